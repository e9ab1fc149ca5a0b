"""The critical path of a run: what the end of the last step depended on, back to the first step.

Walks back over `waited_on` links as Yang and Miller do over messages ("Critical path analysis for
the execution of parallel and distributed programs", ICDCS 1988). At the end of a step: if it last
waited for something, the path goes through that wait to what it waited for, and from the moment
when that was asked for on in the step that ran then; a step that waited for nothing (any more)
goes on in the step before it of the same request, else in the last step that had ended.

Must not know how anything was decided. Invariant: segments touch, so that they add up to the time
between the path's ends, to the nanosecond.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from hotset.dashboards.trace_view import Index, View

KINDS = ("compute", "queue", "wire", "check", "peer", "other", "wake", "wait", "idle")
"""`check`: checksum and making readable; `peer`: a dispatch; `other`: between the phases of a
transfer; `wake`: from its end to that of the wait; `wait`: for what is not in the trace."""


class Segment(NamedTuple):
    """A part of the path; `row` is the span in the table that it belongs to, -1 for idle time."""

    kind: str
    start_ns: int
    end_ns: int
    row: int


@dataclass(frozen=True, slots=True, kw_only=True)
class CriticalPath:
    """The path that ends with the last step of the run, on `device`.

    `by_kind` has every kind of KINDS and adds up to `length_ns`; `by_source` is the part that
    transfers and dispatches from each source have in it; `blocks` are the costliest of them.
    """

    device: str
    length_ns: int
    steps: int
    waits: int
    by_kind: dict[str, int]
    by_source: dict[str, int]
    blocks: dict[str, int]


def critical_path(view: View, *, most_blocks: int = 10) -> CriticalPath | None:
    """Sums over the path of the device whose step ends last; None without a step."""
    steps = np.flatnonzero(view.step)
    if not len(steps):
        return None
    last = int(steps[view.table["end_ns"][steps].argmax()])
    device = view.name(int(view.table["store"][last]))
    path = walk(view, device)
    by_kind = dict.fromkeys(KINDS, 0)
    spent: dict[int, int] = {}
    for kind, start_ns, end_ns, row in path:
        by_kind[kind] += end_ns - start_ns
        spent[row] = spent.get(row, 0) + end_ns - start_ns
    spent.pop(-1, None)
    own = [row for row in spent if view.step[row]]
    by_source: dict[str, int] = {}
    blocks: dict[str, int] = {}
    for row in spent.keys() - set(own):
        source = view.name(int(view.table["source"][row])) or "unknown"
        by_source[source] = by_source.get(source, 0) + spent[row]
        block = view.block(row)
        if block:
            blocks[block] = blocks.get(block, 0) + spent[row]
    costliest = sorted(blocks.items(), key=lambda one: (-one[1], one[0]))[:most_blocks]
    return CriticalPath(
        device=device,
        length_ns=path[0].end_ns - path[-1].start_ns if path else 0,
        steps=len(own),
        waits=len(spent) - len(own),
        by_kind=by_kind,
        by_source=dict(sorted(by_source.items(), key=lambda one: (-one[1], one[0]))),
        blocks=dict(costliest),
    )


def walk(view: View, device: str) -> list[Segment]:
    """The device's path from its last step back to its first; latest segment first."""
    return _Walker(view, device).walk()


class _Rows(NamedTuple):
    """Rows of the table in the order of a time, and that time of each."""

    rows: list[int]
    times_ns: list[int]


