"""`hotset trace analyze RUN`: how much of the moving was hidden behind compute, and what waited.

Reads recorded files only; must not know how anything was decided. All times are int nanoseconds.

For a device D (a store that computes: tier HBM, or one with steps) over its spans:
- S = union of its steps and of layers it computed for peers; W = union of its waits that carry a
  link, to a transfer or to a dispatch; C = S minus W, because compute that waits is not computing;
- X = union of the transfers that touch D, as destination or source, however they ended;
- hidden = |C and X|, exposed = |X minus C|, overlap ratio = hidden / |X|, stall = |W|;
- useful ratio = bytes used by compute / bytes moved to D; unknown when no row says `used`.
A total is the sum over devices, never a union over them: compute of one device does not hide the
wait of another. Transfers between pools touch no device and count under `links` only.

Invariants: hidden + exposed = transfer; dropped rows stand beside every number, for a number from a
trace with losses is a lower bound.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from hotset.actors import names
from hotset.dashboards.intervals import Intervals, union
from hotset.dashboards.otlp import Spans, read_run
from hotset.errors import ConfigError

if TYPE_CHECKING:
    import os

    from numpy.typing import NDArray

    Mask = NDArray[np.bool_]


@dataclass(frozen=True, slots=True, kw_only=True)
class Figures:
    """What happened on one device, or on all (`total`). `dropped` and `spans` count rows.

    `idle_ns` is time between the device's first and last span in which it neither computed nor
    waited. `dispatch_stall_ns` is the part of the stall that waited for a peer's result in place of
    weights. Ratios are None when there is nothing to divide by.
    """

    stall_ns: int
    dispatch_stall_ns: int
    hidden_ns: int
    exposed_ns: int
    transfer_ns: int
    overlap_ratio: float | None
    compute_ns: int
    idle_ns: int
    dispatch_ns: int
    moved_bytes: int
    used_bytes: int
    useful_ratio: float | None
    steps: int
    waits: int
    dropped: int
    spans: int


@dataclass(frozen=True, slots=True, kw_only=True)
class LinkFigures:
    """Transfers that arrived over one link; `busy_ns` is the union of their times."""

    bytes: int
    busy_ns: int
    transfers: int
    bytes_per_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Analysis:
    """A run's figures. Counts below `links` say how far to trust them."""

    run: str
    total: Figures
    devices: dict[str, Figures]
    links: dict[str, LinkFigures]
    emulated: list[str]
    failed_transfers: int
    unlinked_waits: int
    unresolved_links: int
    files: int
    torn_lines: int
    damaged_lines: int


def analyze(run: str | os.PathLike[str]) -> Analysis:
    """Read a run's folder (or one trace file) and compute its figures. Raises ConfigError."""
    spans = read_run(run)
    if not len(spans.table):
        raise ConfigError(
            f"the trace of {run} holds no span",
            remedy="let the run serve a request and end, or look at its log",
        )
    masks = _Masks(spans)
    devices = {name: _device(spans, masks, name) for name in _devices(spans, masks)}
    lost = sum(spans.dropped.values())
    return Analysis(
        run=", ".join(filter(None, spans.runs)),
        total=_total(list(devices.values()), dropped=lost, spans=len(spans.table)),
        devices=devices,
        links=_links(spans, masks),
        emulated=spans.emulated,
        failed_transfers=int((masks.transfer & ~masks.ok).sum()),
        unlinked_waits=int((masks.wait & ~masks.linked).sum()),
        unresolved_links=_unresolved(spans, masks),
        files=spans.files,
        torn_lines=spans.torn_lines,
        damaged_lines=spans.damaged_lines,
    )


class _Masks:
    """Which spans are what; computed once a run."""

    def __init__(self, spans: Spans) -> None:
        self.transfer = spans.where("name", names.SPAN_TRANSFER.name)
        self.step = spans.where("name", names.SPAN_STEP.name)
        self.compute = self.step | spans.where("name", names.SPAN_LAYER.name)
        self.wait = spans.where("name", names.SPAN_WAIT.name)
        self.dispatch = spans.where("name", names.SPAN_DISPATCH.name)
        self.linked = spans.table["links"] > 0
        dispatches = spans.table["span_id"][self.dispatch]
        self.dispatch_wait = self.wait & self.linked & np.isin(spans.table["link"], dispatches)
        self.ok = spans.where("code", "ok")


