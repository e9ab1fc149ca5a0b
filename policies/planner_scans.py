"""The planner's two scans without numba: the same arithmetic on whole arrays, the same choice.

Decides what `planner_search.scan_swaps` and `scan_overwrites` decide; used in their place where
numba is missing. Must not drift from them: `tests/policies/test_place_kernels.py` holds the two
against each other. Ties fall to the first candidate in the order in which the kernels look.
"""

# ruff: noqa: ARG001, PLR0913, PLR0917 - the arguments of the compiled scans, which need bounds; numba
# has no keyword-only arguments, and a call that hands over a whole layer costs more than its loop

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    from hotset.policies.planner_kernels import Fleet, Floats, Layer
    from hotset.policies.planner_search import Tolls

LEAST_DROP = 1e-9
"""A step must relieve the slowest device by more than rounding."""
LEAST_SCORE = 1e-12
"""Less is never worth a step: a price of `FORBIDDEN` rules a step out."""
FORBIDDEN = 1e15
BEYOND = 0.02
"""Weight of relief beyond the goal: a tie-break."""


def _covered(
    layer: Layer, fleet: Fleet, expert: int, *, leave: int, enter: int, copies: int
) -> bool:
    there = layer.on_node[:, expert].astype(np.int64)
    if leave >= 0:
        there[fleet.node[leave]] -= 1
    if enter >= 0:
        there[fleet.node[enter]] += 1
    return int((there > 0).sum()) >= min(copies, fleet.spread)


def _first_best(
    score: NDArray[np.float64],
    allowed: NDArray[np.bool_],
    check: Callable[[int], bool] | None,
    floor: float,
) -> tuple[float, int]:
    """Best allowed score above `floor` and its flat index, or (floor, -1)."""
    flat = np.where(allowed, score, -np.inf).ravel()
    while flat.size:
        at = int(np.argmax(flat))
        if not flat[at] > floor:
            break
        if check is None or check(at):
            return float(flat[at]), at
        flat[at] = -np.inf
    return floor, -1


def scan_swaps(
    layer: Layer, fleet: Fleet, hot: int, goal: float, price: float, floor: float, tolls: Tolls
) -> tuple[float, int, int]:
    """Best swap of a slot of `hot` with a slot elsewhere: (score, slot, slot), above `floor`."""
    width, time, floor = fleet.width, layer.time, max(LEAST_SCORE, floor)
    coldest = int(np.argmin(time))
    order = np.array([coldest, *(d for d in range(len(time)) if d != coldest)])
    order = order[order != hot]
    if not len(order):
        return floor, -1, -1
    top, pace_hot = time[hot], fleet.pace[hot]
    here_slots = np.arange(hot * width, hot * width + width)
    there_slots = order[:, None] * width + np.arange(width)
    one, two = layer.slot[here_slots], layer.slot[there_slots]
    now, pace = time[order][:, None, None], fleet.pace[order][:, None, None]
    shift = layer.unit[one][None, :, None] - layer.unit[two][:, None, :]
    here, there = top - shift * pace_hot, now + shift * pace
    drop = top - np.maximum(here, there)
    gain = (top - np.maximum(here, goal)) - (np.maximum(there, goal) - np.maximum(now, goal))
    score = gain + BEYOND * drop
    allowed = (drop > LEAST_DROP) & (one[None, :, None] >= 0) & (two[:, None, :] >= 0)
    allowed &= ((top - now) * pace_hot / (pace_hot + pace)) > LEAST_DROP
    allowed &= (layer.hold[order][:, one] < fleet.twice)[:, :, None]
    allowed &= (layer.hold[hot][two] < fleet.twice)[:, None, :]
    allowed &= score > LEAST_SCORE
    if price > 0.0:
        cost = layer.cost
        extra = (cost[order][:, one] - cost[hot, one])[:, :, None] + (
            cost[hot][two] - cost[order[:, None], two]
        )[:, None, :]
        score /= 1.0 + price * np.maximum(extra, 0.0)
    grown = layer.size[two][:, None, :] - layer.size[one][None, :, None]
    allowed &= layer.used[hot] + grown <= fleet.room[hot]
    allowed &= layer.used[order][:, None, None] - grown <= fleet.room[order][:, None, None]

    def check(at: int) -> bool:
        rank, first, second = np.unravel_index(at, score.shape)
        mine, theirs, device = one[first], two[rank, second], int(order[rank])
        return _covered(
            layer, fleet, mine, leave=hot, enter=device, copies=layer.count[mine]
        ) and _covered(layer, fleet, theirs, leave=device, enter=hot, copies=layer.count[theirs])

    best, at = _first_best(score, allowed, check if fleet.spread > 1 else None, floor)
    if at < 0:
        return floor, -1, -1
    rank, first, second = np.unravel_index(at, score.shape)
    return best, int(here_slots[first]), int(there_slots[rank, second])


