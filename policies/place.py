"""Plans which expert has how many replicas on which devices, from nothing or from a current plan.

Decides placements for clusters of 2 to 1,000 devices. Must not know how loads are measured, how
bytes move or what time it is. Same arguments, same plan, with numba and without.

From nothing: replicas to argmax(load / replicas) (DeepSeek EPLB), longest processing time first
(Graham 1969), then local search on the slowest device over swaps and overwrites of spare replicas.
From a current plan: the same search with a price on every copy that has to be made, run in every
layer; then only those steps are kept, over all layers, that gain most for their price, until the
target is reached, the budget is spent, or nothing is worth its price.

Invariants: every expert has a copy; a device holds an expert twice only when it has more slots than
there are experts; no device goes over its capacity; a legal current plan never gets worse.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from hotset.policies import place_score as score
from hotset.policies.place_check import (
    Cluster,
    check_cluster,
    check_current,
    check_load,
    check_sizes,
    ratio,
    whole,
)
from hotset.policies.place_greedy import beat_greedy
from hotset.policies.place_types import Placement, PlanReason
from hotset.policies.planner_free import keep_free_layers
from hotset.policies.planner_keep import Traces, cut, keep_layers
from hotset.policies.planner_kernels import Fleet, Log
from hotset.policies.planner_layers import Prices, fresh_layers
from hotset.policies.planner_mix import mix_layers

if TYPE_CHECKING:
    from collections.abc import Mapping

    from hotset.policies.place_types import Floats, Ints

__all__ = ["Placement", "PlanReason", "plan"]

TARGET = 0.976
MOVE_PRICE = 0.25
CROSS_NODE_PRICE = 0.05
LEAVE_PRICE = 0.25
MARGIN = 0.15
"""A layer's search goes this part of the way from the target to perfect, so that others need not
reach it."""


def plan(  # noqa: PLR0913 - the planner's one door; everything after `num_slots` has a default
    load: Any,
    *,
    num_devices: int,
    num_slots: int,
    num_nodes: int = 1,
    current: Any = None,
    groups: int = 1,
    sizes: Any = None,
    capacity: Any = None,
    speed: Any = None,
    spread_nodes: int = 1,
    min_replicas: int = 1,
    target: float | None = None,
    byte_budget: float | None = None,
    move_price: float | None = None,
    cross_node_price: float = CROSS_NODE_PRICE,
    leave_price: float = LEAVE_PRICE,
    split: Literal["even", "free"] = "even",
    risk: float = 0.0,
    formats: Mapping[str, float] | None = None,
    floors: Any = None,
    co_routing: Any = None,
) -> Placement:
    """Plan a placement for `load` [L, E], or [W, L, E] for several windows.

    `current` is a Placement or its slots [L, P]; -1 is an empty slot. `sizes` are bytes of a copy
    (a number, [E] or [L, E]; default 1, so that bytes are slots), `capacity` [D] bytes and `speed`
    [D] those of unequal devices. `spread_nodes` is the number of nodes that an expert's replicas
    cover, as far as it has that many; `min_replicas` the fewest replicas of an expert. With
    `groups` (a multiple of `num_nodes`) the experts of a group have a home node; to leave it costs
    `leave_price` x the share of all bytes that leave.

    From a current plan the search ends at balancedness `target` (mean over layers) or when
    `byte_budget` bytes have moved. A step must gain `move_price` x the share of all bytes that it
    moves; bytes from another node cost `cross_node_price` more and count that much more in the
    budget. Without target and budget both have a default: 0.976 and 0.25; with one of them prices
    only set the order of steps. Moves that make an illegal plan legal are always made.

    `split`: "even" gives replicas equal shares, "free" the best ones (see `shares`). `risk` from 0
    to 1 leads from the mean of the windows to the worst of them. `formats` (bytes by name) and
    `floors` choose formats as well: see `place_formats`, whose `plan_formats` returns them.

    With `co_routing` [L - 1, E, E], tokens that use expert a in layer l and b in layer l + 1, a
    plan from nothing brings experts that follow each other to one node (see `affinity`), and
    `Placement.crossing` tells the traffic between nodes. A plan from a current one tells it only:
    to rearrange would move bytes.

    Raises ValueError that names the argument.
    """
    windows = check_load(load)
    _, layers, experts = windows.shape
    if formats is not None:
        from hotset.policies.place_formats import plan_formats

        return plan_formats(
            load,
            num_devices=num_devices,
            num_slots=num_slots,
            num_nodes=num_nodes,
            formats=formats,
            floors=floors,
            device_bytes=capacity,
            current=current,
            speed=speed,
            target=target,
            split=split,
            co_routing=co_routing,
        ).placement
    cluster = check_cluster(
        num_devices=num_devices,
        num_slots=num_slots,
        num_nodes=num_nodes,
        capacity=capacity,
        speed=speed,
        num_experts=experts,
    )
    nbytes = check_sizes(sizes, layers=layers, experts=experts)
    ratio(risk, name="risk", most=1.0)
    wanted = ratio(1.0 if target is None else target, name="target", most=1.0)
    if move_price is None:
        move_price = MOVE_PRICE if target is None and byte_budget is None else 0.0
    if target is None and byte_budget is None:
        wanted = TARGET
    if split not in {"even", "free"}:
        raise ValueError(f"split must be 'even' or 'free', not {split!r}")
    prices = _prices(move=move_price or MOVE_PRICE, cross=cross_node_price, leave=leave_price)
    fleet = _fleet(
        cluster,
        experts=experts,
        spread=whole(spread_nodes, name="spread_nodes"),
        least=whole(min_replicas, name="min_replicas"),
    )
    usable = _usable(cluster, nbytes, experts=experts)
    if fleet.least * experts > usable.sum() or fleet.least > num_devices * fleet.twice:
        raise ValueError(
            f"min_replicas {fleet.least} of {experts} experts do not fit {usable.sum()} slots"
        )
    before = None
    if current is not None:
        before = check_current(current, layers=layers, slots=num_slots, experts=experts)
    homes = _homes(windows.mean(axis=0), cluster, groups=groups, current=before)
    budget = np.inf if byte_budget is None else ratio(byte_budget, name="byte_budget")
    results = []
    for blend in _blends(windows, risk=risk):
        shaped = _normal(blend)
        if before is None:
            slots, missing = _fresh(shaped, nbytes, fleet, homes, usable, leave_price)
        else:
            slots, missing = _keep(
                before, shaped, nbytes, fleet, homes, prices, wanted, budget, move_price, split
            )
        if missing:
            raise ValueError(
                f"capacity leaves no room for {missing} experts; give devices more bytes or slots"
            )
        results.append(slots)
    chosen = _least_risk(results, windows, speed=cluster.speed, risk=risk)
    found = finish(chosen, windows, cluster=cluster, sizes=nbytes, current=before, split=split)
    return _followed(found, windows, co_routing, cluster=cluster, fresh=before is None, split=split)


def _followed(  # noqa: PLR0913 - what `finish` needs once more
    found: Placement,
    windows: Floats,
    co_routing: Any,
    *,
    cluster: Cluster,
    fresh: bool,
    split: Literal["even", "free"],
) -> Placement:
    """Arrange a plan from nothing for affinity, and report the traffic between nodes."""
    if co_routing is None:
        return found
    from hotset.policies.affinity import crossing, follow

    if not fresh:
        return replace(found, crossing=crossing(found, co_routing))
    slots = follow(found, co_routing).placement.physical_to_logical_map
    final = finish(slots, windows, cluster=cluster, sizes=found.sizes, current=None, split=split)
    return replace(final, crossing=crossing(final, co_routing, before=found))


def finish(  # noqa: PLR0913 - the parts of a placement
    slots: Ints,
    windows: Floats,
    *,
    cluster: Cluster,
    sizes: Floats,
    current: Ints | None,
    split: Literal["even", "free"] = "even",
) -> Placement:
    """Make a Placement of chosen slots: maps, shares, balancedness and moves."""
    experts = windows.shape[2]
    load = windows.mean(axis=0)
    count = score.replica_counts(slots, experts=experts)
    shares = score.even_shares(slots, count)
    if split == "free":
        from hotset.policies.shares import best_shares

        shares = best_shares(slots, load, num_devices=cluster.num_devices, speed=cluster.speed)
    by_window = score.balancedness(slots, shares, windows, speed=cluster.speed).mean(axis=-1)
    table, cross, old = np.zeros((0, 4), dtype=np.int64), 0, None
    if current is not None:
        table, cross = score.move_table(
            slots, current, num_devices=cluster.num_devices, node=cluster.node
        )
        old = _current_balance(current, windows, speed=cluster.speed, split=split)
    return Placement(
        physical_to_logical_map=slots,
        logical_to_physical_map=score.logical_to_physical(slots, count),
        logical_replica_count=count,
        shares=shares,
        num_devices=cluster.num_devices,
        num_nodes=cluster.num_nodes,
        balancedness=float(by_window.mean()),
        worst_balancedness=float(by_window.min()),
        current_balancedness=old,
        moves=len(table),
        cross_node_moves=cross,
        moved_bytes=float(sizes[table[:, 0], table[:, 2]].sum()),
        move_table=table,
        reasons=_reasons(slots, current, experts=experts),
        load=load,
        speed=cluster.speed,
        sizes=sizes,
    )


def _current_balance(current: Ints, windows: Floats, *, speed: Floats, split: str) -> float | None:
    """Balancedness of the current plan with the same split, None when it lacks an expert."""
    count = score.replica_counts(current, experts=windows.shape[2])
    if (count == 0).any():
        return None
    shares = score.even_shares(current, count)
    if split == "free":
        from hotset.policies.shares import best_shares

        shares = best_shares(current, windows.mean(axis=0), num_devices=len(speed), speed=speed)
    return float(score.balancedness(current, shares, windows, speed=speed).mean())


def _reasons(slots: Ints, current: Ints | None, *, experts: int) -> tuple[PlanReason, ...]:
    if current is None:
        return (PlanReason.FRESH,) * len(slots)
    whole_plan = (score.replica_counts(current, experts=experts) > 0).all(axis=1)
    whole_plan &= (current >= 0).all(axis=1) | (slots < 0).any(axis=1)
    changed = (slots != current).sum(axis=1)
    return tuple(
        PlanReason.UNCHANGED if not new else PlanReason.IMPROVED if good else PlanReason.REPAIRED
        for new, good in zip(changed, np.asarray(whole_plan), strict=True)
    )


def _prices(*, move: float, cross: float, leave: float) -> Prices:
    """Prices relative to a byte that moves inside a node."""
    ratio(move, name="move_price")
    ratio(cross, name="cross_node_price")
    ratio(leave, name="leave_price")
    return Prices(1.0, cross / move, leave / move)


def _fleet(cluster: Cluster, *, experts: int, spread: int, least: int) -> Fleet:
    return Fleet(
        node=cluster.node,
        pace=cluster.speed.sum() / cluster.speed,
        room=cluster.room,
        num_nodes=cluster.num_nodes,
        width=cluster.width,
        twice=-(-cluster.width // experts),
        spread=min(spread, cluster.num_nodes),
        least=least,
    )


def _usable(cluster: Cluster, sizes: Floats, *, experts: int) -> Ints:
    """Slots of each node that copies of mean size would fill."""
    most = np.floor(np.minimum(cluster.room / sizes.min(), cluster.width))
    if most.sum() < experts:
        raise ValueError(
            f"capacity has room for {most.sum():.0f} copies, {experts} experts need one each"
        )
    fitting = np.floor(np.minimum(cluster.room / sizes.mean(), cluster.width))
    return np.bincount(cluster.node, weights=fitting, minlength=cluster.num_nodes).astype(np.int64)


def _normal(load: Floats) -> Floats:
    """Loads that sum to 1 in each layer; a layer without load is planned as if all were equal."""
    total = load.sum(axis=1, keepdims=True)
    even = np.full_like(load, 1.0 / load.shape[1])
    return np.where(total > 0, load / np.where(total > 0, total, 1.0), even)


def _homes(load: Floats, cluster: Cluster, *, groups: int, current: Ints | None) -> Ints:
    """Home node of each expert, [L, E]; -1 without groups that divide over the nodes."""
    groups = whole(groups, name="groups")
    layers, experts = load.shape
    if experts % groups:
        raise ValueError(f"groups {groups} must divide the {experts} experts")
    nodes = cluster.num_nodes
    if groups == 1 or nodes == 1 or groups % nodes:
        return np.full((layers, experts), -1, dtype=np.int64)
    if current is None:
        home = score.pack_groups(load.reshape(layers, groups, -1).sum(axis=-1), num_nodes=nodes)
    else:
        home = _main_node(current, cluster, groups=groups, experts=experts)
    return np.repeat(home, experts // groups, axis=1)


def _main_node(current: Ints, cluster: Cluster, *, groups: int, experts: int) -> Ints:
    """The node that holds most copies of each group now."""
    layers = current.shape[0]
    held = np.zeros((layers, groups, cluster.num_nodes))
    group = np.maximum(current, 0) // (experts // groups)
    node = np.repeat(cluster.node, cluster.width)
    np.add.at(held, (np.arange(layers)[:, None], group, node[None, :]), current >= 0)
    node_of: Ints = held.argmax(axis=2)
    return node_of


def _blends(windows: Floats, *, risk: float) -> list[Floats]:
    """Loads to plan for: the mean, and with risk a blend with each expert's worst window."""
    mean = windows.mean(axis=0)
    if risk == 0 or len(windows) == 1:
        return [mean]
    return [mean, (1 - risk) * mean + risk * windows.max(axis=0)]


