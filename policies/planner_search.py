"""Searches a layer step by step: which change on the slowest device is worth most. Compiled.

Decides single steps: a swap of two slots, or an overwrite of a spare replica. Must not know what is
asked for (`planner_layers` and `planner_keep` decide that), formats, windows or where loads come
from. Local search on the slowest device; bounds on what a device or an expert could bring only
spare looking at candidates and never change the choice. The two scans have a vectorised twin in
`planner_scans` for where numba is missing.

Invariants: those of `planner_kernels`; the slowest device never gets slower.
"""

# ruff: noqa: C901, FBT001, PLR0912, PLR0913, PLR0915, PLR0917 - numba has no keyword-only
# arguments, and a call that hands over a whole layer costs more than the loop around it

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from hotset.policies import planner_scans
from hotset.policies.jit import COMPILED, compiled
from hotset.policies.planner_kernels import (
    Fleet,
    Floats,
    Layer,
    Log,
    covered,
    exchange,
    write,
)
from hotset.policies.planner_scans import BEYOND, LEAST_DROP, LEAST_SCORE

CAUTION = 1.0 - 1e-12
"""Rounding must not make a bound pass over what the scan without bounds would choose."""
LAST_REACH = 0.05
"""Reach of the last attempts of a search that finds no step."""


class Tolls(NamedTuple):
    """Bounds on the price of a step, as far as a device decides it."""

    enter: Floats  # [D] least cost of an expert that may come
    leave: Floats  # [D] greatest cost of one that is there


@compiled
def open_tolls(layer: Layer, fleet: Fleet, price: float, least: float) -> Tolls:
    """Bounds to begin with; no expert that may come to a device costs less than `least`."""
    devices = layer.time.shape[0]
    tolls = Tolls(np.full(devices, least), np.zeros(devices))
    for at in range(layer.slot.shape[0] if price > 0.0 else 0):
        device, expert = at // fleet.width, layer.slot[at]
        if expert >= 0:
            tolls.leave[device] = max(tolls.leave[device], layer.cost[device, expert])
    return tolls


@compiled
def _raise_tolls(layer: Layer, tolls: Tolls, device: int, old: int, new: int) -> None:
    """Keep the bounds when `new` replaces `old` on a device."""
    tolls.enter[device] = min(tolls.enter[device], layer.cost[device, old])
    tolls.leave[device] = max(tolls.leave[device], layer.cost[device, new])


@compiled
def scan_swaps(
    layer: Layer, fleet: Fleet, hot: int, goal: float, price: float, floor: float, tolls: Tolls
) -> tuple[float, int, int]:
    """Best swap of a slot of `hot` with a slot elsewhere: (score, slot, slot), above `floor`.

    The fastest device is looked at first, so that most others cannot do better and are passed over.
    """
    width, twice, spread, pace, room = (
        fleet.width, fleet.twice, fleet.spread, fleet.pace, fleet.room,
    )  # fmt: skip
    known = tolls.enter[hot] - tolls.leave[hot]
    slot, unit, hold, cost, size = layer.slot, layer.unit, layer.hold, layer.cost, layer.size
    time, used, count = layer.time, layer.used, layer.count
    top, pace_hot = time[hot], pace[hot]
    best, first, second = max(LEAST_SCORE, floor), -1, -1
    coldest = int(np.argmin(time))
    for rank in range(time.shape[0] + 1):
        device = coldest if rank == 0 else rank - 1
        if device == hot or (rank > 0 and device == coldest):
            continue
        now, pace_there = time[device], pace[device]
        most = (top - now) * pace_hot / (pace_hot + pace_there)
        relief = top - goal  # a device as slow as `hot` wins no more than it has below the goal
        if pace_hot <= pace_there:
            relief = min(relief, max(goal - now, 0.0) * pace_hot / pace_there)
        most_score = relief + BEYOND * most
        if most <= LEAST_DROP or most_score <= best * CAUTION:
            continue
        least = max(known + tolls.enter[device] - tolls.leave[device], 0.0)
        if most_score / (1.0 + price * least) <= best * CAUTION:
            continue
        back = 0.0  # least price of what `hot` would take from here
        if price > 0.0:
            back = np.inf
            for to in range(device * width, device * width + width):
                if slot[to] >= 0:
                    back = min(back, cost[hot, slot[to]] - cost[device, slot[to]])
        for at in range(hot * width, hot * width + width):
            one = slot[at]
            if one < 0 or hold[device, one] >= twice:
                continue
            if price > 0.0:
                least = max(cost[device, one] - cost[hot, one] + back, 0.0)
                if most_score / (1.0 + price * least) <= best * CAUTION:
                    continue
            for to in range(device * width, device * width + width):
                two = slot[to]
                if two < 0:
                    continue
                shift = unit[one] - unit[two]
                here = top - shift * pace_hot
                there = now + shift * pace_there
                drop = top - max(here, there)
                if drop <= LEAST_DROP:
                    continue
                gain = (top - max(here, goal)) - (max(there, goal) - max(now, goal))
                score = gain + BEYOND * drop
                if score <= best or hold[hot, two] >= twice:
                    continue
                if price > 0.0:
                    extra = cost[device, one] - cost[hot, one]
                    extra += cost[hot, two] - cost[device, two]
                    score /= 1.0 + price * max(extra, 0.0)
                    if score <= best:
                        continue
                grown = size[two] - size[one]
                if used[hot] + grown > room[hot] or used[device] - grown > room[device]:
                    continue
                if spread > 1 and not (
                    covered(layer, fleet, one, hot, device, count[one])
                    and covered(layer, fleet, two, device, hot, count[two])
                ):
                    continue
                best, first, second = score, at, to
    return best, first, second


