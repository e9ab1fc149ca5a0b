"""Judges a placement: device times, balancedness, moves, and the bounds that no plan can beat.

Decides nothing. Must not know how plans are found. A time is load / speed, scaled so that each
device of a perfectly balanced layer takes 1.0; a layer without load counts as balanced.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from hotset.policies.place_types import Floats, Ints


def replica_counts(slots: Ints, *, experts: int) -> Ints:
    """Copies of each expert: [L, P] -> [L, E]."""
    layers = slots.shape[0]
    flat = slots + np.arange(layers)[:, None] * experts
    counted = np.bincount(flat[slots >= 0], minlength=layers * experts)
    return counted.reshape(layers, experts).astype(np.int64)


def even_shares(slots: Ints, count: Ints) -> Floats:
    """Every replica takes the same part: [L, P]."""
    owner = np.maximum(slots, 0) + np.arange(len(slots))[:, None] * count.shape[1]
    share: Floats = 1.0 / count.ravel()[owner]
    share[slots < 0] = 0.0
    return share


def device_times(slots: Ints, shares: Floats, load: Floats, *, speed: Floats) -> Floats:
    """Time of each device: load [..., L, E] -> [..., L, D]."""
    devices = speed.shape[0]
    layers, experts = load.shape[-2:]
    owner = np.maximum(slots, 0) + np.arange(layers)[:, None] * experts
    tokens = load.reshape(*load.shape[:-2], -1)[..., owner] * shares
    by_device = tokens.reshape(*load.shape[:-1], devices, -1).sum(axis=-1)
    total = load.sum(axis=-1, keepdims=True)
    scale = speed.sum() / speed / np.where(total > 0, total, 1.0)
    return np.where(total > 0, by_device * scale, 1.0)


def balancedness(slots: Ints, shares: Floats, load: Floats, *, speed: Floats) -> Floats:
    """Mean / slowest device by layer (and window): 1 is perfect."""
    found: Floats = 1.0 / device_times(slots, shares, load, speed=speed).max(axis=-1)
    return found


def logical_to_physical(slots: Ints, count: Ints) -> Ints:
    """Slots of each expert in ascending order: [L, P] -> [L, E, X], padded with -1."""
    layers, width = slots.shape
    experts = count.shape[1]
    found = np.full((layers, experts, max(int(count.max()), 1)), -1, dtype=np.int64)
    keys = slots.astype(np.int16) if experts < 2**15 else slots  # short integers sort by radix
    order = np.argsort(keys, axis=1, kind="stable")
    ranked = np.take_along_axis(slots, order, axis=1)
    starts = np.cumsum(count, axis=1) - count + (slots < 0).sum(axis=1, keepdims=True)
    rank = np.arange(width) - np.take_along_axis(starts, np.maximum(ranked, 0), axis=1)
    layer = np.broadcast_to(np.arange(layers)[:, None], slots.shape)
    used = ranked >= 0
    found[layer[used], ranked[used], rank[used]] = order[used]
    return found


def move_table(slots: Ints, current: Ints, *, num_devices: int, node: Ints) -> tuple[Ints, int]:
    """Copies that devices get: ([M, 4] of layer, slot, expert, source; how many cross nodes).

    The source is a slot of the current plan, on the same node if one holds the expert; -1 when no
    device holds it.
    """
    width = slots.shape[1] // num_devices
    layer, slot = np.nonzero((slots != current) & (slots >= 0))
    expert = slots[layer, slot]
    device = slot // width
    before = current.reshape(current.shape[0], num_devices, width)[layer, device]
    new = ~(before == expert[:, None]).any(axis=1)
    layer, slot, expert, device = layer[new], slot[new], expert[new], device[new]
    # A device that gets an expert twice copies it once.
    key = (layer * num_devices + device) * (int(slots.max(initial=0)) + 1) + expert
    first = np.sort(np.unique(key, return_index=True)[1])
    layer, slot, expert, device = layer[first], slot[first], expert[first], device[first]
    source, local = _sources(current, layer, expert, node[device], width=width, node=node)
    table = np.stack([layer, slot, expert, source], axis=1).astype(np.int64)
    return table, int((~local).sum())


def _sources(  # noqa: PLR0913 - columns of one table
    current: Ints, layer: Ints, expert: Ints, home: Ints, *, width: int, node: Ints
) -> tuple[Ints, NDArray[np.bool_]]:
    """A slot that holds each expert now, best on node `home`: (slot or -1, on the node)."""
    layers, slots = current.shape
    experts, nodes = int(max(current.max(), expert.max(initial=0))) + 1, int(node.max()) + 1
    owner = (np.arange(layers)[:, None] * experts + current)[:, ::-1]
    held = current[:, ::-1] >= 0
    slot = np.broadcast_to(np.arange(slots)[::-1], current.shape)[held]
    anywhere = np.full(layers * experts, -1, dtype=np.int64)
    near = np.full(layers * experts * nodes, -1, dtype=np.int64)
    anywhere[owner[held]] = slot  # of several the last one stays: the first slot
    near[owner[held] * nodes + np.repeat(node, width)[slot]] = slot
    wanted = layer * experts + expert
    inside = near[wanted * nodes + home]
    return np.where(inside >= 0, inside, anywhere[wanted]), inside >= 0


def bound_hottest(load: Floats, *, num_slots: int, num_devices: int) -> Floats:
    """Best balancedness by layer if only the largest replica mattered: [L, E] -> [L].

    Replicas go to argmax(load / replicas), which minimises the largest replica. For equal devices.
    """
    layers, experts = load.shape
    count = np.ones((layers, experts))
    rows = np.arange(layers)
    for _ in range(num_slots - experts):
        unit = np.where(count < num_devices, load / count, -1.0)
        count[rows, unit.argmax(axis=1)] += 1
    largest = (load / count).max(axis=1)
    mean = load.sum(axis=1) / num_devices
    return np.minimum(1.0, np.where(largest > 0, mean / np.where(largest > 0, largest, 1.0), 1.0))


def bound_hierarchical(load: Floats, *, groups: int, num_nodes: int) -> Floats:
    """Best balancedness by layer when each group stays on one node, packed greedily: [L].

    Groups go, largest first, to the node with the least load that has room, as in DeepSeek's EPLB;
    no plan inside the nodes can then beat mean / largest node.
    """
    sums = load.reshape(load.shape[0], groups, -1).sum(axis=-1)
    home = pack_groups(sums, num_nodes=num_nodes)
    by_node = np.zeros((load.shape[0], num_nodes))
    np.add.at(by_node, (np.arange(load.shape[0])[:, None], home), sums)
    top = by_node.max(axis=1)
    mean = by_node.mean(axis=1)
    return np.where(top > 0, mean / np.where(top > 0, top, 1.0), 1.0)


def pack_groups(sums: Floats, *, num_nodes: int) -> Ints:
    """Node of each group, equally many groups a node, largest first: [L, G] -> [L, G]."""
    layers, groups = sums.shape
    rows = np.arange(layers)
    home = np.zeros((layers, groups), dtype=np.int64)
    weight = np.zeros((layers, num_nodes))
    left = np.full((layers, num_nodes), groups // num_nodes)
    for group in np.argsort(-sums, axis=1, kind="stable").T:
        node = np.where(left > 0, weight, np.inf).argmin(axis=1)
        home[rows, group] = node
        weight[rows, node] += sums[rows, group]
        left[rows, node] -= 1
    return home
