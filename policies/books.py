"""The brain's books of one store: what it holds, what is on its way, what waits for room.

Decides nothing. Must not know other stores. Blocks are flat indexes into the brain's sorted
tuple of blocks.

Invariant (with `ClusterBrain.validate`): used + pending bytes never exceed the capacity; queued
wishes claim nothing until they are asked for.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from hotset.policies.schedule import Service, service_of
from hotset.policies.types import LOSSLESS, Format, Reason, StoreInfo, Tier

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from numpy.typing import NDArray

    from hotset.policies.config import PolicyConfig
    from hotset.policies.types import BlockInfo

    Bytes = NDArray[np.int64]


LONG_AGO_NS = -(1 << 62)
_NEVER = 1 << 62


class Wish(NamedTuple):
    """A copy that a store should get."""

    flat: int
    format: Format
    reason: Reason
    cause: str
    due_ns: int = 0


@dataclass(slots=True, kw_only=True)
class Pending:
    """A transfer that the brain has asked for and not heard of yet."""

    nbytes: int
    reason: Reason
    asked_ns: int
    cancelled: bool = False
    from_format: Format | None = None  # a change of format in place; the store finds the room


class Sizes:
    """Bytes of a slot for each block and format, header and alignment included.

    Stores cut their memory into super-slots: one serves a full copy, or two of the largest reduced
    format and as many of a smaller one as fit. So a full copy may cost more than its bytes.
    """

    def __init__(self, blocks: Sequence[BlockInfo], *, config: PolicyConfig) -> None:
        """Blocks in flat order."""
        header, align = config.slot_header_bytes, config.slot_align_bytes

        def slots(nbytes: list[int]) -> Bytes:
            payload = -(-np.array(nbytes, dtype=np.int64) // align) * align
            return payload + header

        whole = slots([info.nbytes for info in blocks])
        named = sorted({form for info in blocks for form, _ in info.by_format})
        reduced = slots([info.reduced_nbytes for info in blocks])
        others = {
            form: slots([dict(info.by_format).get(form, info.reduced_nbytes) for info in blocks])
            for form in named
        }
        lossy = [need for form, need in others.items() if form not in LOSSLESS]
        half = np.max([reduced, *lossy], axis=0)
        stride = 2 * np.maximum(half, -(-whole // (2 * align)) * align)

        def parts(need: Bytes) -> Bytes:
            part: Bytes = stride // np.maximum(1, stride // need) // align * align
            return part

        self.full = stride
        self.reduced = parts(reduced)
        self.smallest = int(min(self.full.min(), self.reduced.min())) if blocks else 0
        self._others = {form: parts(need) for form, need in others.items()}

    def of(self, flat: int, form: Format) -> int:
        """Bytes of a slot that holds the block in this format; compressed ones have full slots."""
        if form in LOSSLESS:
            return int(self.full[flat])
        return int(self._others.get(form, self.reduced)[flat])


class StoreBook:
    """One store as the brain sees it. Arrays are by flat block index."""

    def __init__(self, info: StoreInfo, *, size: int) -> None:
        """Start empty."""
        self.info = info
        self.capacity_bytes = info.capacity_bytes
        self.draining = False
        self.used_bytes = 0
        self.pending_bytes = 0
        self.background_bytes = 0  # of those, what nobody waits for
        self.full = np.zeros(size, dtype=bool)  # a verified full copy is listed
        self.reduced = np.zeros(size, dtype=bool)  # a verified reduced copy is listed
        self.coming = np.zeros(size, dtype=bool)  # a full copy is asked for or queued
        self.landed_ns = np.zeros(size, dtype=np.int64)
        self.left_ns = np.full(size, LONG_AGO_NS, dtype=np.int64)  # when the brain last emptied it
        self.kept: set[int] = set()  # blocks whose copies plans have promised to the others
        self.unknown_bytes = 0  # in use by the store's own report, but no copy and no claim of ours
        self.retry_ns: dict[tuple[int, Format], int] = {}
        self.pending: dict[tuple[int, Format], Pending] = {}
        self.dropping: dict[tuple[int, Format], int] = {}  # asked at
        self.queue: deque[Wish] = deque()  # staging, by deadline
        self.later: deque[Wish] = deque()  # background: whenever the link is free

    @property
    def pool(self) -> bool:
        """Whether the brain fills and empties this store; a worker manages its own memory."""
        return self.info.tier in {Tier.HOST, Tier.CXL}

    @property
    def worker(self) -> bool:
        """Whether this is a device's fast memory."""
        return self.info.tier in {Tier.HBM, Tier.COMPRESSED}

    def free_bytes(self, sizes: Sizes) -> int:
        """Bytes that nothing holds, claims or waits for; drops on their way count as free."""
        queued = sum(sizes.of(wish.flat, wish.format) for wish in self.wishes())
        leaving = sum(sizes.of(flat, form) for flat, form in self.dropping)
        taken = self.used_bytes + self.pending_bytes + self.unknown_bytes
        return self.capacity_bytes - taken - queued + leaving

    def fits(self, nbytes: int) -> bool:
        """Whether the bytes fit now, counting what is on its way."""
        taken = self.used_bytes + self.pending_bytes + self.unknown_bytes
        return taken + nbytes <= self.capacity_bytes

    def wishes(self) -> Iterator[Wish]:
        """All queued copies, staging first."""
        return chain(self.queue, self.later)

    def wish(self, wish: Wish) -> None:
        """Queue a copy for this store: by its service, and within it by its deadline."""
        if service_of(wish.reason) is Service.BACKGROUND:
            self.later.append(wish)
        else:
            last = self.queue[-1].due_ns or _NEVER if self.queue else 0
            self.queue.append(wish)
            if wish.due_ns and wish.due_ns < last:  # else it is in order already
                self.queue = deque(sorted(self.queue, key=lambda one: one.due_ns or _NEVER))
        if wish.format is Format.BF16:
            self.coming[wish.flat] = True

    def ask(
        self, wish: Wish, *, nbytes: int, now_ns: int, from_format: Format | None = None
    ) -> None:
        """Claim the bytes of a transfer, or of a change in place, that is asked for now."""
        self.pending[wish.flat, wish.format] = Pending(
            nbytes=nbytes, reason=wish.reason, asked_ns=now_ns, from_format=from_format
        )
        self.pending_bytes += nbytes
        if service_of(wish.reason) is Service.BACKGROUND:
            self.background_bytes += nbytes

    def settle(self, flat: int, form: Format) -> Pending | None:
        """End the claim of a transfer, however it ended."""
        pending = self.pending.pop((flat, form), None)
        if pending is not None:
            self.pending_bytes -= pending.nbytes
            if service_of(pending.reason) is Service.BACKGROUND:
                self.background_bytes -= pending.nbytes
            if form is Format.BF16:
                self.coming[flat] = False
        return pending

    def break_promise(self, flat: int) -> None:
        """Forget that a plan has promised a copy, if it is neither here nor on its way."""
        if not self.full[flat] and (flat, Format.BF16) not in self.pending:
            self.kept.discard(flat)

    def forget_wishes(self) -> None:
        """Empty the queue."""
        for wish in self.wishes():
            if wish.format is Format.BF16:
                self.coming[wish.flat] = False
        self.queue.clear()
        self.later.clear()