def crowds(layer: Layer, fleet: Fleet, goal: float) -> Floats:
    """As `planner_search.crowds`."""
    table = np.zeros((5, layer.load.shape[0]))
    table[1] = -1.0
    at = np.flatnonzero(layer.slot >= 0)
    expert, device = layer.slot[at], at // fleet.width
    now, pace, unit = layer.time[device], fleet.pace[device], layer.unit[expert]
    over = np.maximum(now, goal)
    relieved = now - (unit - layer.less[expert]) * pace
    np.add.at(table[4], expert, over - np.maximum(relieved, goal))
    spare = layer.count[expert] > 1
    burdened = now + (layer.more[expert] - unit) * pace
    np.add.at(table[3], expert[spare], (np.maximum(burdened, goal) - over)[spare])
    for owner, where, time in zip(expert[spare], device[spare], burdened[spare], strict=True):
        if time > table[0, owner]:
            table[2, owner] = table[0, owner]
            table[0, owner], table[1, owner] = time, where
        elif time > table[2, owner]:
            table[2, owner] = time
    return table


def scan_overwrites(
    layer: Layer, fleet: Fleet, hot: int, goal: float, price: float, floor: float, tolls: Tolls
) -> tuple[float, int, int]:
    """Best overwrite of a spare replica that helps `hot`: (score, slot, expert), above `floor`."""
    width, top = fleet.width, layer.time[hot]
    table = crowds(layer, fleet, goal)
    mine = layer.slot[hot * width : hot * width + width]
    everyone = np.arange(layer.load.shape[0])
    best, chosen, comer = max(LEAST_SCORE, floor), -1, -1
    for at in np.flatnonzero(layer.slot >= 0):
        old, device = int(layer.slot[at]), int(at // width)
        on_hot = device == hot
        if layer.count[old] <= fleet.least or (not on_hot and layer.hold[hot, old] > 0):
            continue
        rest = table[2, old] if table[1, old] == device else table[0, old]
        if top - rest <= LEAST_DROP:
            continue
        new = everyone if on_hot else mine[mine >= 0]
        pace, now = fleet.pace[device], layer.time[device]
        over = max(now, goal)
        alone = layer.more[old] - layer.unit[old]
        harm = table[3, old] - (max(now + alone * pace, goal) - over)
        here = now + (layer.less[new] - layer.unit[old]) * pace
        worst = np.maximum(here, rest)
        if not on_hot:
            relief = (layer.unit[new] - layer.less[new]) * fleet.pace[hot]
            worst = np.maximum(worst, top - relief)
        drop = top - worst
        score = (table[4, new] - harm) + (over - np.maximum(here, goal)) + BEYOND * drop
        allowed = (drop > LEAST_DROP) & (new != old) & (layer.hold[device, new] < fleet.twice)
        allowed &= (layer.count[new] >= 1) & (score > LEAST_SCORE)
        if price > 0.0:
            extra = layer.cost[device, new] - layer.cost[device, old]
            score /= 1.0 + price * np.maximum(extra, 0.0)
        allowed &= layer.used[device] + layer.size[new] - layer.size[old] <= fleet.room[device]
        allowed &= score > best

        def check(
            index: int, new: NDArray[np.int64] = new, old: int = old, to: int = device
        ) -> bool:
            comer = new[index]
            return _covered(
                layer, fleet, old, leave=to, enter=-1, copies=layer.count[old] - 1
            ) and _covered(layer, fleet, comer, leave=-1, enter=to, copies=layer.count[comer] + 1)

        found, index = _first_best(score, allowed, check if fleet.spread > 1 else None, best)
        if index >= 0:
            best, chosen, comer = found, int(at), int(new[index])
    return best, chosen, comer
