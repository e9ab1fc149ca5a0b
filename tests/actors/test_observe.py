"""What a worker tells of its layers, its load and its routing; what a replay is held against."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from hotset.actors import observe
from hotset.actors.observe import LinkSums, Observer
from hotset.policies.types import Concurrency, Event, LayerTimes, Pressure

LAYERS = (1, 2, 5)


class Path:
    """A token path that returns what it gets."""

    def __init__(self) -> None:
        self.context = SimpleNamespace(request=7, stall_ns=0)

    def run(self, _layer: int, _module: Any, hidden: Any, *_more: Any) -> Any:
        return hidden


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    now = SimpleNamespace(ns=10**12)
    fake = SimpleNamespace(monotonic_ns=lambda: now.ns, time_ns=lambda: now.ns)
    monkeypatch.setattr(observe, "time", fake)
    return now


def step(observer: Observer, path: Path, clock: SimpleNamespace, *, rows: int, seed: int) -> Any:
    rng = np.random.default_rng(seed)
    chosen = np.array([[rng.permutation(9)[:2] for _ in LAYERS] for _ in range(rows)])
    for row, layer in enumerate(LAYERS):
        hidden = torch.zeros(rows, 4)
        index = torch.from_numpy(chosen[:, row])
        assert observer.run(layer, None, hidden, index, None) is hidden  # type: ignore[arg-type] # unread
        clock.ns += 100 * (row + 1)
        path.context.stall_ns += 10
    return chosen


def by_kind(events: list[Event]) -> dict[str, Any]:
    return {type(event).__name__: event for event in events}


def test_layer_times_leave_stalls_and_prefills_out(clock: SimpleNamespace) -> None:
    path = Path()
    observer = Observer(path, layers=LAYERS)  # type: ignore[arg-type] # what is needed of a path
    step(observer, path, clock, rows=6, seed=0)
    for seed in range(3):
        step(observer, path, clock, rows=1, seed=seed)
    told = {"requests": 2, "used_bytes": 99, "links": {"h0": LinkSums(50, 40, 1000)}}
    assert observer.reports("w0", **told) == []
    clock.ns += observe.REPORT_NS
    found = by_kind(observer.reports("w0", **told))
    assert found["LayerTimes"] == LayerTimes(
        now_ns=clock.ns, store="w0", steps=3, stall_ns=26, times=((1, 90), (2, 190), (5, 290)),
    )  # fmt: skip
    assert found["Concurrency"] == Concurrency(
        now_ns=clock.ns, store="w0", requests=2, steps=4, tokens=9
    )
    pressure = found["Pressure"]
    assert isinstance(pressure, Pressure)
    assert (pressure.used_bytes, pressure.links[0].demand_ns) == (99, 40)
    clock.ns += observe.REPORT_NS
    assert observer.reports("w0", **told) == [], "at rest there is nothing to tell"
    told["links"] = {"h0": LinkSums(10**12, 40, 2000)}
    (_, again) = observer.reports("w0", **told)
    assert isinstance(again, Pressure)
    assert again.links[0].busy_ns == again.links[0].span_ns
    assert again.links[0].nbytes == 1000
    step(observer, path, clock, rows=1, seed=9)
    assert observer.reports("w0", **told) == []
    leaving = by_kind(observer.reports("w0", **told, last=True))
    assert leaving["Concurrency"].tokens == 1
    assert observer.reports("w0", **told, last=True) == []


def test_recordings_hold_every_token_in_order(clock: SimpleNamespace) -> None:
    path = Path()
    observer = Observer(path, layers=LAYERS, record=True)  # type: ignore[arg-type] # as above
    parts = [step(observer, path, clock, rows=rows, seed=rows) for rows in (5, 1, 1)]
    path.context.request = 8
    other = step(observer, path, clock, rows=2, seed=9)
    observer.run(1, None, torch.zeros(1, 4), torch.tensor([[3, 4]]), None)  # type: ignore[arg-type] # a pass that has only begun
    found = observer.recording()
    assert not found.cut
    for routed, expected in zip(found.requests, (np.concatenate(parts), other), strict=True):
        layers = [np.frombuffer(layer, "<u2").reshape(-1, 2) for layer in routed.layers]
        assert np.array_equal(np.stack(layers, axis=1), expected)


def test_a_recording_stops_at_its_limit_after_a_whole_pass(
    clock: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(observe, "MOST_ROWS", 4)
    path = Path()
    observer = Observer(path, layers=LAYERS, record=True)  # type: ignore[arg-type] # as above
    for seed in range(4):
        step(observer, path, clock, rows=1, seed=seed)
    found = observer.recording()
    assert found.cut
    assert {len(layer) for layer in found.requests[0].layers} == {2 * 2 * 2}
