"""`hotset top` on recorded runs: figures, rates, width, alarms."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import pytest
from click.testing import CliRunner

from hotset.cluster.cli import main
from hotset.dashboards.page.folder import FolderSource
from hotset.dashboards.top import render
from tests.dashboards.recorded import SECOND_NS, START_NS, span, trace_line, write_run

if TYPE_CHECKING:
    from pathlib import Path

    from hotset.dashboards.page.moment import Moment


def moments(folder: Path, *seconds: int) -> list[Moment]:
    source = FolderSource(folder)
    source.poll()
    return [
        source.run.moment(at_ns=START_NS + one * SECOND_NS, now_ns=0, live=False)[0]
        for one in seconds
    ]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    run = write_run(tmp_path / "small")
    waited = span("hotset.wait", START_NS + 8 * SECOND_NS, START_NS + 9 * SECOND_NS, linked=1)
    (run / "trace-n.jsonl").write_bytes(trace_line("worker-0", "hbm", [waited]))
    return run


def test_figures_and_rates(folder: Path) -> None:
    before, now = moments(folder, 7, 9)
    text = render(now, run="small", before=before)
    assert "run        small (at +9.00 s), epoch 3" in text
    assert "1.00 s so far, 50.0 % of the time now" in text
    assert "54 routed, 9.0/s" in text
    for store in ("cxl-0", "worker-0", "worker-1"):
        assert store in text
    assert "EMULATED" in text
    assert "- of the time now" in render(now, run="small")


@pytest.mark.parametrize("width", [40, 80, 120])
def test_no_line_is_wider_than_the_terminal(folder: Path, width: int) -> None:
    text = render(moments(folder, 9)[0], run="small", width=width)
    assert max(len(line) for line in text.splitlines()) <= width


def test_alarms_come_first(folder: Path) -> None:
    (now,) = moments(folder, 9)
    text = render(dataclasses.replace(now, alarms=("nothing moves",)), run="small")
    assert text.startswith("ALERT             nothing moves\n")


def test_the_command_shows_a_recorded_run_once(folder: Path) -> None:
    result = CliRunner().invoke(main, ["top", str(folder)])
    assert result.exit_code == 0, result.output
    assert result.output.count("run        small") == 1
    assert "\x1b" not in result.output


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path) -> None:
    result = CliRunner().invoke(main, ["top", str(tmp_path)])
    assert result.exit_code == 2
    assert "journal.msgpack" in result.output
