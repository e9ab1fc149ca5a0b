"""The plan of formats: in which format each block is held near compute, under bytes and budget.

Decides formats from measured damage, floors and the bytes of slots; `allocate` does the arithmetic.
Must not know how blocks are encoded, moved or computed. A block whose plan is lossy may be held in
that format or in any better one, so a plan is an upper bound of what may be lost; the guardrail
still checks every copy.

Part of the budget (`STANDIN_RATIO`) is left for cheap copies that stand in while a full one is on
its way (`standin`), so plan and stand-ins together stay inside it.

Invariants: a budget of 0 gives lossless formats only; no format below a floor; the plan's damage
times gamma never exceeds the planned share of the budget's margin.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from hotset.policies.allocate import Costs, allocate, caps
from hotset.policies.guard import QUALITY
from hotset.policies.types import BlockId, Format

if TYPE_CHECKING:
    from collections.abc import Mapping

    from hotset.policies.allocate import Flags, Ints
    from hotset.policies.drift import Budget

STANDIN_RATIO = 0.1
"""Share of the budget that plans leave for stand-ins."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FormatPlan:
    """`formats[codes[row, expert]]` is the format of expert `expert` of layer `layers[row]`."""

    layers: tuple[int, ...]
    formats: tuple[Format, ...]
    codes: Ints
    nbytes: int
    nats: float

    def by_block(self) -> dict[BlockId, Format]:
        """Blocks whose plan is not full precision."""
        rows, experts = np.nonzero(self.codes)
        return {
            BlockId(self.layers[row], expert): self.formats[self.codes[row, expert]]
            for row, expert in zip(rows.tolist(), experts.tolist(), strict=True)
        }


def plan_formats(  # noqa: PLR0913 - the terms of one plan, by keyword
    costs: Costs,
    *,
    layers: tuple[int, ...],
    slot_nbytes: Mapping[Format, int],
    capacity_bytes: int,
    budget: Budget,
    floors: Mapping[int, Format] | None = None,
    default_floor: Format | None = None,
) -> FormatPlan:
    """Choose formats so that all blocks fit into `capacity_bytes`, or as few bytes as may be.

    `costs` as calibration measured them, full precision first; formats that `slot_nbytes` (bytes
    of a slot) lacks are not used. Where the budget does not reach the bytes, it is used up: fewer
    bytes are then more blocks at hand. Floors name the cheapest format of a layer.
    """
    keep = [at for at, name in enumerate(costs.formats) if Format(name) in slot_nbytes]
    formats = tuple(Format(costs.formats[at]) for at in keep)
    sized = Costs(
        formats=tuple(str(form) for form in formats),
        nbytes=np.array([slot_nbytes[form] for form in formats], dtype=np.int64),
        nats=costs.nats[..., keep],
    )
    allowed = _allowed(formats, layers, floors=floors or {}, default=default_floor)
    nats = budget.nats * budget.margin_ratio * (1.0 - STANDIN_RATIO) / budget.gamma
    layer_cap, expert_cap = caps(budget.nats * (1.0 - STANDIN_RATIO), gamma=budget.gamma)
    try:
        found = allocate(
            sized, bytes_at_most=capacity_bytes, nats_at_most=nats, allowed=allowed,
            layer_cap_nats=layer_cap, expert_cap_nats=expert_cap,
        )  # fmt: skip
    except ValueError:  # the budget does not reach the bytes
        found = allocate(
            sized, nats_at_most=nats, allowed=allowed,
            layer_cap_nats=layer_cap, expert_cap_nats=expert_cap,
        )  # fmt: skip
    return FormatPlan(
        layers=layers, formats=formats, codes=found.codes, nbytes=found.nbytes, nats=found.nats
    )


def _allowed(
    formats: tuple[Format, ...],
    layers: tuple[int, ...],
    *,
    floors: Mapping[int, Format],
    default: Format | None,
) -> Flags:
    """Formats at or above each layer's floor, [L, 1, F]."""
    cheapest = min(QUALITY, key=lambda form: QUALITY[form])
    rows = [
        [QUALITY[form] >= QUALITY[floors.get(layer, default or cheapest)] for form in formats]
        for layer in layers
    ]
    return np.array(rows, dtype=np.bool_)[:, None, :]
