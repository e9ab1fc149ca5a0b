"""What the brain does to its books and asks of stores: one function for each side effect.

Decides how a plan is carried out: who is asked when, from which sources, what is refused and what
waits. Must not know events; `brain` does. Background work waits while compute needs the link or
the store; the sum of what is asked never exceeds a store's budget.

Invariant: what is asked for is claimed in the same call, and every claim ends once (landed, failed,
given up, or expired).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from hotset.policies import placement
from hotset.policies.admission import Admission
from hotset.policies.books import Pending, StoreBook, Wish
from hotset.policies.directory import CopyKey
from hotset.policies.guard import Refusal, is_lossless
from hotset.policies.reformat import Change
from hotset.policies.schedule import Service, service_of
from hotset.policies.types import (
    BlockId,
    BlockInfo,
    CancelTransfer,
    ChangeFormat,
    Command,
    Copy,
    DropCopy,
    Format,
    PublishEpoch,
    Reason,
    StartTransfer,
    Veto,
)
from hotset.policies.windows import Key

if TYPE_CHECKING:
    from collections.abc import Sequence

    from hotset.policies.config import PolicyConfig
    from hotset.policies.guard import Guardrail


class Orders(Admission):
    """The books, and what changes them."""

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
        self._out: list[Command] = []

    def _plan(
        self,
        moves: Sequence[placement.Put | placement.Take],
        *,
        cause: str,
        reason: Reason,
        always: bool = False,
        due_ns: int = 0,
    ) -> None:
        """Take a new target: publish its epoch, then ask for what is admitted, until `due_ns`."""
        moves = self._admitted(moves, due_ns=due_ns)
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
                due = due_ns or move.due_ns
                move.book.wish(Wish(move.flat, move.format, move.reason, cause, due))
        for book in touched.values():
            self._pump(book)

    def _admitted(
        self, moves: Sequence[placement.Put | placement.Take], *, due_ns: int
    ) -> list[placement.Put | placement.Take]:
        """Leave out what the guardrail refuses, and what its link cannot carry in time."""
        counts = self._popularity.counts
        spared: set[tuple[str, int]] = set()
        kept: list[placement.Put | placement.Take] = []
        for move in moves:
            if isinstance(move, placement.Put):
                refusal = self._refused(move, due_ns=due_ns, counts=counts)
                if refusal is not None:
                    wish = Wish(move.flat, move.format, move.reason, "")
                    self._turn_down(move.book, wish, refusal)
                    spared.add((move.book.info.name, move.displaces))
                    continue
            kept.append(move)
        return [
            move
            for move in kept
            if isinstance(move, placement.Put) or (move.book.info.name, move.flat) not in spared
        ]

    def _change(self, change: Change, *, cause: str) -> None:
        """Ask a store to change a copy in place; it finds the room, as it does for its own."""
        block, book = self.blocks[change.flat].block, change.book
        refusal = self.guard.check_demotion(block, change.into)
        if refusal is not None:
            self._veto(book, block, change.into, refusal)
            return
        wish = Wish(change.flat, change.into, change.reason, cause)
        book.ask(wish, nbytes=0, now_ns=self._now_ns, from_format=change.format)
        if change.into is Format.BF16:
            book.coming[change.flat] = True
        what = f"asked {book.info.name} to make {change.into.value} of {change.format.value}"
        self._note(block, what, change.reason, store=book.info.name)
        self._out.append(
            ChangeFormat(
                epoch=self.epoch,
                store=book.info.name,
                block=block,
                format=change.format,
                into=change.into,
                cause=cause,
                reason=change.reason,
            )
        )

    def _repair(self, bound: str, *, cause: str, reason: Reason = Reason.REPAIR) -> None:
        """Ask for what the guardrail wants back at full precision, until each has been done.

        With the reason VETO_DRIFT a store makes no cheap copy by the plan any more, either.
        """
        for block in self.guard.repairing:
            flat = self._flat[block]
            for copy in self._directory.of_block(block):
                book, key = self._books[copy.store], (flat, Format.BF16)
                if is_lossless(copy.format) or not book.worker:
                    continue
                if key in book.pending or key in book.retry_ns:
                    continue
                refusal = Refusal(reason=Reason.VETO_DRIFT, bound=bound)
                self._veto(book, block, copy.format, refusal)
                self._change(Change(book, flat, copy.format, Format.BF16, reason), cause=cause)

    def _cancel(
        self, book: StoreBook, flat: int, form: Format, *, cause: str, reason: Reason
    ) -> None:
        """Take back what was asked for; the claim stays until the store says how it ended."""
        pending: Pending = book.pending[flat, form]
        if pending.cancelled:
            return
        pending.cancelled = True
        block, name = self.blocks[flat].block, book.info.name
        self._note(block, f"asked {name} to give up {form.value}", reason, store=name)
        self._out.append(
            CancelTransfer(
                epoch=self.epoch, store=name, block=block, format=form, cause=cause, reason=reason
            )
        )

    def _take(self, take: placement.Take, *, cause: str) -> None:
        block = self.blocks[take.flat].block
        name = take.book.info.name
        packed = self._directory.get(CopyKey(block, name, Format.BF16Z))
        going = self._directory.get(CopyKey(block, name, Format.BF16)) or packed
        form = going.format if going is not None else Format.BF16
        refusal = self.guard.check_drop(block, self._directory.of_block(block), going=going)
        if refusal is not None:
            self._veto(take.book, block, form, refusal)
            return
        take.book.dropping[take.flat, form] = self._now_ns
        take.book.left_ns[take.flat] = self._now_ns
        self._drop(name, block, form, cause=cause, reason=take.reason)

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
        for queue in (book.queue, book.later):
            while queue and not book.draining and self._ask_next(book, queue[0]):
                queue.popleft()

    def _ask_next(self, book: StoreBook, wish: Wish) -> bool:
        """Ask for a copy, or find that it is here; False: it waits."""
        block, name = self.blocks[wish.flat].block, book.info.name
        key = Key(name, wish.flat, wish.format)
        if self._directory.get(CopyKey(block, name, wish.format)) is not None:
            self._windows.end(key)
            book.coming[wish.flat] = (wish.flat, Format.BF16) in book.pending
            return True
        if 0 < wish.due_ns <= self._now_ns:
            self._windows.end(key)
            book.coming[wish.flat] = (wish.flat, Format.BF16) in book.pending
            bound = f"it was due at {wish.due_ns} ns and still waited for room"
            self._turn_down(book, wish, Refusal(reason=Reason.VETO_LATE, bound=bound))
            return True
        nbytes = self._sizes.of(wish.flat, wish.format)
        if not book.fits(nbytes) or not self._flows(book, wish, nbytes=nbytes):
            return False
        sources = self._sources(block, book, wish.format)
        background = service_of(wish.reason) is Service.BACKGROUND
        if background and (self._outlook.pressed(name) or self._outlook.pressed(sources[0])):
            return False
        if key not in self._windows:
            self._book(book, wish.flat, wish.format, wish.reason, source=sources[0])
        book.ask(wish, nbytes=nbytes, now_ns=self._now_ns)
        self._start(book, wish, sources)
        return True

    def _ask_kept(self, book: StoreBook, wish: Wish) -> bool:
        """Ask a worker for a copy that it should keep; it makes the room, so none is claimed.

        False: the link cannot bring it in time.
        """
        sources = self._sources(self.blocks[wish.flat].block, book, wish.format)
        late = self._book(
            book, wish.flat, wish.format, wish.reason, source=sources[0], due_ns=wish.due_ns
        )
        if late is not None:
            self._turn_down(book, wish, Refusal(reason=late.reason, bound=late.bound))
            return False
        book.ask(wish, nbytes=0, now_ns=self._now_ns)
        book.coming[wish.flat] = True
        self._start(book, wish, sources)
        return True

    def _start(self, book: StoreBook, wish: Wish, sources: tuple[str, ...]) -> None:
        """Command what the book has been asked for."""
        block, name = self.blocks[wish.flat].block, book.info.name
        self._note(block, f"asked {name} to fetch {wish.format.value}", wish.reason, store=name)
        self._out.append(
            StartTransfer(
                epoch=self.epoch,
                store=name,
                block=block,
                format=wish.format,
                sources=sources,
                cause=wish.cause,
                reason=wish.reason,
                due_ns=wish.due_ns,
            )
        )

    def _turn_down(self, book: StoreBook, wish: Wish, refusal: Refusal) -> None:
        """Refuse a copy, and do not ask again at once."""
        book.retry_ns[wish.flat, wish.format] = self._now_ns + self.config.retry_ns
        self._veto(book, self.blocks[wish.flat].block, wish.format, refusal)

    def _flows(self, book: StoreBook, wish: Wish, *, nbytes: int) -> bool:
        """Whether the bytes in flight leave room; one copy may always fly."""
        if service_of(wish.reason) is Service.BACKGROUND:
            flying = book.background_bytes
            return not flying or flying + nbytes <= self.config.background_bytes_in_flight
        flying = book.pending_bytes
        return not book.pending or flying + nbytes <= self.config.warm_bytes_in_flight

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
            self._settle(book, flat, form)
            book.break_promise(flat)
            self._note(
                self.blocks[flat].block,
                f"gave up its claim at {book.info.name}",
                None,
                store=book.info.name,
            )

    def _forget(self, book: StoreBook) -> None:
        name = book.info.name
        self._windows.end_all(name)
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
            self._settle(book, flat, form)
            book.break_promise(flat)
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
            self._forget_wishes(book)
        for key in [key for key, at_ns in book.retry_ns.items() if at_ns <= self._now_ns]:
            del book.retry_ns[key]

    def _veto(self, book: StoreBook, block: BlockId, form: Format, refusal: Refusal) -> None:
        what = f"refused {form.value} at {book.info.name}: {refusal.bound}"
        self._note(block, what, refusal.reason, store=book.info.name)
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
