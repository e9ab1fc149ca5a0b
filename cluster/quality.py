"""From options to what a run may lose: the sensitivity file, the budget, the plan of formats.

Decides nothing about formats itself (`policies.formatplan`); refuses what does not fit together,
before anything starts. Must not start anything.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from hotset.actors.quality import QualitySpec
from hotset.blocks.lowrank import install, read_bases
from hotset.blocks.sensitivity_table import read_table
from hotset.cluster.calibrate import budget_of, costs_of
from hotset.policies.formatplan import plan_formats
from hotset.policies.guard import BUDGET_NATS
from hotset.policies.types import Format
from hotset.transport.slots import part_bytes, slot_parts, slot_stride

if TYPE_CHECKING:
    from pathlib import Path

    from hotset.blocks.checkpoint import Catalog
    from hotset.cluster.config import RunConfig
    from hotset.policies.formatplan import FormatPlan


def read_quality(
    config: RunConfig, catalog: Catalog, *, reduced_nbytes: int, capacity_bytes: int
) -> QualitySpec | None:
    """Read the table and plan the formats of a worker with `capacity_bytes`; None without a table.

    Raises ConfigError for a table that cannot be read or belongs to another checkpoint.
    """
    if config.sensitivity is None:
        return None
    table = read_table(config.sensitivity, checkpoint=catalog.digest)
    bases = bases_of(config, catalog)
    costs = costs_of(table)
    nats = BUDGET_NATS if config.quality_budget is None else config.quality_budget
    budget = budget_of(table, nats=nats)
    stride = slot_stride(catalog.block_nbytes, reduced_nbytes, *table.nbytes)
    sizes = dict(zip(costs.formats, costs.nbytes.tolist(), strict=True))
    plan = plan_formats(
        costs,
        layers=table.layers,
        slot_nbytes={
            Format(name): part_bytes(slot_parts(nbytes, stride=stride), stride=stride)
            for name, nbytes in sizes.items()
        },
        capacity_bytes=capacity_bytes - 2 * stride,  # the live check's slot, and a scratch slot
        budget=budget,
        floors={layer: Format(name) for layer, name in config.floors.items()},
        default_floor=Format(config.default_floor) if config.default_floor else None,
    )
    return QualitySpec(
        formats=costs.formats,
        nbytes=tuple(costs.nbytes.tolist()),
        layers=table.layers,
        num_experts=table.num_experts,
        nats=np.ascontiguousarray(costs.nats, dtype=np.float64).tobytes(),
        frequency=np.ascontiguousarray(table.use, dtype=np.float64).tobytes(),
        plan=_codes(plan, costs.formats),
        budget_nats=nats,
        gamma=budget.gamma,
        bases=str(bases or ""),
    )


def bases_of(config: RunConfig, catalog: Catalog) -> Path | None:
    """The file of bases that goes with the sensitivity file, if `lowrank` was offered."""
    if config.sensitivity is None:
        return None
    table = read_table(config.sensitivity, checkpoint=catalog.digest)
    return config.sensitivity.resolve().with_name(table.bases) if table.bases else None


def bases_nbytes(config: RunConfig, catalog: Catalog) -> int:
    """Bytes of device memory that a worker keeps the bases in. Raises as `read_bases` does."""
    path = bases_of(config, catalog)
    if path is None:
        return 0
    found = install(read_bases(path, checkpoint=catalog.digest))
    return found.bases * catalog.block_nbytes


def planned_formats(quality: QualitySpec | None) -> dict[str, int]:
    """Payload bytes of each lossy format that the plan uses."""
    if quality is None:
        return {}
    used = {str(form) for form in quality.planned().values()}
    return {
        name: nbytes
        for name, nbytes in zip(quality.formats, quality.nbytes, strict=True)
        if name in used
    }


def _codes(plan: FormatPlan, formats: tuple[str, ...]) -> bytes:
    """The plan's codes in the order of the table's formats."""
    code = np.array([formats.index(str(form)) for form in plan.formats], dtype=np.uint8)
    return code[plan.codes].tobytes()
