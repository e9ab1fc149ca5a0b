"""The planner's inner loops: compiled by numba where it is installed, plain NumPy code otherwise.

Decides single steps: which expert gets the next replica, which device takes a slot, which move on
the slowest device is worth most. `place` decides what is asked of them. Must not know formats,
windows or where loads come from. Both forms do the same arithmetic in the same order, so the plans
are the same; the two scans have a vectorised twin in `planner_scans`.

Sources: replicas go to argmax(load / replicas) as in DeepSeek's EPLB; packing is longest processing
time first (Graham 1969); the rest is local search on the slowest device.

Times are load / speed, scaled so that every device of a perfectly balanced layer takes 1.0.
Invariants: `count`, `hold`, `on_node`, `time` and `used` agree with `slot` after every function; an
expert keeps a copy; no device goes over its bytes or holds an expert more than `twice` times.
"""

# ruff: noqa: C901, FBT001, PLR0912, PLR0913, PLR0915, PLR0917 - numba has no keyword-only
# arguments, and a call that hands over a whole layer costs more than the loop around it

from __future__ import annotations

import heapq
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from hotset.policies import planner_scans
from hotset.policies.jit import COMPILED, compiled
from hotset.policies.planner_scans import BEYOND, LEAST_DROP, LEAST_SCORE

CAUTION = 1.0 - 1e-12
"""Rounding must not make a bound pass over what the scan without bounds would choose."""
LAST_REACH = 0.05
"""Reach of the last attempts of a search that finds no step."""
Ints = NDArray[np.int64]
Floats = NDArray[np.float64]
Small = NDArray[np.int16]


class Fleet(NamedTuple):
    """The devices of a plan."""

    node: Ints  # [D]
    pace: Floats  # [D] time that the whole layer would take on this device alone
    room: Floats  # [D] bytes
    num_nodes: int
    width: int  # slots of a device
    twice: int  # most copies of one expert on one device: 1 unless slots outnumber experts
    spread: int  # nodes that the replicas of an expert must cover, as far as it has replicas
    least: int  # fewest replicas of an expert that a search leaves


class Layer(NamedTuple):
    """One layer while it is planned."""

    slot: Ints  # [P] expert, or -1
    load: Floats  # [E], sums to 1
    size: Floats  # [E] bytes
    home: Ints  # [E] node, or -1
    cost: Floats  # [D, E] price of having the expert there; not read by a search without price
    count: Ints  # type: ignore[assignment] # [E] replicas; a tuple's method of this name is unused
    unit: Floats  # [E] load of one replica
    less: Floats  # [E] the same with one replica more
    more: Floats  # [E] the same with one replica less
    hold: Small  # [D, E] copies
    on_node: Small  # [N, E] copies
    time: Floats  # [D]
    used: Floats  # [D] bytes


class Log(NamedTuple):
    """What a search did: `writes` (slot, before, after); entry k of the rest is after k steps."""

    writes: Ints  # [2 * most, 3]
    ends: Ints  # [most + 1] writes so far
    peak: Floats  # [most + 1] time of the slowest device
    spent: Floats  # [most + 1] cost so far


@compiled
def replicate(load: Floats, left: int, most: int, cap: float, cold: bool, count: Ints) -> None:
    """Give `left` more replicas, each to the expert with the most load on one replica.

    Once no replica carries more than `cap`, those that are left go to experts with one copy: the
    coldest or the hottest of them. Many replicas just above half a device's load cannot be paired;
    fewer and larger ones, with small experts beside them, can.
    """
    queue = [(-load[e] / count[e], e) for e in range(load.shape[0]) if count[e] < most]
    heapq.heapify(queue)
    singles = np.argsort(load if cold else -load, kind="mergesort")
    next_single = 0
    while left > 0 and len(queue) > 0:
        unit, chosen = queue[0]
        if unit != -load[chosen] / count[chosen]:  # got one as a single
            heapq.heappop(queue)
            if count[chosen] < most:
                heapq.heappush(queue, (-load[chosen] / count[chosen], chosen))
            continue
        if -unit <= cap and most > 1:
            while next_single < singles.shape[0] and count[singles[next_single]] > 1:
                next_single += 1
            if next_single < singles.shape[0]:
                count[singles[next_single]] += 1
                left -= 1
                continue
        count[chosen] += 1
        left -= 1
        heapq.heappop(queue)
        if count[chosen] < most:
            heapq.heappush(queue, (-load[chosen] / count[chosen], chosen))


