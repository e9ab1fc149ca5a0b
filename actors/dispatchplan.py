"""The plan for replicas as one store knows it: what it keeps, and who gets which part of tokens.

Decides which holder gets the next tokens, so that parts come out as the plan says. Written by the
membership thread and read by the token path; a plan is swapped as a whole, so a reader needs no
lock. Must not know how a plan came about.

Invariant: only stores that are said to hold a block are picked; where the plan says nothing of
them, nobody is.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Collection

    from hotset.actors.messages import WorkerPlan
    from hotset.policies.types import BlockId


class _Plan(NamedTuple):
    """`parts` in thousandths; `sent` counts tokens under this plan."""

    epoch: int
    kept: frozenset[tuple[int, int]]
    parts: dict[BlockId, dict[str, int]]
    sent: dict[BlockId, dict[str, int]]


class DispatchPlan:
    """The newest plan that the controller has published to this store."""

    def __init__(self) -> None:
        """No plan yet."""
        self._plan = _Plan(-1, frozenset(), {}, {})

    @property
    def epoch(self) -> int:
        """Epoch of the plan, -1 before there is one."""
        return self._plan.epoch

    @property
    def kept(self) -> frozenset[tuple[int, int]]:
        """(layer, expert) of the copies that others count on: the last to be evicted."""
        return self._plan.kept

    def take(self, plan: WorkerPlan) -> None:
        """Follow this plan from now on."""
        parts: dict[BlockId, dict[str, int]] = {}
        for share in plan.shares:
            parts.setdefault(share.block, {})[share.store] = share.permille
        kept = frozenset((block.layer, block.index) for block in plan.keep)
        self._plan = _Plan(plan.epoch, kept, parts, {})

    def pick(self, block: BlockId, holders: Collection[str], *, rows: int) -> str | None:
        """The holder that is furthest behind its part; None when the plan names none of them.

        Threads may race, which blurs a part and nothing else.
        """
        plan = self._plan
        parts = plan.parts.get(block)
        if parts is None:
            return None
        fit = [store for store in holders if parts.get(store, 0) > 0]
        if not fit:
            return None
        sent = plan.sent.setdefault(block, {})
        best = min(fit, key=lambda store: ((sent.get(store, 0) + rows) / parts[store], store))
        sent[best] = sent.get(best, 0) + rows
        return best
