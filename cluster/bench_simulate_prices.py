"""What a simulation of a live run is told: prices, all from the trace of other requests of the run.

Decides how a price is measured. Must not know the requests that are simulated with them.

A decode step's compute is its time without its waits. A line through compute and transfers of all
calibrating steps gives compute without fetching and what each fetch adds. A layer's reads are a
measured visit: for each, from asking until compute could use it, and how much of that compute was
busy with other experts. Visits are kept whole, not means of reads: waits come from the slow reads,
what slows one read slows its companions and the compute beside it, and blocks of one layer travel
in one transfer. From which tier a read came is part of the visit, so the live directory's choice
among sources, which follows measured prices, enters as it was.

Steps that took more than ten times the median step, or in which one wait took more than ten times
the median wait, were interrupted from outside and count nowhere, calibrating or tested.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from hotset.actors import names
from hotset.errors import ClusterError
from hotset.policies.linkmodel import LinkSpec
from hotset.policies.outlook import GUESSES
from hotset.policies.simspec import MeasuredVisit, ReadSample, TierSpec
from hotset.policies.types import BlockId, Reason, Tier

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from numpy.typing import NDArray

    from hotset.dashboards.otlp import Spans

    Rows = NDArray[Any]

INTERRUPTED = 10
"""A step or wait of this many medians is none of the model but a pause of the machine."""
_FILLS = (Reason.WARM, Reason.JOINED, Reason.STAGE)


@dataclass(frozen=True, slots=True, kw_only=True)
class Prices:
    """What layers, reads and waits take; see `ClusterSpec`. `layer_ns` is the mean over layers."""

    tiers: dict[Tier, TierSpec]
    visits: tuple[MeasuredVisit, ...]
    layer_ns: int
    fetch_ns: int
    dispatch_ns: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Steps:
    """Decode steps of some requests, with the waits in them: rows of the trace."""

    steps: Rows
    waits: Rows
    interrupted: int

    @property
    def step_ns(self) -> int:
        """Mean time."""
        return int(_spans_ns(self.steps).mean())

    def fetches(self, spans: Spans) -> float:
        """Transfers that a step started, the mean."""
        reads = spans.where("name", names.SPAN_TRANSFER.name)
        started = np.isin(spans.table["parent"][reads], self.steps["span_id"]).sum()
        return float(started) / len(self.steps)

    @property
    def stall_ns(self) -> int:
        """Mean of what was waited for."""
        return int(_spans_ns(self.waits).sum()) // len(self.steps)


class _Read(NamedTuple):
    """A read of a layer: when compute could use it and was free for it, from asking."""

    visit: tuple[int, int]  # step and layer
    tier: str
    nbytes: int
    sample: ReadSample


def requests_of(spans: Spans) -> list[int]:
    """Requests in the order in which they began."""
    rows = spans.table[spans.where("name", names.SPAN_STEP.name)]
    order = rows[np.argsort(rows["start_ns"], kind="stable")]
    return list(dict.fromkeys(int(one) for one in order["request"]))


def steps_of(spans: Spans, requests: Iterable[int]) -> Steps:
    """Whole steps of one token of the requests, and what was waited for in them."""
    rows = spans.table
    mine = np.isin(rows["request"], np.array(list(requests), dtype=np.uint64))
    steps = rows[mine & spans.where("name", names.SPAN_STEP.name) & (rows["tokens"] == 1)]
    if not len(steps):
        raise ClusterError("the trace holds no decode step", remedy="generate more tokens")
    waits = rows[spans.where("name", names.SPAN_WAIT.name)]
    waits = waits[np.isin(waits["parent"], steps["span_id"])]
    whole = ~_interrupted(steps) & ~np.isin(steps["span_id"], waits["parent"][_interrupted(waits)])
    steps = steps[whole]
    waits = waits[np.isin(waits["parent"], steps["span_id"])]
    return Steps(steps=steps, waits=waits, interrupted=int((~whole).sum()))


def _interrupted(rows: Rows) -> NDArray[np.bool_]:
    took_ns = _spans_ns(rows)
    return took_ns > INTERRUPTED * np.median(took_ns) if len(rows) else np.zeros(0, dtype=np.bool_)


def prices_of(
    spans: Spans, found: Steps, *, worker: str, layers: int, seen: Sequence[Tier]
) -> Prices:
    """Measure. `seen` are the tiers of the cluster; one that was never read is the last choice."""
    rows = spans.table
    reads = rows[
        spans.where("store", worker)
        & spans.where("name", names.SPAN_TRANSFER.name)
        & (rows["nbytes"] > 0)
        & np.isin(rows["parent"], found.steps["span_id"])
    ]
    base_ns, fetch_ns = _line(found, reads)
    sent = rows[
        spans.where("store", worker)
        & spans.where("name", names.SPAN_DISPATCH.name)
        & np.isin(rows["parent"], found.steps["span_id"])
    ]
    samples = _samples(spans, found, reads)
    return Prices(
        tiers=_tiers(samples, seen=seen),
        visits=_visits(samples),
        layer_ns=max(1, base_ns // layers),
        fetch_ns=fetch_ns,
        dispatch_ns=int(np.median(_spans_ns(sent))) if len(sent) else 0,
    )


def holdings_of(spans: Spans, *, store: str, until_ns: int) -> tuple[BlockId, ...]:
    """Blocks that the controller has sent to a store by then, in the order of their landing."""
    rows = spans.table
    asked = np.zeros(len(rows), dtype=bool)
    for reason in _FILLS:
        asked |= spans.where("reason", reason.value)
    landed = rows[
        asked
        & spans.where("store", store)
        & spans.where("name", names.SPAN_TRANSFER.name)
        & (rows["nbytes"] > 0)
        & (rows["end_ns"] <= until_ns)
    ]
    order = landed[np.argsort(landed["end_ns"], kind="stable")]
    return tuple(dict.fromkeys(BlockId(int(row["layer"]), int(row["index"])) for row in order))


def _spans_ns(rows: Rows) -> NDArray[np.int64]:
    took: NDArray[np.int64] = rows["end_ns"] - rows["start_ns"]
    return took


def _line(found: Steps, reads: Rows) -> tuple[int, int]:
    """Compute of a step that fetches nothing, and what each fetch adds: least squares."""
    stalls = dict.fromkeys(found.steps["span_id"].tolist(), 0)
    for parent, ns in zip(found.waits["parent"].tolist(), _spans_ns(found.waits), strict=True):
        stalls[parent] += int(ns)
    fetches = dict.fromkeys(stalls, 0)
    for parent in reads["parent"].tolist():
        fetches[parent] += 1
    compute = _spans_ns(found.steps) - np.array(list(stalls.values()))
    count = np.array(list(fetches.values()), dtype=np.float64)
    off = count - count.mean()
    spread = float((off * off).sum())
    slope = max(0.0, float((off * compute).sum()) / spread) if spread else 0.0
    return int(compute.mean() - slope * count.mean()), int(slope)


def _samples(spans: Spans, found: Steps, reads: Rows) -> list[_Read]:
    """Demand reads of the steps, with what compute did meanwhile."""
    demand = spans.table["span_id"][spans.where("reason", Reason.DEMAND.value)]
    reads = reads[np.isin(reads["span_id"], demand)]
    uses = spans.table[spans.where("name", names.SPAN_USE.name)]
    landed = dict(zip(uses["link"].tolist(), uses["start_ns"].tolist(), strict=True))
    waited = {int(wait["link"]): wait for wait in found.waits}
    samples = []
    for read in reads:
        span, asked_ns = int(read["span_id"]), int(read["start_ns"])
        wait = waited.get(span)
        until_ns = landed.get(span) if wait is None else int(wait["end_ns"])
        if until_ns is None:  # never read: its row waits for the block's drop
            continue
        took_ns = until_ns - asked_ns
        cover_ns = took_ns if wait is None else int(wait["start_ns"]) - asked_ns
        samples.append(
            _Read(
                visit=(int(read["parent"]), int(read["layer"])),
                tier=spans.tiers.get(spans.names[read["source"]], "storage"),
                nbytes=int(read["nbytes"]),
                sample=ReadSample(took_ns, max(0, cover_ns)),
            )
        )
    return samples


def _visits(samples: Sequence[_Read]) -> tuple[MeasuredVisit, ...]:
    """Reads of one layer of one step belong together, in the order of their landing."""
    found: dict[tuple[int, int], list[ReadSample]] = defaultdict(list)
    for read in samples:
        found[read.visit].append(read.sample)
    return tuple(tuple(sorted(reads)) for reads in found.values())


def _tiers(samples: Sequence[_Read], *, seen: Sequence[Tier]) -> dict[Tier, TierSpec]:
    """Prices by which sources compete; one that was never read is the last choice."""
    tiers: dict[Tier, TierSpec] = {}
    slowest_ns = max((read.sample.took_ns for read in samples), default=0)
    for tier in seen:
        link = LinkSpec(bandwidth_bytes_per_s=GUESSES[tier].bandwidth_bytes_per_s, latency_ns=0)
        beside_link = [
            max(0, read.sample.took_ns - link.transfer_ns(read.nbytes))
            for read in samples
            if read.tier == tier.name.lower()
        ]
        overhead_ns = int(np.mean(beside_link)) if beside_link else slowest_ns
        tiers[tier] = TierSpec(link=link, overhead_ns=overhead_ns)
    return tiers
