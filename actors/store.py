"""A store: one actor's memory in one tier, and the record of which copies it holds.

Invariants: a copy is listed here exactly while its slot is READY; what is listed is what the
directory will learn, because each change leaves an event in the outbox in the same step; a pinned
slot is never reused. Knows slots and blocks; must not know policy, compute or Ray.
"""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING

from hotset.policies.types import (
    FORMAT_CODES,
    BlockId,
    Copy,
    CopyDropped,
    CopyLanded,
    Event,
    Format,
    Reason,
    StoreInfo,
    TransferFailed,
    stand_ins,
)
from hotset.transport.header import checksum

if TYPE_CHECKING:
    from hotset.actors.fetcher import Landing
    from hotset.blocks.checkpoint import Catalog
    from hotset.transport.slab import Slab, Slot


class Store:
    """Copies in one slab, by block and format."""

    def __init__(self, *, info: StoreInfo, catalog: Catalog, slab: Slab) -> None:
        """`info` says who this is; the slab is empty."""
        self.info = info
        self.catalog = catalog
        self.slab = slab
        self._slots: dict[tuple[BlockId, Format], Slot] = {}
        self._copies: dict[tuple[BlockId, Format], Copy] = {}
        self._outbox: list[Event] = []
        self._lock = threading.Lock()

    def pin(self, block: BlockId, fmt: Format) -> Slot | None:
        """The slot of a copy, pinned once for the caller; None when there is no such copy."""
        with self._lock:
            slot = self._slots.get((block, fmt))
            if slot is not None:
                self.slab.pin(slot)
            return slot

    def unpin(self, slot: Slot) -> None:
        """Give a pin back."""
        self.slab.unpin(slot)

    def adopt(self, landing: Landing) -> None:
        """List a block that has landed; its slot stays pinned for the caller."""
        assert landing.slot is not None  # noqa: S101 - failures go to `report_failure`
        self.add(
            landing.block,
            landing.format,
            slot=landing.slot,
            nbytes=landing.nbytes,
            checksum=landing.checksum,
            generation=landing.generation,
            reason=landing.reason,
            source=landing.source,
        )

    def add(  # noqa: PLR0913 - the parts of a copy, by keyword
        self,
        block: BlockId,
        fmt: Format,
        *,
        slot: Slot,
        nbytes: int,
        checksum: int,
        generation: int,
        reason: Reason,
        source: str,
    ) -> None:
        """List a copy whose slot is READY. A second copy in the same format replaces the first."""
        copy = Copy(
            block=block,
            format=fmt,
            store=self.info.name,
            offset=slot.offset,
            nbytes=nbytes,
            generation=generation,
            checksum=checksum,
            incarnation=self.info.incarnation,
        )
        with self._lock:
            older = self._slots.get((block, fmt))
            self._slots[block, fmt] = slot
            self._copies[block, fmt] = copy
            self._outbox.append(
                CopyLanded(now_ns=time.time_ns(), copy=copy, reason=reason, source=source)
            )
            if older is not None:
                self.slab.retire(older)

    def drop(self, block: BlockId, fmt: Format, *, reason: Reason) -> bool:
        """Void a copy; its bytes are free once the last reader has unpinned. False: no copy."""
        with self._lock:
            slot = self._slots.pop((block, fmt), None)
            if slot is None:
                return False
            copy = self._copies.pop((block, fmt))
            self._outbox.append(
                CopyDropped(
                    now_ns=time.time_ns(),
                    store=self.info.name,
                    block=block,
                    format=fmt,
                    reason=reason,
                    incarnation=self.info.incarnation,
                    generation=copy.generation,
                )
            )
            self.slab.retire(slot)
            return True

    def report_failure(self, block: BlockId, fmt: Format, *, reason: Reason) -> None:
        """Tell the controller that a transfer which it asked for brought nothing."""
        with self._lock:
            self._outbox.append(
                TransferFailed(
                    now_ns=time.time_ns(),
                    store=self.info.name,
                    block=block,
                    format=fmt,
                    reason=reason,
                    incarnation=self.info.incarnation,
                )
            )

    def holds(self, block: BlockId, fmt: Format) -> bool:
        """Whether a copy in this format is here."""
        return (block, fmt) in self._slots

    def tell_again(self, block: BlockId, fmt: Format, *, reason: Reason) -> bool:
        """Tell the controller of a copy that it asks for and that is here; False: it is not.

        Else the order would stand until its time is up, when the directory has lost the copy.
        """
        with self._lock:
            for form in stand_ins(fmt):
                copy = self._copies.get((block, form))
                if copy is not None:
                    self._outbox.append(
                        CopyLanded(
                            now_ns=time.time_ns(), copy=copy, reason=reason, source=self.info.name
                        )
                    )
                    return True
        return False

    def sharing(self, slot: Slot) -> list[tuple[BlockId, Format, Slot]]:
        """Copies in the super-slot of `slot`, its own included."""
        stride = self.slab.stride_bytes
        with self._lock:
            return [
                (block, fmt, other)
                for (block, fmt), other in self._slots.items()
                if other.offset // stride == slot.offset // stride
            ]

    def copies(self) -> tuple[Copy, ...]:
        """Every copy, in block order."""
        with self._lock:
            return tuple(sorted(self._copies.values(), key=lambda copy: (copy.block, copy.format)))

    def take_events(self) -> list[Event]:
        """Empty the outbox."""
        with self._lock:
            events, self._outbox = self._outbox, []
            return events

    def put_back(self, events: list[Event]) -> None:
        """Return events whose heartbeat did not arrive; order is kept."""
        with self._lock:
            self._outbox = events + self._outbox

    def fill(
        self,
        slot: Slot,
        payload: memoryview,
        *,
        block: BlockId,
        fmt: Format,
        reason: Reason = Reason.DEMOTE,
    ) -> Copy:
        """Write a payload made here into a FILLING slot and list it."""
        digest = checksum(payload)
        self.slab.write_payload(slot, payload)
        generation = self.slab.publish(
            slot,
            key=self.catalog.key(block),
            format_code=FORMAT_CODES[fmt],
            nbytes=len(payload),
            checksum=digest,
        )
        self.add(
            block,
            fmt,
            slot=slot,
            nbytes=len(payload),
            checksum=digest,
            generation=generation,
            reason=reason,
            source=self.info.name,
        )
        return self._copies[block, fmt]
