"""Plans layers from a current plan, and keeps of all their steps those that pay. Compiled.

Decides which steps of which layer are carried out. Must not know arguments as users give them
(`place` checks those) or how a step is found.

Invariant: a layer that started from a whole plan never ends with a slower slowest device.
"""

# ruff: noqa: C901, PLR0913, PLR0917 - numba has no keyword-only arguments, and a call that hands
# over a whole layer costs more than the loop around it

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from hotset.policies.planner_flow import level_layer
from hotset.policies.planner_jit import compiled
from hotset.policies.planner_kernels import (
    Fleet,
    Floats,
    Ints,
    Layer,
    Log,
    covered,
    search,
    settle,
    write,
)
from hotset.policies.planner_layers import Prices, blank, price_copies, repair

KEEP_REACH = 0.8
"""Reach of the search, see `planner_kernels.search`."""
SPARES = 12
COMERS = 4
"""Spare replicas and experts that are tried in every pair when shares are free."""


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
        missing[index] = repair(layer, fleet)
        log = Log(traces.writes[index], traces.ends[index], traces.peak[index], traces.spent[index])
        scale = 1000.0 / size[index].mean()
        floor = max(goal[index], 1.0)
        traces.steps[index] = search(layer, fleet, floor, scale, False, KEEP_REACH, log)
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


@compiled
def _limit(slot: Ints, load: Floats, speed: Floats, shares: Floats, time: Floats) -> float:
    """Level a layer; fill `time` [D] and return that of the slowest device."""
    shares[:] = 0.0
    level_layer(slot, load, speed, shares)
    width = slot.shape[0] // speed.shape[0]
    time[:] = 0.0
    for at in range(slot.shape[0]):
        if slot[at] >= 0:
            time[at // width] += shares[at] * load[slot[at]] / speed[at // width]
    return float(time.max())


@compiled
def _free_step(
    layer: Layer, fleet: Fleet, speed: Floats, shares: Floats, time: Floats, price: float
) -> tuple[int, int]:
    """The overwrite that lowers the limit most for its price: (slot, expert), or (-1, -1).

    Little used spare replicas become replicas of what burdens the bottleneck: one copy opens a way
    out of it for as much load as wanted.
    """
    width, experts = fleet.width, layer.load.shape[0]
    peak = time.max()
    burden = np.zeros(experts)
    idle = np.full(layer.slot.shape[0], np.inf)
    for at in range(layer.slot.shape[0]):
        expert = layer.slot[at]
        if expert < 0:
            continue
        if time[at // width] >= peak - 1e-7:
            burden[expert] += shares[at] * layer.load[expert]
        if layer.count[expert] > 1:
            idle[at] = shares[at] * layer.load[expert]
    heavy = np.argsort(-burden, kind="mergesort")[:COMERS]
    before, after = shares.copy(), time.copy()
    best, chosen, comer = 1e-7, -1, -1
    for at in np.argsort(idle, kind="mergesort")[:SPARES]:
        if np.isinf(idle[at]):
            break
        old, device = layer.slot[at], at // width
        for new in heavy:
            if burden[new] <= 0.0 or new == old or layer.hold[device, new] >= fleet.twice:
                continue
            if layer.used[device] + layer.size[new] - layer.size[old] > fleet.room[device]:
                continue
            if not covered(layer, fleet, old, device, -1, layer.count[old] - 1):
                continue
            if not covered(layer, fleet, new, -1, device, layer.count[new] + 1):
                continue
            layer.slot[at] = new
            gain = peak - _limit(layer.slot, layer.load, speed, before, after)
            layer.slot[at] = old
            gain /= 1.0 + price * max(layer.cost[device, new] - layer.cost[device, old], 0.0)
            if gain > best * 1e-3 and (chosen < 0 or gain > best):
                best, chosen, comer = gain, at, new
    return chosen, comer


@compiled
def keep_free_layers(
    slot: Ints, load: Floats, size: Floats, fleet: Fleet, home: Ints, prices: Prices,
    goal: Floats, traces: Traces,
) -> Ints:  # fmt: skip
    """As `keep_layers`, with shares that are levelled after every step."""
    missing = np.zeros(slot.shape[0], dtype=np.int64)
    speed = 1.0 / fleet.pace
    shares, time = np.zeros(slot.shape[1]), np.zeros(speed.shape[0])
    for index in range(slot.shape[0]):
        layer = blank(load[index], size[index], slot[index], home[index], fleet, True)
        settle(layer, fleet)
        price_copies(layer, fleet, prices)
        missing[index] = repair(layer, fleet)
        price = 1.0 / size[index].mean()
        steps, spent = 0, 0.0
        traces.peak[index, 0] = _limit(layer.slot, layer.load, speed, shares, time)
        while traces.peak[index, steps] > goal[index] and steps < traces.peak.shape[1] - 1:
            at, new = _free_step(layer, fleet, speed, shares, time, price)
            if at < 0:
                break
            old, device = layer.slot[at], at // fleet.width
            spent += layer.cost[device, new] - layer.cost[device, old]
            traces.writes[index, steps] = (at, old, new)
            write(layer, fleet, at, new)
            steps += 1
            traces.ends[index, steps] = steps
            traces.spent[index, steps] = spent
            traces.peak[index, steps] = _limit(layer.slot, layer.load, speed, shares, time)
        traces.steps[index] = steps
    return missing
