"""Makes a balanced layer easy to level by shares: devices that share an expert can shift load.

Decides swaps between nearly equal slots after a layer has been balanced. Two devices are connected
when they hold the same expert; shares can level load within a connected set and not beyond (the
topology behind LPLB). A device that shares nothing is stuck with its load until weights move.
Compiled like the kernels.

Invariants: balance stays under the limit; the number of connected sets never grows.
"""

# ruff: noqa: C901, PLR0913, PLR0917 - numba has no keyword-only
# arguments, and a call that hands over a whole layer costs more than the loop around it

from __future__ import annotations

import numpy as np

from hotset.policies.planner_jit import compiled
from hotset.policies.planner_kernels import (
    Fleet,
    Floats,
    Ints,
    Layer,
    Log,
    covered,
    exchange,
    search,
    settle,
)
from hotset.policies.planner_layers import FINE_GOAL, FRESH_REACH, blank

SLACK = 1.01
"""A device may become this slow for the sake of a connection; the search that follows mends it."""
TRIES = 6
"""Swaps that are tried for one set, the best balanced first."""


@compiled
def components(layer: Layer, fleet: Fleet, label: Ints) -> int:
    """Label each device with its connected set; return how many there are."""
    devices = label.shape[0]
    for device in range(devices):
        label[device] = device
    last = np.full(layer.load.shape[0], -1, dtype=np.int64)
    for at in range(layer.slot.shape[0]):
        expert = layer.slot[at]
        if expert < 0 or layer.count[expert] < 2:
            continue
        device = at // fleet.width
        if last[expert] >= 0:
            one, two = label[last[expert]], label[device]
            if one != two:
                for other in range(devices):
                    if label[other] == two:
                        label[other] = one
        last[expert] = device
    seen = np.zeros(devices, dtype=np.int64)
    seen[label] = 1
    return int(seen.sum())


@compiled
def _bridges(layer: Layer, fleet: Fleet, label: Ints, small: int, limit: float) -> Ints:
    """Swaps that bring a shared expert into set `small`, best balanced first: [TRIES, 2]."""
    found = np.full((TRIES, 2), -1, dtype=np.int64)
    worth = np.full(TRIES, np.inf)
    width = fleet.width
    inside = np.flatnonzero(label == small)
    for to in range(layer.slot.shape[0]):
        shared, there = layer.slot[to], to // width
        if shared < 0 or layer.count[shared] < 2 or label[there] == small:
            continue
        for index in range(inside.shape[0] * width):
            here = inside[index // width]
            at = here * width + index % width
            own = layer.slot[at]
            if own < 0 or layer.count[own] > 1 or layer.hold[here, shared] > 0:
                continue
            if layer.size[own] != layer.size[shared]:
                continue
            shift = layer.unit[own] - layer.unit[shared]
            peak = max(
                layer.time[here] - shift * fleet.pace[here],
                layer.time[there] + shift * fleet.pace[there],
            )
            if peak > limit or peak >= worth[TRIES - 1]:
                continue
            if not covered(layer, fleet, shared, there, here, layer.count[shared]):
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
def mix_layer(layer: Layer, fleet: Fleet, log: Log) -> None:
    """Connect small sets to others, smallest first, then balance again."""
    label = np.zeros(fleet.node.shape[0], dtype=np.int64)
    limit = max(layer.time.max(), SLACK)
    sets = components(layer, fleet, label)
    if sets == 1:
        return
    done = np.zeros(label.shape[0], dtype=np.int64)
    while sets > 1:
        sizes = np.bincount(label, minlength=label.shape[0])
        small, least = -1, label.shape[0] + 1
        for device in range(label.shape[0]):
            if done[device] == 0 and sizes[label[device]] < least:
                least, small = sizes[label[device]], label[device]
        if small < 0:
            break
        for device in range(label.shape[0]):
            if label[device] == small:
                done[device] = 1
        for at, to in _bridges(layer, fleet, label, small, limit):
            if at < 0:
                break
            exchange(layer, fleet, at, to)
            fewer = components(layer, fleet, label)
            if fewer < sets:
                sets = fewer
                break
            exchange(layer, fleet, at, to)
            components(layer, fleet, label)
    search(layer, fleet, FINE_GOAL, 0.0, True, FRESH_REACH, log)


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
