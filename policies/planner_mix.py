"""Makes a balanced layer easy to level by shares: devices that share an expert can shift load.

Decides swaps between nearly equal slots after a layer has been balanced. Two devices are connected
when they hold the same expert; shares can level load within a connected set and not beyond (the
topology behind LPLB). A device that shares nothing is stuck with its load until weights move, and
so is a pair of devices that holds the same two experts.
Compiled like the kernels.

Invariants: balance stays under the limit; the number of connected sets never grows.
"""

# ruff: noqa: C901, PLR0913, PLR0917 - numba has no keyword-only
# arguments, and a call that hands over a whole layer costs more than the loop around it

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from hotset.policies.jit import compiled
from hotset.policies.planner_flow import find_sets, list_hosts
from hotset.policies.planner_kernels import (
    Fleet,
    Floats,
    Ints,
    Layer,
    Log,
    covered,
    exchange,
    settle,
)
from hotset.policies.planner_layers import FINE_GOAL, FRESH_REACH, blank
from hotset.policies.planner_search import search

ROUNDING = 1.0 + 1e-9
SLACK = 1.01
"""A device may become this slow for the sake of a connection; the search that follows mends it."""
TRIES = 3
"""Swaps that are tried for one set, the best balanced first."""
NEIGHBOURS = 8
"""Experts with a replica of nearly the same load, on either side, that are looked at."""


class Sets(NamedTuple):
    """Which devices are connected, and which slots hold an expert."""

    label: Ints  # [D] first device of the connected set
    links: Ints  # [D] experts that other devices hold too
    first: Ints  # [E + 1] where an expert's slots begin in `hosts`
    hosts: Ints  # [P]
    listed: Ints  # [P] where a slot is in `hosts`
    order: Ints  # [E] experts by the load of a replica
    rank: Ints  # [E] their places in `order`


