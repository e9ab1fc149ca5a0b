"""The best split of each expert's tokens over its replicas, for a placement that is there.

Decides shares, never moves. `best_shares` is exact; `split_batch` is the quick form for the token
path: whole tokens of one batch and layer. Must not know how placements are found.

The exact form lowers a time limit until it cannot be kept: load is pushed from devices over the
limit along chains of replicas to devices under it (augmenting paths, Ford and Fulkerson); devices
that no chain leads out of form a bottleneck; its load over its speed is the next limit (Newton's
method on the cut). It is the optimum of the linear program of LPLB. The quick form
levels the hosts of one expert at a time, largest first (water filling, coordinate descent).

Invariants: shares of an expert sum to 1 and tokens to its count; no share is negative.
"""

# ruff: noqa: C901, PLR0912, PLR0915 - numba has no keyword-only
# arguments, and a call that hands over a whole layer costs more than the loop around it

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from hotset.policies.place_check import as_numpy, check_current, check_load
from hotset.policies.planner_jit import compiled

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from hotset.policies.planner_kernels import Floats, Ints

__all__ = ["best_shares", "split_batch"]

TOLERANCE = 1e-9
"""Load below this part of a layer's total is not worth a path."""
SWEEPS = 16
"""Most times that the quick form levels every expert; it ends when the slowest device stays."""


def best_shares(slots: Any, load: Any, *, num_devices: int, speed: Any = None) -> Floats:
    """Shares [L, P] that make the slowest device of every layer as fast as can be.

    `slots` [L, P] as in `physical_to_logical_map`, `load` [L, E], `speed` [D].
    Raises ValueError that names the argument.
    """
    loads = check_load(load)
    if len(loads) != 1:
        raise ValueError("load must be one window [layers, experts]; take the mean of several")
    layers, experts = loads[0].shape
    array = as_numpy(getattr(slots, "physical_to_logical_map", slots), name="slots")
    if array.ndim != 2 or array.shape[1] % num_devices:
        raise ValueError(f"num_devices {num_devices} must divide the slots {array.shape}")
    where = check_current(array, layers=layers, slots=array.shape[1], experts=experts)
    pace = np.ones(num_devices) if speed is None else as_numpy(speed, name="speed").astype(float)
    total = loads[0].sum(axis=1, keepdims=True)
    scaled = np.where(total > 0, loads[0] / np.where(total > 0, total, 1.0), 1.0 / experts)
    found = np.zeros(where.shape)
    for layer in range(layers):
        level_layer(where[layer], scaled[layer], pace / pace.sum(), found[layer])
    return found


