"""Every figure of the trace analysis against a naive count over the same rows."""

from __future__ import annotations

from collections import Counter
from statistics import median
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hotset.actors.kinds import ControlKind
from hotset.dashboards.critical import walk
from hotset.dashboards.trace import analyze, load
from hotset.dashboards.trace_stalls import costliest_stalls
from hotset.transport.records import Code, Kind
from tests.dashboards.rows import NAMES, PREFETCH, T0, Event, some_events, write_run

if TYPE_CHECKING:
    from pathlib import Path

    Step = tuple[str, int, int, int]  # kind, start, end, number of the event

KINDS = [Kind.STEP, Kind.LAYER, Kind.TRANSFER, Kind.TRANSFER, Kind.WAIT, Kind.WAIT, Kind.DISPATCH,
         ControlKind.USE]  # fmt: skip
events = some_events(KINDS, codes=[Code.OK, Code.OK, Code.OK, Code.FAILED], most=20)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("figures")


def written(folder: Path, found: list[Event], **batch: Any) -> Path:
    (folder / "trace-n0.jsonl").unlink(missing_ok=True)
    return write_run(folder, found, **batch)


def transfers(found: list[Event], *, used: bool | None = None) -> dict[int, Event]:
    """Transfers by number; `used`: only those that compute read, or only those dropped unread."""
    read = {one.waits_for for one in found if one.kind == Kind.WAIT} | {
        one.waits_for for one in found if one.kind == ControlKind.USE and one.used
    }
    unread = {one.waits_for for one in found if one.kind == ControlKind.USE and not one.used}
    every = {n: one for n, one in enumerate(found, 1) if one.kind == Kind.TRANSFER}
    of_use = {n: one for n, one in every.items() if n in read or one.used}
    if used is None:
        return every
    return of_use if used else {n: every[n] for n in every.keys() & unread - of_use.keys()}


def times(found: list[Event]) -> set[int]:
    return {at for one in found for at in range(one.start, one.start + one.length)}


def ratio(part: int, whole: int) -> float | None:
    return part / whole if whole else None


@given(events)
@settings(max_examples=60)
def test_overlap_and_useful_ratios_of_devices_and_total(folder: Path, found: list[Event]) -> None:
    shown = analyze(written(folder, found))
    used = transfers(found, used=True)
    knows = any(one.kind == ControlKind.USE for one in found) or any(
        one.used for one in transfers(found).values()
    )
    sums: Counter[str] = Counter()
    for device, figures in shown.devices.items():
        mine = [one for one in found if one.store == device]
        waiting = times([one for one in mine if one.kind == Kind.WAIT and one.waits_for])
        working = times([one for one in mine if one.kind in (Kind.STEP, Kind.LAYER)]) - waiting
        moving = times(
            [e for e in transfers(found).values() if device in (e.store, NAMES[e.source])]
        )
        assert figures.overlap_ratio == ratio(len(working & moving), len(moving))
        came = {
            n: one
            for n, one in transfers(found).items()
            if one.store == device and one.code == Code.OK
        }
        moved = sum(one.nbytes for one in came.values())
        read = sum(one.nbytes for n, one in came.items() if n in used) if knows else 0
        assert (figures.moved_bytes, figures.used_bytes) == (moved, read)
        assert figures.useful_ratio == (ratio(read, moved) if knows else None)
        assert figures.stall_ns + figures.compute_ns + figures.idle_ns == figures.window_ns
        sums += Counter(
            moved=moved, read=read, hidden=len(working & moving), moving=len(moving),
            stall=len(waiting),
        )  # fmt: skip
    total = shown.total
    assert total.stall_ns == sums["stall"]
    assert total.overlap_ratio == ratio(sums["hidden"], sums["moving"])
    assert (total.moved_bytes, total.used_bytes) == (sums["moved"], sums["read"])
    if any(one.useful_ratio is not None for one in shown.devices.values()):
        assert total.useful_ratio == ratio(sums["read"], sums["moved"])
    else:
        assert total.useful_ratio is None


