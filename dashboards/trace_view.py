"""The spans of a run, looked up by what they are and by whose they are.

Indexes once, so that an analysis costs one pass for all devices and not one for each. Must not know
what the figures mean.

A device is a store that computes: of tier HBM, or with steps. Invariant: every index list is in the
order of the table.
"""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from hotset.actors import names
from hotset.dashboards.intervals import Intervals, union

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from hotset.dashboards.otlp import Spans, Table

    Mask = NDArray[np.bool_]
    Index = NDArray[np.int64]
    Ids = NDArray[np.uint64]

PREFETCH = "prefetch"
_NOBODY = np.zeros(0, np.int64)


class View:
    """Masks over all spans, and lists of spans by store and by source."""

    def __init__(self, spans: Spans) -> None:
        """One pass over the columns."""
        self.spans = spans
        self.table: Table = spans.table
        self.transfer = spans.where("name", names.SPAN_TRANSFER.name)
        self.step = spans.where("name", names.SPAN_STEP.name)
        self.compute = self.step | spans.where("name", names.SPAN_LAYER.name)
        self.wait = spans.where("name", names.SPAN_WAIT.name)
        self.dispatch = spans.where("name", names.SPAN_DISPATCH.name)
        self.use = spans.where("name", names.SPAN_USE.name)
        self.linked = self.wait & (self.table["links"] > 0)
        self.ok = spans.where("code", "ok")
        self.prefetch = self.transfer & spans.where("reason", PREFETCH)
        self._by_store = _groups(self.table["store"], np.arange(len(self.table)))
        moving = np.flatnonzero(self.transfer)
        self._by_source = _groups(self.table["source"][moving], moving)
        self._order = np.argsort(self.table["span_id"], kind="stable")
        self._sorted_ids = self.table["span_id"][self._order]

    @cached_property
    def devices(self) -> list[str]:
        """Names of the stores that compute."""
        spans = self.spans
        stores = {spans.names[number] for number in np.unique(self.table["store"][self.step])}
        return sorted(stores | {store for store, tier in spans.tiers.items() if tier == "hbm"})

    @cached_property
    def dispatch_wait(self) -> Mask:
        """Waits for a peer's result."""
        mask = self.linked.copy()
        waits = np.flatnonzero(mask)
        target = self.find(self.table["link"][waits])
        mask[waits] = (target >= 0) & self.dispatch[target]
        return mask

    @cached_property
    def knows_use(self) -> bool:
        """Whether the run says what became of moved bytes at all."""
        return bool(self.use.any() or (self.table["used"][self.transfer] >= 0).any())

    @cached_property
    def used(self) -> Mask:
        """Transfers whose bytes compute has read."""
        read = self.use & (self.table["used"] == 1)
        targets = self.table["link"][self.linked | read]
        known = np.isin(self.table["span_id"], targets)
        found: Mask = self.transfer & (known | (self.table["used"] == 1))
        return found

    @cached_property
    def wasted(self) -> Mask:
        """Transfers whose bytes were dropped unread."""
        unread = self.table["link"][self.use & (self.table["used"] == 0)]
        found: Mask = self.transfer & np.isin(self.table["span_id"], unread) & ~self.used
        return found

    def of(self, store: str) -> Index:
        """Spans that a store wrote."""
        return self._by_store.get(self.spans.number(store), _NOBODY)

    def from_source(self, store: str) -> Index:
        """Transfers that came from a store, to any other."""
        return self._by_source.get(self.spans.number(store), _NOBODY)

    def touching(self, store: str) -> Index:
        """Transfers to or from a store."""
        mine = self.of(store)
        touched = np.zeros(len(self.table), np.bool_)
        touched[mine[self.transfer[mine]]] = True
        touched[self.from_source(store)] = True
        return np.flatnonzero(touched)

    def intervals(self, index: Index) -> Intervals:
        """Time that these spans cover together."""
        return union(self.table["start_ns"][index], self.table["end_ns"][index])

    def find(self, ids: Ids) -> Index:
        """Where the spans with these ids are in the table, -1 where there is none."""
        if not len(self._sorted_ids):
            return np.full(len(ids), -1)
        place = np.minimum(np.searchsorted(self._sorted_ids, ids), len(self._sorted_ids) - 1)
        found: Index = np.where(self._sorted_ids[place] == ids, self._order[place], -1)
        return found

    def name(self, number: int) -> str:
        """Text of a number in a column of names; empty for none."""
        return self.spans.names[number] if number >= 0 else ""

    def block(self, at: int) -> str:
        """`LAYER.EXPERT` of a span; empty when it concerns no one block."""
        layer, index = int(self.table["layer"][at]), int(self.table["index"][at])
        return f"{layer}.{index}" if layer >= 0 and index >= 0 else ""


def _groups(keys: NDArray[np.int32], index: Index) -> dict[int, Index]:
    """Members of `index` by key, each list in order."""
    order = np.argsort(keys, kind="stable")
    found, first = np.unique(keys[order], return_index=True)
    parts = np.split(index[order], first[1:]) if len(found) else []
    return dict(zip(found.tolist(), parts, strict=True))
