"""What a placement plan is: maps in the ecosystem's shapes, and what it costs to get there.

Decides nothing. Must not know how plans are found. Shapes: L layers, E experts, P slots of the
cluster, D devices (device d owns slots d*P/D to (d+1)*P/D), W windows of load.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]


class PlanReason(StrEnum):
    """Why the search of a layer ended. Closed and append-only."""

    FRESH = "fresh"  # planned from nothing
    UNCHANGED = "unchanged"  # no step was worth its price, or none was needed
    IMPROVED = "improved"  # steps from the current plan
    REPAIRED = "repaired"  # the current plan was not legal: copies were missing, or one too many


@dataclass(frozen=True, slots=True, kw_only=True)
class Crossing:
    """Tokens that change node between a MoE layer and the next, expected under co-routing counts.

    `ratio` is of all tokens that go from one layer to the next; `saved_tokens` is how many more
    would change node if the plan had not been arranged for affinity.
    """

    tokens: float
    ratio: float
    saved_tokens: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Placement:
    """Which expert is in which slot, and which part of its tokens each slot takes.

    `moves` counts copies that a device gets and did not have in the plan that this one started
    from, `cross_node_moves` those whose whole node did not have the expert, `move_table` [moves, 4]
    lists (layer, slot, expert, slot to copy from or -1). `balancedness` is the mean over layers and
    windows of mean / slowest device; `worst_balancedness` the same for the worst window.
    """

    physical_to_logical_map: Ints  # [L, P], -1 for a slot that stays empty
    logical_to_physical_map: Ints  # [L, E, X], padded with -1
    logical_replica_count: Ints  # [L, E]
    shares: Floats  # [L, P], sums to 1 for each expert
    num_devices: int
    num_nodes: int
    balancedness: float
    worst_balancedness: float
    current_balancedness: float | None  # of the plan that this one started from
    moves: int
    cross_node_moves: int
    moved_bytes: float
    move_table: Ints
    reasons: tuple[PlanReason, ...]  # [L]
    load: Floats  # [L, E] tokens that were planned for
    speed: Floats  # [D]
    sizes: Floats  # [L, E] bytes of a copy
    crossing: Crossing | None = None  # when co-routing counts were given

    @property
    def moved_ratio(self) -> float:
        """Moves over all slots."""
        return self.moves / max(self.physical_to_logical_map.size, 1)

    def check_integrity(self) -> None:
        """Raise ValueError where the maps disagree; for tests, dumps and plans from elsewhere."""
        slots, maps = self.physical_to_logical_map, self.logical_to_physical_map
        layers, experts = self.logical_replica_count.shape
        if slots.shape != self.shares.shape or maps.shape[:2] != (layers, experts):
            raise ValueError("the maps have different shapes; plan again")
        if (self.shares < 0).any() or (self.shares[slots < 0] != 0).any():
            raise ValueError("shares are negative, or an empty slot has one; plan again")
        for layer in range(layers):
            used = slots[layer] >= 0
            count = np.bincount(slots[layer][used], minlength=experts)
            if (count < 1).any() or (count != self.logical_replica_count[layer]).any():
                raise ValueError(f"layer {layer}: replica counts are wrong; plan again")
            sums = np.bincount(
                slots[layer][used], weights=self.shares[layer][used], minlength=experts
            )
            if not np.allclose(sums, 1.0):
                raise ValueError(f"layer {layer}: shares do not sum to 1; plan again")
            for expert, row in enumerate(maps[layer]):
                where = row[row >= 0]
                if len(where) != count[expert] or (slots[layer, where] != expert).any():
                    raise ValueError(f"layer {layer}: the two maps disagree; plan again")
