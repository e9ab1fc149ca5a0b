"""Whether a plan pays: time saved in every step against the time to move.

Decides a verdict, never a plan. Must not know clocks: all times are given. The slowest device of a
layer sets the layer's time, so a step takes as long as the sum over layers of the slowest.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from hotset.policies import place_score as score
from hotset.policies.place_check import check_current, ratio, whole

if TYPE_CHECKING:
    from hotset.policies.place_types import Placement

HORIZON_STEPS = 1_000


@dataclass(frozen=True, slots=True, kw_only=True)
class LinkModel:
    """What moving costs: bytes a second of a device's link and of a node's, and each copy's start.

    `visible_ratio` is the part of a move's time that compute waits for: 1 when serving stops for
    it, 0 when it hides completely.
    """

    device_bytes_per_s: float
    node_bytes_per_s: float
    start_ns: int = 0
    visible_ratio: float = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """Whether to commit, and the figures that say so. `break_even_steps` is None for never."""

    pays: bool
    saved_ns_per_step: int
    move_ns: int
    break_even_steps: int | None
    horizon_steps: int


def worth_it(  # noqa: PLR0913 - an argument for each term of the comparison
    placement: Placement,
    current: Any,
    *,
    step_time_ns: int,
    link_model: LinkModel,
    horizon_steps: int = HORIZON_STEPS,
    balanced_ratio: float = 1.0,
    extra_ns_per_step: int = 0,
) -> Verdict:
    """Compare the plan with `current` under the load that the plan was made for.

    `step_time_ns` is the time of a step now, `balanced_ratio` the part of it that expert compute
    takes, `extra_ns_per_step` what the plan costs in every step (copies that had to make room).
    The move ends when the busiest link has carried its bytes; devices and nodes receive and send at
    once. Raises ValueError that names the argument.
    """
    whole(step_time_ns, name="step_time_ns")
    whole(horizon_steps, name="horizon_steps")
    whole(extra_ns_per_step, name="extra_ns_per_step", least=0)
    ratio(balanced_ratio, name="balanced_ratio", most=1.0)
    ratio(link_model.visible_ratio, name="link_model.visible_ratio", most=1.0)
    if link_model.device_bytes_per_s <= 0 or link_model.node_bytes_per_s <= 0:
        raise ValueError("link_model must have bandwidths above 0")
    slots = placement.physical_to_logical_map
    layers, experts = placement.logical_replica_count.shape
    old = check_current(current, layers=layers, slots=slots.shape[1], experts=experts)
    count = score.replica_counts(old, experts=experts)
    if (count == 0).any():
        raise ValueError("current lacks experts; a plan that brings them back is always worth it")
    shares = getattr(current, "shares", None)
    shares = score.even_shares(old, count) if shares is None else shares
    times = {
        name: score.device_times(where, part, placement.load, speed=placement.speed)
        .max(axis=1)
        .sum()
        for name, where, part in (("old", old, shares), ("new", slots, placement.shares))
    }
    compute_ns = step_time_ns * balanced_ratio
    saved = compute_ns * (1.0 - times["new"] / times["old"]) - extra_ns_per_step
    move_ns = _move_ns(placement, old, link_model)
    visible = move_ns * link_model.visible_ratio
    even = int(np.ceil(visible / saved)) if saved > 0 else None
    if move_ns == 0:
        even = 0
    return Verdict(
        pays=saved > 0 and visible < saved * horizon_steps,
        saved_ns_per_step=int(saved),
        move_ns=int(move_ns),
        break_even_steps=even,
        horizon_steps=horizon_steps,
    )


def _move_ns(placement: Placement, old: Any, links: LinkModel) -> float:
    """Time until the busiest link of a device or node has carried its bytes."""
    node = np.arange(placement.num_devices) * placement.num_nodes // placement.num_devices
    table, _ = score.move_table(
        placement.physical_to_logical_map, old, num_devices=placement.num_devices, node=node
    )
    if not len(table):
        return 0.0
    width = old.shape[1] // placement.num_devices
    nbytes = placement.sizes[table[:, 0], table[:, 2]]
    to, came = table[:, 1] // width, table[:, 3] // width
    known = table[:, 3] >= 0
    received = np.bincount(to, weights=nbytes, minlength=placement.num_devices)
    sent = np.bincount(came[known], weights=nbytes[known], minlength=placement.num_devices)
    copies = np.bincount(to, minlength=placement.num_devices)
    crossing = ~known | (node[to] != node[np.where(known, came, 0)])
    into = np.bincount(node[to][crossing], weights=nbytes[crossing], minlength=placement.num_nodes)
    by_device = np.maximum(received, sent).max() / links.device_bytes_per_s * 1e9
    by_node = into.max() / links.node_bytes_per_s * 1e9
    return float(max(by_device, by_node) + copies.max() * links.start_ns)
