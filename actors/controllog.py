"""What the controller did, as rows for telemetry: plans, vetoes, stores that came and went.

Decides what counts as a plan (an event that made the brain ask for something, publish an epoch, or
judge a plan for the workers' replicas) and how load is averaged; must not know Ray, how the brain
decides, or who takes the rows. One thread only, the controller's.

Invariants: appended == taken + dropped + waiting; at most `capacity` rows wait, and of more the
oldest are dropped and counted; names of a batch are its own, so their table cannot grow.
"""

from __future__ import annotations

from collections import Counter, deque
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from hotset.actors.batches import RowBatch
from hotset.actors.kinds import ControlKind
from hotset.policies.types import (
    FORMAT_CODES,
    DropCopy,
    Event,
    PlanDecision,
    PublishEpoch,
    Reason,
    RouterCounts,
    StartTransfer,
    StoreDraining,
    StoreJoined,
    StoreLost,
    Veto,
    WakeAt,
)
from hotset.transport.records import NO_NAME, ROW

if TYPE_CHECKING:
    from collections.abc import Sequence

    from hotset.policies.types import Command

CONTROLLER: Final = "controller"
"""Name under which the controller's rows stand beside those of the stores."""

_LOAD_HALVES_NS: Final = 30_000_000_000  # the load of half a minute ago counts half
_EPOCH_MASK: Final = 0x7FFFFFFF  # the column has 31 bits


class ControlLog:
    """Rows of the control plane, and sums for its metrics."""

    def __init__(self, *, first_row_id: int, nbytes: dict[str, int], capacity: int = 8192) -> None:
        """`nbytes` is the size of a block by name of format; row ids count up from the first."""
        self._next = first_row_id
        self._nbytes = nbytes
        self._capacity = capacity
        self._waiting: deque[tuple[int, dict[str, Any]]] = deque()
        self._dropped = 0
        self._load: dict[str, float] = {}
        self._load_ns = 0
        self.decisions: Counter[str] = Counter()
        self.plans: Counter[str] = Counter()
        self.plan_moves: Counter[str] = Counter()
        self.last_plan: PlanDecision | None = None

    def handled(
        self,
        event: Event,
        commands: Sequence[Command],
        *,
        epoch: int,
        start_ns: int,
        end_ns: int,
    ) -> None:
        """Take in what an event led to; the times are those of the brain's work."""
        self._scale(event, epoch=epoch, end_ns=end_ns)
        starts = [one for one in commands if isinstance(one, StartTransfer)]
        drops = [one for one in commands if isinstance(one, DropCopy)]
        published = [one for one in commands if isinstance(one, PublishEpoch)]
        asked = [one for one in commands if not isinstance(one, _TOLD)]
        for one in asked:
            self.decisions[one.reason.value] += 1
        judged = [one for one in commands if isinstance(one, PlanDecision)]
        for plan in judged:
            self._judge(plan, starts=len(starts), start_ns=start_ns, end_ns=end_ns)
        if (asked or published) and not judged:
            first = (*published, *asked)[0]
            self._append(
                ControlKind.PLAN,
                start_ns=start_ns,
                end_ns=end_ns,
                index=epoch & _EPOCH_MASK,
                reason=first.reason.value,
                nbytes=sum(self._nbytes.get(one.format.value, 0) for one in starts),
                queue_ns=len(starts),
                wire_ns=len(drops),
            )
        for veto in commands:
            if isinstance(veto, Veto):
                self._append(
                    ControlKind.VETO,
                    start_ns=start_ns,
                    end_ns=end_ns,
                    source=veto.store,
                    layer=veto.block.layer,
                    index=veto.block.index,
                    format=FORMAT_CODES[veto.format],
                    reason=veto.reason.value,
                    bound=veto.bound,
                )

    def _judge(self, plan: PlanDecision, *, starts: int, start_ns: int, end_ns: int) -> None:
        """A plan for the workers' replicas, in force or refused."""
        self.plans[plan.reason.value] += 1
        self.plan_moves[plan.reason.value] += plan.moves
        self.last_plan = plan
        self._append(
            ControlKind.PLAN,
            start_ns=start_ns,
            end_ns=end_ns,
            index=plan.epoch & _EPOCH_MASK,
            reason=plan.reason.value,
            nbytes=plan.nbytes,
            queue_ns=starts if plan.reason is Reason.REBALANCE else 0,
            verify_ns=plan.before_ppm,
            activate_ns=plan.after_ppm,
            attempt=plan.moves,
        )

    def imbalance(self) -> float | None:
        """Largest over mean decayed number of tokens at a worker; None before there is any."""
        total = sum(self._load.values())
        return max(self._load.values()) * len(self._load) / total if total else None

    def take(self) -> RowBatch:
        """Everything that waits, as one batch. Take it only to send it."""
        taken, self._waiting = list(self._waiting), deque()
        lost, self._dropped = self._dropped, 0
        rows = np.zeros(len(taken), ROW)
        numbers: dict[str, int] = {}

        def number(text: str | None) -> int:
            return NO_NAME if text is None else numbers.setdefault(text, len(numbers))

        for row, (row_id, fields) in zip(rows, taken, strict=True):
            row["row_id"] = row_id
            row["source"], row["reason"] = number(fields["source"]), number(fields["reason"])
            if fields["bound"] is not None:
                row["queue_ns"] = number(fields["bound"]) + 1
            for column, value in fields.items():
                if column not in _NAMED:
                    row[column] = value
        return RowBatch(
            store=CONTROLLER, tier=None, rows=rows.tobytes(), names=tuple(numbers), dropped=lost
        )

    def put_back(self, batch: RowBatch) -> None:
        """A batch did not arrive: its rows count as dropped with the next one."""
        self._dropped += len(batch.table()) + batch.dropped

    def _scale(self, event: Event, *, epoch: int, end_ns: int) -> None:
        match event:
            case StoreJoined():
                name, why = event.store.name, Reason.JOINED
                start_ns = min(event.store.incarnation, end_ns)  # its birth by its own clock
            case StoreDraining():
                name, why, start_ns = event.store, Reason.DRAIN, end_ns
            case StoreLost():
                name, why, start_ns = event.store, Reason.LOST, end_ns
                self._load.pop(event.store, None)
            case RouterCounts():
                self._count_load(event)
                return
            case _:
                return
        self._append(
            ControlKind.SCALE,
            start_ns=start_ns,
            end_ns=end_ns,
            source=name,
            reason=why.value,
            index=epoch & _EPOCH_MASK,
        )

    def _count_load(self, event: RouterCounts) -> None:
        passed_ns = max(0, event.now_ns - self._load_ns) if self._load_ns else 0
        self._load_ns = max(self._load_ns, event.now_ns)
        left = 0.5 ** (passed_ns / _LOAD_HALVES_NS)
        self._load = {store: load * left for store, load in self._load.items()}
        routed = sum(count for _, count in event.counts)
        self._load[event.store] = self._load.get(event.store, 0.0) + routed

    def _append(self, kind: ControlKind, **fields: Any) -> None:
        self._next = (self._next + 1) & 0x7FFFFFFFFFFFFFFF or 1
        if len(self._waiting) >= self._capacity:
            self._waiting.popleft()
            self._dropped += 1
        defaults = {"source": None, "reason": None, "bound": None, "layer": -1}
        self._waiting.append((self._next, {**defaults, "kind": int(kind), **fields}))


_TOLD = (Veto, WakeAt, PublishEpoch, PlanDecision)
"""Commands that ask nothing of a store."""
_NAMED = frozenset({"source", "reason", "bound"})
