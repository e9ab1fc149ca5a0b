"""Runs of a few rows for tests of the trace analysis, written by the span writer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from hypothesis import strategies as st

from hotset.actors.clock import ClockOffset
from hotset.actors.spans import RowBatch, SpanWriter
from hotset.policies.types import Tier
from hotset.transport.records import NO_NAME, ROW

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

STORES = {"worker-0": Tier.HBM, "worker-1": Tier.HBM, "host-0": Tier.HOST}
NAMES = (*STORES, "storage", "demand", "prefetch", "stage")
DEMAND, PREFETCH = NAMES.index("demand"), NAMES.index("prefetch")
T0 = 1_790_000_000_000_000_000


class Event(NamedTuple):
    """One row in short; `source` and `reason` index NAMES."""

    store: str
    kind: int
    start: int
    length: int
    source: int = NO_NAME
    waits_for: int = 0
    parent: int = 0
    nbytes: int = 0
    used: int = 0
    reason: int = NO_NAME
    phases: tuple[int, int, int] = (0, 0, 0)
    layer: int = 0
    index: int = 0
    request: int = 1
    code: int = 0


def some_events(
    kinds: Sequence[int], *, codes: Sequence[int] = (0,), most: int
) -> st.SearchStrategy[list[Event]]:
    """One to `most` short rows of all stores that overlap, wait for and belong to one another."""
    return st.lists(
        st.builds(
            Event,
            store=st.sampled_from(list(STORES)),
            kind=st.sampled_from(list(kinds)),
            start=st.integers(0, 60),
            length=st.integers(0, 25),
            source=st.sampled_from([0, 1, 2, 3]),
            waits_for=st.integers(0, 9),
            parent=st.integers(0, 9),
            used=st.integers(0, 1),
            reason=st.sampled_from([DEMAND, PREFETCH]),
            phases=st.tuples(st.integers(0, 9), st.integers(0, 9), st.integers(0, 9)),
            request=st.integers(0, 2),
            nbytes=st.integers(0, 9),
            layer=st.just(0),
            index=st.just(0),
            code=st.sampled_from(list(codes)),
        ),
        min_size=1,
        max_size=most,
    )


def write_run(folder: Path, events: list[Event], **batch: Any) -> Path:
    writer = SpanWriter(folder / "trace-n0.jsonl", node="n0", run="r1")
    writer.encoder.clock = ClockOffset(offset_ns=-1500, error_ns=700)
    for store, tier in STORES.items():
        mine = [(number, one) for number, one in enumerate(events, 1) if one.store == store]
        rows = np.zeros(len(mine), ROW)
        for row, (number, one) in zip(rows, mine, strict=True):
            row["row_id"], row["kind"], row["code"] = number, one.kind, one.code
            row["source"], row["waits_for"], row["used"] = one.source, one.waits_for, one.used
            row["parent"], row["reason"], row["nbytes"] = one.parent, one.reason, one.nbytes
            row["queue_ns"], row["wire_ns"], row["verify_ns"] = one.phases
            row["layer"], row["index"], row["trace_lo"] = one.layer, one.index, one.request
            row["start_ns"], row["end_ns"] = T0 + one.start, T0 + one.start + one.length
        writer.write(
            RowBatch(
                store=store, tier=tier, rows=rows.tobytes(), names=NAMES, tiers=STORES, **batch
            )
        )
    writer.close()
    return folder
