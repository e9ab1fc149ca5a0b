"""The planner that hotset is held against: greedy replicas, packed group by group, node by node.

Decides placements as deepseek-ai/EPLB describes (hierarchical load balancing): groups to nodes,
replicas inside nodes, replicas to devices, each step greedy, always from nothing. Our own words for
it; used by `hotset bench planner` and by tests. Must not know a current plan: that is its point.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from hotset.policies.place_score import pack_groups

if TYPE_CHECKING:
    from hotset.policies.place_types import Floats, Ints


def greedy_plan(
    load: Floats, *, num_slots: int, num_devices: int, num_nodes: int = 1, groups: int = 1
) -> Ints:
    """Slots [L, P] for load [L, E]. Sizes must divide each other; else nodes and groups are 1."""
    layers, experts = load.shape
    if groups % num_nodes:
        groups = num_nodes = 1
    home = pack_groups(load.reshape(layers, groups, -1).sum(axis=-1), num_nodes=num_nodes)
    node = np.repeat(home, experts // groups, axis=1)
    members = np.argsort(node, axis=1, kind="stable").reshape(layers * num_nodes, -1)
    local = np.take_along_axis(load, members.reshape(layers, experts), axis=1)
    local = local.reshape(layers * num_nodes, -1)
    replica, unit = _replicate(local, num_slots // num_nodes)
    order = _pack(unit, num_devices // num_nodes)
    inside = np.take_along_axis(replica, order, axis=1)
    return np.take_along_axis(members, inside, axis=1).reshape(layers, num_slots)


def _replicate(load: Floats, slots: int) -> tuple[Ints, Floats]:
    """Replicas to argmax(load / replicas): (expert of each replica, its load), both [R, slots]."""
    rows, experts = load.shape
    count = np.ones((rows, experts), dtype=np.int64)
    expert = np.tile(np.arange(slots), (rows, 1))
    for at in range(experts, slots):
        chosen = (load / count).argmax(axis=1)
        expert[:, at] = chosen
        count[np.arange(rows), chosen] += 1
    return expert, np.take_along_axis(load / count, expert, axis=1)


def _pack(unit: Floats, devices: int) -> Ints:
    """Largest first to the least loaded device with room: order of replicas by slot, [R, slots]."""
    rows, slots = unit.shape
    width = slots // devices
    every = np.arange(rows)
    found = np.zeros((rows, slots), dtype=np.int64)
    weight = np.zeros((rows, devices))
    filled = np.zeros((rows, devices), dtype=np.int64)
    for item in np.argsort(-unit, axis=1, kind="stable").T:
        device = np.where(filled < width, weight, np.inf).argmin(axis=1)
        found[every, device * width + filled[every, device]] = item
        weight[every, device] += unit[every, item]
        filled[every, device] += 1
    return found