@compiled
def level_layer(slot: Ints, load: Floats, speed: Floats, shares: Floats) -> None:
    """Fill `shares` [P] of one layer; `load` and `speed` sum to 1."""
    experts, devices, width = load.shape[0], speed.shape[0], slot.shape[0] // speed.shape[0]
    count = np.zeros(experts, dtype=np.int64)
    for at in range(slot.shape[0]):
        if slot[at] >= 0:
            count[slot[at]] += 1
    first = np.zeros(experts + 1, dtype=np.int64)
    first[1:] = np.cumsum(count)
    hosts = np.zeros(slot.shape[0], dtype=np.int64)  # slots of each expert in turn
    ahead = first[:-1].copy()
    flow = np.zeros(slot.shape[0])
    held = np.zeros(devices)
    for at in range(slot.shape[0]):
        expert = slot[at]
        if expert >= 0:
            hosts[ahead[expert]] = at
            ahead[expert] += 1
            flow[at] = load[expert] / count[expert]
            held[at // width] += flow[at]
    limit = 1.0
    came = np.full(devices, -1, dtype=np.int64)  # slot on the device before that gives
    into = np.full(devices, -1, dtype=np.int64)  # slot here that takes
    queue = np.zeros(devices, dtype=np.int64)
    for _ in range(64 * slot.shape[0]):
        came[:] = -2
        tail = 0
        for device in range(devices):
            if held[device] > limit * speed[device] + TOLERANCE:
                came[device] = -1
                queue[tail] = device
                tail += 1
        if tail == 0:
            break
        goal, head = -1, 0
        while head < tail and goal < 0:
            device = queue[head]
            head += 1
            for at in range(device * width, device * width + width):
                expert = slot[at]
                if expert < 0 or count[expert] < 2 or flow[at] <= TOLERANCE * 1e-3:
                    continue
                for index in range(first[expert], first[expert + 1]):
                    to = hosts[index] // width
                    if came[to] != -2:
                        continue
                    came[to], into[to] = at, hosts[index]
                    queue[tail] = to
                    tail += 1
                    if held[to] < limit * speed[to] - TOLERANCE * 1e-3:
                        goal = to
                        break
                if goal >= 0:
                    break
        if goal < 0:  # what was reached is a bottleneck: its load over its speed is the least limit
            stuck = capacity = 0.0
            for index in range(tail):
                stuck += held[queue[index]]
                capacity += speed[queue[index]]
            limit = max(stuck / capacity, limit * (1.0 + 1e-12))
            continue
        amount = limit * speed[goal] - held[goal]
        device = goal
        while came[device] >= 0:
            amount = min(amount, flow[came[device]])
            device = came[device] // width
        amount = min(amount, held[device] - limit * speed[device])
        held[goal] += amount
        held[device] -= amount
        device = goal
        while came[device] >= 0:
            flow[came[device]] -= amount
            flow[into[device]] += amount
            device = came[device] // width
    for at in range(slot.shape[0]):
        expert = slot[at]
        if expert >= 0:
            shares[at] = flow[at] / load[expert] if load[expert] > 0 else 1.0 / count[expert]
    for expert in range(experts):  # rounding of long chains
        total = 0.0
        for index in range(first[expert], first[expert + 1]):
            shares[hosts[index]] = max(shares[hosts[index]], 0.0)
            total += shares[hosts[index]]
        for index in range(first[expert], first[expert + 1]):
            shares[hosts[index]] /= total


def split_batch(counts: Any, hosts: Any, *, num_slots: int, num_devices: int) -> NDArray[np.int64]:
    """Whole tokens for each slot [P] from one batch's tokens for each expert [E] in one layer.

    `hosts` [E, X] is the layer's row of `logical_to_physical_map`. No checks: this is the token
    path.
    """
    tokens: NDArray[np.int64] = np.zeros(num_slots, dtype=np.int64)
    level_batch(
        np.asarray(counts, dtype=np.int64), hosts, num_slots // num_devices, num_devices, tokens
    )
    return tokens


@compiled
def level_batch(counts: Ints, hosts: Ints, width: int, devices: int, tokens: Ints) -> None:
    """Level the hosts of each expert with several, largest count first, a few times over."""
    held = np.zeros(devices)
    many = np.zeros(counts.shape[0], dtype=np.int64)
    several = 0
    for expert in range(counts.shape[0]):
        if counts[expert] == 0:
            continue
        if hosts.shape[1] < 2 or hosts[expert, 1] < 0:
            tokens[hosts[expert, 0]] = counts[expert]
            held[hosts[expert, 0] // width] += counts[expert]
        else:
            many[several] = expert
            several += 1
    order = many[:several][np.argsort(-counts[many[:several]], kind="mergesort")]
    last = np.inf
    for sweep in range(SWEEPS):
        if sweep > 1:
            if held.max() >= last - 0.5:
                break
            last = held.max()
        for expert in order:
            spread = 0
            while spread < hosts.shape[1] and hosts[expert, spread] >= 0:
                at = hosts[expert, spread]
                held[at // width] -= tokens[at]
                tokens[at] = 0
                spread += 1
            _pour(counts[expert], hosts[expert, :spread], width, held, tokens)


@compiled
def _pour(count: int, hosts: Ints, width: int, held: Floats, tokens: Ints) -> None:
    """Give `count` tokens to the hosts so that the least loaded come level."""
    level = np.sort(held[hosts // width])
    room = 0.0
    height = level[-1] + count
    for index in range(level.shape[0]):
        above = level[index + 1] if index + 1 < level.shape[0] else np.inf
        room += level[index]
        height = (count + room) / (index + 1)
        if height <= above:
            break
    left = count
    for at in hosts:
        taken = min(left, max(0, int(height - held[at // width])))
        tokens[at] = taken
        held[at // width] += taken
        left -= taken
    while left > 0:  # less than one token a host, by rounding down
        best = hosts[0]
        for at in hosts:
            if held[at // width] < held[best // width]:
                best = at
        tokens[best] += 1
        held[best // width] += 1
        left -= 1