@given(events)
@settings(max_examples=60)
def test_what_prefetching_was_worth(folder: Path, found: list[Event]) -> None:
    shown = analyze(written(folder, found)).prefetch
    asked = {n: one for n, one in transfers(found).items() if one.reason == PREFETCH}
    ended = {n: one for n, one in asked.items() if one.code == Code.OK}
    used, wasted = (
        ended.keys() & transfers(found, used=True),
        ended.keys() & transfers(found, used=False),
    )
    waits = [one for one in found if one.kind == Kind.WAIT and one.waits_for in asked]
    late = {one.waits_for for one in waits}
    slack = [
        one.length
        for one in found
        if one.kind == ControlKind.USE and one.used and one.waits_for in ended.keys() - late
    ]
    lengths = [one.length for one in waits]
    assert (shown.transfers, shown.failed) == (len(ended), len(asked) - len(ended))
    assert (shown.used, shown.wasted) == (len(used), len(wasted))
    assert shown.unread == len(ended) - len(used) - len(wasted)
    assert shown.bytes == sum(one.nbytes for one in ended.values())
    assert shown.wasted_bytes == sum(ended[n].nbytes for n in wasted)
    assert shown.precision_ratio == ratio(len(used), len(used) + len(wasted)) or (
        shown.precision_ratio is None
        and not any(one.kind == ControlKind.USE or one.used for one in found)
    )
    assert (shown.late, shown.late_ns) == (len(late), sum(lengths))
    assert shown.late_max_ns == max(lengths, default=0)
    assert shown.late_p50_ns == int(median(lengths or [0]))
    assert shown.slack_p50_ns == int(median(slack or [0]))


@given(events, st.sampled_from([0, 10**9, 20 * 10**9]))
@settings(max_examples=60)
def test_the_use_of_each_link_against_its_bound(
    folder: Path, found: list[Event], profile: int
) -> None:
    shown = analyze(written(folder, found, link_bytes_per_s=profile))
    window = max(one.start + one.length for one in found) - min(one.start for one in found)
    assert shown.window_ns == window
    came = [one for one in transfers(found).values() if one.code == Code.OK]
    assert set(shown.links) == {f"{NAMES[one.source]}->{one.store}" for one in came}
    written_of = {one.store for one in found}  # of others there is no line that tells a profile
    for name, link in shown.links.items():
        source, store = name.split("->")
        mine = [one for one in came if (NAMES[one.source], one.store) == (source, store)]
        nbytes, busy = sum(one.nbytes for one in mine), len(times(mine))
        rate = 1e9 * nbytes / busy if busy else 0.0
        wires = [1e9 * one.nbytes / one.phases[1] for one in mine if one.phases[1]]
        bound = float(profile)
        if not profile or source not in written_of:
            bound = max([rate, *([float(np.quantile(wires, 0.95))] if wires else [])])
        assert (link.bytes, link.busy_ns, link.transfers) == (nbytes, busy, len(mine))
        assert link.queue_ns == sum(one.phases[0] for one in mine)
        assert link.wire_ns == sum(one.phases[1] for one in mine)
        assert (link.bytes_per_s, link.bound_bytes_per_s) == pytest.approx((rate, bound))
        assert link.rate_ratio == pytest.approx(rate / bound if bound else 0.0)
        used = 1e9 * nbytes / (bound * window) if bound and window else 0.0
        assert link.use_ratio == pytest.approx(used)


beside = st.lists(st.tuples(st.integers(0, 2500), st.integers(0, 300)), max_size=12)