@compiled
def crowds(layer: Layer, fleet: Fleet, goal: float) -> Floats:
    """What one replica less or more of each expert does to its hosts: [5, E].

    Rows: time of the slowest host with one replica less, its device, time of the second slowest,
    time over `goal` that hosts would gain with one replica less, and lose with one more.
    """
    width, pace, time = fleet.width, fleet.pace, layer.time
    slot, unit, less, more, count = layer.slot, layer.unit, layer.less, layer.more, layer.count
    table = np.zeros((5, unit.shape[0]))
    table[1] = -1.0
    for device in range(time.shape[0]):
        now, there = time[device], pace[device]
        over = max(now, goal)
        for at in range(device * width, device * width + width):
            expert = slot[at]
            if expert < 0:
                continue
            if over > goal:
                relieved = now - (unit[expert] - less[expert]) * there
                table[4, expert] += over - max(relieved, goal)
            if count[expert] < 2:
                continue
            burdened = now + (more[expert] - unit[expert]) * there
            table[3, expert] += max(burdened, goal) - over
            if burdened > table[0, expert]:
                table[2, expert] = table[0, expert]
                table[0, expert], table[1, expert] = burdened, device
            elif burdened > table[2, expert]:
                table[2, expert] = burdened
    return table


@compiled
def _ceilings(
    layer: Layer, fleet: Fleet, hot: int, relief: float, most: float, table: Floats
) -> Floats:
    """Bound on the score of a free overwrite of each expert's replicas away from `hot`: [E].

    Without what the device of the replica wins, which is no harm any more.
    """
    top, experts = layer.time[hot], layer.unit.shape[0]
    found = np.full(experts, -np.inf)
    for expert in range(experts):
        rest = table[2, expert]  # the best case: the slowest host loses its replica
        if layer.count[expert] <= fleet.least or layer.hold[hot, expert] > 0:
            continue  # with a replica less, `hot` would have to take more of it
        if top - rest > LEAST_DROP:
            found[expert] = relief - table[3, expert] + BEYOND * min(top - rest, most)
    return found


