"""Precision as a lever: chooses a format for each expert together with its replicas.

Decides formats and a placement under bytes per device. Must not know how quality is measured: the
floors come from the guardrail and are never undercut, sensitivities from calibration. All copies of
an expert have one format.

Two copies of half the size in the bytes of one let a hot expert be on two devices (design, section
7). Experts are demoted in the order of divergence for each byte freed, and only as many as the
target needs; demoting none is always among the candidates.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from hotset.policies import place
from hotset.policies.guard import QUALITY
from hotset.policies.place_check import as_numpy, check_load, whole
from hotset.policies.types import Format

if TYPE_CHECKING:
    from collections.abc import Mapping

    from hotset.policies.place_types import Floats, Ints, Placement

STAGES = 8
"""Parts in which demotions are tried."""
GOOD = 0.98


@dataclass(frozen=True, slots=True, kw_only=True)
class FormatPlan:
    """A placement and the format of each expert: `names[codes[layer, expert]]`."""

    placement: Placement
    names: tuple[str, ...]  # best quality first
    codes: Ints  # [L, E]
    demoted_ratio: float  # experts below the best format


def plan_formats(  # noqa: PLR0913 - the terms of one trade
    load: Any,
    *,
    num_devices: int,
    num_slots: int,
    formats: Mapping[str, float],
    device_bytes: Any = None,
    num_nodes: int = 1,
    floors: Any = None,
    sensitivity: Any = None,
    current: Any = None,
    speed: Any = None,
    target: float | None = None,
    split: Literal["even", "free"] = "even",
    co_routing: Any = None,
) -> FormatPlan:
    """Choose formats, replica counts and places under `device_bytes` (a number or [D]).

    `formats` gives the bytes of a copy by name. `device_bytes` defaults to `num_slots` copies of
    the best format over all devices. `floors` says what the guardrail allows: a `Guardrail`, one
    name, or a mapping from layer to name (absent layers stay at the best format); None allows every
    format given. `sensitivity` [L, E] is the divergence of a demotion, by default the load;
    `co_routing` is that of `place.plan`.

    The plan's slots are as many as the cheapest format would fill; slots without bytes stay empty.
    Raises ValueError that names the argument.
    """
    windows = check_load(load)
    mean = windows.mean(axis=0)
    names = _by_quality(formats)
    nbytes = np.array([formats[name] for name in names], dtype=np.float64)
    allowed = _allowed(floors, names, layers=mean.shape[0])
    devices = whole(num_devices, name="num_devices")
    width = whole(num_slots, name="num_slots") / devices
    if device_bytes is None:
        device_bytes = width * nbytes[0]
    room = np.broadcast_to(as_numpy(device_bytes, name="device_bytes"), (devices,)).astype(float)
    slots = devices * max(1, int(room.max() // nbytes.min()))
    wish = GOOD if target is None else target
    best: FormatPlan | None = None
    for stage in range(STAGES + 1):
        codes = _demote(mean, nbytes, allowed, sensitivity, part=stage / STAGES)
        if stage and best is not None and (codes == best.codes).all():
            break
        try:
            found = place.plan(
                load, num_devices=devices, num_slots=slots, num_nodes=num_nodes,
                sizes=nbytes[codes], capacity=room, speed=speed, split=split, target=target,
                current=_fitting(current, slots), co_routing=co_routing,
            )  # fmt: skip
        except ValueError as refusal:
            if stage == STAGES or "capacity" not in str(refusal):
                raise
            continue  # the next stage needs fewer bytes
        if best is None or found.balancedness > best.placement.balancedness:
            best = FormatPlan(
                placement=found, names=names, codes=codes, demoted_ratio=float((codes > 0).mean())
            )
        if best.placement.balancedness >= wish:
            break
    if best is None:
        raise ValueError("device_bytes has no room for every expert within the floors")
    return best


def _fitting(current: Any, slots: int) -> Any:
    """The current plan if it has as many slots; a plan in other formats may have more or fewer."""
    if current is None:
        return None
    array = as_numpy(getattr(current, "physical_to_logical_map", current), name="current")
    return array if array.ndim == 2 and array.shape[1] == slots else None


def _by_quality(formats: Mapping[str, float]) -> tuple[str, ...]:
    """Names, best quality first; a name that hotset does not know counts by its bytes."""
    if not formats:
        raise ValueError("formats is empty; give bytes by name, for instance {'bf16': 88_080_384}")
    known = {str(name) for name in Format}
    for name, nbytes in formats.items():
        if not np.isfinite(nbytes) or nbytes <= 0:
            raise ValueError(f"formats gives {name!r} {nbytes!r} bytes; give a positive number")
    return tuple(
        sorted(
            map(str, formats),
            key=lambda name: (
                -QUALITY[Format(name)] if name in known else 0,
                -formats[name],
                name,
            ),
        )
    )


def _allowed(floors: Any, names: tuple[str, ...], *, layers: int) -> Ints:
    """Code of the cheapest format allowed in each layer."""
    if floors is None:
        return np.full(layers, len(names) - 1, dtype=np.int64)
    found = np.zeros(layers, dtype=np.int64)
    for layer in range(layers):
        if hasattr(floors, "floor"):
            name = str(floors.floor(layer))
        elif isinstance(floors, str):
            name = str(floors)
        else:
            name = str(floors.get(layer, names[0]))
        if name in names:
            found[layer] = names.index(name)
        elif name not in {str(one) for one in Format}:
            raise ValueError(f"floors names {name!r}, which is not among formats {names}")
        else:
            good = [QUALITY.get(Format(one), 0) >= QUALITY[Format(name)] for one in names]
            found[layer] = max((code for code, ok in enumerate(good) if ok), default=0)
    return found


def _demote(load: Floats, nbytes: Floats, allowed: Ints, sensitivity: Any, *, part: float) -> Ints:
    """Codes when `part` of the experts that may go take the cheapest format allowed."""
    layers, experts = load.shape
    harm = load if sensitivity is None else as_numpy(sensitivity, name="sensitivity")
    if harm.shape != load.shape:
        raise ValueError(f"sensitivity must be [layers, experts] = {load.shape}, not {harm.shape}")
    freed = nbytes[0] - nbytes[allowed]
    codes = np.zeros((layers, experts), dtype=np.int64)
    many = round(part * experts)
    for layer in np.flatnonzero(freed > 0):
        order = np.argsort(harm[layer] / freed[layer], kind="stable")
        codes[layer, order[:many]] = allowed[layer]
    return codes