class _Walker:
    """One walk. Columns are lists: single look-ups in them are ten times faster than in arrays."""

    def __init__(self, view: View, device: str) -> None:
        table = view.table
        mine = view.of(device)
        steps, waits = mine[view.step[mine]], mine[view.linked[mine]]
        begun, ended = table["start_ns"], table["end_ns"]
        self._start: list[int] = begun.tolist()
        self._end: list[int] = ended.tolist()
        self._parent: list[int] = table["parent"].tolist()
        self._transfer: list[bool] = view.transfer.tolist()
        self._queue: list[int] = table["queue_ns"].tolist()
        self._wire: list[int] = table["wire_ns"].tolist()
        self._settle: list[int] = table["settle_ns"].tolist()
        steps = steps[np.argsort(ended[steps], kind="stable")]
        by_start = steps[np.argsort(begun[steps], kind="stable")]
        waits = waits[np.argsort(begun[waits], kind="stable")]
        self._steps = _Rows(steps.tolist(), ended[steps].tolist())
        self._by_start = _Rows(by_start.tolist(), begun[by_start].tolist())
        self._request = dict(zip(steps.tolist(), table["request"][steps].tolist(), strict=True))
        self._by_request = _grouped(table["request"][steps], steps, ended)
        self._waits = _grouped(table["parent"][waits], waits, begun)
        ids = table["span_id"][steps].tolist()
        self._step_of = dict(zip(ids, steps.tolist(), strict=True))
        self._id_of = dict(zip(steps.tolist(), ids, strict=True))
        targets = view.find(table["link"][waits])
        self._target = dict(zip(waits.tolist(), targets.tolist(), strict=True))
        self._path: list[Segment] = []

    def walk(self) -> list[Segment]:
        if not self._steps.rows:
            return []
        step, at_ns = self._steps.rows[-1], self._steps.times_ns[-1]
        floor_ns = self._by_start.times_ns[0]
        while at_ns > floor_ns:
            wait = self._wait_before(step, at_ns)
            if wait < 0:
                at_ns = self._add("compute", self._start[step], at_ns, step)
                step, at_ns = self._step_before(step, at_ns, floor_ns)
                continue
            if self._end[wait] > at_ns:  # it was asked for by another thread meanwhile
                at_ns = self._add("wait", self._start[wait], at_ns, wait)
                continue
            at_ns = self._add("compute", self._end[wait], at_ns, step)
            at_ns, target = self._through(wait, at_ns, floor_ns)
            step, at_ns = self._step_at(target, at_ns, step, floor_ns)
        return self._path

    def _add(self, kind: str, start_ns: int, end_ns: int, row: int) -> int:
        if end_ns > start_ns:
            self._path.append(Segment(kind, start_ns, end_ns, row))
            return start_ns
        return end_ns

    def _wait_before(self, step: int, at_ns: int) -> int:
        """The step's last wait that had begun by then; it may last on."""
        waits = self._waits.get(self._id_of[step])
        if waits is None:
            return -1
        for place in range(bisect_left(waits.times_ns, at_ns) - 1, -1, -1):
            wait = waits.rows[place]
            if self._start[wait] < self._start[step]:
                return -1
            if self._end[wait] > self._start[wait]:  # an empty wait held nothing up
                return wait
        return -1

    def _through(self, wait: int, at_ns: int, floor_ns: int) -> tuple[int, int]:
        """Follow a wait to what it waited for; returns when that was asked for, and its row."""
        target = self._target[wait]
        asked_ns = max(floor_ns, self._start[target])
        if target < 0 or asked_ns >= at_ns:
            return self._add("wait", max(floor_ns, self._start[wait]), at_ns, wait), -1
        if not self._transfer[target]:
            return self._add("peer", asked_ns, at_ns, target), target
        over_ns = self._end[target]
        queued_ns = self._start[target] + self._queue[target]
        wired_ns = queued_ns + self._wire[target]
        settled_ns = wired_ns + self._settle[target]
        for kind, begin_ns in (
            ("wake", over_ns),
            ("other", min(settled_ns, over_ns)),
            ("check", min(wired_ns, over_ns)),
            ("wire", min(queued_ns, over_ns)),
            ("queue", asked_ns),
        ):
            at_ns = self._add(kind, max(asked_ns, begin_ns), at_ns, target)
        return at_ns, target

    def _step_at(self, target: int, at_ns: int, step: int, floor_ns: int) -> tuple[int, int]:
        """The step in which something was asked for (its parent, when that ran then), and when."""
        parent = self._parent[target] if target >= 0 else 0
        covering = bisect_left(self._by_start.times_ns, at_ns) - 1
        latest = self._by_start.rows[covering] if covering >= 0 else -1
        for known in (self._step_of.get(parent, -1), step, latest):
            if known >= 0 and self._start[known] < at_ns <= self._end[known]:
                return known, at_ns
        return self._step_before(step, at_ns, floor_ns)

    def _step_before(self, step: int, at_ns: int, floor_ns: int) -> tuple[int, int]:
        """The step that had to end before, and when; the time in between is idle."""
        if at_ns <= floor_ns:
            return step, at_ns
        request = self._request[step]
        found = self._last_ended(self._by_request[request], at_ns) if request else -1
        if found < 0:
            found = self._last_ended(self._steps, at_ns)
        if found < 0:
            return step, self._add("idle", floor_ns, at_ns, -1)
        return found, self._add("idle", self._end[found], at_ns, -1)

    def _last_ended(self, steps: _Rows, at_ns: int) -> int:
        for place in range(bisect_right(steps.times_ns, at_ns) - 1, -1, -1):
            if self._start[steps.rows[place]] < at_ns:  # else an empty step
                return steps.rows[place]
        return -1


def _grouped(
    keys: NDArray[np.uint64], index: Index, times_ns: NDArray[np.int64]
) -> dict[int, _Rows]:
    """Members of `index` by key; each list keeps its order."""
    order = np.argsort(keys, kind="stable")
    found, first = np.unique(keys[order], return_index=True)
    rows, times = index[order].tolist(), times_ns[index[order]].tolist()
    begins = first.tolist()
    return {
        key: _Rows(rows[begin:end], times[begin:end])
        for key, begin, end in zip(found.tolist(), begins, [*begins[1:], None], strict=False)
    }
