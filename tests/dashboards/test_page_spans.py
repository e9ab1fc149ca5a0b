"""Trace files that grow: lines are taken once, torn tails wait, figures agree with brute force."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hotset.dashboards.page.spans import Traces
from tests.dashboards.recorded import span, trace_line

if TYPE_CHECKING:
    from pathlib import Path


def transfer(start_ns: int, end_ns: int, **said: str | int) -> dict[str, object]:
    base: dict[str, str | int] = {
        "code": "ok", "source": "cxl-0", "format": "bf16", "reason": "demand",
        "layer": 2, "index": 3, "bytes": 100,
    }  # fmt: skip
    return span("hotset.transfer", start_ns, end_ns, **(base | said))


def wait(start_ns: int, end_ns: int, *, linked: int = 1) -> dict[str, object]:
    return span("hotset.wait", start_ns, end_ns, linked=linked)


@pytest.mark.parametrize("cut", [1, 50, 199])
def test_a_torn_line_waits_for_its_end(tmp_path: Path, cut: int) -> None:
    traces = Traces()
    line = trace_line("worker-0", "hbm", [transfer(10, 20), wait(12, 20)], lost=3)
    path = tmp_path / "trace-n.jsonl"
    path.write_bytes(line + line[:cut])
    assert traces.poll(tmp_path)
    assert (len(traces.flights), len(traces.waits), traces.dropped) == (1, 1, 3)
    assert not traces.poll(tmp_path)
    path.write_bytes(line + line)
    assert traces.poll(tmp_path)
    assert (len(traces.flights), len(traces.waits), traces.dropped) == (2, 2, 6)
    assert traces.damaged == 0
    assert list(traces.emulated) == ["hbm: a byte budget"]


def test_damage_is_counted_and_skipped(tmp_path: Path) -> None:
    good = trace_line("worker-0", "hbm", [transfer(10, 20)])
    (tmp_path / "trace-n.jsonl").write_bytes(b"{nonsense\n" + good)
    traces = Traces()
    traces.poll(tmp_path)
    assert (traces.damaged, len(traces.flights)) == (1, 1)


def test_flying_shows_what_had_begun_and_not_ended() -> None:
    traces = Traces()
    line = trace_line(
        "worker-0", "hbm", [transfer(10, 20, layer=5), transfer(15, 30, code="failed")]
    )
    traces.take(line)
    assert [len(traces.flying(at)) for at in (9, 10, 15, 19, 20, 30)] == [0, 1, 2, 2, 1, 0]
    row = traces.flying(12)[0]
    assert (row["layer"], row["index"], row["nbytes"]) == (5, 3, 100)
    assert traces.texts[row["source"]] == "cxl-0"
    assert traces.moved_bytes(np.array([0, 20, 40])).tolist() == [0, 100]  # a failed one moves none


times = st.integers(0, 60)
waits = st.lists(st.tuples(times, times, st.sampled_from(["a", "b"])), max_size=12)


@given(waits=waits, until=times)
@settings(max_examples=60)
def test_stall_agrees_with_counting_each_nanosecond(
    waits: list[tuple[int, int, str]], until: int
) -> None:
    traces = Traces()
    covered: dict[str, set[int]] = {"a": set(), "b": set()}
    for one, other, store in waits:
        start_ns, end_ns = min(one, other), max(one, other)
        traces.take(trace_line(store, "hbm", [wait(start_ns, end_ns), wait(0, 60, linked=0)]))
        covered[store] |= set(range(start_ns, end_ns))
    assert traces.stall_ns(until_ns=until) == sum(
        sum(at < until for at in found) for found in covered.values()
    )
    edges = np.array([0, 7, 13, 31, 60])
    for store, shares in traces.stalled_by_device(edges).items():
        for left, right, share in zip(edges[:-1], edges[1:], shares, strict=True):
            inside = sum(left <= at < right for at in covered[store])
            assert share == pytest.approx(inside / (right - left))
