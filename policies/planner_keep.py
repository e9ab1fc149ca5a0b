"""Plans layers from a current plan, and keeps of all their steps those that pay. Compiled.

Decides which steps of which layer are carried out. Must not know arguments as users give them
(`place` checks those) or how a step is found. With free shares `planner_free` makes the steps.

Invariant: a layer that started from a whole plan never ends with a slower slowest device.
"""

# ruff: noqa: PLR0913, PLR0917 - numba has no keyword-only arguments, and a call that hands
# over a whole layer costs more than the loop around it

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from hotset.policies.jit import compiled
from hotset.policies.planner_kernels import (
    Fleet,
    Floats,
    Ints,
    Log,
    settle,
)
from hotset.policies.planner_layers import Prices, blank, price_copies, repair
from hotset.policies.planner_search import search

KEEP_REACH = 0.8
"""Reach of the search, see `planner_search.search`."""


class Traces(NamedTuple):
    """Searches of all layers, so that only the steps that pay are kept. As `Log`, by layer."""

    writes: Ints  # [L, 2 * most, 3]
    ends: Ints  # [L, most + 1]
    peak: Floats  # [L, most + 1]
    spent: Floats  # [L, most + 1]
    steps: Ints  # [L]


@compiled
def keep_layers(
    slot: Ints, load: Floats, size: Floats, fleet: Fleet, home: Ints, prices: Prices,
    goal: Floats, traces: Traces,
) -> Ints:  # fmt: skip
    """Repair and search every layer from `slot` [L, P], in place; return missing experts.

    The search spends bytes where they buy most: `price` of a step is its cost over a slot's bytes.
    """
    missing = np.zeros(slot.shape[0], dtype=np.int64)
    for index in range(slot.shape[0]):
        layer = blank(load[index], size[index], slot[index], home[index], fleet, True)
        settle(layer, fleet)
        price_copies(layer, fleet, prices)
        before = layer.slot.copy()
        missing[index] = repair(layer, fleet)
        least = prices.move * layer.size.min()  # of copies that were not there
        if fleet.twice > 1 or (layer.slot != before).any():
            least = 0.0
        log = Log(traces.writes[index], traces.ends[index], traces.peak[index], traces.spent[index])
        scale = 1000.0 / size[index].mean()
        floor = max(goal[index], 1.0)
        traces.steps[index] = search(layer, fleet, floor, scale, least, False, KEEP_REACH, log)
    return missing


@compiled
def cut(slot: Ints, traces: Traces, target: float, budget: float, slope: float) -> Floats:
    """Keep of each layer's search the steps that buy most, and undo the rest in `slot`.

    Segments are taken by balancedness gained per cost, best first, over all layers, until the mean
    over layers of 1 / slowest reaches `target`, `budget` is spent, or a segment gains less than
    `slope` per cost. Returns 1 / slowest by layer.
    """
    layers = slot.shape[0]
    kept = np.zeros(layers, dtype=np.int64)
    balance = 1.0 / traces.peak[:, 0]
    spent = 0.0
    ahead = np.zeros(layers, dtype=np.int64)
    worth = np.full(layers, -1.0)
    for index in range(layers):
        ahead[index], worth[index] = _next(traces, index, 0, budget)
    while balance.mean() < target:
        best = int(np.argmax(worth))
        if worth[best] <= slope or ahead[best] < 0:
            break
        lack = (target - balance.mean()) * layers
        stop = ahead[best]
        for step in range(kept[best] + 1, ahead[best]):  # the target may come before its end
            if 1.0 / traces.peak[best, step] - balance[best] >= lack:
                stop = step
                break
        spent += traces.spent[best, stop] - traces.spent[best, kept[best]]
        kept[best] = stop
        balance[best] = 1.0 / traces.peak[best, stop]
        for index in range(layers):
            last = traces.spent[index, ahead[index]] - traces.spent[index, kept[index]]
            if index == best or (ahead[index] >= 0 and spent + last > budget):
                ahead[index], worth[index] = _next(traces, index, kept[index], budget - spent)
    for index in range(layers):
        first = traces.ends[index, kept[index]]
        for at in range(traces.ends[index, traces.steps[index]] - 1, first - 1, -1):
            slot[index, traces.writes[index, at, 0]] = traces.writes[index, at, 1]
    return balance


@compiled
def _next(traces: Traces, index: int, start: int, budget: float) -> tuple[int, float]:
    """The later step of a layer with the best balancedness per cost within the budget."""
    best, chosen = -1.0, -1
    base = 1.0 / traces.peak[index, start]
    for step in range(start + 1, traces.steps[index] + 1):
        cost = traces.spent[index, step] - traces.spent[index, start]
        if cost > budget:
            continue
        gain = 1.0 / traces.peak[index, step] - base
        if gain <= 0.0:
            continue
        worth = gain / max(cost, 1e-12)
        if worth > best:
            best, chosen = worth, step
    return chosen, best
