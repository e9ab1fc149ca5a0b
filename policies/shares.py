"""The best split of each expert's tokens over its replicas, for a placement that is there.

Decides shares, never moves. `best_shares` is exact; `split_batch` is the quick form for the token
path: whole tokens of one batch and layer. Must not know how placements are found.

The exact form is the optimum of the linear program of LPLB; see `planner_flow`. The quick form
levels the hosts of one expert at a time, largest first (water filling, coordinate descent).

Invariants: shares of an expert sum to 1 and tokens to its count; no share is negative.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from hotset.policies.jit import compiled
from hotset.policies.place_check import as_numpy, check_current, check_load, check_speed, whole
from hotset.policies.planner_flow import level_layers

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from hotset.policies.planner_kernels import Floats, Ints

__all__ = ["best_shares", "split_batch"]

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
    devices = whole(num_devices, name="num_devices")
    if array.ndim != 2 or array.shape[1] % devices:
        raise ValueError(f"num_devices {devices} must divide the slots {array.shape}")
    where = check_current(array, layers=layers, slots=array.shape[1], experts=experts)
    pace = check_speed(speed, devices=devices)
    total = loads[0].sum(axis=1, keepdims=True)
    scaled = np.where(total > 0, loads[0] / np.where(total > 0, total, 1.0), 1.0 / experts)
    found = np.zeros(where.shape)
    level_layers(where, scaled, pace / pace.sum(), found)
    return found


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
