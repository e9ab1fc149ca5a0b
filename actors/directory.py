"""A store's view of where copies are: the published directory, and what its links have cost.

The directory is written by the membership thread and read by the token path. It may be stale; that
is safe, because every read validates what it got. Each block's copies are one immutable tuple, so
a reader needs no lock.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING

from hotset.actors.dispatchplan import DispatchPlan
from hotset.policies.choose import LinkCost
from hotset.policies.types import STORAGE, BlockId, Copy, Format, Tier

if TYPE_CHECKING:
    from collections.abc import Iterable

    from hotset.policies.directory import CopyKey

# First guesses until a link has been measured: storage is the slowest.
_FIRST_BYTES_PER_S = 2_000_000_000
_FIRST_STORAGE_BYTES_PER_S = 800_000_000
_FIRST_DECODED_BYTES_PER_S = 3_000_000_000
_FIRST_DECODE_NS = 30_000
_FIRST_LATENCY_NS = 100_000
_FIRST_DISPATCH_NS = 2_000_000
_LOOK_AGAIN = 16
"""A source that is passed over gets a read when cheaper ones have taken this many times its price:
a sixteenth of the time of reads goes into knowing what the others cost."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """Where to read a block from. `copy` is None for storage."""

    store: str
    copy: Copy | None
    cost_ns: int


class Directory:
    """Remote copies by block, and the cost of each link as measured from here."""

    def __init__(self, *, owner: str) -> None:
        """`owner` is the store whose view this is; its own copies are never listed."""
        self._owner = owner
        self._copies: dict[BlockId, tuple[Copy, ...]] = {}
        self._costs: dict[str, LinkCost] = {}
        self._dispatch: dict[str, LinkCost] = {}
        self._decoding: dict[Format, LinkCost] = {}
        self._saved_ns: dict[str, int] = {}  # time of reads since each store was passed over first
        self._tiers: dict[str, Tier] = {}
        self.plan = DispatchPlan()
        self._lock = threading.Lock()
        self.epoch = 0
        self.version = 0

    def replace(self, copies: Iterable[Copy], *, epoch: int, version: int) -> None:
        """Take a whole directory over."""
        table: dict[BlockId, tuple[Copy, ...]] = {}
        for copy in copies:
            if copy.store != self._owner:
                table[copy.block] = (*table.get(copy.block, ()), copy)
        with self._lock:
            self._copies = table
            self.epoch = max(self.epoch, epoch)
            self.version = version

    def change(
        self, *, added: Iterable[Copy], removed: Iterable[CopyKey], epoch: int, version: int
    ) -> None:
        """Apply changes since the last version."""
        with self._lock:
            for key in removed:
                others = self._copies.get(key.block, ())
                self._copies[key.block] = tuple(c for c in others if not _same(c, key))
            for copy in added:
                if copy.store != self._owner:
                    others = self._copies.get(copy.block, ())
                    kept = tuple(c for c in others if not _same(c, copy))
                    self._copies[copy.block] = (*kept, copy)
            self.epoch = max(self.epoch, epoch)
            self.version = version

    def forget(self, copy: Copy) -> None:
        """A read found that this copy is gone; do not try it again until it is published anew."""
        with self._lock:
            others = self._copies.get(copy.block, ())
            self._copies[copy.block] = tuple(c for c in others if c != copy)

    def forget_store(self, store: str, *, incarnation: int) -> None:
        """A peer's process is gone: none of that incarnation's copies will answer."""
        with self._lock:
            for block, copies in self._copies.items():
                if any(c.store == store and c.incarnation <= incarnation for c in copies):
                    self._copies[block] = tuple(
                        c for c in copies if c.store != store or c.incarnation > incarnation
                    )

    def set_tiers(self, tiers: dict[str, Tier]) -> None:
        """Tier of each store that is in the cluster now."""
        self._tiers = dict(tiers)

    def tiers(self) -> dict[str, Tier]:
        """Tier by store."""
        return self._tiers

    def tier(self, store: str) -> Tier | None:
        """Tier of a store, None for storage and for strangers."""
        return self._tiers.get(store)

    def copies(self, block: BlockId) -> tuple[Copy, ...]:
        """Copies of a block at other stores, in no order."""
        return self._copies.get(block, ())

    def cost(self, store: str) -> LinkCost:
        """Measured cost of reading from a store."""
        cost = self._costs.get(store)
        if cost is None:
            rate = _FIRST_STORAGE_BYTES_PER_S if store == STORAGE else _FIRST_BYTES_PER_S
            fresh = LinkCost(latency_ns=_FIRST_LATENCY_NS, bytes_per_s=rate)
            cost = self._costs.setdefault(store, fresh)
        return cost

    def cheapest_ns(self, nbytes: int) -> int:
        """Expected time of a fetch from the link that measures fastest."""
        costs = list(self._costs.values()) or [self.cost(STORAGE)]
        return min(cost.estimate_ns(nbytes) for cost in costs)

    def dispatch(self, store: str) -> LinkCost:
        """Measured cost of sending tokens to a worker and getting rows back."""
        cost = self._dispatch.get(store)
        if cost is None:
            fresh = LinkCost(latency_ns=_FIRST_DISPATCH_NS, bytes_per_s=_FIRST_BYTES_PER_S)
            cost = self._dispatch.setdefault(store, fresh)
        return cost

    def decoding(self, form: Format) -> LinkCost:
        """Measured cost of decoding here, by full-precision bytes."""
        cost = self._decoding.get(form)
        if cost is None:
            fresh = LinkCost(latency_ns=_FIRST_DECODE_NS, bytes_per_s=_FIRST_DECODED_BYTES_PER_S)
            cost = self._decoding.setdefault(form, fresh)
        return cost

    def sources(
        self,
        block: BlockId,
        *,
        fmt: Format,
        nbytes: int,
        allow: frozenset[str] | None = None,
        look_again: bool = True,
    ) -> list[Source]:
        """Sources of a block in one format, cheapest first; storage stands last or where it is.

        Full precision may also come compressed without loss: fewer bytes on the link, and a
        decoding that counts. `allow` restricts the stores (a command that names its sources).
        `look_again`: now and then a dear source comes first, or its price would never be corrected.
        """
        found = [
            Source(store=c.store, copy=c, cost_ns=self._price(c, fmt=fmt, nbytes=nbytes))
            for c in self._copies.get(block, ())
            if (c.format is fmt or (fmt is Format.BF16 and c.format is Format.BF16Z))
            and (allow is None or c.store in allow)
        ]
        found.append(
            Source(store=STORAGE, copy=None, cost_ns=self.cost(STORAGE).estimate_ns(nbytes))
        )
        order = sorted(found, key=lambda source: source.cost_ns)
        return self._retry(order) if look_again and allow is None else order

    def _retry(self, order: list[Source]) -> list[Source]:
        """Put a source first that was passed over so often that one read of it is due."""
        for source in order[1:]:
            saved_ns = self._saved_ns.get(source.store, 0) + order[0].cost_ns
            due = saved_ns >= _LOOK_AGAIN * source.cost_ns
            self._saved_ns[source.store] = 0 if due else saved_ns
            if due:
                return [source, *(other for other in order if other is not source)]
        return order

    def _price(self, copy: Copy, *, fmt: Format, nbytes: int) -> int:
        link = self.cost(copy.store)
        if copy.format is fmt:
            return link.estimate_ns(nbytes)
        return link.estimate_ns(copy.nbytes) + self.decoding(copy.format).estimate_ns(nbytes)


def _same(left: Copy, right: Copy | CopyKey) -> bool:
    return left.store == right.store and left.format is right.format