@compiled
def _open_sets(layer: Layer, fleet: Fleet) -> Sets:
    """Everything but `label`."""
    devices, experts, slots = fleet.node.shape[0], layer.load.shape[0], layer.slot.shape[0]
    order = np.argsort(layer.unit, kind="mergesort")
    sets = Sets(
        np.zeros(devices, dtype=np.int64),
        np.zeros(devices, dtype=np.int64),
        np.zeros(experts + 1, dtype=np.int64),
        np.zeros(slots, dtype=np.int64),
        np.zeros(slots, dtype=np.int64),
        order,
        np.argsort(order, kind="mergesort"),
    )
    list_hosts(layer.slot, sets.first, sets.hosts, np.zeros(experts, dtype=np.int64))
    for index in range(sets.first[experts]):
        at = sets.hosts[index]
        sets.listed[at] = index
        if layer.count[layer.slot[at]] > 1:
            sets.links[at // fleet.width] += 1
    return sets


@compiled
def _bridges(layer: Layer, fleet: Fleet, sets: Sets, small: int, limit: float) -> Ints:
    """Swaps that lead from set `small` into another, best balanced first: [TRIES, 2] slots, or -1.

    Only replicas of nearly the same load are looked at. After a swap both devices must share an
    expert, and one of them one with each of the sets, as far as these two devices tell.
    """
    found = np.full((TRIES, 2), -1, dtype=np.int64)
    worth = np.full(TRIES, limit)
    slot, unit, time, pace, width = layer.slot, layer.unit, layer.time, fleet.pace, fleet.width
    label, links, first, hosts, order = sets.label, sets.links, sets.first, sets.hosts, sets.order
    hold, size, count = layer.hold, layer.size, layer.count
    for device in np.flatnonzero(label == small):
        here = int(device)
        for at in range(here * width, here * width + width):
            own = slot[at]
            if own < 0:
                continue
            gives = 1 if count[own] > 1 else 0
            mine = links[here] - gives
            low, high = sets.rank[own] - NEIGHBOURS, sets.rank[own] + NEIGHBOURS + 1
            for near in range(max(low, 0), min(high, order.shape[0])):
                shared = order[near]
                takes = 1 if count[shared] > 1 else 0
                here_after = time[here] - (unit[own] - unit[shared]) * pace[here]
                if here_after > worth[-1] or mine + takes == 0 or hold[here, shared] > 0:
                    continue
                for index in range(first[shared], first[shared + 1]):
                    to = hosts[index]
                    there = to // width
                    theirs = links[there] - takes
                    peak = max(here_after, time[there] + (unit[own] - unit[shared]) * pace[there])
                    if peak >= worth[-1] or label[there] == small or theirs + gives == 0:
                        continue
                    if not (
                        (takes == 1 and mine > 0) or (gives == 1 and theirs > 0) or links[here] == 0
                    ):
                        continue
                    if hold[there, own] > 0 or size[own] != size[shared]:
                        continue
                    if fleet.spread > 1 and not (
                        covered(layer, fleet, shared, there, here, count[shared])
                        and covered(layer, fleet, own, here, there, count[own])
                    ):
                        continue
                    place = TRIES - 1
                    while place > 0 and worth[place - 1] > peak:
                        worth[place] = worth[place - 1]
                        found[place] = found[place - 1]
                        place -= 1
                    worth[place] = peak
                    found[place, 0], found[place, 1] = at, to
    return found


@compiled
def _swap(layer: Layer, fleet: Fleet, sets: Sets, at: int, to: int) -> None:
    """Swap two slots and keep the lists; `label` waits for `find_sets`."""
    own, shared = layer.slot[at], layer.slot[to]
    here, there = at // fleet.width, to // fleet.width
    change = (1 if layer.count[shared] > 1 else 0) - (1 if layer.count[own] > 1 else 0)
    sets.links[here] += change
    sets.links[there] -= change
    one, two = sets.listed[at], sets.listed[to]
    sets.hosts[one], sets.hosts[two] = to, at
    sets.listed[at], sets.listed[to] = two, one
    exchange(layer, fleet, at, to)


@compiled
def mix_layer(layer: Layer, fleet: Fleet, log: Log) -> None:
    """Connect small sets to others, smallest first, then balance again what that has cost."""
    devices = fleet.node.shape[0]
    before = layer.time.max()
    limit = max(before, SLACK)
    sets = _open_sets(layer, fleet)
    number = find_sets(sets.label, sets.first, sets.hosts, fleet.width)
    done = np.zeros(devices, dtype=np.int64)
    while number > 1:
        sizes = np.bincount(sets.label, minlength=devices)
        small, least = -1, int(sizes.max())  # the largest set is what others are connected to
        for device in range(devices):
            if done[device] == 0 and sizes[sets.label[device]] < least:
                least, small = sizes[sets.label[device]], sets.label[device]
        if small < 0:
            break
        for device in range(devices):
            if sets.label[device] == small:
                done[device] = 1
        label = sets.label.copy()
        for at, to in _bridges(layer, fleet, sets, small, limit):
            if at < 0:
                break
            _swap(layer, fleet, sets, at, to)
            fewer = find_sets(sets.label, sets.first, sets.hosts, fleet.width)
            if fewer < number:
                number = fewer
                break
            _swap(layer, fleet, sets, at, to)
            sets.label[:] = label
    if layer.time.max() > before * ROUNDING:
        search(layer, fleet, FINE_GOAL, 0.0, 0.0, True, FRESH_REACH, log)


@compiled
def mix_layers(slot: Ints, load: Floats, size: Floats, fleet: Fleet, home: Ints, log: Log) -> None:
    """Mix every layer of `slot` [L, P] in place, unless that would cost balance."""
    for index in range(slot.shape[0]):
        layer = blank(load[index], size[index], slot[index], home[index], fleet, False)
        settle(layer, fleet)
        before, peak = layer.slot.copy(), layer.time.max()
        mix_layer(layer, fleet, log)
        if layer.time.max() > max(peak, FINE_GOAL * FINE_GOAL):
            layer.slot[:] = before
