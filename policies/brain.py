"""The brain of the cluster: events in, commands out.

Decides where copies of blocks should be, and refuses what the guardrail refuses. Must not know
Ray, clocks, links or how a command is carried out. `handle` is the only mutating door; a shell
actor carries the commands out and turns results into events, so the same brain runs live and in
replay of a journal: same events, same commands, byte for byte.

Storage holds a verified copy of every block (the checkpoint), so it is never listed and the last
copy is never lost. Reports of one store arrive in the order in which they happened; reports of a
store that is gone, or of an older incarnation, are ignored, counted and noted.

Invariants (`validate`): listed and claimed bytes of a store never exceed its capacity; epochs
only grow; the states of all blocks at a store add up; the books match the directory.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from hotset.policies import placement
from hotset.policies.books import StoreBook, Wish
from hotset.policies.directory import CopyKey
from hotset.policies.ledger import ClusterLedger
from hotset.policies.types import (
    STORAGE,
    BlockId,
    BlockInfo,
    Command,
    Copy,
    CopyDropped,
    CopyLanded,
    DropCopy,
    Event,
    Format,
    PublishEpoch,
    Reason,
    RouterCounts,
    StartTransfer,
    StoreDraining,
    StoreJoined,
    StoreLost,
    Tick,
    Tier,
    TransferFailed,
    Veto,
    WakeAt,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from hotset.policies.config import PolicyConfig
    from hotset.policies.guard import Guardrail, Refusal

_NEAR = {Tier.HOST: 0, Tier.HBM: 1, Tier.COMPRESSED: 1, Tier.CXL: 2, Tier.STORAGE: 3}
"""Order of sources: host memory is faster to read than the memory of a busy device."""
_MOST_SOURCES = 3


class ClusterBrain(ClusterLedger):
    """Pure state machine over the events of hotset.policies.types."""

    def __init__(
        self,
        blocks: Sequence[BlockInfo],
        *,
        config: PolicyConfig | None = None,
        guard: Guardrail | None = None,
        epoch: int = 0,
    ) -> None:
        """`blocks`: every block of the checkpoint. `epoch`: the last one published before."""
        super().__init__(blocks, config=config, guard=guard, epoch=epoch)
        self._plan_at_ns = 0
        self._out: list[Command] = []

    # --- the only mutating door --------------------------------------------------------------

    def handle(self, event: Event) -> list[Command]:
        """Take in one event; return what the cluster should do now, in order."""
        self._now_ns = max(self._now_ns, event.now_ns)
        self._out = []
        match event:
            case StoreJoined():
                self._joined(event)
            case StoreLost():
                self._lost(event)
            case StoreDraining():
                self._draining(event)
            case RouterCounts():
                self._counted(event)
            case CopyLanded():
                self._landed(event)
            case CopyDropped():
                self._dropped(event)
            case TransferFailed():
                self._failed(event)
            case Tick():
                self._tick()
        return self._out

    def _joined(self, event: StoreJoined) -> None:
        info = event.store
        old = self._books.get(info.name)
        if old is not None and info.incarnation < old.info.incarnation:
            self.ignored += 1
            return
        if old is not None and old.info == info:
            book, again = old, True
            reported = {(copy.block, copy.format) for copy in event.copies}
            for copy in self._directory.of_store(info.name):
                if (copy.block, copy.format) not in reported:
                    self._unlist(book, CopyKey(copy.block, info.name, copy.format))
        else:
            if old is not None:
                self._forget(old)
            book, again = StoreBook(info, size=len(self.blocks)), False
            self._books[info.name] = book
        for copy in event.copies:
            self._admit(copy, source=info.name, reason=Reason.JOINED)
        cause = f"joined {info.name}:{info.incarnation}"
        puts: list[placement.Put | placement.Take] = []
        if book.worker and not again:
            puts += placement.fill_worker(self._view(), book)
        puts += placement.cover(self._view(), reason=Reason.WARM)
        self._plan(puts, cause=cause, reason=Reason.JOINED)
        if info.tier is Tier.HOST and not again:
            self._plan(placement.fill_host(self._view()), cause=cause, reason=Reason.JOINED)
        self._out.append(WakeAt(at_ns=self._now_ns + self.config.tick_ns))

    def _lost(self, event: StoreLost) -> None:
        book = self._books.get(event.store)
        if book is None or event.incarnation < book.info.incarnation:
            self.ignored += 1
            return
        self._forget(book)
        del self._books[event.store]
        self._plan(
            placement.cover(self._view(), reason=Reason.LOST),
            cause=f"lost {event.store}:{event.incarnation}",
            reason=Reason.LOST,
            always=True,
        )

    def _draining(self, event: StoreDraining) -> None:
        book = self._current(event.store, event.incarnation)
        if book is None or book.draining:
            return
        book.draining = True
        book.forget_wishes()
        self._plan(
            placement.cover(self._view(), reason=Reason.DRAIN),
            cause=f"draining {event.store}",
            reason=Reason.DRAIN,
            always=True,
        )

    def _counted(self, event: RouterCounts) -> None:
        known = [(self._flat[block], count) for block, count in event.counts if block in self._flat]
        self._popularity.add(
            np.array([flat for flat, _ in known], dtype=np.intp),
            tokens=np.array([min(count, 1 << 35) for _, count in known], dtype=np.int64),
            passed=event.tokens,
        )

    def _landed(self, event: CopyLanded) -> None:
        copy = event.copy
        book = self._current(copy.store, copy.incarnation, block=copy.block)
        flat = self._flat.get(copy.block)
        if book is None or flat is None:
            return
        book.settle(flat, copy.format)
        book.retry_ns.pop((flat, copy.format), None)
        self._admit(copy, source=event.source, reason=event.reason)
        self._pump(book)

    def _dropped(self, event: CopyDropped) -> None:
        book = self._current(event.store, event.incarnation, block=event.block)
        key = CopyKey(event.block, event.store, event.format)
        copy = self._directory.get(key)
        if book is None or event.block not in self._flat:
            return
        if copy is not None and 0 < event.generation < copy.generation:
            self._ignore(event.block, f"drop of generation {event.generation}", store=event.store)
            return
        self._unlist(book, key)
        self._note(
            event.block,
            f"dropped {event.format.value} at {event.store}",
            event.reason,
            store=event.store,
        )
        self._pump(book)

    def _failed(self, event: TransferFailed) -> None:
        book = self._current(event.store, event.incarnation, block=event.block)
        flat = self._flat.get(event.block)
        if book is None or flat is None:
            return
        pending = book.settle(flat, event.format)
        self._note(
            event.block,
            f"failed {event.format.value} at {event.store}",
            event.reason,
            store=event.store,
        )
        if pending is None:
            return
        book.retry_ns[flat, event.format] = self._now_ns + self.config.retry_ns
        if event.reason is Reason.VETO_MEMORY:  # the store knows its room better than our sums
            book.capacity_bytes = book.used_bytes + book.pending_bytes
            book.forget_wishes()
        self._pump(book)

    def _tick(self) -> None:
        if self._now_ns < self._plan_at_ns:
            self._out.append(WakeAt(at_ns=self._plan_at_ns))
            return
        self._plan_at_ns = self._now_ns + self.config.tick_ns
        for name in sorted(self._books):
            self._expire(self._books[name])
        cause = f"tick {self._now_ns}"
        moves: list[placement.Put | placement.Take] = []
        moves += placement.cover(self._view(), reason=Reason.STAGE)
        if not moves:
            moves = placement.rebalance(self._view())
        self._plan(moves, cause=cause, reason=Reason.REBALANCE)
        for name in sorted(self._books):
            self._pump(self._books[name])
        self._out.append(WakeAt(at_ns=self._plan_at_ns))

    # --- one function for each side effect ---------------------------------------------------

    def _plan(
        self,
        moves: Sequence[placement.Put | placement.Take],
        *,
        cause: str,
        reason: Reason,
        always: bool = False,
    ) -> None:
        """Take a new target: publish its epoch, then ask for what it needs."""
        if not moves and not always:
            return
        self.epoch += 1
        self._out.append(PublishEpoch(epoch=self.epoch, cause=cause, reason=reason))
        touched: dict[str, StoreBook] = {}
        for move in moves:
            touched[move.book.info.name] = move.book
            if isinstance(move, placement.Take):
                self._take(move, cause=cause)
            else:
                self._put(move, cause=cause)
        for book in touched.values():
            self._pump(book)

    def _put(self, put: placement.Put, *, cause: str) -> None:
        block = self.blocks[put.flat].block
        refusal = self.guard.check_demotion(block, put.format)
        if refusal is not None:
            self._veto(put.book, block, put.format, refusal)
            return
        put.book.wish(Wish(put.flat, put.format, put.reason, cause))

    def _take(self, take: placement.Take, *, cause: str) -> None:
        block = self.blocks[take.flat].block
        name = take.book.info.name
        going = self._directory.get(CopyKey(block, name, Format.BF16))
        refusal = self.guard.check_drop(block, self._directory.of_block(block), going=going)
        if refusal is not None:
            self._veto(take.book, block, Format.BF16, refusal)
            return
        take.book.dropping[take.flat, Format.BF16] = self._now_ns
        self._drop(name, block, Format.BF16, cause=cause, reason=take.reason)

    def _drop(
        self, store: str, block: BlockId, form: Format, *, cause: str, reason: Reason
    ) -> None:
        self._note(block, f"asked {store} to drop {form.value}", reason, store=store)
        self._out.append(
            DropCopy(
                epoch=self.epoch,
                store=store,
                block=block,
                format=form,
                cause=cause,
                reason=reason,
            )
        )

    def _pump(self, book: StoreBook) -> None:
        """Ask for queued copies while there is room for them and for their bytes in flight."""
        while book.queue and not book.draining:
            wish = book.queue[0]
            nbytes = self._sizes.of(wish.flat, wish.format)
            block = self.blocks[wish.flat].block
            name = book.info.name
            if self._directory.get(CopyKey(block, name, wish.format)) is not None:
                book.queue.popleft()
                book.coming[wish.flat] = (wish.flat, Format.BF16) in book.pending
                continue
            flow = book.pending_bytes + nbytes <= self.config.warm_bytes_in_flight
            if not book.fits(nbytes) or (book.pending and not flow):
                return
            book.queue.popleft()
            book.ask(wish, nbytes=nbytes, now_ns=self._now_ns)
            self._note(block, f"asked {name} to fetch {wish.format.value}", wish.reason, store=name)
            self._out.append(
                StartTransfer(
                    epoch=self.epoch,
                    store=name,
                    block=block,
                    format=wish.format,
                    sources=self._sources(block, book, wish.format),
                    cause=wish.cause,
                    reason=wish.reason,
                )
            )

    def _sources(self, block: BlockId, book: StoreBook, form: Format) -> tuple[str, ...]:
        """Stores to read from, best first, then storage.

        A reduced copy may be encoded by the reader from a full one, its own before others'.
        """
        me, node = book.info.name, book.info.node
        found: list[tuple[int, int, int, str]] = []
        turn = self._flat[block]
        for copy in self._directory.of_block(block):
            if copy.format is not form and copy.format is not Format.BF16:
                continue
            if copy.store == me and copy.format is form:
                continue
            info = self._books[copy.store].info
            away = 0 if copy.store == me else 1 + (info.node != node)
            # Equal sources take turns by block, so that a warm-up reads from all of them.
            found.append((away, _NEAR[info.tier], (turn + info.incarnation) % 7, copy.store))
        found.sort()
        names = dict.fromkeys(name for _, _, _, name in found)
        return (*list(names)[:_MOST_SOURCES], STORAGE)

    def _admit(self, copy: Copy, *, source: str, reason: Reason) -> None:
        """List a copy that exists, unless it breaks the budget or the precision floor."""
        book = self._books[copy.store]
        flat = self._flat.get(copy.block)
        if flat is None or copy.incarnation != book.info.incarnation:
            self._ignore(copy.block, "copy of another version", store=copy.store)
            return
        key = CopyKey(copy.block, copy.store, copy.format)
        old = self._directory.get(key)
        if old is not None and old.generation > copy.generation:
            self._ignore(copy.block, f"copy of generation {copy.generation}", store=copy.store)
            return
        nbytes = self._sizes.of(flat, copy.format)
        used = book.used_bytes - (nbytes if old is not None else 0)
        refusal = self.guard.check_fit(
            nbytes,
            used_bytes=used,
            capacity_bytes=book.info.capacity_bytes,
            store=copy.store,
        ) or self.guard.check_demotion(copy.block, copy.format)
        if refusal is not None:
            self._veto(book, copy.block, copy.format, refusal)
            if old is None:
                self._drop(
                    copy.store, copy.block, copy.format, cause="refused", reason=refusal.reason
                )
            return
        self._list(book, copy)
        self._note(
            copy.block,
            f"landed {copy.format.value} at {copy.store} from {source}",
            reason,
            store=copy.store,
        )
        self._release_claims(book)

    def _release_claims(self, book: StoreBook) -> None:
        """A worker may fill room that was claimed for the brain's own wishes: it comes first."""
        while book.pending and book.used_bytes + book.pending_bytes > book.capacity_bytes:
            flat, form = next(reversed(book.pending))
            book.settle(flat, form)
            self._note(
                self.blocks[flat].block,
                f"gave up its claim at {book.info.name}",
                None,
                store=book.info.name,
            )

    def _forget(self, book: StoreBook) -> None:
        name = book.info.name
        for copy in self._directory.of_store(name):
            self._unlist(book, CopyKey(copy.block, name, copy.format))
            self._note(copy.block, f"lost {copy.format.value} with {name}", Reason.LOST, store=name)
        for flat, _ in book.pending:
            self._note(
                self.blocks[flat].block, f"transfer ended with {name}", Reason.LOST, store=name
            )

    def _expire(self, book: StoreBook) -> None:
        """Stop waiting for transfers and drops that nobody has reported on."""
        before = self._now_ns - self.config.transfer_timeout_ns
        late = [key for key, pending in book.pending.items() if pending.asked_ns <= before]
        for flat, form in late:
            book.settle(flat, form)
            book.retry_ns[flat, form] = self._now_ns + self.config.retry_ns
            self._note(
                self.blocks[flat].block,
                f"no word from {book.info.name}",
                Reason.TIMEOUT,
                store=book.info.name,
            )
        stuck = [key for key, asked_ns in book.dropping.items() if asked_ns <= before]
        for key in stuck:
            del book.dropping[key]
        if stuck:
            book.forget_wishes()
        for key in [key for key, at_ns in book.retry_ns.items() if at_ns <= self._now_ns]:
            del book.retry_ns[key]

    def _veto(self, book: StoreBook, block: BlockId, form: Format, refusal: Refusal) -> None:
        self._note(
            block, f"refused {form.value} at {book.info.name}", refusal.reason, store=book.info.name
        )
        self._out.append(
            Veto(
                epoch=self.epoch,
                store=book.info.name,
                block=block,
                format=form,
                reason=refusal.reason,
                bound=refusal.bound,
            )
        )

    def _current(
        self, store: str, incarnation: int, *, block: BlockId | None = None
    ) -> StoreBook | None:
        """Return the store's book unless the event is of another incarnation (0: any)."""
        book = self._books.get(store)
        if book is not None and incarnation in {0, book.info.incarnation}:
            return book
        self._ignore(block, f"report of incarnation {incarnation}", store=store)
        return None

    def _ignore(self, block: BlockId | None, what: str, *, store: str) -> None:
        self.ignored += 1
        if block is not None and block in self._flat:
            self._note(block, f"ignored {what} at {store}", Reason.STALE, store=store)
