"""Drop-in forms of the planner: DeepSeek's `rebalance_experts` and the shape of vLLM's policy.

Decides nothing of its own. Must not import torch: tensors are made from the tensor that came in.
Shapes as in deepseek-ai/EPLB: weight [L, E]; maps [L, P], [L, E, X] padded with -1, counts [L, E].

The hierarchy of groups and nodes is soft here: a few per cent of the slots leave their group's home
node where that pays in balance. `leave_price` (see `place.plan`) sets how few.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from hotset.policies.place import LEAVE_PRICE, plan

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from hotset.policies.place_types import Placement

__all__ = ["EplbPolicy", "Rebalanced", "rebalance_experts"]


class Rebalanced(NamedTuple):
    """What `rebalance_experts` returns: tensors of int64 on the CPU, or arrays for arrays."""

    physical_to_logical_map: Any  # [L, P]
    logical_to_physical_map: Any  # [L, E, X]
    expert_count: Any  # [L, E]


def rebalance_experts(
    weight: Any, num_replicas: int, num_groups: int, num_nodes: int, num_gpus: int
) -> Rebalanced:
    """Plan from nothing, with the arguments and results of DeepSeek's function."""
    found = _plan(weight, num_replicas, num_groups, num_nodes, num_gpus, current=None)
    return Rebalanced(
        _like(weight, found.physical_to_logical_map),
        _like(weight, found.logical_to_physical_map),
        _like(weight, found.logical_replica_count),
    )


class EplbPolicy:
    """Has the class method that vLLM calls on an EPLB policy; plans from the old map if it comes.

    After an elastic change the old map may have another number of slots; then the plan is made from
    nothing.
    """

    @classmethod
    def rebalance_experts(  # noqa: PLR0913, PLR0917 - vLLM's signature
        cls,
        weight: Any,
        num_replicas: int,
        num_groups: int,
        num_nodes: int,
        num_ranks: int,
        old_global_expert_indices: Any = None,
    ) -> Any:
        """Return physical_to_logical_map [L, P] as a tensor of int64 on the CPU."""
        old = old_global_expert_indices
        if old is not None and tuple(old.shape) != (weight.shape[0], num_replicas):
            old = None
        found = _plan(weight, num_replicas, num_groups, num_nodes, num_ranks, current=old)
        return _like(weight, found.physical_to_logical_map)


def _plan(  # noqa: PLR0913 - the ecosystem's arguments, in its order
    weight: Any, replicas: int, groups: int, nodes: int, devices: int, *, current: Any
) -> Placement:
    grouped = groups > 0 and groups % max(nodes, 1) == 0  # else global, as DeepSeek's function does
    return plan(
        weight,
        num_devices=devices,
        num_slots=replicas,
        num_nodes=nodes if devices % max(nodes, 1) == 0 else 1,
        groups=groups if grouped else 1,
        leave_price=LEAVE_PRICE,
        current=current,
    )


def _like(weight: Any, array: NDArray[np.int64]) -> Any:
    """The array as a CPU tensor if `weight` is a tensor."""
    if not hasattr(weight, "new_tensor"):
        return array
    return weight.new_tensor(array, dtype=weight.long().dtype, device="cpu")
