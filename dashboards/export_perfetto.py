"""A run for trace viewers: Chrome's JSON trace format, as Perfetto and `chrome://tracing` read it.

A store is a process; its steps, waits, layers, dispatches, transfers by source and the
controller's decisions are threads, with as many lanes as spans overlap, because slices of one
thread must nest. A flow arrow runs from a transfer (or dispatch) to each wait for it. Times are
microseconds with three decimals from the run's first span, so that no nanosecond is lost. Decides
only how things are drawn.

Source of the format: "Trace Event Format" (Chromium project). Invariants: slices of one thread are
disjoint; each flow has one start and one end, inside a slice each.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from hotset.actors import names
from hotset.dashboards.lanes import lanes

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from hotset.dashboards.trace_view import Index, View

_TRACKS = (
    (names.SPAN_STEP.name, "steps"),
    (names.SPAN_WAIT.name, "waits"),
    (names.SPAN_LAYER.name, "layers"),
    (names.SPAN_DISPATCH.name, "dispatches"),
    (names.SPAN_PLAN.name, "plans"),
    (names.SPAN_VETO.name, "vetoes"),
    (names.SPAN_SCALE.name, "scale"),
)
_LANES_A_TRACK = 1000
"""Thread ids of a track begin at a multiple of this."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Track:
    """Spans of one kind of one store; `lane[i]` is that of `rows[i]`."""

    store: str
    title: str
    pid: int
    tid: int
    rows: Index
    lane: Index


def tracks(view: View) -> list[Track]:
    """Every track that has a span, stores and tracks in a stable order."""
    found: list[Track] = []
    stores = [view.name(int(one)) for one in np.unique(view.table["store"])]
    for pid, store in enumerate(sorted(stores, key=lambda one: (one not in view.devices, one)), 1):
        mine = view.of(store)
        parts = [(title, mine[view.spans.where("name", name)[mine]]) for name, title in _TRACKS]
        moving = mine[view.transfer[mine]]
        for number in np.unique(view.table["source"][moving]).tolist():
            of_source = moving[view.table["source"][moving] == number]
            parts.append((f"from {view.name(number) or 'unknown'}", of_source))
        for at, (title, rows) in enumerate(parts):
            if len(rows):
                lane = lanes(view.table["start_ns"][rows], view.table["end_ns"][rows])
                found.append(
                    Track(
                        store=store, title=title, pid=pid, tid=1 + at * _LANES_A_TRACK, rows=rows,
                        lane=lane,
                    )
                )  # fmt: skip
    return found


def write_perfetto(view: View, path: Path) -> int:
    """Write the trace; returns the number of slices."""
    count = 0
    with path.open("w", encoding="utf-8") as file:
        file.write('{"displayTimeUnit":"ns","otherData":')
        about = {"run": ", ".join(view.spans.runs), "emulated": view.spans.emulated}
        file.write(f'{json.dumps(about)},"traceEvents":[\n')
        first = True
        for slices, text in _events(view):
            file.write(text if first else f",\n{text}")
            first = False
            count += slices
        file.write("\n]}\n")
    return count


def _events(view: View) -> Iterator[tuple[int, str]]:
    found = tracks(view)
    for pid, store in dict.fromkeys((track.pid, track.store) for track in found):
        tier = view.spans.tiers.get(store, "")
        label = json.dumps(f"{store} ({tier})" if tier else store)
        yield 0, _meta("process_name", pid=pid, tid=0, args=f'"name":{label}')
        yield 0, _meta("process_sort_index", pid=pid, tid=0, args=f'"sort_index":{pid}')
    place: dict[int, tuple[int, int]] = {}
    for track in found:
        for lane in range(int(track.lane.max()) + 1):
            title = json.dumps(track.title if lane == 0 else f"{track.title} +{lane}")
            tid = track.tid + lane
            yield 0, _meta("thread_name", pid=track.pid, tid=tid, args=f'"name":{title}')
            yield 0, _meta("thread_sort_index", pid=track.pid, tid=tid, args=f'"sort_index":{tid}')
        for row, lane in zip(track.rows.tolist(), track.lane.tolist(), strict=True):
            place[row] = (track.pid, track.tid + lane)
    yield from _slices(view, place)
    yield from _flows(view, place)


def _slices(view: View, place: dict[int, tuple[int, int]]) -> Iterator[tuple[int, str]]:
    table = view.table
    zero_ns = int(table["start_ns"].min())
    short = {number: json.dumps(text.removeprefix("hotset.")) for number, text in
             enumerate(view.spans.names)}  # fmt: skip
    texts = {number: json.dumps(text) for number, text in enumerate(view.spans.names)}
    wanted = ("name", "start_ns", "end_ns", "source", "reason", "code", "layer", "index", "nbytes",
              "tokens", "queue_ns", "wire_ns", "settle_ns", "span_id")  # fmt: skip
    rows = zip(*(table[column].tolist() for column in wanted), strict=True)
    for at, (name, start, end, source, reason, code, layer, index, *rest) in enumerate(rows):
        where = place.get(at)
        if where is None:
            continue  # uses: drawn as part of what they are about
        nbytes, tokens, queue, wire, settle, span_id = rest
        args = f'"id":"{span_id:016x}"'
        if layer >= 0:
            args += f',"block":"{layer}.{index}"' if index >= 0 else f',"layer":{layer}'
        for key, number in (("source", source), ("reason", reason), ("code", code)):
            args += f',"{key}":{texts[number]}' if number >= 0 else ""
        for key, value in (
            ("bytes", nbytes), ("tokens", tokens), ("queue_ns", queue), ("wire_ns", wire),
            ("settle_ns", settle),
        ):  # fmt: skip
            args += f',"{key}":{value}' if value else ""
        yield (
            1,
            (
                f'{{"ph":"X","pid":{where[0]},"tid":{where[1]},"name":{short[name]},'
                f'"ts":{_us(start - zero_ns)},"dur":{_us(end - start)},"args":{{{args}}}}}'
            ),
        )


def _flows(view: View, place: dict[int, tuple[int, int]]) -> Iterator[tuple[int, str]]:
    """Arrows from what was waited for to the wait, bound to the enclosing slices."""
    table = view.table
    zero_ns = int(table["start_ns"].min())
    waits = np.flatnonzero(view.linked)
    targets = view.find(table["link"][waits])
    for wait, target in zip(waits.tolist(), targets.tolist(), strict=True):
        if target not in place or wait not in place:
            continue
        at_ns = max(int(table["start_ns"][target]), int(table["end_ns"][target]) - 1)
        for phase, row, moment_ns in (("s", target, at_ns), ("f", wait, table["end_ns"][wait] - 1)):
            pid, tid = place[row]
            moment_ns = max(int(moment_ns), int(table["start_ns"][row]))  # noqa: PLW2901 - clamped to its slice
            bound = ',"bp":"e"' if phase == "f" else ""
            yield (
                0,
                (
                    f'{{"ph":"{phase}","id":{wait + 1},"pid":{pid},"tid":{tid},"name":"waited_on",'
                    f'"cat":"waited_on","ts":{_us(moment_ns - zero_ns)}{bound}}}'
                ),
            )


def _meta(name: str, *, pid: int, tid: int, args: str) -> str:
    return f'{{"ph":"M","pid":{pid},"tid":{tid},"name":"{name}","args":{{{args}}}}}'


def _us(ns: int) -> str:
    return f"{ns // 1000}.{ns % 1000:03d}"
