"""Load of each device before and after a plan, as values.

A block's tokens count evenly at the devices (stores in HBM) that hold a copy of it; tokens of
blocks that no device holds are `unplaced`. The traffic is that of the last minute before the moment
shown, the same for all bars, so that only the placement differs. With no traffic yet every block
counts one token, and `basis` says so. Must not know how a plan was made.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from hotset.dashboards.page.timeline import FORMATS, NOWHERE, What
from hotset.policies.types import Tier

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from hotset.dashboards.page.timeline import Cells, Plan, Timeline

WINDOW_NS = 60_000_000_000
COPIES = (1 << len(FORMATS)) - 1
"""Bits of a cell that are copies."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceLoad:
    """Tokens of one device under the placement before the plan, the planned one, and now's."""

    device: str
    before: float
    after: float
    now: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """`balance_*` is mean / max device load, 1 is even; None without load."""

    basis: str
    devices: tuple[DeviceLoad, ...]
    unplaced_before: float
    unplaced_after: float
    unplaced_now: float
    balance_before: float | None
    balance_after: float | None
    balance_now: float | None
    epoch: int
    reason: str
    cause: str


def load_at(
    timeline: Timeline, cells: Cells, *, at_ns: int, states: Sequence[str], plan: Plan | None
) -> Load:
    """Loads at a moment whose `cells` and stores' `states` are given; no plan: before = after."""
    devices = [
        number
        for number, store in enumerate(timeline.stores)
        if store.tier is Tier.HBM and states[number] != "absent"
    ]
    weights, basis = traffic(timeline, at_ns=at_ns)
    now = _shares(cells[devices], weights)
    before = after = now
    if plan is not None:
        old = timeline.cells_after(plan.first)
        before = _shares(old[devices], weights)
        after = _shares(planned(timeline, old, plan)[devices], weights)
    return Load(
        basis=basis,
        devices=tuple(
            DeviceLoad(
                device=timeline.stores[number].name,
                before=float(before[place]),
                after=float(after[place]),
                now=float(now[place]),
            )
            for place, number in enumerate(devices)
        ),
        unplaced_before=float(weights.sum() - before.sum()),
        unplaced_after=float(weights.sum() - after.sum()),
        unplaced_now=float(weights.sum() - now.sum()),
        balance_before=_balance(before),
        balance_after=_balance(after),
        balance_now=_balance(now),
        epoch=plan.epoch if plan else 0,
        reason=plan.reason if plan else "",
        cause=plan.cause if plan else "",
    )


def traffic(timeline: Timeline, *, at_ns: int) -> tuple[NDArray[np.float64], str]:
    """Tokens by block, [blocks], and what they are."""
    weights = np.zeros(timeline.blocks)
    for report in reversed(timeline.counts):
        if report.at_ns > at_ns:
            continue
        if report.at_ns < at_ns - WINDOW_NS:
            break
        np.add.at(weights, report.blocks, report.tokens)
    if weights.any():
        return weights, "tokens routed in the minute before"
    return np.ones(timeline.blocks), "no token routed yet: every block counts one"


def planned(timeline: Timeline, cells: Cells, plan: Plan) -> Cells:
    """Cells once everything that the plan asked for has been done."""
    target = cells.copy()
    for record in timeline.changes.table[plan.first : plan.last].tolist():
        _, store, flat, what, code, _, _ = record
        if flat == NOWHERE:
            continue
        if what == What.ASKED:
            target[store, flat] |= 1 << (code - 1)
        elif what == What.DROP_ASKED:
            target[store, flat] &= 0xFFFF ^ 1 << (code - 1)
    return target


def _shares(cells: Cells, weights: NDArray[np.float64]) -> NDArray[np.float64]:
    held = (cells & COPIES) > 0
    holders = held.sum(axis=0)
    each = np.divide(weights, holders, out=np.zeros_like(weights), where=holders > 0)
    shares: NDArray[np.float64] = held @ each
    return shares


def _balance(shares: NDArray[np.float64]) -> float | None:
    most = float(shares.max()) if len(shares) else 0.0
    return float(shares.mean()) / most if most else None
