"""A live run's routing becomes a file that replay reads, and its journal gives its commands."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import msgspec
import pytest
from click.testing import CliRunner

from hotset.actors.frames import encode_frame, read_frames
from hotset.cluster.cli import main
from hotset.dashboards.routertrace import read_trace

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.ray

TOKENS = 24
"""Less than a second of work for most machines: what is left to report is told at the end."""


def test_a_recorded_run_can_be_replayed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOTSET_RUNS", str(tmp_path / "runs"))
    out = tmp_path / "routing.npz"
    prompts = ["--prompt", "import os", "--prompt", "def main():"]
    args = ["record", *prompts, "--max-new-tokens", str(TOKENS), "--out", str(out), "--json"]
    result = CliRunner().invoke(main, args)
    assert result.exit_code == 0, result.output
    written = json.loads(result.stdout)
    trace = read_trace(out)
    assert written["sequences"] == 2
    assert (trace.tokens, trace.layers, trace.top_k) == (
        written["tokens"], written["layers"], written["top_k"],
    )  # fmt: skip
    assert trace.tokens >= 2 * TOKENS - 2, "all but the last token of each request were computed"
    replayed = CliRunner().invoke(main, ["replay", "--router", str(out), "--json"])
    assert replayed.exit_code == 0, replayed.output
    assert 0 < json.loads(replayed.stdout)["hit_ratio"] < 1
    (run,) = (tmp_path / "runs").iterdir()
    events = [msgspec.msgpack.decode(frame) for frame in read_frames(run / "journal.msgpack")]
    kinds = {kind for kind, _ in events}
    assert {"StoreJoined", "RouterCounts", "CopyLanded"} <= kinds
    assert {"Concurrency", "Pressure", "LayerTimes"} <= kinds, "the worker reports its load"
    load = [fields for kind, fields in events if kind == "Concurrency"]
    assert sum(one["tokens"] for one in load) == trace.tokens, "the end of the run is in it"
    times = [fields for kind, fields in events if kind == "LayerTimes"]
    assert all(
        0 < one["experts_ns"] <= sum(ns for _, ns in one["times"]) and len(one["times"]) == 6
        for one in times
    )
    check_journal(run)


def check_journal(run: Path) -> None:
    """The recorded run as it is, with torn tails, and with a command that nobody gave."""

    def check() -> tuple[int, dict[str, Any]]:
        result = CliRunner().invoke(main, ["journal", "check", str(run), "--json"])
        return result.exit_code, json.loads(result.stdout)

    code, whole = check()
    assert (code, whole["same"], whole["torn_bytes"]) == (0, True, 0)
    assert whole["compared"] > 0
    for name in ("journal.msgpack", "commands.msgpack"):
        path = run / name
        path.write_bytes(path.read_bytes()[:-3])
        code, torn = check()
        assert (code, torn["same"]) == (0, True)
        assert torn["torn_bytes"] > 0
    log = run / "commands.msgpack"
    first, *others = read_frames(log)
    number, told = msgspec.msgpack.decode(first)
    told[0][1]["epoch"] += 1
    changed = [msgspec.msgpack.encode([number, told]), *others]
    log.write_bytes(b"".join(encode_frame(frame) for frame in changed))
    code, differs = check()
    assert (code, differs["same"], differs["differs_at"]) == (1, False, number)
    said = CliRunner().invoke(main, ["journal", "check", str(run)])
    assert f"the first difference is at event {number}" in said.output
