"""What stores and controller are told about quality: the measured damage, the budget, the plan.

Decides nothing: a value that travels (in specs and in a run's `run.json`) and what is made of it.
The controller opens no files, so the sensitivity table comes as arrays. Must not know Ray.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec
import numpy as np

from hotset.policies.allocate import Costs
from hotset.policies.drift import Budget, DriftMeter
from hotset.policies.guard import QUALITY, Guardrail
from hotset.policies.types import BlockId, Format

if TYPE_CHECKING:
    from collections.abc import Mapping


class QualitySpec(msgspec.Struct, frozen=True, kw_only=True):
    """Damage of every block in every format, the budget, and the format planned for each block.

    `formats` [F], full precision first; `nats` is float64 [L, E, F], `frequency` float64 [L, E],
    `plan` uint8 [L, E] of indices into `formats`; all row-major bytes.
    """

    formats: tuple[str, ...]
    nbytes: tuple[int, ...]
    layers: tuple[int, ...]
    num_experts: int
    nats: bytes
    frequency: bytes
    plan: bytes
    budget_nats: float
    gamma: float
    bases: str = ""  # file of the bases that `lowrank` needs

    def meter(self) -> DriftMeter:
        """A drift meter with everything at full precision."""
        shape = (len(self.layers), self.num_experts, len(self.formats))
        return DriftMeter(
            Costs(
                formats=self.formats,
                nbytes=np.array(self.nbytes, dtype=np.int64),
                nats=np.frombuffer(self.nats, dtype=np.float64).reshape(shape).copy(),
            ),
            layers=self.layers,
            frequency=np.frombuffer(self.frequency, dtype=np.float64).reshape(shape[:2]).copy(),
            budget=Budget(nats=self.budget_nats, gamma=self.gamma),
        )

    def planned(self) -> dict[BlockId, Format]:
        """The planned format of each block that is not held at full precision."""
        codes = np.frombuffer(self.plan, dtype=np.uint8).reshape(-1, self.num_experts)
        rows, experts = np.nonzero(codes)
        return {
            BlockId(self.layers[row], expert): Format(self.formats[codes[row, expert]])
            for row, expert in zip(rows.tolist(), experts.tolist(), strict=True)
        }


def guardrail(
    quality: QualitySpec | None, *, floors: Mapping[int, str], default_floor: str
) -> Guardrail:
    """Make the guardrail of a run: a person's floors, and measured drift where there is a table.

    An empty `default_floor` is full precision without a table; with one drift alone decides.
    """
    floor = {layer: Format(name) for layer, name in floors.items()}
    if quality is None:
        return Guardrail(floor=floor, default_floor=Format(default_floor or Format.BF16))
    cheapest = min(QUALITY, key=lambda form: QUALITY[form])
    default = Format(default_floor) if default_floor else cheapest
    return Guardrail(floor=floor, default_floor=default, drift=quality.meter())