@given(
    st.lists(st.tuples(st.integers(40, 100), st.sampled_from([1, 1, 1, 7])), min_size=8,
             max_size=24),
    beside,
    beside,
)  # fmt: skip
@settings(max_examples=60)
def test_interference_is_a_ratio_of_medians(
    folder: Path,
    sizes: list[tuple[int, int]],
    moves: list[tuple[int, int]],
    waits: list[tuple[int, int]],
) -> None:
    steps = [
        Event("worker-0", Kind.STEP, 100 * n, length, index=tokens)
        for n, (length, tokens) in enumerate(sizes)
    ]
    moved = [Event("worker-0", Kind.TRANSFER, at, length // 2, source=2) for at, length in moves]
    waited = [Event("worker-0", Kind.WAIT, at, length // 9, waits_for=1) for at, length in waits]
    shown = analyze(written(folder, [*steps, *moved, *waited])).devices["worker-0"]
    count = Counter(one.index for one in steps)
    usual = min(count, key=lambda tokens: (-count[tokens], tokens))
    moving, waiting = times(moved), times(waited)
    loud, calm = [], []
    for one in steps:
        working = times([one]) - waiting
        if one.index == usual and working:
            share = len(working & moving) / len(working)
            loud += [len(working)] if share >= 0.5 else []
            calm += [len(working)] if share <= 0.1 else []
    if len(steps) >= 10 and min(len(loud), len(calm)) >= 5:
        assert shown.interference_ratio == pytest.approx(median(loud) / median(calm) - 1)
    else:
        assert shown.interference_ratio is None


@given(events, st.integers(1, 5))
@settings(max_examples=40)
def test_the_costliest_stalls_are_the_longest_waits(
    folder: Path, found: list[Event], most: int
) -> None:
    view = load(written(folder, found))
    zero = min(one.start for one in found)
    waits = sorted(
        (-one.length, one.start - zero, one.store) for one in found if one.kind == Kind.WAIT
    )
    shown = [(-one.stall_ns, one.at_ns, one.device) for one in costliest_stalls(view, most=most)]
    assert [one[:2] for one in shown] == [one[:2] for one in waits[:most]]
    assert not Counter(shown) - Counter(waits)


@given(events)
@settings(max_examples=150)
def test_the_critical_path_is_that_of_a_naive_walk(folder: Path, found: list[Event]) -> None:
    view = load(written(folder, found))
    numbers = view.table["span_id"]
    for device in view.devices:
        path = [
            (one.kind, one.start_ns - T0, one.end_ns - T0,
             int(numbers[one.row]) if one.row >= 0 else 0)
            for one in walk(view, device)
        ]  # fmt: skip
        assert path == NaiveWalk(found, device).path


class NaiveWalk:
    """The rules of `critical` spelled over lists of events, one look at all of them a step."""

    def __init__(self, found: list[Event], device: str) -> None:
        self.found = dict(enumerate(found, 1))
        mine = {n: one for n, one in self.found.items() if one.store == device}
        self.steps = [n for n, one in mine.items() if one.kind == Kind.STEP]
        self.waits = [n for n, one in mine.items() if one.kind == Kind.WAIT and one.waits_for]
        self.path: list[Step] = []
        if self.steps:
            self.floor = min(self.found[n].start for n in self.steps)
            step = max(self.steps, key=lambda n: (self.end(n), n))
            self.back(step, self.end(step))

    def end(self, number: int) -> int:
        return self.found[number].start + self.found[number].length

    def add(self, kind: str, start: int, end: int, number: int) -> int:
        if end > start:
            self.path.append((kind, start, end, number))
        return min(start, end)

    def back(self, step: int, at: int) -> None:
        while at > self.floor:
            begun = self.found[step].start
            held = [
                n
                for n in self.waits
                if self.found[n].parent == step
                and begun <= self.found[n].start < at
                and self.found[n].length
            ]
            if not held:
                step, at = self.before(step, self.add("compute", begun, at, step))
                continue
            wait = max(held, key=lambda n: (self.found[n].start, n))
            if self.end(wait) > at:
                at = self.add("wait", self.found[wait].start, at, wait)
                continue
            at = self.add("compute", self.end(wait), at, step)
            step, at = self.through(wait, at, step)

    def through(self, wait: int, at: int, step: int) -> tuple[int, int]:
        number = self.found[wait].waits_for
        target = self.found.get(number)
        if target is None or max(self.floor, target.start) >= at:
            at = self.add("wait", max(self.floor, self.found[wait].start), at, wait)
            return self.during(0, at, step)
        asked = max(self.floor, target.start)
        if target.kind != Kind.TRANSFER:
            return self.during(target.parent, self.add("peer", asked, at, number), step)
        over, queue, (wire, settle) = self.end(number), target.phases[0], target.phases[1:]
        marks = [over, *(min(over, target.start + sum(part)) for part in (
            (queue, wire, settle), (queue, wire), (queue,)))]  # fmt: skip
        for kind, mark in zip(("wake", "other", "check", "wire"), marks, strict=True):
            at = self.add(kind, max(asked, mark), at, number)
        return self.during(target.parent, self.add("queue", asked, at, number), step)

    def during(self, parent: int, at: int, step: int) -> tuple[int, int]:
        begun = [n for n in self.steps if self.found[n].start < at]
        latest = max(begun, key=lambda n: (self.found[n].start, self.end(n), n), default=0)
        for one in (parent, step, latest):
            if one in self.steps and self.found[one].start < at <= self.end(one):
                return one, at
        return self.before(step, at)

    def before(self, step: int, at: int) -> tuple[int, int]:
        if at <= self.floor:
            return step, at
        ended = [n for n in self.steps if self.end(n) <= at and self.found[n].start < at]
        request = self.found[step].request
        same = [n for n in ended if request and self.found[n].request == request]
        if not ended:
            return step, self.add("idle", self.floor, at, 0)
        one = max(same or ended, key=lambda n: (self.end(n), n))
        return one, self.add("idle", self.end(one), at, 0)
