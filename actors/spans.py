"""Rows become spans in a file of OTLP JSON lines, and sums for metrics.

Moves nothing but telemetry and decides only what is kept when there is too much. Must not know Ray,
actors or placement: the Telemetry actor hands batches in and publishes what `Aggregate` says.

**One trace a run.** Every span of a run, on all nodes, carries the run's trace id
(`run_trace_id(run)`); the trace id of the request stands in `hotset.request.trace_id`. A step may
wait for a transfer that another request caused, on rows that were dropped or arrive later; with one
trace id a `waited_on` link needs only the transfer's row id, which the WAIT row has. So every link
resolves, in any order of arrival.

Invariants: rows handed in + rows that rings lost = `written` + `dropped`; a span's id is its row's
id; one line of the file is one batch, so a crash tears at most the last line; WAIT and STEP rows,
transfers and failures are never dropped to save time.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from hotset.policies.types import Tier
from hotset.transport.records import ROW

if TYPE_CHECKING:
    import os
    from collections.abc import Callable, Sequence


@dataclass(frozen=True, slots=True, kw_only=True)
class RowBatch:
    """What one store's ring gave at one drain. msgspec encodes it as it is.

    `rows` is what `Ring.drain` returned, `names` its `Ring.names()`, `dropped` the growth of its
    `dropped` since the batch before. `tiers` names the tier of each source in `names` that is a
    store (`storage` is known). `hits_by_tier`, `queries` and `tokens` are the worker's counters,
    again as growth since the batch before.
    """

    store: str
    tier: Tier
    rows: bytes = b""
    names: tuple[str, ...] = ()
    tiers: dict[str, Tier] = field(default_factory=dict)
    dropped: int = 0
    hits_by_tier: dict[str, int] = field(default_factory=dict)
    queries: int = 0
    tokens: int = 0

    def table(self) -> np.ndarray:
        """Rows as a structured array of `ROW`, without a copy."""
        return np.frombuffer(self.rows, ROW)


@dataclass(frozen=True, slots=True, kw_only=True)
class Flow:
    """Sum of transfers from one tier to another."""

    tier_from: str
    tier_to: str
    nbytes: int
    busy_ns: int
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
    """Sum a batch. Bytes count only transfers that ended OK."""
    raise NotImplementedError


def run_trace_id(run: str) -> int:
    """Trace id (128 bits, not 0) of all spans of a run, from the run's id on any node."""
    raise NotImplementedError


class SpanWriter:
    """Appends batches to one file, `trace-<node>.jsonl` by convention. One thread only."""

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        node: str,
        run: str,
        emulated: Sequence[str] = (),
        formats: Sequence[str] = (),
        max_rows: int = 100_000,
        clock: Callable[[], int] | None = None,
    ) -> None:
        """Open for appending and create the folder. `formats` names the codes of rows' `format`."""
        raise NotImplementedError

    @property
    def written(self) -> int:
        """Spans written."""
        raise NotImplementedError

    @property
    def dropped(self) -> int:
        """Rows that did not become spans: lost by rings, damaged, or over `max_rows` a batch."""
        raise NotImplementedError

    def write(self, batch: RowBatch) -> int:
        """Append one line; returns the number of spans in it."""
        raise NotImplementedError

    def plan(self, *, epoch: int, reason: str, start_ns: int, end_ns: int, row_id: int) -> None:
        """Append a `hotset.plan` span of the controller."""
        raise NotImplementedError

    def close(self) -> None:
        """Close the file. Idempotent."""
        raise NotImplementedError
