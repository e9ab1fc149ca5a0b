"""`hotset trace analyze RUN`: how much of the moving was hidden behind compute, and what waited.

Reads recorded files only; must not know how anything was decided. All times are int nanoseconds.

For a device D (a store that computes: tier HBM, or one with steps) over its spans:
- S = union of its steps and of layers it computed for peers; W = union of its waits that carry a
  link, to a transfer or to a dispatch; C = S minus W, because compute that waits is not computing;
- X = union of the transfers that touch D, as destination or source, however they ended;
- hidden = |C and X|, exposed = |X minus C|, overlap ratio = hidden / |X|, stall = |W|;
- useful ratio = bytes used by compute / bytes moved to D; unknown when no span says what was used;
- interference = how much longer a step computes with transfers beside it than without (medians).
A total is the sum over devices, never a union over them: compute of one device does not hide the
wait of another. Transfers between pools touch no device and count under `links` only.

Invariants: hidden + exposed = transfer; the parts of `breakdown` are disjoint and add up to the
window, to the nanosecond; dropped rows stand beside every number, for a number from a trace with
losses is a lower bound.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

import numpy as np

from hotset.dashboards.critical import CriticalPath, critical_path
from hotset.dashboards.otlp import Clock, read_run
from hotset.dashboards.trace_control import ControlFigures, control_figures
from hotset.dashboards.trace_links import LinkFigures, link_figures
from hotset.dashboards.trace_stalls import Prefetches, Stall, costliest_stalls, prefetches
from hotset.dashboards.trace_view import View
from hotset.errors import ConfigError

if TYPE_CHECKING:
    import os

    from hotset.dashboards.intervals import Intervals
    from hotset.dashboards.trace_view import Index

_LOUD, _CALM = 0.5, 0.1
"""Shares of a step with transfers beside it that count as with and without."""
_LEAST_STEPS = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class Breakdown:
    """What a device did in its window; disjoint, and the sum is the window.

    `idle_moving_ns` is time without work in which transfers ran, `idle_quiet_ns` without.
    """

    compute_alone_ns: int
    compute_hiding_ns: int
    stall_transfer_ns: int
    stall_peer_ns: int
    idle_moving_ns: int
    idle_quiet_ns: int

    @property
    def sum_ns(self) -> int:
        """Sum of all parts."""
        return sum(getattr(self, part.name) for part in fields(self))


@dataclass(frozen=True, slots=True, kw_only=True)
class Figures:
    """What happened on one device, or on all (`total`). `dropped` and `spans` count rows.

    `window_ns` is the time between the device's first and last span, `idle_ns` the part of it in
    which it neither computed nor waited. `dispatch_stall_ns` is the part of the stall that waited
    for a peer's result in place of weights. Ratios are None when there is nothing to divide by;
    `interference_ratio` is 0 when transfers do not slow compute, 0.1 for ten per cent, and None
    with fewer than five steps of one size with or without transfers (and in the total).
    """

    window_ns: int
    breakdown: Breakdown
    stall_ns: int
    dispatch_stall_ns: int
    hidden_ns: int
    exposed_ns: int
    transfer_ns: int
    overlap_ratio: float | None
    compute_ns: int
    idle_ns: int
    dispatch_ns: int
    interference_ratio: float | None
    moved_bytes: int
    used_bytes: int
    useful_ratio: float | None
    steps: int
    waits: int
    dropped: int
    spans: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Analysis:
    """A run's figures. Counts from `failed_transfers` on say how far to trust them."""

    run: str
    window_ns: int
    total: Figures
    devices: dict[str, Figures]
    links: dict[str, LinkFigures]
    critical_path: CriticalPath | None
    stalls: tuple[Stall, ...]
    prefetch: Prefetches
    control: ControlFigures
    clocks: dict[str, Clock]
    emulated: list[str]
    failed_transfers: int
    unlinked_waits: int
    unresolved_links: int
    sampled_out: int
    files: int
    torn_lines: int
    damaged_lines: int


def load(run: str | os.PathLike[str]) -> View:
    """Read a run's folder (or one trace file). Raises ConfigError when it holds no span."""
    spans = read_run(run)
    if not len(spans.table):
        raise ConfigError(
            f"the trace of {run} holds no span",
            remedy="let the run serve a request and end, or look at its log",
        )
    return View(spans)


def analyze(run: str | os.PathLike[str], *, stalls: int = 10) -> Analysis:
    """Read a run and compute its figures, with the `stalls` costliest. Raises ConfigError."""
    return analyze_view(load(run), stalls=stalls)


def analyze_view(view: View, *, stalls: int = 10) -> Analysis:
    """Figures of spans that were read before."""
    spans, table = view.spans, view.table
    devices = {name: _device(view, name) for name in view.devices}
    window_ns = int(table["end_ns"].max() - table["start_ns"].min())
    return Analysis(
        run=", ".join(filter(None, spans.runs)),
        window_ns=window_ns,
        total=_total(list(devices.values()), dropped=sum(spans.dropped.values()), spans=len(table)),
        devices=devices,
        links=link_figures(view, window_ns=window_ns),
        critical_path=critical_path(view),
        stalls=costliest_stalls(view, most=stalls),
        prefetch=prefetches(view),
        control=control_figures(view),
        clocks=spans.clocks,
        emulated=spans.emulated,
        failed_transfers=int((view.transfer & ~view.ok).sum()),
        unlinked_waits=int((view.wait & ~view.linked).sum()),
        unresolved_links=_unresolved(view),
        sampled_out=spans.sampled_out,
        files=spans.files,
        torn_lines=spans.torn_lines,
        damaged_lines=spans.damaged_lines,
    )


