"""Plans layers from a current plan when shares are free: levels first, moves where that ends.

Decides which spare replica is overwritten so that load can leave a bottleneck. Must not know
arguments as users give them, or which of the steps are kept (`planner_keep.cut`).

When shares have been levelled, the slowest devices form a bottleneck: a set that holds its experts
alone, so no share can lead load out of it (see `planner_flow`). One replica of one of its experts
on a device outside opens a way for as much load as that device, and those behind it, can take.
That is the only kind of step. Compiled like the kernels.

Invariants: the slowest device never gets slower; the books agree with the slots.
"""

# ruff: noqa: C901, PLR0913, PLR0917 - numba has no keyword-only arguments, and a call that hands
# over a whole layer costs more than the loop around it

from __future__ import annotations

import numpy as np

from hotset.policies.jit import compiled
from hotset.policies.planner_flow import Flow, hold, level, list_hosts, open_flow
from hotset.policies.planner_keep import Traces  # noqa: TC001 - names what the stamp depends on
from hotset.policies.planner_kernels import (
    Fleet,
    Floats,
    Ints,
    Layer,
    covered,
    settle,
    write,
)
from hotset.policies.planner_layers import Prices, blank, price_copies, repair

TRIES = 16
ENOUGH = 4
"""Steps that may be tried to relieve a bottleneck, the most promising first, and how many are if
one of them does."""
COMERS = 4
"""Experts of the bottleneck that are considered for a slot, the one with most load first."""
LEAST_GAIN = 1e-7


