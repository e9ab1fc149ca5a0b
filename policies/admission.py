"""Admission: what the brain asks of a link goes through its windows, and from where it is read.

Decides whether a copy may come now: the guardrail's floors, room on the link of its source by its
deadline, and that nothing needed sooner makes way for it. Must not know events, or how an order is
given; `orders` does.

Invariant: each booking belongs to a copy that is queued or asked for, and ends with it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from hotset.policies import score
from hotset.policies.guard import Refusal
from hotset.policies.ledger import ClusterLedger
from hotset.policies.schedule import service_of
from hotset.policies.types import LOSSLESS, STORAGE, BlockId, Format, Reason, Tier
from hotset.policies.windows import Key, Read, Windows, sooner

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy as np
    from numpy.typing import NDArray

    from hotset.policies.books import Pending, StoreBook
    from hotset.policies.config import PolicyConfig
    from hotset.policies.guard import Guardrail
    from hotset.policies.placement import Put
    from hotset.policies.schedule import Refused
    from hotset.policies.types import BlockInfo

_NEAR = {Tier.HOST: 0, Tier.HBM: 1, Tier.COMPRESSED: 1, Tier.CXL: 2, Tier.STORAGE: 3}
"""Order of sources: host memory is faster to read than the memory of a busy device."""
_MOST_SOURCES = 3


class Admission(ClusterLedger):
    """The books, with the windows of what is on its way."""

    def __init__(
        self,
        blocks: Sequence[BlockInfo],
        *,
        config: PolicyConfig | None = None,
        guard: Guardrail | None = None,
        epoch: int = 0,
    ) -> None:
        """See `ClusterLedger`."""
        super().__init__(blocks, config=config, guard=guard, epoch=epoch)
        self._windows = Windows()

    def _refused(self, put: Put, *, due_ns: int, counts: NDArray[np.int64]) -> Refusal | None:
        """Why a copy does not come; where its link has room for it in time, that is booked.

        `counts` is popularity.
        """
        block, book = self.blocks[put.flat].block, put.book
        refusal = self.guard.check_demotion(block, put.format)
        if refusal is not None:
            return refusal
        due = due_ns or put.due_ns
        late = None
        if put.displaces >= 0:
            late = self._displaces_sooner(put.flat, put.displaces, counts=counts)
        if late is None and due:
            source = self._sources(block, book, put.format)[0]
            late = self._book(book, put.flat, put.format, put.reason, source=source, due_ns=due)
        if late is None:
            return None
        return Refusal(reason=late.reason, bound=late.bound)

    def _displaces_sooner(
        self, flat: int, victim: int, *, counts: NDArray[np.int64]
    ) -> Refused | None:
        """Refuse to displace what is used as often; neutral while nobody knows how fast."""
        if counts[flat] > counts[victim] or not self._rates().tokens_per_s:
            return None
        horizon_ns = self.reuse_horizon_ns()
        if horizon_ns[flat] == score.NEVER_NS:
            return None
        return sooner(int(horizon_ns[flat]), victim_use_ns=int(horizon_ns[victim]))

    def _book(  # noqa: PLR0913 - the parts of a read, by name
        self,
        book: StoreBook,
        flat: int,
        form: Format,
        reason: Reason,
        *,
        source: str,
        due_ns: int = 0,
    ) -> Refused | None:
        """Book a read on its source's link. A guess of the link's speed refuses only drains."""
        tier = Tier.STORAGE if source == STORAGE else self._books[source].info.tier
        read = Read(
            source=source,
            spec=self._outlook.link(source, tier),
            service=service_of(reason),
            nbytes=self._sizes.of(flat, form),
            due_ns=due_ns,
        )
        key = Key(book.info.name, flat, form)
        judged = reason is Reason.DRAIN or self._outlook.measured(source)
        return self._windows.admit(key, read, now_ns=self._now_ns, judged=judged)

    def _settle(self, book: StoreBook, flat: int, form: Format) -> Pending | None:
        """End a transfer's claim and its booking, however it ended."""
        self._windows.end(Key(book.info.name, flat, form))
        return book.settle(flat, form)

    def _forget_wishes(self, book: StoreBook) -> None:
        """Empty a store's queue."""
        for wish in book.wishes():
            self._windows.end(Key(book.info.name, wish.flat, wish.format))
        book.forget_wishes()

    def _sources(self, block: BlockId, book: StoreBook, form: Format) -> tuple[str, ...]:
        """Stores to read from, best first, then storage.

        A store that compute keeps busy comes after all others. A reduced copy may be encoded by
        the reader from a full one, its own before others'.
        """
        me, node = book.info.name, book.info.node
        found: list[tuple[bool, int, int, int, str]] = []
        turn = self._flat[block]
        for copy in self._directory.of_block(block):
            if copy.format is not form and copy.format not in LOSSLESS:
                continue
            if copy.store == me and copy.format is form:
                continue
            info = self._books[copy.store].info
            away = 0 if copy.store == me else 1 + (info.node != node)
            # Equal sources take turns by block, so that a warm-up reads from all of them.
            pressed = self._outlook.pressed(copy.store)
            rotated = (turn + info.incarnation) % 7
            found.append((pressed, away, _NEAR[info.tier], rotated, copy.store))
        found.sort()
        names = dict.fromkeys(name for *_, name in found)
        return (*list(names)[:_MOST_SOURCES], STORAGE)

    def validate(self) -> None:
        """Assert the invariants of the books, and that bookings end with what they are for."""
        super().validate()
        wanted = {
            Key(name, flat, form)
            for name, book in self._books.items()
            for flat, form in (*book.pending, *((w.flat, w.format) for w in book.wishes()))
        }
        assert set(self._windows) <= wanted, set(self._windows) - wanted  # noqa: S101 - our own bugs
