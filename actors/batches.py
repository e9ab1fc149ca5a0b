"""What one store's ring gave at one drain, and its sums for metrics.

Decides how rows are counted. Must not know Ray, files or who publishes the sums.

Invariants: bytes and life times count only transfers that ended OK; sums are exact integers; keys
are names of stores, tiers, reasons and codes, never of experts or requests.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from hotset.policies.types import STORAGE, Tier
from hotset.transport.records import ROW, Code, Kind

if TYPE_CHECKING:
    from collections.abc import Sequence

    Rows = np.ndarray[Any, np.dtype[Any]]

UNKNOWN = "unknown"
CONTROL = "control"
"""Name of the controller's tier: it holds no blocks."""
CODE_NAMES = {int(code): code.name.lower() for code in Code}


@dataclass(frozen=True, slots=True, kw_only=True)
class RowBatch:
    """What one store's ring gave at one drain. msgspec encodes it as it is.

    `rows` is what `Ring.drain` returned, `names` its `Ring.names()`, `dropped` the growth of its
    `dropped` since the batch before. `tiers` names the tier of each source in `names` that is a
    store (`storage` is known). `hits_by_tier`, `queries` and `tokens` are the worker's counters,
    again as growth since the batch before. The controller's batches have no tier.
    `link_bytes_per_s` is what an emulated link to this store gives its readers, 0 for a real one;
    `oldest_transfer_ns` the age of the oldest transfer in flight at the drain.
    """

    store: str
    tier: Tier | None
    rows: bytes = b""
    names: tuple[str, ...] = ()
    tiers: dict[str, Tier] = field(default_factory=dict)
    dropped: int = 0
    hits_by_tier: dict[str, int] = field(default_factory=dict)
    queries: int = 0
    tokens: int = 0
    link_bytes_per_s: int = 0
    oldest_transfer_ns: int = 0

    @property
    def tier_name(self) -> str:
        """Name of the store's tier, `control` for the controller."""
        return CONTROL if self.tier is None else self.tier.name.lower()

    def table(self) -> Rows:
        """Rows as a structured array of `ROW`, without a copy."""
        return np.frombuffer(self.rows, ROW)

    def tier_of(self, source: str) -> str:
        """Name of the tier of a source, `unknown` when the batch does not say."""
        if source == STORAGE:
            return "storage"
        tier = self.tiers.get(source)
        return UNKNOWN if tier is None else tier.name.lower()


@dataclass(frozen=True, slots=True, kw_only=True)
class Flow:
    """Sum of transfers from one tier to another; `transfer_ns` sums their life times.

    The other times are parts of it: between submit and post, from post to the backend's end, and
    for checking the bytes and making them readable.
    """

    tier_from: str
    tier_to: str
    nbytes: int
    transfer_ns: int
    queue_ns: int
    wire_ns: int
    activate_ns: int
    transfers: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Aggregate:
    """Sums of one batch, for metrics. `transfers_by_code` counts by name of `Code`."""

    store: str
    flows: tuple[Flow, ...]
    stall_ns_by_reason: dict[str, int]
    transfers_by_code: dict[str, int]
    hits_by_tier: dict[str, int]
    bytes_by_source: dict[str, int]
    queries: int
    tokens: int
    dispatched_bytes: int
    rows: int
    dropped: int


def aggregate(batch: RowBatch) -> Aggregate:
    """Sum a batch. Flows and bytes count only transfers that ended OK."""
    rows = batch.table()
    life_ns = np.maximum(rows["end_ns"] - rows["start_ns"], 0)
    transfers = rows["kind"] == Kind.TRANSFER
    arrived = transfers & (rows["code"] == Code.OK)
    waits = rows["kind"] == Kind.WAIT
    flows: dict[str, Flow] = {}
    bytes_by_source: dict[str, int] = {}
    for index in np.unique(rows["source"][arrived]).tolist():
        source = name_at(batch.names, index)
        tier = batch.tier_of(source)
        mine = rows[arrived & (rows["source"] == index)]
        nbytes = int(mine["nbytes"].sum())
        bytes_by_source[source] = bytes_by_source.get(source, 0) + nbytes
        before = flows.get(tier) or _no_flow(tier, batch.tier_name)
        flows[tier] = Flow(
            tier_from=tier,
            tier_to=batch.tier_name,
            nbytes=nbytes + before.nbytes,
            transfer_ns=int(np.maximum(mine["end_ns"] - mine["start_ns"], 0).sum())
            + before.transfer_ns,
            queue_ns=int(mine["queue_ns"].sum()) + before.queue_ns,
            wire_ns=int(mine["wire_ns"].sum()) + before.wire_ns,
            activate_ns=int((mine["verify_ns"] + mine["activate_ns"]).sum()) + before.activate_ns,
            transfers=len(mine) + before.transfers,
        )
    stall_ns = {
        name_at(batch.names, index): int(life_ns[waits & (rows["reason"] == index)].sum())
        for index in np.unique(rows["reason"][waits]).tolist()
    }
    codes, counts = np.unique(rows["code"][transfers], return_counts=True)
    return Aggregate(
        store=batch.store,
        flows=tuple(flows.values()),
        stall_ns_by_reason=stall_ns,
        transfers_by_code={
            CODE_NAMES.get(code, UNKNOWN): count
            for code, count in zip(codes.tolist(), counts.tolist(), strict=True)
        },
        hits_by_tier=dict(batch.hits_by_tier),
        bytes_by_source=bytes_by_source,
        queries=batch.queries,
        tokens=batch.tokens,
        dispatched_bytes=int(rows["nbytes"][rows["kind"] == Kind.DISPATCH].sum()),
        rows=len(rows),
        dropped=batch.dropped,
    )


def _no_flow(tier_from: str, tier_to: str) -> Flow:
    return Flow(
        tier_from=tier_from, tier_to=tier_to, nbytes=0, transfer_ns=0, queue_ns=0, wire_ns=0,
        activate_ns=0, transfers=0,
    )  # fmt: skip


def name_at(table: Sequence[str], index: int) -> str:
    """Name of an index of a row, `unknown` when the table is too short."""
    return table[index] if index < len(table) else UNKNOWN