@compiled
def _burdens(layer: Layer, fleet: Fleet, whole: Flow) -> Ints:
    """The experts with most load in the bottleneck, most first: [COMERS], padded with -1."""
    burden = np.zeros(layer.load.shape[0])
    for at in range(layer.slot.shape[0]):
        if layer.slot[at] >= 0 and whole.stuck[at // fleet.width] == 1:
            burden[layer.slot[at]] += whole.flow[at]
    found = np.full(COMERS, -1, dtype=np.int64)
    for rank in range(COMERS):
        heaviest = int(np.argmax(burden))
        if burden[heaviest] > 0.0:
            found[rank] = heaviest
            burden[heaviest] = 0.0
    return found


@compiled
def _comer(layer: Layer, fleet: Fleet, heavy: Ints, at: int) -> int:
    """The first of the experts that may come into a slot, or -1."""
    device, old = at // fleet.width, layer.slot[at]
    for new in heavy:
        if new < 0 or layer.hold[device, new] >= fleet.twice:
            continue
        if layer.used[device] + layer.size[new] - layer.size[old] > fleet.room[device]:
            continue
        if covered(layer, fleet, new, -1, device, layer.count[new] + 1):
            return int(new)
    return -1


@compiled
def _openings(layer: Layer, fleet: Fleet, whole: Flow, limit: float, price: float) -> Ints:
    """Overwrites outside the bottleneck that promise most for their price: [TRIES, 2].

    Each is a slot and the expert that comes, or -1. The promise is the limit if the bottleneck and
    the device became one, and what the slot took found room elsewhere.
    """
    width, stuck, held, speed = fleet.width, whole.stuck, whole.held, whole.speed
    heavy = _burdens(layer, fleet, whole)
    found = np.full((TRIES, 2), -1, dtype=np.int64)
    worth = np.zeros(TRIES)
    room = np.maximum(limit * speed - held, 0.0)
    bound_load = bound_speed = 0.0
    for device in range(stuck.shape[0]):
        if stuck[device] == 1:
            bound_load += held[device]
            bound_speed += speed[device]
    for at in range(layer.slot.shape[0]):
        old, device = layer.slot[at], at // width
        if old < 0 or layer.count[old] <= fleet.least or stuck[device] == 1:
            continue
        rest = 0.0
        for index in range(whole.first[old], whole.first[old + 1]):
            if whole.hosts[index] != at:
                rest += room[whole.hosts[index] // width]
        kept = held[device] - min(whole.flow[at], rest)
        gain = limit - (bound_load + kept) / (bound_speed + speed[device])
        if gain <= worth[-1]:
            continue
        new = _comer(layer, fleet, heavy, at)
        if new < 0 or not covered(layer, fleet, old, device, -1, layer.count[old] - 1):
            continue
        gain /= 1.0 + price * max(layer.cost[device, new] - layer.cost[device, old], 0.0)
        place = TRIES - 1
        if gain <= worth[place]:
            continue
        while place > 0 and worth[place - 1] < gain:
            worth[place] = worth[place - 1]
            found[place] = found[place - 1]
            place -= 1
        worth[place] = gain
        found[place, 0], found[place, 1] = at, new
    return found


@compiled
def _overwrite(layer: Layer, fleet: Fleet, whole: Flow, at: int, new: int) -> None:
    """Put an expert into a slot; what the slot took goes to the old expert's other replicas."""
    old = layer.slot[at]
    write(layer, fleet, at, new)
    list_hosts(layer.slot, whole.first, whole.hosts, whole.next_host)
    first, last = whole.first[old], whole.first[old + 1]
    part = whole.flow[at] / (last - first)
    whole.flow[at] = 0.0
    for index in range(first, last):
        whole.flow[whole.hosts[index]] += part
    hold(whole)


@compiled
def _step(
    layer: Layer, fleet: Fleet, whole: Flow, limit: float, goal: float, price: float
) -> tuple[float, int, int]:
    """Relieve the bottleneck by one overwrite: (limit then, slot, expert before), or slot -1."""
    flow, held, stuck = whole.flow.copy(), whole.held.copy(), whole.stuck.copy()
    best, chosen, comer = LEAST_GAIN, -1, -1
    openings = _openings(layer, fleet, whole, limit, price)
    for rank in range(TRIES):
        at, new = openings[rank]
        if at < 0 or (rank >= ENOUGH and chosen >= 0):
            break
        old, device = layer.slot[at], at // fleet.width
        _overwrite(layer, fleet, whole, at, new)
        gain = limit - level(whole, goal)
        gain /= 1.0 + price * max(layer.cost[device, new] - layer.cost[device, old], 0.0)
        if gain > best:
            best, chosen, comer = gain, at, new
        write(layer, fleet, at, old)
        list_hosts(layer.slot, whole.first, whole.hosts, whole.next_host)
        whole.flow[:], whole.held[:], whole.stuck[:] = flow, held, stuck
    if chosen < 0:
        return limit, -1, -1
    before = layer.slot[chosen]
    _overwrite(layer, fleet, whole, chosen, comer)
    return level(whole, 1.0), chosen, before


@compiled
def keep_free_layers(
    slot: Ints, load: Floats, size: Floats, fleet: Fleet, home: Ints, prices: Prices,
    goal: Floats, traces: Traces,
) -> Ints:  # fmt: skip
    """As `planner_keep.keep_layers`, with shares that are levelled after every step."""
    missing = np.zeros(slot.shape[0], dtype=np.int64)
    speed = 1.0 / fleet.pace
    most = traces.peak.shape[1] - 1
    for index in range(slot.shape[0]):
        layer = blank(load[index], size[index], slot[index], home[index], fleet, True)
        settle(layer, fleet)
        price_copies(layer, fleet, prices)
        missing[index] = repair(layer, fleet)
        whole = open_flow(layer.slot, layer.load, speed)
        price = 1.0 / size[index].mean()
        floor = max(goal[index], 1.0)
        steps, spent = 0, 0.0
        limit = level(whole, 1.0)
        traces.peak[index, 0] = limit
        while limit > floor and steps < most:
            limit, at, old = _step(layer, fleet, whole, limit, floor, price)
            if at < 0:
                break
            new, device = layer.slot[at], at // fleet.width
            spent += layer.cost[device, new] - layer.cost[device, old]
            traces.writes[index, steps] = (at, old, new)
            steps += 1
            traces.ends[index, steps] = steps
            traces.spent[index, steps] = spent
            traces.peak[index, steps] = limit
        traces.steps[index] = steps
    return missing
