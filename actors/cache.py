"""A worker's fast memory: the residency policy decides, this module carries out and delivers.

Request threads ask for the experts of a layer; blocks that are not here are fetched once, however
many requests wait for them, and each waiter gets the block pinned in its own queue. A request that
finds no slot free waits in line: every pinned slot belongs to a thread that is about to compute it
and needs nothing else for that, so the line always moves.

Invariants: policy and slab agree on what is here (both change under one lock); a delivered block
is pinned in both until `done`. Must not know Ray, models or peers' compute.
"""

from __future__ import annotations

import threading
from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

from hotset.actors.fetcher import Landing, Want
from hotset.policies.types import LOSSLESS, BlockId, Format, Reason

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Sequence

    from hotset.actors.fetcher import Fetcher
    from hotset.actors.store import Store
    from hotset.actors.uses import Uses
    from hotset.policies.plan import UseChances
    from hotset.policies.residency import LayerPlan, ResidencyPolicy
    from hotset.transport.inbox import Inbox
    from hotset.transport.slab import Slot


class Held(NamedTuple):
    """An expert that is here and pinned for its receiver, who gives it back with `done`."""

    layer: int
    expert: int
    slot: Slot
    format: Format
    source: str = ""
    transfer_id: int = 0
    reason: Reason = Reason.DEMAND
    trace: tuple[int, int] = (0, 0)  # of the request that asked for the transfer
    stands_in: bool = False  # a cheap copy, for the full one that is on its way


class Lost(NamedTuple):
    """An expert that no source could deliver."""

    layer: int
    expert: int
    error: str


Delivery = Held | Lost


@dataclass(slots=True)
class _Flight:
    """A block on its way (or in line for a slot), and who waits for it."""

    reason: Reason
    trace: tuple[int, int]
    parent: int
    full: bool = False  # bring full precision, whatever the plan would take
    waiters: list[Inbox[Delivery]] = field(default_factory=list)


def _full(_block: BlockId) -> Format:
    return Format.BF16


def _always(_block: BlockId, _form: Format) -> bool:
    return True


def _ignore(_landing: Landing) -> None:
    return None