@compiled
def scan_overwrites(
    layer: Layer, fleet: Fleet, hot: int, goal: float, price: float, floor: float, tolls: Tolls
) -> tuple[float, int, int]:
    """Best overwrite of a spare replica that helps `hot`: (score, slot, expert), above `floor`.

    Either a spare replica elsewhere becomes one of an expert of `hot`, or a spare replica on `hot`
    becomes one of an expert elsewhere.
    """
    width, twice, spread, pace = fleet.width, fleet.twice, fleet.spread, fleet.pace
    least = fleet.least
    slot, unit, less, more, count = layer.slot, layer.unit, layer.less, layer.more, layer.count
    size, hold, cost, time = layer.size, layer.hold, layer.cost, layer.time
    top, pace_hot = time[hot], pace[hot]
    best, chosen, comer = max(LEAST_SCORE, floor), -1, -1
    table = crowds(layer, fleet, goal)
    relief, most = 0.0, 0.0  # bounds on what a comer relieves
    for at in range(hot * width, hot * width + width):
        if slot[at] >= 0:
            relief = max(relief, table[4, slot[at]])
            most = max(most, (unit[slot[at]] - less[slot[at]]) * pace_hot)
    ceiling = _ceilings(layer, fleet, hot, relief, most, table)
    everyone = float(table[4].max())
    for device in range(time.shape[0]):
        on_hot = device == hot
        there, now = pace[device], time[device]
        over = max(now, goal)
        fee = CAUTION * (1.0 + price * max(tolls.enter[device] - tolls.leave[device], 0.0))
        for at in range(device * width, device * width + width):
            old = slot[at]
            if old < 0:
                continue
            burdened = max(now + (more[old] - unit[old]) * there, goal)
            if not on_hot and ceiling[old] + (burdened - goal) <= best * fee:
                continue
            rest = table[2, old] if table[1, old] == device else table[0, old]
            if top - rest <= LEAST_DROP or count[old] <= least:
                continue
            harm = table[3, old] - (burdened - over)
            if on_hot and everyone - harm + (over - goal) + BEYOND * (top - rest) <= best * fee:
                continue
            for index in range(unit.shape[0] if on_hot else width):
                new = index if on_hot else slot[hot * width + index]
                if new < 0:
                    continue
                here = now + (less[new] - unit[old]) * there
                worst = max(here, rest)
                if not on_hot:
                    worst = max(worst, top - (unit[new] - less[new]) * pace_hot)
                drop = top - worst
                if drop <= LEAST_DROP:
                    continue
                score = (table[4, new] - harm) + (over - max(here, goal)) + BEYOND * drop
                if score <= best or new == old or hold[device, new] >= twice or count[new] < 1:
                    continue
                if price > 0.0:
                    extra = cost[device, new] - cost[device, old]
                    score /= 1.0 + price * max(extra, 0.0)
                    if score <= best:
                        continue
                if layer.used[device] + size[new] - size[old] > fleet.room[device]:
                    continue
                if spread > 1 and not (
                    covered(layer, fleet, old, device, -1, count[old] - 1)
                    and covered(layer, fleet, new, -1, device, count[new] + 1)
                ):
                    continue
                best, chosen, comer = score, at, new
    return best, chosen, comer


if not COMPILED:
    scan_swaps = planner_scans.scan_swaps
    scan_overwrites = planner_scans.scan_overwrites


@compiled
def search(
    layer: Layer, fleet: Fleet, goal: float, price: float, least: float, swaps_first: bool,
    reach: float, log: Log,
) -> int:  # fmt: skip
    """Relieve the slowest device step by step until it takes at most `goal`; return the steps.

    A step is worth the time above a level that it removes, over 1 + `price` x its cost. The level
    lies `reach` of the way from the slowest device to a perfect one, but not below `goal`: low
    reach looks at the slowest device alone, high reach at all that are slow. Nothing that may come
    to a device at the start costs less there than `least`.
    """
    most = log.ends.shape[0] - 1
    steps = writes = 0
    spent = 0.0
    tolls, wrote = open_tolls(layer, fleet, price, least), False
    log.peak[0], log.spent[0], log.ends[0] = layer.time.max(), 0.0, 0
    while steps < most:
        hot = int(np.argmax(layer.time))
        top = layer.time[hot]
        if top <= goal:
            break
        level = max(goal, top - reach * (top - 1.0))
        score, first, second = 0.0, -1, -1
        better, at, expert = 0.0, -1, -1
        if swaps_first or not wrote:
            score, first, second = scan_swaps(layer, fleet, hot, level, price, 0.0, tolls)
        if not (swaps_first and first >= 0):
            better, at, expert = scan_overwrites(layer, fleet, hot, level, price, score, tolls)
        if wrote and not swaps_first:
            floor = better * CAUTION
            score, first, second = scan_swaps(layer, fleet, hot, level, price, floor, tolls)
        if at < 0 and first < 0:
            if reach <= LAST_REACH:
                break
            reach = LAST_REACH
            continue
        wrote = at >= 0 and better > score  # the next step is likely to be of the same kind
        if wrote:
            old = layer.slot[at]
            device = at // fleet.width
            if price > 0.0:
                spent += layer.cost[device, expert] - layer.cost[device, old]
                _raise_tolls(layer, tolls, device, old, expert)
            write(layer, fleet, at, expert)
            log.writes[writes] = (at, old, expert)
            writes += 1
        else:
            one, two = layer.slot[first], layer.slot[second]
            here, there = first // fleet.width, second // fleet.width
            if price > 0.0:
                spent += layer.cost[there, one] - layer.cost[here, one]
                spent += layer.cost[here, two] - layer.cost[there, two]
                _raise_tolls(layer, tolls, here, one, two)
                _raise_tolls(layer, tolls, there, two, one)
            exchange(layer, fleet, first, second)
            log.writes[writes] = (first, one, two)
            log.writes[writes + 1] = (second, two, one)
            writes += 2
        steps += 1
        log.peak[steps] = layer.time.max()
        log.spent[steps] = spent
        log.ends[steps] = writes
    return steps
