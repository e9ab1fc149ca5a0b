"""Checks the planner's arguments once, so that nothing after it has to.

Decides what is refused. Must not know how plans are found. Every refusal is a ValueError that names
the argument and says what would do.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from hotset.policies.place_types import Floats, Ints


@dataclass(frozen=True, slots=True, kw_only=True)
class Cluster:
    """Devices and what they can take; `room` in the unit of `sizes`."""

    num_devices: int
    num_slots: int
    num_nodes: int
    node: Ints  # [D]
    speed: Floats  # [D]
    room: Floats  # [D]

    @property
    def width(self) -> int:
        """Slots of a device."""
        return self.num_slots // self.num_devices


def as_numpy(value: Any, *, name: str) -> Any:
    """An array from NumPy, a list or a torch tensor of any type and device."""
    if hasattr(value, "detach"):  # torch, which this folder must not import
        value = value.detach().cpu()
        if value.is_floating_point():
            value = value.double()
        value = value.numpy()
    try:
        array = np.asarray(value)
    except ValueError as error:
        raise ValueError(f"{name} is not an array of one shape: {error}") from error
    if array.dtype.kind not in "iufb":
        raise ValueError(f"{name} must hold numbers, not {array.dtype}")
    return array


def check_load(load: Any) -> Floats:
    """Return [W, L, E] of finite, non-negative float64."""
    array = as_numpy(load, name="load").astype(np.float64)
    if array.ndim not in {2, 3}:
        raise ValueError(
            f"load must be [layers, experts] or [windows, layers, experts], not {array.shape}"
        )
    if array.size == 0:
        raise ValueError(f"load is empty: its shape is {array.shape}; give at least one of each")
    if not np.isfinite(array).all():
        raise ValueError("load holds NaN or infinity; drop the window or count again")
    if (array < 0).any():
        raise ValueError("load holds negative numbers; give counts of tokens")
    if array.max() > 1e300 / array.size:
        raise ValueError("load is too large to add up in float64; scale it down")
    windows: Floats = array if array.ndim == 3 else array[None]
    return windows


def whole(value: Any, *, name: str, least: int = 1) -> int:
    """Return an int of at least `least`."""
    if isinstance(value, bool) or int(value) != value or value < least:
        raise ValueError(f"{name} must be a whole number of at least {least}, not {value!r}")
    return int(value)


def ratio(value: float, *, name: str, most: float = np.inf) -> float:
    """Return a float from 0 to `most`."""
    if not 0 <= value <= most:
        raise ValueError(f"{name} must lie between 0 and {most:g}, not {value!r}")
    return float(value)


def _per_device(value: Any, *, name: str, devices: int) -> Floats:
    array: Floats = as_numpy(value, name=name).astype(np.float64)
    if array.shape != (devices,):
        raise ValueError(f"{name} must have one entry for each of {devices} devices")
    if not np.isfinite(array).all() or (array < 0).any():
        raise ValueError(f"{name} must be finite and not negative")
    return array


def check_speed(speed: Any, *, devices: int) -> Floats:
    """Return [D]; equal devices by default."""
    if speed is None:
        return np.ones(devices)
    pace = _per_device(speed, name="speed", devices=devices)
    if (pace <= 0).any():
        raise ValueError("speed must be positive; give a dead device a capacity of 0 instead")
    return pace


def check_cluster(  # noqa: PLR0913 - the facts about a cluster, by name
    *,
    num_devices: int,
    num_slots: int,
    num_nodes: int,
    capacity: Any,
    speed: Any,
    num_experts: int,
) -> Cluster:
    """Check the devices against each other and against the number of experts."""
    devices = whole(num_devices, name="num_devices")
    slots = whole(num_slots, name="num_slots")
    nodes = whole(num_nodes, name="num_nodes")
    if slots % devices:
        raise ValueError(f"num_slots {slots} must be a multiple of num_devices {devices}")
    if slots < num_experts:
        raise ValueError(f"num_slots {slots} cannot hold {num_experts} experts; give more slots")
    if nodes > devices or devices % nodes:
        raise ValueError(f"num_nodes {nodes} must divide num_devices {devices}")
    pace = check_speed(speed, devices=devices)
    room = np.full(devices, np.inf)
    if capacity is not None:
        room = _per_device(capacity, name="capacity", devices=devices)
    return Cluster(
        num_devices=devices,
        num_slots=slots,
        num_nodes=nodes,
        node=np.arange(devices, dtype=np.int64) * nodes // devices,
        speed=pace,
        room=room,
    )


def check_sizes(sizes: Any, *, layers: int, experts: int) -> Floats:
    """Return bytes of a copy as [L, E]; 1 each by default, so that bytes are slots."""
    if sizes is None:
        return np.ones((layers, experts))
    array = as_numpy(sizes, name="sizes").astype(np.float64)
    try:
        full = np.broadcast_to(array, (layers, experts)).copy()
    except ValueError:
        raise ValueError(
            f"sizes must be one number, [experts] or [layers, experts] = ({layers}, {experts}),"
            f" not {array.shape}"
        ) from None
    if not np.isfinite(full).all() or (full <= 0).any():
        raise ValueError("sizes must be finite and positive")
    return full


def check_current(current: Any, *, layers: int, slots: int, experts: int) -> Ints:
    """Return the slots of a current plan, [L, P]; -1 marks an empty slot."""
    found = getattr(current, "physical_to_logical_map", current)
    array = as_numpy(found, name="current")
    if array.shape != (layers, slots):
        raise ValueError(
            f"current must be [layers, num_slots] = ({layers}, {slots}), not {array.shape}"
        )
    whole_numbers: Ints = array.astype(np.int64)
    if (whole_numbers != array).any() or (array < -1).any() or (array >= experts).any():
        raise ValueError(
            f"current must hold experts from 0 to {experts - 1}, or -1 for an empty slot"
        )
    return whole_numbers