def _least_risk(plans: list[Ints], windows: Floats, *, speed: Floats, risk: float) -> Ints:
    """The best of the plans, layer by layer, between mean and worst window."""
    if len(plans) == 1:
        return plans[0]
    worths = []
    for slots in plans:
        count = score.replica_counts(slots, experts=windows.shape[2])
        found = score.balancedness(slots, score.even_shares(slots, count), windows, speed=speed)
        worths.append((1 - risk) * found.mean(axis=0) + risk * found.min(axis=0))
    best = np.argmax(worths, axis=0)
    chosen: Ints = np.stack(plans)[best, np.arange(len(best))]
    return chosen


def _fresh(  # noqa: PLR0913, PLR0917 - arrays for the kernel, in its order
    load: Floats, sizes: Floats, fleet: Fleet, homes: Ints, usable: Ints, leave: float
) -> tuple[Ints, int]:
    slots = np.full((load.shape[0], fleet.node.shape[0] * fleet.width), -1, dtype=np.int64)
    most = 4 * slots.shape[1]
    log = Log(
        np.zeros((2 * most, 3), dtype=np.int64),
        np.zeros(most + 1, dtype=np.int64),
        np.zeros(most + 1),
        np.zeros(most + 1),
    )
    missing = fresh_layers(slots, load, sizes, fleet, homes, usable, log)
    if homes[0, 0] >= 0:
        away = Prices(0.0, 0.0, 1.0)
        slots, _ = _keep(slots, load, sizes, fleet, homes, away, 1.0, np.inf, leave)
    elif not missing.any():
        beat_greedy(slots, load, fleet)
        if fleet.width > 1:
            mix_layers(slots, load, sizes, fleet, homes, log)
    return slots, int(missing.sum())


def _keep(  # noqa: PLR0913, PLR0917 - arrays for the kernel, in its order
    current: Ints,
    load: Floats,
    sizes: Floats,
    fleet: Fleet,
    homes: Ints,
    prices: Prices,
    target: float,
    budget: float,
    move_price: float,
    split: str = "even",
) -> tuple[Ints, int]:
    slots = current.copy()
    layers, width = slots.shape
    traces = Traces(
        np.zeros((layers, 2 * width, 3), dtype=np.int64),
        np.zeros((layers, width + 1), dtype=np.int64),
        np.zeros((layers, width + 1)),
        np.zeros((layers, width + 1)),
        np.zeros(layers, dtype=np.int64),
    )
    goal = np.full(layers, 1.0 / max(target + MARGIN * (1.0 - target), 1e-9))
    keep = keep_free_layers if split == "free" else keep_layers
    missing = keep(slots, load, sizes, fleet, homes, prices, goal, traces)
    # A step pays when the mean over layers gains move_price x its share of all bytes.
    slope = move_price * layers / (sizes.mean() * slots.size)
    cut(slots, traces, target, budget, slope)
    return slots, int(missing.sum())