class HotCache:
    """Blocks in one device's slots, under a residency policy."""

    def __init__(  # noqa: PLR0913 - the parts of one cache, by keyword
        self,
        *,
        store: Store,
        fetcher: Fetcher,
        policy: ResidencyPolicy,
        payload_nbytes: dict[Format, int],
        uses: Uses | None = None,
        choose: Callable[[BlockId], Format] = _full,
        arrived: Callable[[Landing], None] = _ignore,
        kept: Callable[[], Collection[tuple[int, int]]] = frozenset,
    ) -> None:
        """`payload_nbytes` is the payload of a block by format (the policy counts whole slots).

        `uses` is told what became of each landed block. `choose` names the format to fetch a block
        in, `arrived` is called for each block that has landed, on the engine's thread. `kept` are
        the blocks that a plan has promised to other workers: they are not evicted.
        """
        self._store = store
        self._fetcher = fetcher
        self._policy = policy
        self._payload_nbytes = payload_nbytes
        self._uses = uses
        self._choose = choose
        self._arrived = arrived
        self._kept = kept
        self._flights: dict[BlockId, _Flight] = {}
        self._line: deque[BlockId] = deque()
        self._lock = threading.Lock()

    # --- request threads ------------------------------------------------------------------------

    def begin(  # noqa: PLR0913 - one layer of one step
        self,
        layer: int,
        experts: Sequence[int],
        counts: Sequence[int],
        *,
        step: int,
        request: int,
        inbox: Inbox[Delivery],
        may_stand_in: Callable[[BlockId, Format], bool] = _always,
    ) -> tuple[list[Held], LayerPlan]:
        """Pin what is here, join what is coming, and say what is missing or worth a prefetch.

        Each expert of `plan.arriving` will be delivered to `inbox` exactly once; so will one whose
        cheap copy is here and whose full one is coming, unless `may_stand_in` takes the cheap one.
        """
        with self._lock:
            plan = self._policy.routed(layer, experts, counts, step=step, request=request)
            held: list[Held] = []
            for expert in plan.resident:
                coming = self._flights.get(BlockId(layer, expert))
                if coming is None:
                    held.append(self._hold(layer, expert))
                    continue
                cheap = self._policy.format(layer, expert)
                if cheap is not None and may_stand_in(BlockId(layer, expert), cheap):
                    held.append(self._hold(layer, expert)._replace(stands_in=True))
                else:
                    coming.waiters.append(inbox)
            for expert in plan.arriving:
                self._flights[BlockId(layer, expert)].waiters.append(inbox)
        return held, plan

    def fetch(  # noqa: PLR0913 - who asks, and why
        self,
        layer: int,
        experts: Sequence[int],
        *,
        inbox: Inbox[Delivery],
        trace: tuple[int, int],
        parent: int,
        reason: Reason = Reason.DEMAND,
        full: bool = False,
    ) -> None:
        """Bring missing experts here; each is delivered to `inbox` exactly once.

        `full`: at full precision, whatever `choose` says; a copy that is here serves as it is.
        """
        wants: list[Want] = []
        with self._lock:
            for expert in experts:
                block = BlockId(layer, expert)
                flight = self._flights.get(block)
                if flight is not None:
                    flight.waiters.append(inbox)
                elif self._policy.format(layer, expert) is not None:
                    inbox.put(self._hold(layer, expert))
                else:
                    flight = _Flight(reason=reason, trace=trace, parent=parent, full=full)
                    flight.waiters.append(inbox)
                    self._flights[block] = flight
                    self._admit_or_queue(block, flight, wants)
        self._fetcher.start(wants)

    def prefetch(
        self,
        blocks: Sequence[tuple[int, int]],
        *,
        reason: Reason = Reason.PREFETCH,
        trace: tuple[int, int] = (0, 0),
        parent: int = 0,
    ) -> bool:
        """Start bringing blocks here that nobody waits for; False when there is no room for all."""
        wants: list[Want] = []
        all_fit = True
        with self._lock:
            if self._line:
                return False  # somebody waits for a slot
            for layer, expert in blocks:
                block = BlockId(layer, expert)
                if block in self._flights or self._policy.format(layer, expert) is not None:
                    continue
                flight = _Flight(reason=reason, trace=trace, parent=parent)
                want = self._admit(block, flight, evict=reason is not Reason.WARM)
                if want is None:
                    all_fit = False
                    break
                self._flights[block] = flight
                wants.append(want)
        self._fetcher.start(wants)
        return all_fit

    def steer(self, least_chance: float, *, missed_ns: int | None = None) -> None:
        """Tell the policy the least chance of use at which a prefetch pays, and a miss's price."""
        self._policy.steer(least_chance, missed_ns=missed_ns)

    def use_chances(self, layer: int, expert: int) -> UseChances:
        """How likely a block that is not here is used again, and what would make room for it."""
        with self._lock:
            return self._policy.use_chances(layer, expert)

    def abandon(self, inbox: Inbox[Delivery], held: Sequence[Held]) -> None:
        """A layer failed: take back its holds, those delivered and those still to come."""
        with self._lock:
            for flight in self._flights.values():
                flight.waiters = [waiter for waiter in flight.waiters if waiter is not inbox]
            for block in [b for b in self._line if not self._flights[b].waiters]:
                self._line.remove(block)
                del self._flights[block]
        for one in (*held, *_delivered(inbox)):
            self.done(one)

    @property
    def waiting(self) -> bool:
        """Whether a block stands in line for a slot."""
        return bool(self._line)

    def done(self, held: Held) -> None:
        """Give a pin back; a block in line may take the slot."""
        with self._lock:
            self._policy.unpin(held.layer, held.expert)
            self._store.unpin(held.slot)
            wants = self._serve_line()
        self._fetcher.start(wants)

    def hold(self, layer: int, expert: int) -> Held | None:
        """Pin an expert for a peer's tokens, if it is here."""
        with self._lock:
            if self._policy.format(layer, expert) is None:
                return None
            return self._hold(layer, expert)

    # --- controller's commands ------------------------------------------------------------------

    def drop(self, block: BlockId, *, reason: Reason, only: Format | None = None) -> bool:
        """Free a block unless somebody computes with it right now; `only` in this format."""
        with self._lock:
            fmt = self._policy.format(block.layer, block.index)
            if fmt is None or block in self._flights or only not in {None, fmt}:
                return False
            if self._store.slab.pins(self._slot(block, fmt)):
                return False
            self._drop(block, fmt, reason)
            wants = self._serve_line()
        self._fetcher.start(wants)
        return True

    def upgrade(self, block: BlockId, *, reason: Reason) -> bool:
        """Fetch the full copy of a block of which a cheap one is here; that stays until then.

        False when there is no cheap copy, the block is on its way, or there is no room.
        """
        layer, expert = block.layer, block.index
        with self._lock:
            cheap = self._policy.format(layer, expert)
            if cheap is None or cheap in LOSSLESS or block in self._flights or self._line:
                return False
            flight = _Flight(reason=reason, trace=(0, 0), parent=0, full=True)
            slot = self._slot(block, cheap)
            self._policy.pin(layer, expert)  # it must not make way for its own successor,
            self._store.slab.pin(slot)  # nor with those that share its super-slot
            want = self._admit(block, flight, evict=True)
            self._policy.unpin(layer, expert)
            self._store.unpin(slot)
            if want is None:
                return False
            self._flights[block] = flight
        self._fetcher.start([want])
        return True

    def replace(
        self, held: Held, fmt: Format, payload: memoryview, *, reason: Reason = Reason.DEMOTE
    ) -> bool:
        """Put another format of a held block in its place; takes the hold back.

        False when somebody else holds the block too or another copy is coming, and nothing has
        changed; or when another took the slot meanwhile, and the block is not here any more.
        """
        block = BlockId(held.layer, held.expert)
        with self._lock:
            self._policy.unpin(held.layer, held.expert)
            alone = self._store.slab.pins(held.slot) == 1
            self._store.unpin(held.slot)
            if not alone or block in self._flights:
                return False
            self._store.drop(block, held.format, reason=reason)
            slot = self._store.slab.allocate(len(payload))
            if slot is None:  # a read that went on in a fresh slot was faster
                self._policy.dropped(held.layer, held.expert, reason=Reason.EVICT)
            else:
                self._store.fill(slot, payload, block=block, fmt=fmt, reason=reason)
                self._policy.demoted(held.layer, held.expert, fmt)
            wants = self._serve_line()
        self._fetcher.start(wants)
        return slot is not None

    # --- engine's thread ------------------------------------------------------------------------

    def _landed(self, landing: Landing) -> None:
        layer, expert = landing.block.layer, landing.block.index
        with self._lock:
            flight = self._flights[landing.block]
            if landing.slot is None:
                self._policy.failed(layer, expert)
                wants = self._fail(landing, flight)
            else:
                del self._flights[landing.block]
                before = self._policy.format(layer, expert)
                self._store.adopt(landing)
                self._policy.landed(layer, expert, landing.format)
                if before is not None and before is not landing.format:
                    self._store.drop(landing.block, before, reason=Reason.PROMOTE)
                if self._uses is not None:
                    self._uses.landed(landing)
                    if flight.waiters:
                        self._uses.used(landing.block)
                for inbox in flight.waiters:
                    self._policy.pin(layer, expert)
                    self._store.slab.pin(landing.slot)
                    inbox.put(
                        Held(
                            layer=layer,
                            expert=expert,
                            slot=landing.slot,
                            format=landing.format,
                            source=landing.source,
                            transfer_id=landing.transfer_id,
                            reason=flight.reason,
                            trace=landing.trace,
                        )
                    )
                self._store.unpin(landing.slot)  # the pin that it arrived with
                wants = self._serve_line()
        self._fetcher.start(wants)
        if landing.slot is not None:
            self._arrived(landing)

    def _fail(self, landing: Landing, flight: _Flight) -> list[Want]:
        cheap = landing.format not in LOSSLESS  # whoever had it so may be gone: storage never is
        if flight.waiters and (landing.no_slot or (cheap and not flight.full)):
            flight.full = flight.full or cheap
            self._line.appendleft(landing.block)
            return self._serve_line()
        del self._flights[landing.block]
        reason = Reason.VETO_MEMORY if landing.no_slot else Reason.LOST
        self._store.report_failure(landing.block, landing.format, reason=reason)
        for inbox in flight.waiters:
            inbox.put(Lost(landing.block.layer, landing.block.index, landing.error))
        return self._serve_line()

    # --- under the lock -------------------------------------------------------------------------

    def _hold(self, layer: int, expert: int) -> Held:
        fmt = self._policy.format(layer, expert)
        assert fmt is not None  # noqa: S101 - the caller has asked
        slot = self._store.pin(BlockId(layer, expert), fmt)
        assert slot is not None, "policy and store disagree"  # noqa: S101 - own bug
        self._policy.pin(layer, expert)
        if self._uses is not None:
            self._uses.used(BlockId(layer, expert))
        return Held(layer=layer, expert=expert, slot=slot, format=fmt)

    def _slot(self, block: BlockId, fmt: Format) -> Slot:
        slot = self._store.pin(block, fmt)
        assert slot is not None, "policy and store disagree"  # noqa: S101 - own bug
        self._store.unpin(slot)
        return slot

    def _drop(self, block: BlockId, fmt: Format, reason: Reason) -> None:
        self._policy.dropped(block.layer, block.index, reason=reason)
        if self._uses is not None:
            self._uses.dropped(block)
        self._store.drop(block, fmt, reason=reason)

    def _admit_or_queue(self, block: BlockId, flight: _Flight, wants: list[Want]) -> None:
        want = None if self._line else self._admit(block, flight, evict=True)
        if want is None:
            self._line.append(block)
        else:
            wants.append(want)

    def _admit(self, block: BlockId, flight: _Flight, *, evict: bool) -> Want | None:
        """Make room and claim a slot; None when everything is pinned or on its way."""
        fmt = Format.BF16 if flight.full else self._choose(block)
        want_bytes = self._policy.nbytes(fmt)
        slot = None
        while slot is None:
            if self._policy.room(want_bytes):
                slot = self._store.slab.allocate(self._payload_nbytes[fmt])
                if slot is not None:
                    break
                # Room by the books, but parts of slots lie apart or a slot is in quarantine.
                want_bytes = self._policy.capacity_bytes + 1
            victim = self._policy.victim(want_bytes) if evict else None
            if victim is not None and (victim.layer, victim.expert) in (kept := self._kept()):
                victim = self._policy.victim(want_bytes, needed=kept)
            if victim is None:
                return None
            leaving = [(BlockId(victim.layer, victim.expert), victim.format)]
            if want_bytes > self._policy.capacity_bytes:  # a whole super-slot has to become free
                leaving = self._sharing(*leaving[0]) or leaving
            for one, form in leaving:
                self._drop(one, form, Reason.EVICT)
            want_bytes = self._policy.nbytes(fmt)
        self._policy.in_flight(block.layer, block.index, fmt, flight.reason)
        return Want(
            block=block,
            format=fmt,
            slot=slot,
            nbytes=self._payload_nbytes[fmt],
            on_end=self._landed,
            reason=flight.reason,
            trace=flight.trace,
            parent=flight.parent,
        )

    def _sharing(self, block: BlockId, form: Format) -> list[tuple[BlockId, Format]]:
        """All copies in the super-slot of this one; none where one of them cannot leave now."""
        found = self._store.sharing(self._slot(block, form))
        kept = self._kept()
        stuck = any(
            self._store.slab.pins(slot) or one in self._flights or (one.layer, one.index) in kept
            for one, _, slot in found
        )
        return [] if stuck else [(one, fmt) for one, fmt, _ in found]

    def _serve_line(self) -> list[Want]:
        wants: list[Want] = []
        while self._line:
            block = self._line[0]
            want = self._admit(block, self._flights[block], evict=True)
            if want is None:
                break
            self._line.popleft()
            wants.append(want)
        return wants


def _delivered(inbox: Inbox[Delivery]) -> list[Held]:
    found = []
    while not inbox.empty():
        one = inbox.get_nowait()
        if isinstance(one, Held):
            found.append(one)
    return found
