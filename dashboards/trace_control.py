"""What the controller's spans of a run add up to: plans and their cost, vetoes, stores in and out.

Must not know how anything was decided. Invariant: every plan, veto and scale span counts once.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from hotset.actors import names

if TYPE_CHECKING:
    from hotset.dashboards.trace_view import View


@dataclass(frozen=True, slots=True, kw_only=True)
class ControlFigures:
    """Plans: how many, how long the brain took for all and for the slowest, bytes asked to move.

    `plans_by_reason`, `vetoes` and `scale` count by reason; `epoch` is the last one.
    """

    plans: int
    plan_ns: int
    slowest_plan_ns: int
    planned_bytes: int
    epoch: int
    plans_by_reason: dict[str, int]
    vetoes: dict[str, int]
    scale: dict[str, int]


def control_figures(view: View) -> ControlFigures:
    """Sum the control plane's spans."""
    table = view.table
    plan = view.spans.where("name", names.SPAN_PLAN.name)
    took_ns = (table["end_ns"] - table["start_ns"])[plan]
    return ControlFigures(
        plans=int(plan.sum()),
        plan_ns=int(took_ns.sum()),
        slowest_plan_ns=int(took_ns.max(initial=0)),
        planned_bytes=int(table["nbytes"][plan].sum()),
        epoch=int(table["epoch"].max(initial=-1)),
        plans_by_reason=_by_reason(view, names.SPAN_PLAN.name),
        vetoes=_by_reason(view, names.SPAN_VETO.name),
        scale=_by_reason(view, names.SPAN_SCALE.name),
    )


def _by_reason(view: View, span: str) -> dict[str, int]:
    numbers, counts = np.unique(
        view.table["reason"][view.spans.where("name", span)], return_counts=True
    )
    named = zip(numbers.tolist(), counts.tolist(), strict=True)
    return {view.name(number): count for number, count in named}
