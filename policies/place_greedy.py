"""The planner that hotset is held against: greedy replicas, packed group by group, node by node.

Decides placements as deepseek-ai/EPLB describes (hierarchical load balancing): groups to nodes,
replicas inside nodes, replicas to devices, each step greedy, always from nothing. Our own words for
it; used by `hotset bench planner` and by tests. Must not know a current plan: that is its point.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from hotset.policies.place_score import balancedness, even_shares, pack_groups, replica_counts

if TYPE_CHECKING:
    from hotset.policies.place_types import Floats, Ints
    from hotset.policies.planner_kernels import Fleet

SMALL = 10_000
"""Slots over all layers up to which every plan is held against the greedy one."""
NEAR = 1.03
"""Over the bound times this, larger ones are as well."""


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


def beat_greedy(slots: Ints, load: Floats, fleet: Fleet) -> None:
    """Take the greedy planner's layers, in place, where luck makes them the better ones.

    Only where it may be held against this one: alike devices, nothing else asked of the plan. Large
    layers near their bound are not looked at; none was seen to be worse there.
    """
    devices, experts = len(fleet.node), load.shape[1]
    alike = (fleet.pace == fleet.pace[0]).all() and np.isinf(fleet.room).all()
    if not alike or fleet.spread > 1 or fleet.least > 1 or fleet.twice > 1:
        return
    count = replica_counts(slots, experts=experts)
    largest = (load / count).max(axis=1) * devices
    speed = np.ones(devices)
    mine = balancedness(slots, even_shares(slots, count), load, speed=speed)
    near = NEAR if slots.size > SMALL else 1.0 + 1e-9
    layers = np.flatnonzero(1.0 / mine > near * np.maximum(largest, 1.0))
    nodes = fleet.num_nodes if experts % fleet.num_nodes == 0 else 1
    for groups in {1, nodes} if len(layers) else ():
        rival = greedy_plan(
            load[layers], num_slots=slots.shape[1], num_devices=devices, num_nodes=nodes,
            groups=groups,
        )  # fmt: skip
        shares = even_shares(rival, replica_counts(rival, experts=experts))
        theirs = balancedness(rival, shares, load[layers], speed=speed)
        better = theirs > mine[layers]
        held = np.sort(rival.reshape(len(layers), devices, -1), axis=-1)
        better &= (np.diff(held, axis=-1) > 0).all(axis=(1, 2))  # no expert twice on a device
        slots[layers[better]], mine[layers[better]] = rival[better], theirs[better]
