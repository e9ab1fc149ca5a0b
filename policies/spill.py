"""One step's overflow: which tokens leave a device that would be too slow, and with which weights.

Decides for a single batch and layer, with no lasting change of the placement. Must not know how
tokens travel. After least-loaded expert parallelism (LLEP): a device over its limit hands the
overflow of its largest experts to the device with the least load, which borrows the weights for
this step if it does not hold them.

Invariants: tokens are conserved; a spill is at least `least_tokens`, so that borrowed weights are
worth their transfer; nothing spills when no device is over the limit.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from hotset.policies.place_check import as_numpy, whole

if TYPE_CHECKING:
    from numpy.typing import NDArray


@dataclass(frozen=True, slots=True, kw_only=True)
class Spill:
    """`tokens` of `expert` go from a device to another; `borrows` when its weights go as well."""

    expert: int
    source: int
    target: int
    tokens: int
    borrows: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Spilled:
    """All spills of a step, and tokens by device before and after."""

    spills: tuple[Spill, ...]
    before: NDArray[np.int64]  # [D]
    after: NDArray[np.int64]  # [D]
    borrowed: int  # copies of weights that travel


def least_loaded_spill(
    tokens: Any,
    slots: Any,
    *,
    num_devices: int,
    limit_ratio: float = 1.1,
    least_tokens: int = 64,
) -> Spilled:
    """Plan one step's spills.

    `tokens` [P] are those of each slot in this step (from `shares.split_batch`), `slots` [P] its
    experts. A device may have up to `limit_ratio` x the mean before it spills. A spill to a device
    without the expert is at least `least_tokens`: below that the transfer costs more than it saves.
    Raises ValueError that names the argument.
    """
    devices = whole(num_devices, name="num_devices")
    least = whole(least_tokens, name="least_tokens")
    if not limit_ratio >= 1:
        raise ValueError(f"limit_ratio must be at least 1, not {limit_ratio!r}")
    slot = as_numpy(slots, name="slots").astype(np.int64)
    left = as_numpy(tokens, name="tokens").astype(np.int64)
    if slot.ndim != 1 or slot.shape != left.shape or len(slot) % devices:
        raise ValueError(f"tokens and slots must both be [slots], a multiple of {devices} devices")
    if (left < 0).any() or (left[slot < 0] > 0).any():
        raise ValueError("tokens are negative, or an empty slot has some")
    by_device = left.reshape(devices, -1)
    owner = slot.reshape(devices, -1)
    held = [set(row[row >= 0].tolist()) for row in owner]
    before = by_device.sum(axis=1)
    load = before.copy()
    limit = int(np.ceil(load.mean() * limit_ratio))
    spills: list[Spill] = []
    for source in np.argsort(-before, kind="stable"):
        while load[source] > limit:
            spill = _next_spill(
                by_device[source], owner[source], load, held, source=int(source), limit=limit,
                least=least,
            )  # fmt: skip
            if spill is None:
                break
            at = int(np.flatnonzero((owner[source] == spill.expert) & (by_device[source] > 0))[0])
            by_device[source, at] -= spill.tokens
            load[source] -= spill.tokens
            load[spill.target] += spill.tokens
            held[spill.target].add(spill.expert)
            spills.append(spill)
    return Spilled(
        spills=tuple(spills),
        before=before,
        after=load,
        borrowed=sum(spill.borrows for spill in spills),
    )


def _next_spill(  # noqa: PLR0913 - the state of one step
    tokens: NDArray[np.int64],
    experts: NDArray[np.int64],
    load: NDArray[np.int64],
    held: list[set[int]],
    *,
    source: int,
    limit: int,
    least: int,
) -> Spill | None:
    """Overflow of the largest expert to the least loaded device, best one that holds it."""
    over = int(load[source]) - limit
    for at in np.argsort(-tokens, kind="stable"):
        if tokens[at] == 0:
            return None
        expert = int(experts[at])
        ranked = [int(device) for device in np.argsort(load, kind="stable") if device != source]
        holders = [device for device in ranked if expert in held[device]]
        for target in (*holders[:1], *ranked[:1]):
            amount = min(over, int(tokens[at]), limit - int(load[target]))
            borrows = expert not in held[target]
            if amount >= (least if borrows else 1):
                return Spill(
                    expert=expert, source=source, target=target, tokens=amount, borrows=borrows
                )
    return None
