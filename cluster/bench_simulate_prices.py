"""What a simulation of a live run is told: prices, all from the trace of other requests of the run.

Decides how a price is measured. Must not know the requests that are simulated with them.

A decode step's compute is its time without its waits. A line through compute and transfers of all
calibrating steps gives compute without fetching and what each fetch adds. Each read is a sample:
from asking until compute could use it, and how much of that compute was busy with other experts. A
read that was in time says no more than that compute was busy until then. Samples are kept, not
means: waits come from the slow reads, and what slows a read slows the compute beside it.

Steps of more than ten times the median were interrupted from outside and count nowhere.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from hotset.actors import names
from hotset.errors import ClusterError
from hotset.policies.linkmodel import LinkSpec
from hotset.policies.outlook import GUESSES
from hotset.policies.simspec import ReadSample, TierSpec
from hotset.policies.types import BlockId, Reason, Tier

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from numpy.typing import NDArray

    from hotset.dashboards.otlp import Spans

    Rows = NDArray[Any]

INTERRUPTED = 10
"""A step of this many medians is no step of the model but a pause of the machine."""
_NEVER = 1 << 62
_FILLS = (Reason.WARM, Reason.JOINED, Reason.STAGE)


@dataclass(frozen=True, slots=True, kw_only=True)
class Prices:
    """What layers, reads and waits take; see `ClusterSpec`. `layer_ns` is the mean over layers."""

    tiers: dict[Tier, TierSpec]
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

    def fetches(self, spans: Spans) -> int:
        """Transfers that these steps started."""
        reads = spans.where("name", names.SPAN_TRANSFER.name)
        return int(np.isin(spans.table["parent"][reads], self.steps["span_id"]).sum())

    @property
    def stall_ns(self) -> int:
        """Mean of what was waited for."""
        return int(_spans_ns(self.waits).sum()) // len(self.steps)


class _Read(NamedTuple):
    """A read's way, from asking: until compute could use it, and until compute had to wait."""

    tier: str
    nbytes: int
    took_ns: int
    cover_ns: int
    here: int  # experts of its layer that were resident


def requests_of(spans: Spans) -> list[int]:
    """Requests in the order in which they began."""
    rows = spans.table[spans.where("name", names.SPAN_STEP.name)]
    order = rows[np.argsort(rows["start_ns"], kind="stable")]
    return list(dict.fromkeys(int(one) for one in order["request"]))


def steps_of(spans: Spans, requests: Iterable[int]) -> Steps:
    """Steps of one token of the requests, and what was waited for in them."""
    rows = spans.table
    mine = np.isin(rows["request"], np.array(list(requests), dtype=np.uint64))
    steps = rows[mine & spans.where("name", names.SPAN_STEP.name) & (rows["tokens"] == 1)]
    if not len(steps):
        raise ClusterError("the trace holds no decode step", remedy="generate more tokens")
    took_ns = _spans_ns(steps)
    whole = took_ns <= INTERRUPTED * np.median(took_ns)
    steps = steps[whole]
    waits = rows[spans.where("name", names.SPAN_WAIT.name)]
    waits = waits[np.isin(waits["parent"], steps["span_id"])]
    return Steps(steps=steps, waits=waits, interrupted=int((~whole).sum()))


def prices_of(  # noqa: PLR0913 - what the trace does not say of itself
    spans: Spans, found: Steps, *, worker: str, layers: int, top_k: int, seen: Sequence[Tier]
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
    return Prices(
        tiers=_tiers(_samples(spans, found, reads, top_k=top_k), seen=seen),
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


def _samples(spans: Spans, found: Steps, reads: Rows, *, top_k: int) -> list[_Read]:
    """Demand reads of the steps, with what compute did meanwhile."""
    demand = spans.table["span_id"][spans.where("reason", Reason.DEMAND.value)]
    reads = reads[np.isin(reads["span_id"], demand)]
    uses = spans.table[spans.where("name", names.SPAN_USE.name)]
    landed = dict(zip(uses["link"].tolist(), uses["start_ns"].tolist(), strict=True))
    ended = dict(zip(found.waits["link"].tolist(), found.waits["end_ns"].tolist(), strict=True))
    first_wait: dict[tuple[int, int], int] = {}
    for wait in found.waits:
        key = int(wait["parent"]), int(wait["layer"])
        first_wait[key] = min(first_wait.get(key, _NEVER), int(wait["start_ns"]))
    blocks = Counter((int(read["parent"]), int(read["layer"])) for read in reads)
    samples = []
    for read in reads:
        key, span, asked_ns = (
            (int(read["parent"]), int(read["layer"])), int(read["span_id"]), int(read["start_ns"])
        )  # fmt: skip
        until_ns = ended.get(span) or landed.get(span)
        if until_ns is None:  # never read: its row waits for the block's drop
            continue
        took_ns = until_ns - asked_ns
        samples.append(
            _Read(
                tier=spans.tiers.get(spans.names[read["source"]], "storage"),
                nbytes=int(read["nbytes"]),
                took_ns=took_ns,
                cover_ns=min(took_ns, max(0, first_wait.get(key, _NEVER) - asked_ns)),
                here=max(0, top_k - blocks[key]),
            )
        )
    return samples


def _tiers(samples: Sequence[_Read], *, seen: Sequence[Tier]) -> dict[Tier, TierSpec]:
    tiers: dict[Tier, TierSpec] = {}
    slowest_ns = max((read.took_ns for read in samples), default=0)
    for tier in seen:
        rate = GUESSES[tier].bandwidth_bytes_per_s
        link = LinkSpec(bandwidth_bytes_per_s=rate, latency_ns=0)
        mine = [read for read in samples if read.tier == tier.name.lower()]
        if not mine:  # the directory could have chosen it, and never did
            tiers[tier] = TierSpec(link=link, overhead_ns=slowest_ns)
            continue
        beside_link = [max(0, read.took_ns - link.transfer_ns(read.nbytes)) for read in mine]
        kept = [
            (read.here, ReadSample(overhead_ns, read.cover_ns))
            for read, overhead_ns in zip(mine, beside_link, strict=True)
        ]
        tiers[tier] = TierSpec(
            link=link,
            overhead_ns=int(np.mean(beside_link)),
            alone=tuple(read for here, read in kept if not here),
            beside=tuple(read for here, read in kept if here),
        )
    return tiers
