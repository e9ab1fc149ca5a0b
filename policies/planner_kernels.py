"""The planner's books on a layer: compiled by numba where it is installed, plain code otherwise.

Decides which expert gets the next replica, and keeps count of what every change of a slot does.
`planner_search` chooses the changes. Must not know formats, windows or where loads come from. Both
forms do the same arithmetic in the same order, so the plans are the same.

Source: replicas go to argmax(load / replicas) as in DeepSeek's EPLB.

Times are load / speed, scaled so that every device of a perfectly balanced layer takes 1.0.
Invariants: `count`, `hold`, `on_node`, `time` and `used` agree with `slot` after every function; an
expert keeps a copy; no device goes over its bytes or holds an expert more than `twice` times.
"""

# ruff: noqa: FBT001, PLR0913, PLR0917 - numba has no keyword-only
# arguments, and a call that hands over a whole layer costs more than the loop around it

from __future__ import annotations

import heapq
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from hotset.policies.jit import compiled

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
    width = fleet.width
    for device in range(layer.time.shape[0]):
        node = fleet.node[device]
        for at in range(device * width, device * width + width):
            expert = layer.slot[at]
            if expert >= 0:
                layer.count[expert] += 1
                layer.hold[device, expert] += 1
                layer.on_node[node, expert] += 1
                layer.used[device] += layer.size[expert]
    for expert in range(layer.load.shape[0]):
        _divide(layer, expert)
    for device in range(layer.time.shape[0]):
        for at in range(device * width, device * width + width):
            expert = layer.slot[at]
            if expert >= 0:
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
