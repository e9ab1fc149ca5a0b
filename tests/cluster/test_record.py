"""A live run's routing becomes a file that replay reads, and its journal gives its commands."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import msgspec
import pytest
from click.testing import CliRunner

from hotset.actors.commandlog import check_replay
from hotset.actors.control import ControlSpec, make_brain
from hotset.actors.frames import read_frames
from hotset.cluster.cli import main
from hotset.dashboards.routertrace import read_trace

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.ray


def test_a_recorded_run_can_be_replayed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOTSET_RUNS", str(tmp_path / "runs"))
    out = tmp_path / "routing.npz"
    prompts = ["--prompt", "import os", "--prompt", "def main():"]
    args = ["record", *prompts, "--max-new-tokens", "24", "--out", str(out), "--json"]
    result = CliRunner().invoke(main, args)
    assert result.exit_code == 0, result.output
    written = json.loads(result.stdout)
    trace = read_trace(out)
    assert written["sequences"] == 2
    assert (trace.tokens, trace.layers, trace.top_k) == (
        written["tokens"], written["layers"], written["top_k"],
    )  # fmt: skip
    assert trace.tokens >= 2 * 24 - 2, "all but the last token of each request were computed"
    replayed = CliRunner().invoke(main, ["replay", "--router", str(out), "--json"])
    assert replayed.exit_code == 0, replayed.output
    assert 0 < json.loads(replayed.stdout)["hit_ratio"] < 1
    (run,) = (tmp_path / "runs").iterdir()
    kinds = {msgspec.msgpack.decode(frame)[0] for frame in read_frames(run / "journal.msgpack")}
    assert {"StoreJoined", "RouterCounts", "CopyLanded"} <= kinds
    spec = msgspec.json.decode((run / "run.json").read_bytes(), type=ControlSpec)
    found = check_replay(run, lambda: make_brain(spec))
    assert found.differs_at is None
    assert found.compared > 0