def _devices(spans: Spans, masks: _Masks) -> list[str]:
    stores = {spans.names[number] for number in np.unique(spans.table["store"][masks.step])}
    stores |= {store for store, tier in spans.tiers.items() if tier == "hbm"}
    return sorted(stores)


def _device(spans: Spans, masks: _Masks, name: str) -> Figures:
    table = spans.table
    mine = spans.where("store", name)
    touching = masks.transfer & (mine | spans.where("source", name))
    busy = _intervals(spans, mine & masks.compute)
    stalled = _intervals(spans, mine & masks.wait & masks.linked)
    moving = _intervals(spans, touching)
    computing = busy - stalled
    hidden_ns = (computing & moving).length_ns
    arrived = mine & masks.transfer & masks.ok
    moved_bytes = int(table["nbytes"][arrived].sum())
    used_bytes = int(table["nbytes"][arrived & table["used"]].sum())
    begun_ns, over_ns = table["start_ns"][mine], table["end_ns"][mine]
    window_ns = int(over_ns.max() - begun_ns.min()) if len(begun_ns) else 0
    return Figures(
        stall_ns=stalled.length_ns,
        dispatch_stall_ns=_intervals(spans, mine & masks.dispatch_wait).length_ns,
        hidden_ns=hidden_ns,
        exposed_ns=moving.length_ns - hidden_ns,
        transfer_ns=moving.length_ns,
        overlap_ratio=_ratio(hidden_ns, moving.length_ns),
        compute_ns=computing.length_ns,
        idle_ns=window_ns - (busy | stalled).length_ns,
        dispatch_ns=_intervals(spans, mine & masks.dispatch).length_ns,
        moved_bytes=moved_bytes,
        used_bytes=used_bytes,
        useful_ratio=_ratio(used_bytes, moved_bytes) if used_bytes else None,
        steps=int((mine & masks.step).sum()),
        waits=int((mine & masks.wait).sum()),
        dropped=spans.dropped.get(name, 0),
        spans=int(mine.sum()),
    )


def _total(devices: list[Figures], *, dropped: int, spans: int) -> Figures:
    """Sum over devices; `dropped` and `spans` are those of all stores."""
    hidden_ns = sum(one.hidden_ns for one in devices)
    transfer_ns = sum(one.transfer_ns for one in devices)
    moved_bytes = sum(one.moved_bytes for one in devices)
    used_bytes = sum(one.used_bytes for one in devices)
    return Figures(
        stall_ns=sum(one.stall_ns for one in devices),
        dispatch_stall_ns=sum(one.dispatch_stall_ns for one in devices),
        hidden_ns=hidden_ns,
        exposed_ns=transfer_ns - hidden_ns,
        transfer_ns=transfer_ns,
        overlap_ratio=_ratio(hidden_ns, transfer_ns),
        compute_ns=sum(one.compute_ns for one in devices),
        idle_ns=sum(one.idle_ns for one in devices),
        dispatch_ns=sum(one.dispatch_ns for one in devices),
        moved_bytes=moved_bytes,
        used_bytes=used_bytes,
        useful_ratio=_ratio(used_bytes, moved_bytes) if used_bytes else None,
        steps=sum(one.steps for one in devices),
        waits=sum(one.waits for one in devices),
        dropped=dropped,
        spans=spans,
    )


def _links(spans: Spans, masks: _Masks) -> dict[str, LinkFigures]:
    arrived = masks.transfer & masks.ok & (spans.table["source"] >= 0)
    pairs = np.unique(spans.table[arrived][["source", "store"]])
    found = {}
    for source, store in pairs.tolist():
        mine = arrived & (spans.table["source"] == source) & (spans.table["store"] == store)
        nbytes = int(spans.table["nbytes"][mine].sum())
        busy_ns = _intervals(spans, mine).length_ns
        found[f"{spans.names[source]}->{spans.names[store]}"] = LinkFigures(
            bytes=nbytes,
            busy_ns=busy_ns,
            transfers=int(mine.sum()),
            bytes_per_s=nbytes * 1e9 / busy_ns if busy_ns else 0.0,
        )
    return dict(sorted(found.items()))


def _unresolved(spans: Spans, masks: _Masks) -> int:
    targets = np.unique(spans.table["link"][masks.wait & masks.linked])
    return int((~np.isin(targets, spans.table["span_id"])).sum())


def _intervals(spans: Spans, mask: Mask) -> Intervals:
    return union(spans.table["start_ns"][mask], spans.table["end_ns"][mask])


def _ratio(part: int, whole: int) -> float | None:
    return part / whole if whole else None
