"""Places what follows each other on the same node: fewer tokens cross between layers.

Decides swaps inside a layer that keep its balance. Must not know how co-routing is counted. Layers
are taken in order; each is arranged around the one before it.

After MoETuner (Go and Mahajan, 2025), which assigns experts by integer programming; here whole
nodes are exchanged first (balance and replicas stay exactly), then slots of nearly equal load. A
token of expert e in layer l goes to each replica of e in the proportion of its share, and so does
its successor: the traffic between nodes is the expectation over both.

Invariants: replica counts stay, replicas cover no fewer nodes, no device holds an expert twice, no
layer's slowest device gets slower than the limit.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from hotset.policies import place_score as score
from hotset.policies.jit import compiled
from hotset.policies.place_check import as_numpy, ratio
from hotset.policies.place_types import Crossing

if TYPE_CHECKING:
    from hotset.policies.place_types import Placement
    from hotset.policies.planner_kernels import Floats, Ints

PASSES = 3
"""Sweeps over all pairs of slots of a layer."""
TRUSTED = 0.995
"""Balancedness that a layer may be brought down to for the sake of affinity, by default."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Followed:
    """A placement arranged for affinity. Ratios are of all tokens between MoE layers."""

    placement: Placement
    crossing_before_ratio: float
    crossing_after_ratio: float
    saved_tokens: float


def node_shares(placement: Placement) -> Floats:
    """Part of each expert's tokens that each node takes: [L, E, N]."""
    slots, nodes = placement.physical_to_logical_map, placement.num_nodes
    layers, experts = placement.logical_replica_count.shape
    found = np.zeros((layers, experts, nodes))
    node = np.arange(slots.shape[1]) * nodes // slots.shape[1]
    layer, slot = np.nonzero(slots >= 0)
    np.add.at(found, (layer, slots[layer, slot], node[slot]), placement.shares[layer, slot])
    return found


def crossing_tokens(placement: Placement, co_routing: Any) -> float:
    """Expected tokens that change node between a layer and the next; `co_routing` [L-1, E, E]."""
    counts = _check(placement, co_routing)
    part = node_shares(placement)
    stay = np.einsum("lab,lan,lbn->", counts, part[:-1], part[1:], optimize=True)
    return float(counts.sum() - stay)


def crossing(placement: Placement, co_routing: Any, *, before: Placement | None = None) -> Crossing:
    """Traffic between nodes under a plan, and what it saves against the plan `before`."""
    counts = _check(placement, co_routing)
    tokens = crossing_tokens(placement, counts)
    return Crossing(
        tokens=tokens,
        ratio=tokens / max(float(counts.sum()), 1e-300),
        saved_tokens=0.0 if before is None else crossing_tokens(before, counts) - tokens,
    )


def follow(
    placement: Placement, co_routing: Any, *, least_balancedness: float = TRUSTED
) -> Followed:
    """Rearrange a placement so that experts that follow each other share a node.

    `co_routing[l, a, b]` counts tokens that use expert a in layer l and b in layer l + 1. Layers
    below `least_balancedness` are not made worse. For a plan from nothing: every swap moves bytes.
    Raises ValueError that names the argument.
    """
    counts = _check(placement, co_routing)
    ratio(least_balancedness, name="least_balancedness", most=1.0)
    before = crossing_tokens(placement, counts)
    slots = placement.physical_to_logical_map.copy()
    shares = placement.shares.copy()
    load = placement.load
    total = np.maximum(load.sum(axis=1, keepdims=True), 1e-300)
    unit = load / total
    nodes, devices = placement.num_nodes, placement.num_devices
    pace = placement.speed.sum() / placement.speed
    node = np.arange(devices) * nodes // devices
    part = node_shares(placement)
    alike = bool(
        (placement.speed == placement.speed[0]).all()
        and (placement.sizes == placement.sizes[0, 0]).all()
        and (slots >= 0).all()
    )
    for layer in range(1, len(slots)):
        wish = counts[layer - 1].T @ part[layer - 1]  # [E, N] tokens that come from each node
        if alike:
            _exchange_nodes(slots[layer], shares[layer], wish, nodes)
        time = score.device_times(
            slots[layer : layer + 1], shares[layer : layer + 1], load[layer : layer + 1],
            speed=placement.speed,
        )[0]  # fmt: skip
        limit = max(float(time.max()), 1.0 / max(least_balancedness, 1e-9))
        swap_towards(
            slots[layer], shares[layer], wish, unit[layer], placement.sizes[layer], time, pace,
            node, limit,
        )  # fmt: skip
        part[layer] = node_shares(replace(placement, physical_to_logical_map=slots, shares=shares))[
            layer
        ]
    count = placement.logical_replica_count
    arranged = replace(
        placement,
        physical_to_logical_map=slots,
        logical_to_physical_map=score.logical_to_physical(slots, count),
        shares=shares,
        balancedness=float(score.balancedness(slots, shares, load, speed=placement.speed).mean()),
    )
    after = crossing_tokens(arranged, counts)
    everything = max(float(counts.sum()), 1e-300)
    return Followed(
        placement=arranged,
        crossing_before_ratio=before / everything,
        crossing_after_ratio=after / everything,
        saved_tokens=before - after,
    )


