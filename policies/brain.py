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
from hotset.policies.books import StoreBook
from hotset.policies.directory import CopyKey
from hotset.policies.guard import is_lossless
from hotset.policies.reformat import fill_planned, reformat, stage_planned
from hotset.policies.replanning import Replanning
from hotset.policies.schedule import Service, service_of
from hotset.policies.types import (
    BlockInfo,
    Command,
    Concurrency,
    CopyDropped,
    CopyLanded,
    DriftMeasured,
    Event,
    Format,
    LayerTimes,
    Pressure,
    Reason,
    Replan,
    RouterCounts,
    StoreDraining,
    StoreJoined,
    StoreLost,
    Tick,
    Tier,
    TransferFailed,
    WakeAt,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from hotset.policies.config import PolicyConfig
    from hotset.policies.guard import Guardrail


class ClusterBrain(Replanning):
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

    # --- the only mutating door --------------------------------------------------------------

    def handle(self, event: Event) -> list[Command]:  # noqa: C901 - one arm for each event
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
            case LayerTimes() | Pressure() | Concurrency() | DriftMeasured():
                self._observed(event)
            case Tick():
                self._tick()
            case Replan():
                self._replan()
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
            fill = fill_planned if self._planned else placement.fill_worker
            puts += fill(self._view(), book)
        puts += placement.cover(self._view(), reason=Reason.WARM)
        self._plan(puts, cause=cause, reason=Reason.JOINED)
        if info.tier is Tier.HOST and not again:
            fill_host = stage_planned if self._planned else placement.fill_host
            self._plan(fill_host(self._view()), cause=cause, reason=Reason.JOINED)
        self._out.append(WakeAt(at_ns=self._now_ns + self.config.tick_ns))

    def _lost(self, event: StoreLost) -> None:
        book = self._books.get(event.store)
        if book is None or event.incarnation < book.info.incarnation:
            self.ignored += 1
            return
        self._forget(book)
        self._outlook.forget(event.store)
        self._origins.forget(event.store)
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
        self._forget_wishes(book)
        cause = f"draining {event.store}"
        for flat, form in list(book.pending):
            self._cancel(book, flat, form, cause=cause, reason=Reason.DRAIN)
        puts = placement.cover(self._view(), reason=Reason.DRAIN)
        self._plan(puts, cause=cause, reason=Reason.DRAIN, always=True, due_ns=event.deadline_ns)

    def _counted(self, event: RouterCounts) -> None:
        known = [(self._flat[block], count) for block, count in event.counts if block in self._flat]
        index = np.array([flat for flat, _ in known], dtype=np.intp)
        tokens = np.array([min(count, 1 << 35) for _, count in known], dtype=np.int64)
        self._popularity.add(index, tokens=tokens, passed=event.tokens)
        if event.store in self._books:
            self._origins.add(event.store, index, tokens=tokens, passed=event.tokens)
        self._outlook.routed(sum(count for _, count in known), tokens=event.tokens)
        self.guard.observe(dict(event.counts), tokens=event.tokens)

    def _measured(self, event: DriftMeasured) -> None:
        """Act on the live check at once: repairs of a broken budget do not wait for a tick."""
        found = self.guard.measured(event.kl, event.flips, since_ns=event.since_ns)
        if found is not None:
            self._repair(
                "; ".join(found.verdict.broken),
                cause=f"live check at {event.store}",
                reason=Reason.VETO_DRIFT,
            )

    def _judge_drift(self, *, cause: str) -> None:
        """Repair what shifted text has made too costly, and ask again for what is still to do."""
        if self.guard.drift is None:
            return
        budget, nats = self.guard.drift.budget.nats, self.guard.drift.nats
        said = self.guard.check.said if self.guard.check is not None else ""
        if self.guard.due():
            said = f"drift of {nats:.2g} nats, the budget is {budget:.2g}"
        self._repair(said, cause=cause)
        self._may_reduce = self.guard.may_compute(self._ids, Format.INT8)

    def _observed(self, event: LayerTimes | Pressure | Concurrency | DriftMeasured) -> None:
        if isinstance(event, DriftMeasured):
            self._measured(event)
        elif event.store in self._books:
            self._outlook.observe(event)
        else:
            self._ignore(None, "report of a store that is not in", store=event.store)

    def _landed(self, event: CopyLanded) -> None:
        copy = event.copy
        book = self._current(copy.store, copy.incarnation, block=copy.block)
        flat = self._flat.get(copy.block)
        if book is None or flat is None:
            return
        came = copy.format
        if is_lossless(came) and (flat, came) not in book.pending:
            came = Format.BF16  # what was asked for in full may come compressed
        self._settle(book, flat, came)
        book.retry_ns.pop((flat, came), None)
        self._admit(copy, source=event.source, reason=event.reason)
        book.break_promise(flat)
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
        if book.worker:  # a plan does not bring back at once what the worker had no use for
            book.left_ns[self._flat[event.block]] = self._now_ns
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
        pending = self._settle(book, flat, event.format)
        book.break_promise(flat)
        self._note(
            event.block,
            f"failed {event.format.value} at {event.store}",
            event.reason,
            store=event.store,
        )
        if pending is None:
            return
        book.retry_ns[flat, event.format] = self._now_ns + self.config.retry_ns
        if pending.from_format is not None:  # the copy that was there may be gone: its own report
            return
        if event.reason is Reason.VETO_MEMORY:  # the store knows its room better than our sums
            book.capacity_bytes = book.used_bytes + book.pending_bytes
            self._forget_wishes(book)
        self._pump(book)

    def _tick(self) -> None:
        if self._now_ns < self._plan_at_ns:
            self._out.append(WakeAt(at_ns=self._plan_at_ns))
            return
        self._plan_at_ns = self._now_ns + self.config.tick_ns
        cause = f"tick {self._now_ns}"
        names = sorted(self._books)
        self._outlook.judge_pressure(names, now_ns=self._now_ns)
        pressed = {name for name in names if self._outlook.pressed(name)}
        self._windows.pause(pressed, now_ns=self._now_ns)
        self._outlook.judge_regime(self._popularity.counts, now_ns=self._now_ns)
        for name in names:
            self._expire(self._books[name])
            self._squeeze(self._books[name], cause=cause)
        self._judge_drift(cause=cause)
        view = self._view()
        moves: list[placement.Put | placement.Take] = []
        moves += placement.cover(view, reason=Reason.STAGE)
        if not moves:
            moves = placement.rebalance(view)
        self._plan(moves, cause=cause, reason=Reason.REBALANCE)
        for name in names:
            book = self._books[name]
            for change in reformat(view, book, sensitivity=self._sensitivity):
                self._change(change, cause=cause)
            self._pump(book)
        self._out.append(WakeAt(at_ns=self._plan_at_ns))

    def _squeeze(self, book: StoreBook, *, cause: str) -> None:
        """Believe a store that has less memory than our sums say; give up background first."""
        told = self._outlook.used_bytes(book.info.name, now_ns=self._now_ns)
        book.unknown_bytes = max(0, told - book.used_bytes - book.pending_bytes)
        over = told - book.capacity_bytes
        for (flat, form), pending in list(book.pending.items()):
            if over <= 0:
                return
            if service_of(pending.reason) is Service.BACKGROUND and not pending.cancelled:
                self._cancel(book, flat, form, cause=cause, reason=Reason.PRESSURE)
                over -= pending.nbytes
