"""A store that also writes: it offers its copies, and pulls what is offered to it.

Writing is offering (`hotset/transport/offers.py`), so the same things are seen as for reads: when
bytes land in painted slots, how each offer ended at the source, and whether a block that landed is
what it must be.
"""

from __future__ import annotations

import time
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Final

from hotset.errors import TransportError
from hotset.transport.exchange import Exchange
from hotset.transport.offers import Offers, Pushed, push
from hotset.transport.slab import Slot
from tests.transport.stores import SLACK_NS, Begun, Hands, Report, Shape, Strike

if TYPE_CHECKING:
    from hotset.transport.base import Expect, ItemResult, PeerInfo
    from tests.transport.peer import Source

TOKEN: Final = b"t" * 32


class Offering(Hands):
    """Both ends of an offer."""

    def __init__(self, shape: Shape) -> None:
        super().__init__(shape)
        self.token = TOKEN if shape.address else b""
        self.offers = Offers(
            slab=self.slab, engine=self.engine, token=self.token, landed=self._landed
        )
        self.exchange = Exchange(
            self.engine.info, token=self.token, host=shape.address or "127.0.0.1",
            on_offer=self.offers.handle,
        )  # fmt: skip
        self.pool = ThreadPoolExecutor(8, thread_name_prefix="push")
        self.pushes: list[Future[tuple[Pushed, int]]] = []
        self.push_deadline_ns = 0
        self.landed: list[tuple[Slot, int]] = []
        self.painted_room: list[Slot] = []

    def describe(self) -> tuple[PeerInfo, list[Source], tuple[str, int]]:  # type: ignore[override] # one more
        info, copies = super().describe()
        return info, copies, self.exchange.address

    # --- as a source ------------------------------------------------------------------------------

    def offer(self, to: tuple[str, int], seconds: float) -> None:
        """Begin to offer every copy at once."""
        self.push_deadline_ns = time.monotonic_ns() + int(seconds * 1e9)
        _, copies, _ = self.describe()
        self.pushes = [self.pool.submit(self._push, to, copy) for copy in copies]

    def _push(self, to: tuple[str, int], copy: Source) -> tuple[Pushed, int]:
        item = copy.item(Slot(0, copy.nbytes, 0, 0))
        pushed = push(
            self.engine.info(), remote_offset=item.remote_offset, expect=item.expect, to=to,
            deadline_ns=self.push_deadline_ns, token=self.token,
        )  # fmt: skip
        return pushed, time.monotonic_ns()

    def pushed(self) -> Report:
        """How the offers ended; `after_deadline_ns` is that of the last one."""
        left = max(0, self.push_deadline_ns - time.monotonic_ns()) + 4 * SLACK_NS
        end = time.monotonic_ns() + left
        found: list[tuple[Pushed, int]] = []
        for future in self.pushes:
            try:
                found.append(future.result(max(0.0, (end - time.monotonic_ns()) / 1e9)))
            except TimeoutError:
                return Report(["hung"], [], left, [], 0, 0)
        return Report(
            [pushed.status.value for pushed, _ in found],
            sorted({pushed.error for pushed, _ in found if pushed.error}),
            max(ended for _, ended in found) - self.push_deadline_ns,
            [],
            0,
            0,
        )

    # --- as a destination -------------------------------------------------------------------------

    def room(self, count: int) -> None:
        """Let `count` slots be free and painted."""
        self.wanted, self.ticket = [], None
        self.took(0.0)  # of an earlier offer, landed after its source had given up
        self.paint()  # so that no other slot is free
        slots = self._destinations(count)
        for slot in slots:
            self.slab.fail(slot)
        self.painted_room = slots

    def landing(self, seconds: float, strike: Strike | None) -> Begun:
        """Wait until offered bytes land in that room, or the offers are over; then strike."""
        end = time.monotonic() + seconds
        begun = self._strike(
            self.painted_room, strike, over=lambda: time.monotonic() > end or self._all_landed()
        )
        self.wanted = []
        return begun

    def _all_landed(self) -> bool:
        return len(self.landed) >= len(self.painted_room)

    def _landed(self, expect: Expect, result: ItemResult) -> None:
        """Keep the copy pinned until `took` has looked at it."""
        self.landed.append((result.dest, int.from_bytes(expect.key, "little")))

    def took(self, seconds: float) -> Report:
        """What landed here, compared with what it must be, once no offer is under way."""
        quiet = self._await(lambda: self.engine.in_flight == 0, seconds=seconds)
        corrupt = 0
        quarantined = self.engine.quarantined
        landed, self.landed = self.landed, []
        for slot, seed in landed:
            corrupt += bytes(self.slab.payload(slot)) != self._truth(seed).tobytes()
            self.slab.unpin(slot)
            self.slab.retire(slot)
        return Report(
            ["done"] * len(landed) if quiet else ["hung"], [], 0, [], quarantined, corrupt
        )

    def settle(self, seconds: float) -> float:
        """As for reads; offers that ended late are looked at and let go."""
        begin = time.monotonic()
        over = super().settle(seconds)
        late = self.took(1.0)
        if late.corrupt:
            raise TransportError(
                f"{late.corrupt} offered blocks are corrupt", remedy="find out why"
            )
        return time.monotonic() - begin if over >= 0 else over

    def close(self) -> str:
        """End the exchange first: it uses the engine."""
        self.pool.shutdown(wait=True)
        if not self.exchange.close():
            return "a handler of the exchange still runs"
        return super().close()