def stalled_time(view: View, store: str) -> Intervals:
    """W: time in which a device waited for something that has a link."""
    mine = view.of(store)
    return view.intervals(mine[view.linked[mine]])


def computing_time(view: View, store: str) -> Intervals:
    """C: time in which a device computed and did not wait."""
    mine = view.of(store)
    return view.intervals(mine[view.compute[mine]]) - stalled_time(view, store)


def _device(view: View, name: str) -> Figures:
    table, mine = view.table, view.of(name)
    stalled, computing = stalled_time(view, name), computing_time(view, name)
    for_peer = view.intervals(mine[view.dispatch_wait[mine]])
    moving = view.intervals(view.touching(name))
    hidden_ns = (computing & moving).length_ns
    arrived = mine[view.transfer[mine] & view.ok[mine]]
    moved_bytes = int(table["nbytes"][arrived].sum())
    used_bytes = int(table["nbytes"][arrived[view.used[arrived]]].sum()) if view.knows_use else 0
    busy = computing | stalled
    begin_ns = int(table["start_ns"][mine].min()) if len(mine) else 0
    end_ns = int(table["end_ns"][mine].max()) if len(mine) else 0
    idle_ns = end_ns - begin_ns - busy.length_ns
    outside = moving - busy
    idle_moving_ns = int(outside.within(np.array([begin_ns]), np.array([end_ns]))[0])
    return Figures(
        window_ns=end_ns - begin_ns,
        breakdown=Breakdown(
            compute_alone_ns=computing.length_ns - hidden_ns,
            compute_hiding_ns=hidden_ns,
            stall_transfer_ns=(stalled - for_peer).length_ns,
            stall_peer_ns=for_peer.length_ns,
            idle_moving_ns=idle_moving_ns,
            idle_quiet_ns=idle_ns - idle_moving_ns,
        ),
        stall_ns=stalled.length_ns,
        dispatch_stall_ns=for_peer.length_ns,
        hidden_ns=hidden_ns,
        exposed_ns=moving.length_ns - hidden_ns,
        transfer_ns=moving.length_ns,
        overlap_ratio=_ratio(hidden_ns, moving.length_ns),
        compute_ns=computing.length_ns,
        idle_ns=idle_ns,
        dispatch_ns=view.intervals(mine[view.dispatch[mine]]).length_ns,
        interference_ratio=_interference(view, mine, computing=computing, moving=moving),
        moved_bytes=moved_bytes,
        used_bytes=used_bytes,
        useful_ratio=_ratio(used_bytes, moved_bytes) if view.knows_use else None,
        steps=int(view.step[mine].sum()),
        waits=int(view.wait[mine].sum()),
        dropped=view.spans.dropped.get(name, 0),
        spans=len(mine),
    )


def _interference(
    view: View, mine: Index, *, computing: Intervals, moving: Intervals
) -> float | None:
    """Compare the compute time of steps of one size with and without transfers beside them."""
    steps = mine[view.step[mine]]
    if len(steps) < 2 * _LEAST_STEPS:
        return None
    sizes, counts = np.unique(view.table["tokens"][steps], return_counts=True)
    steps = steps[view.table["tokens"][steps] == sizes[counts.argmax()]]
    begin_ns, end_ns = view.table["start_ns"][steps], view.table["end_ns"][steps]
    compute_ns = computing.within(begin_ns, end_ns)
    beside_ns = (computing & moving).within(begin_ns, end_ns)
    real = compute_ns > 0
    share = beside_ns[real] / compute_ns[real]
    loud, calm = compute_ns[real][share >= _LOUD], compute_ns[real][share <= _CALM]
    if min(len(loud), len(calm)) < _LEAST_STEPS:
        return None
    return float(np.median(loud) / np.median(calm)) - 1


def _total(devices: list[Figures], *, dropped: int, spans: int) -> Figures:
    """Sum over devices; `dropped` and `spans` are those of all stores."""

    def add(field: str) -> int:
        return sum(getattr(one, field) for one in devices)

    parts = {
        part.name: sum(getattr(one.breakdown, part.name) for one in devices)
        for part in fields(Breakdown)
    }
    knows_use = any(one.useful_ratio is not None for one in devices)
    return Figures(
        window_ns=add("window_ns"),
        breakdown=Breakdown(**parts),
        stall_ns=add("stall_ns"),
        dispatch_stall_ns=add("dispatch_stall_ns"),
        hidden_ns=add("hidden_ns"),
        exposed_ns=add("exposed_ns"),
        transfer_ns=add("transfer_ns"),
        overlap_ratio=_ratio(add("hidden_ns"), add("transfer_ns")),
        compute_ns=add("compute_ns"),
        idle_ns=add("idle_ns"),
        dispatch_ns=add("dispatch_ns"),
        interference_ratio=None,
        moved_bytes=add("moved_bytes"),
        used_bytes=add("used_bytes"),
        useful_ratio=_ratio(add("used_bytes"), add("moved_bytes")) if knows_use else None,
        steps=add("steps"),
        waits=add("waits"),
        dropped=dropped,
        spans=spans,
    )


def _unresolved(view: View) -> int:
    targets = np.unique(view.table["link"][view.linked])
    return int((view.find(targets) < 0).sum())


def _ratio(part: int, whole: int) -> float | None:
    return part / whole if whole else None