@compiled
def settle(layer: Layer, fleet: Fleet) -> None:
    """Derive everything else from `slot`."""
    layer.count[:] = 0
    layer.hold[:] = 0
    layer.on_node[:] = 0
    layer.time[:] = 0.0
    layer.used[:] = 0.0
    for at in range(layer.slot.shape[0]):
        expert = layer.slot[at]
        if expert >= 0:
            device = at // fleet.width
            layer.count[expert] += 1
            layer.hold[device, expert] += 1
            layer.on_node[fleet.node[device], expert] += 1
            layer.used[device] += layer.size[expert]
    for expert in range(layer.load.shape[0]):
        _divide(layer, expert)
    for at in range(layer.slot.shape[0]):
        expert = layer.slot[at]
        if expert >= 0:
            device = at // fleet.width
            layer.time[device] += layer.unit[expert] * fleet.pace[device]


@compiled
def _divide(layer: Layer, expert: int) -> None:
    copies = layer.count[expert]
    layer.unit[expert] = layer.load[expert] / copies if copies > 0 else 0.0
    layer.less[expert] = layer.load[expert] / (copies + 1)
    layer.more[expert] = layer.load[expert] / (copies - 1) if copies > 1 else 0.0


@compiled
def covered(layer: Layer, fleet: Fleet, expert: int, leave: int, enter: int, copies: int) -> bool:
    """Whether `copies` replicas cover enough nodes when one leaves a device and one enters."""
    if fleet.spread <= 1:
        return True
    distinct = 0
    for node in range(fleet.num_nodes):
        there = layer.on_node[node, expert]
        if leave >= 0 and fleet.node[leave] == node:
            there -= 1
        if enter >= 0 and fleet.node[enter] == node:
            there += 1
        if there > 0:
            distinct += 1
    return distinct >= min(copies, fleet.spread)


@compiled
def write(layer: Layer, fleet: Fleet, at: int, expert: int) -> None:
    """Put `expert` (or -1) into a slot and keep the books."""
    device = at // fleet.width
    before = layer.slot[at]
    if before >= 0:
        _recount(layer, fleet, before, device, -1)
    layer.slot[at] = expert
    if expert >= 0:
        _recount(layer, fleet, expert, device, 1)


@compiled
def _recount(layer: Layer, fleet: Fleet, expert: int, device: int, step: int) -> None:
    before = layer.unit[expert]
    layer.time[device] -= layer.hold[device, expert] * before * fleet.pace[device]
    layer.hold[device, expert] += step
    layer.on_node[fleet.node[device], expert] += step
    layer.used[device] += step * layer.size[expert]
    layer.count[expert] += step
    _divide(layer, expert)
    after = layer.unit[expert]
    layer.time[device] += layer.hold[device, expert] * after * fleet.pace[device]
    change = after - before
    if change != 0.0 and layer.count[expert] > layer.hold[device, expert]:
        for other in range(layer.time.shape[0]):
            if other != device and layer.hold[other, expert] > 0:
                layer.time[other] += layer.hold[other, expert] * change * fleet.pace[other]


@compiled
def exchange(layer: Layer, fleet: Fleet, first: int, second: int) -> None:
    """Swap two slots; counts stay, so only two devices change."""
    one, two = layer.slot[first], layer.slot[second]
    here, there = first // fleet.width, second // fleet.width
    shift = layer.unit[one] - layer.unit[two]
    layer.time[here] -= shift * fleet.pace[here]
    layer.time[there] += shift * fleet.pace[there]
    layer.used[here] += layer.size[two] - layer.size[one]
    layer.used[there] += layer.size[one] - layer.size[two]
    layer.hold[here, one] -= 1
    layer.hold[there, one] += 1
    layer.hold[there, two] -= 1
    layer.hold[here, two] += 1
    layer.on_node[fleet.node[here], one] -= 1
    layer.on_node[fleet.node[there], one] += 1
    layer.on_node[fleet.node[there], two] -= 1
    layer.on_node[fleet.node[here], two] += 1
    layer.slot[first], layer.slot[second] = two, one


@compiled
def scan_swaps(
    layer: Layer, fleet: Fleet, hot: int, goal: float, price: float
) -> tuple[float, int, int]:
    """Best swap of a slot of `hot` with a slot elsewhere: (score, slot, slot).

    The fastest device is looked at first, so that most others cannot do better and are passed over.
    """
    width, twice, spread, pace, room = (
        fleet.width, fleet.twice, fleet.spread, fleet.pace, fleet.room,
    )  # fmt: skip
    slot, unit, hold, cost, size = layer.slot, layer.unit, layer.hold, layer.cost, layer.size
    time, used, count = layer.time, layer.used, layer.count
    top, pace_hot = time[hot], pace[hot]
    best, first, second = LEAST_SCORE, -1, -1
    coldest = int(np.argmin(time))
    for rank in range(time.shape[0] + 1):
        device = coldest if rank == 0 else rank - 1
        if device == hot or (rank > 0 and device == coldest):
            continue
        now, pace_there = time[device], pace[device]
        most = (top - now) * pace_hot / (pace_hot + pace_there)
        most_score = (top - goal) + BEYOND * most
        if most <= LEAST_DROP or most_score <= best * CAUTION:
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
    for at in range(slot.shape[0]):
        expert = slot[at]
        if expert < 0:
            continue
        device = at // width
        now = time[device]
        over = max(now, goal)
        if over > goal:
            relieved = now - (unit[expert] - less[expert]) * pace[device]
            table[4, expert] += over - max(relieved, goal)
        if count[expert] < 2:
            continue
        burdened = now + (more[expert] - unit[expert]) * pace[device]
        table[3, expert] += max(burdened, goal) - over
        if burdened > table[0, expert]:
            table[2, expert] = table[0, expert]
            table[0, expert], table[1, expert] = burdened, device
        elif burdened > table[2, expert]:
            table[2, expert] = burdened
    return table


