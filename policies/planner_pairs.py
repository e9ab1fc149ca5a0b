"""Replica counts for devices with two slots, where it is counts that decide the balance.

Decides how many replicas an expert gets, nothing else. Must not know devices: for given counts the
best pairs are known, the largest replica with the smallest, the second largest with the second
smallest and so on (a fold; it minimises the largest sum). So counts can be judged without packing:
local search takes a replica from where pairs are light and gives it to where they are heavy.
Compiled like the kernels.

Loads are in units of a perfectly balanced device: a pair should add up to 1.
Invariants: the sum of counts stays; every expert keeps a replica.
"""

# ruff: noqa: PLR0913, PLR0917 - numba has no keyword-only arguments, and a call that hands over
# arrays costs more than the loop around it

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from hotset.policies.jit import compiled

if TYPE_CHECKING:
    from hotset.policies.planner_kernels import Floats, Ints

GIVERS = 6
TAKERS = 2
"""Experts that are tried in every combination in one step."""
STEPS = 64
"""Most steps; few are needed."""


@compiled
def _strain(order: Ints, unit: Floats, count: Ints, enough: float) -> float:
    """How much the pairs of a fold go over 1, the fourth power of each; `order` is largest first.

    Ends early when it exceeds `enough`. An expert in the middle counts as paired with itself.
    """
    large, small = 0, order.shape[0] - 1
    large_left, small_left = count[order[large]], count[order[small]]
    strain = 0.0
    while large < small and strain <= enough:
        pairs = min(large_left, small_left)
        over = unit[order[large]] + unit[order[small]] - 1.0
        if over > 0.0:
            strain += pairs * over * over * over * over
        large_left -= pairs
        small_left -= pairs
        if large_left == 0:
            large += 1
            large_left = count[order[large]] if large < small else small_left
        if small_left == 0 and large < small:
            small -= 1
            small_left = count[order[small]] if large < small else large_left
    over = 2.0 * unit[order[large]] - 1.0
    if large == small and over > 0.0:
        strain += large_left // 2 * over * over * over * over
    return strain


@compiled
def _note(best: Floats, found: Ints, worth: float, expert: int) -> None:
    """Keep an expert among the best found so far, once; worth descends."""
    place = found.shape[0] - 1
    if worth <= best[place]:
        return
    for other in range(place + 1):
        if found[other] == expert:
            return
    while place > 0 and best[place - 1] < worth:
        best[place], found[place] = best[place - 1], found[place - 1]
        place -= 1
    best[place], found[place] = worth, expert


@compiled
def _candidates(
    order: Ints, unit: Floats, count: Ints, most: int, takers: Ints, givers: Ints
) -> None:
    """Fill in experts of the heaviest pairs, and those whose loss leaves their pairs lightest."""
    heaviest, lightest = np.full(takers.shape[0], 1.0), np.full(givers.shape[0], -np.inf)
    takers[:] = -1
    givers[:] = -1
    large, small = 0, order.shape[0] - 1
    large_left, small_left = count[order[large]], count[order[small]]
    while large < small:
        total = unit[order[large]] + unit[order[small]]
        for expert in (order[large], order[small]):
            if count[expert] < most:
                _note(heaviest, takers, total, expert)
            if count[expert] > 1:
                burdened = total + unit[expert] / (count[expert] - 1)
                _note(lightest, givers, -burdened, expert)
        pairs = min(large_left, small_left)
        large_left -= pairs
        small_left -= pairs
        if large_left == 0:
            large += 1
            large_left = count[order[large]]
        if small_left == 0:
            small -= 1
            small_left = count[order[small]]


@compiled
def _recount(
    order: Ints, unit: Floats, count: Ints, load: Floats, expert: int, change: int
) -> None:
    """Change a count and keep `order`."""
    place = 0
    while order[place] != expert:
        place += 1
    count[expert] += change
    unit[expert] = load[expert] / count[expert]
    while place > 0 and unit[order[place - 1]] < unit[expert]:
        order[place] = order[place - 1]
        place -= 1
    while place < order.shape[0] - 1 and unit[order[place + 1]] > unit[expert]:
        order[place] = order[place + 1]
        place += 1
    order[place] = expert


@compiled
def fold_counts(load: Floats, count: Ints, most: int) -> None:
    """Change `count` [E], at most `most` each, so that folded pairs are level; `load` [E]."""
    scaled = load * (count.sum() / 2.0)
    unit = scaled / count
    order = np.argsort(-unit, kind="mergesort")
    trial = order.copy()
    takers = np.zeros(TAKERS, dtype=np.int64)
    givers = np.zeros(GIVERS, dtype=np.int64)
    strain = _strain(order, unit, count, np.inf)
    for _ in range(STEPS):
        _candidates(order, unit, count, most, takers, givers)
        best, chosen, payer = strain, -1, -1
        for first in takers:
            for second in givers:
                taker, giver = int(first), int(second)
                if taker < 0 or giver < 0 or taker == giver:
                    continue
                trial[:] = order
                _recount(trial, unit, count, scaled, taker, 1)
                _recount(trial, unit, count, scaled, giver, -1)
                found = _strain(trial, unit, count, best)
                if found < best:
                    best, chosen, payer = found, taker, giver
                for expert, change in ((taker, -1), (giver, 1)):
                    count[expert] += change
                    unit[expert] = scaled[expert] / count[expert]
        if chosen < 0:
            return
        _recount(order, unit, count, scaled, chosen, 1)
        _recount(order, unit, count, scaled, payer, -1)
        strain = best