def _check(placement: Placement, co_routing: Any) -> Floats:
    layers, experts = placement.logical_replica_count.shape
    counts: Floats = as_numpy(co_routing, name="co_routing").astype(np.float64)
    if counts.shape != (layers - 1, experts, experts):
        raise ValueError(
            f"co_routing must be [layers - 1, experts, experts] = {(layers - 1, experts, experts)},"
            f" not {counts.shape}"
        )
    if not np.isfinite(counts).all() or (counts < 0).any():
        raise ValueError("co_routing must be finite and not negative")
    return counts


def _exchange_nodes(slot: Ints, shares: Floats, wish: Floats, nodes: int) -> None:
    """Give whole nodes' contents to the nodes that want them most, greedily and then pairwise."""
    width = len(slot) // nodes
    contents = slot.reshape(nodes, width)
    weights = shares.reshape(nodes, width)
    gain = np.zeros((nodes, nodes))  # contents of i placed on node j
    for index in range(nodes):
        used = contents[index] >= 0
        gain[index] = weights[index][used] @ wish[contents[index][used]]
    place = np.arange(nodes)  # node that contents i go to
    for _ in range(nodes):
        change = gain[:, place] + gain[:, place].T - np.diag(gain[:, place])[:, None]
        change -= np.diag(gain[:, place])[None, :]
        one, two = np.unravel_index(int(change.argmax()), change.shape)
        if change[one, two] <= 1e-9 * max(gain.sum(), 1e-300):
            break
        place[one], place[two] = place[two], place[one]
    order = np.argsort(place)
    slot[:] = contents[order].ravel()
    shares[:] = weights[order].ravel()


@compiled
def swap_towards(  # noqa: C901, PLR0913, PLR0917 - a kernel: numba has no keyword-only arguments
    slot: Ints, shares: Floats, wish: Floats, unit: Floats, size: Floats, time: Floats,
    pace: Floats, node: Ints, limit: float,
) -> None:  # fmt: skip
    """Swap slots of different nodes while that keeps tokens on their node, within the limit."""
    width = slot.shape[0] // time.shape[0]
    hold = np.zeros((time.shape[0], unit.shape[0]), dtype=np.bool_)
    on_node = np.zeros((node[-1] + 1, unit.shape[0]), dtype=np.int64)
    for at in range(slot.shape[0]):
        if slot[at] >= 0:
            hold[at // width, slot[at]] = True
            on_node[node[at // width], slot[at]] += 1
    for _ in range(PASSES):
        moved = False
        for first in range(slot.shape[0]):
            here = first // width
            for second in range(first + 1, slot.shape[0]):
                there = second // width
                one, two = slot[first], slot[second]
                if one < 0 or two < 0 or node[here] == node[there] or size[one] != size[two]:
                    continue
                gain = shares[first] * (wish[one, node[there]] - wish[one, node[here]])
                gain += shares[second] * (wish[two, node[here]] - wish[two, node[there]])
                if gain <= 1e-9 or hold[there, one] or hold[here, two]:
                    continue
                if on_node[node[here], one] == 1 and on_node[node[there], one] > 0:
                    continue  # its replicas would cover one node less
                if on_node[node[there], two] == 1 and on_node[node[here], two] > 0:
                    continue
                shift = shares[first] * unit[one] - shares[second] * unit[two]
                now_here = time[here] - shift * pace[here]
                now_there = time[there] + shift * pace[there]
                if max(now_here, now_there) > limit:
                    continue
                time[here], time[there] = now_here, now_there
                hold[here, one] = hold[there, two] = False
                hold[there, one] = hold[here, two] = True
                on_node[node[here], one] -= 1
                on_node[node[there], one] += 1
                on_node[node[there], two] -= 1
                on_node[node[here], two] += 1
                slot[first], slot[second] = two, one
                shares[first], shares[second] = shares[second], shares[first]
                moved = True
        if not moved:
            break