@compiled
def scan_overwrites(
    layer: Layer, fleet: Fleet, hot: int, goal: float, price: float
) -> tuple[float, int, int]:
    """Best overwrite of a spare replica that helps `hot`: (score, slot, expert).

    Either a spare replica elsewhere becomes one of an expert of `hot`, or a spare replica on `hot`
    becomes one of an expert elsewhere.
    """
    width, twice, spread, pace = fleet.width, fleet.twice, fleet.spread, fleet.pace
    least = fleet.least
    slot, unit, less, hold, cost = layer.slot, layer.unit, layer.less, layer.hold, layer.cost
    size, count, time = layer.size, layer.count, layer.time
    top, pace_hot = time[hot], pace[hot]
    best, chosen, comer = LEAST_SCORE, -1, -1
    table = crowds(layer, fleet, goal)
    relief, known, fee = 0.0, -1, 0.0
    for at in range(slot.shape[0]):
        old = slot[at]
        if old < 0 or count[old] <= least:
            continue
        device = at // width
        on_hot = device == hot
        if device != known:
            known, relief, fee = device, -np.inf, np.inf  # bounds over all that may come here
            if width < 3 and not on_hot:
                relief, fee = np.inf, 0.0  # looking at both is as quick
            for index in range(unit.shape[0] if on_hot else width if width > 2 else 0):
                new = index if on_hot else slot[hot * width + index]
                if new >= 0 and hold[device, new] < twice:
                    relief = max(relief, table[4, new])
                    if price > 0.0:
                        fee = min(fee, cost[device, new])
        if not on_hot and hold[hot, old] > 0:
            continue  # `hot` would have to take more of it
        rest = table[2, old] if table[1, old] == device else table[0, old]
        if top - rest <= LEAST_DROP:
            continue
        there, now = pace[device], time[device]
        over = max(now, goal)
        alone = layer.more[old] - unit[old]
        harm = table[3, old] - (max(now + alone * there, goal) - over)
        bound = relief - harm + (over - goal) + BEYOND * (top - rest)
        if price > 0.0:
            bound /= 1.0 + price * max(fee - cost[device, old], 0.0)
        if bound <= best * CAUTION:
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
    layer: Layer, fleet: Fleet, goal: float, price: float, swaps_first: bool, reach: float, log: Log
) -> int:
    """Relieve the slowest device step by step until it takes at most `goal`; return the steps.

    A step is worth the time above a level that it removes, over 1 + `price` x its cost. The level
    lies `reach` of the way from the slowest device to a perfect one, but not below `goal`: low
    reach looks at the slowest device alone, high reach at all that are slow.
    """
    most = log.ends.shape[0] - 1
    steps = writes = 0
    spent = 0.0
    log.peak[0], log.spent[0], log.ends[0] = layer.time.max(), 0.0, 0
    while steps < most:
        hot = int(np.argmax(layer.time))
        top = layer.time[hot]
        if top <= goal:
            break
        level = max(goal, top - reach * (top - 1.0))
        score, first, second = scan_swaps(layer, fleet, hot, level, price)
        better, at, expert = 0.0, -1, -1
        if not (swaps_first and first >= 0):
            better, at, expert = scan_overwrites(layer, fleet, hot, level, price)
        if at < 0 and first < 0:
            if reach <= LAST_REACH:
                break
            reach = LAST_REACH
            continue
        if better > score:
            old = layer.slot[at]
            device = at // fleet.width
            if price > 0.0:
                spent += layer.cost[device, expert] - layer.cost[device, old]
            write(layer, fleet, at, expert)
            log.writes[writes] = (at, old, expert)
            writes += 1
        else:
            one, two = layer.slot[first], layer.slot[second]
            here, there = first // fleet.width, second // fleet.width
            if price > 0.0:
                spent += layer.cost[there, one] - layer.cost[here, one]
                spent += layer.cost[here, two] - layer.cost[there, two]
            exchange(layer, fleet, first, second)
            log.writes[writes] = (first, one, two)
            log.writes[writes + 1] = (second, two, one)
            writes += 2
        steps += 1
        log.peak[steps] = layer.time.max()
        log.spent[steps] = spent
        log.ends[steps] = writes
    return steps
