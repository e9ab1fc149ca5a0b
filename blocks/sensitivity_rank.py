"""How well each way of estimating ranks blocks: estimates against the true KL of single blocks.

Decides which blocks are drawn and what is compared: the Fisher- and the router-weighted output
error, how often a block is used, how far its weights are off, and the table that decisions go by.
The first three are taken as they come from text of the same kind; the table is drawn to the layer's
mean and to even use, so it ranks blocks that this kind of text does not use higher than they
deserve here. True KL is that of one block in one format with all others at full precision, on text
that no estimate saw. Must not know how a table is used.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from hotset.blocks.sensitivity import FULL
from hotset.blocks.sensitivity_fisher import first_order
from hotset.blocks.sensitivity_stats import rank_correlation
from hotset.policies.types import BlockId

if TYPE_CHECKING:
    import torch

    from hotset.blocks.sensitivity import KLMeter
    from hotset.blocks.sensitivity_table import SensitivityTable

_RESAMPLES = 500


@dataclass(frozen=True, slots=True, kw_only=True)
class RankCheck:
    """Rank correlation with true KL over `blocks` blocks, with its 5 % and 95 % bounds."""

    by: str
    format: str
    correlation: float
    lower: float
    upper: float
    blocks: int


def check_ranks(  # noqa: PLR0913 - what is ranked, on what, how often
    meter: KLMeter,
    table: SensitivityTable,
    windows: torch.Tensor,
    *,
    fit: torch.Tensor,
    form: str,
    blocks: int,
    seed: int = 0,
) -> tuple[RankCheck, ...]:
    """Measure `blocks` random blocks in `form` on `windows` [W, T]; best estimate first.

    `fit` [W, T] is the text of the estimates.
    """
    random = np.random.default_rng(seed)
    everything = [
        (row, expert) for row in range(len(table.layers)) for expert in range(table.num_experts)
    ]
    count = min(blocks, len(everything))
    chosen = [everything[at] for at in random.choice(len(everything), count, replace=False)]
    names = [BlockId(table.layers[row], expert) for row, expert in chosen]
    true = [float(meter.measure({block: form}, windows).kl.mean()) for block in names]
    rows, experts = (np.array(axis) for axis in zip(*chosen, strict=True))
    code = table.formats.index(form)
    found = first_order(meter, fit, formats=(form,), seed=seed)
    estimates = {
        "Fisher-weighted output error": found.nats.sum(axis=0)[rows, experts, 0],
        "router-weighted output error": found.router[rows, experts, 0],
        "frequency": found.counts.sum(axis=0)[rows, experts],
        "the table": table.damage[rows, experts, code],
        "weight error": np.array([_weight_error(meter, block, form) for block in names]),
    }
    drawn = random.integers(count, size=(_RESAMPLES, count))
    checks = []
    for by, values in estimates.items():
        again = [rank_correlation(values[one], np.array(true)[one]) for one in drawn]
        low, high = np.percentile(again, [5.0, 95.0])
        checks.append(
            RankCheck(
                by=by, format=form, correlation=rank_correlation(values, true),
                lower=float(low), upper=float(high), blocks=count,
            )
        )  # fmt: skip
    return tuple(sorted(checks, key=lambda one: -one.correlation))


def _weight_error(meter: KLMeter, block: BlockId, form: str) -> float:
    """Squared error of the weights."""
    full, rough = meter.runner.weights(block, FULL), meter.runner.weights(block, form)
    return sum(
        float((getattr(rough, role) - getattr(full, role)).square().sum())
        for role in ("gate_up", "down")
    )
