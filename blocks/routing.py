"""From a router's choice to rows for each expert, and back: the two orders of the references.

eager (`combine_eager`): experts in ascending order add their weighted rows to the result in its own
type. grouped_mm (`combine_grouped`): weighted rows are put back in (token, choice) order and summed
over the choices. In bf16 the two differ, so a run names the one it follows.

Must not know weights or where experts run: outputs of experts may come from anywhere.
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Literal, NamedTuple

import torch

if TYPE_CHECKING:
    from collections.abc import Mapping

_MOST_CHOICES_IN_PYTHON = 64  # below it a loop beats torch.unique
Reference = Literal["eager", "grouped_mm"]
"""The experts implementation of transformers whose bits are reproduced."""


class Group(NamedTuple):
    """Rows of one expert: `tokens[i]` chose it as its `positions[i]`-th expert."""

    positions: torch.Tensor
    tokens: torch.Tensor


def experts_hit(index: torch.Tensor, *, num_experts: int) -> list[int]:
    """List the experts that any token chose, ascending. `index` is [n, K]."""
    return count_experts(index, num_experts=num_experts)[0]


def group_rows(index: torch.Tensor, expert: int, *, reference: Reference = "eager") -> Group:
    """Find the tokens that chose `expert`, in the row order of the reference.

    eager: by choice, then token. grouped_mm: by token (its sort over the flattened choices).
    """
    if reference == "eager":
        positions, tokens = torch.where(index.t() == expert)
    else:
        tokens, positions = torch.where(index == expert)
    return Group(positions, tokens)


def combine_eager(
    hidden: torch.Tensor,
    index: torch.Tensor,
    weights: torch.Tensor,
    outputs: Mapping[int, torch.Tensor],
) -> torch.Tensor:
    """Add up experts' rows as eager does.

    `hidden` [n, H] gives shape and type, `index` and `weights` are [n, K]; `outputs[e]` holds the
    rows of expert e in the order of `group_rows(index, e)`.
    """
    if hidden.shape[0] == 1:
        return _combine_one(hidden, index, weights, outputs)
    result = torch.zeros_like(hidden)
    for expert in sorted(outputs):
        positions, tokens = group_rows(index, expert)
        weighted = outputs[expert] * weights[tokens, positions, None]
        result.index_add_(0, tokens, weighted.to(result.dtype))
    return result


def _combine_one(
    hidden: torch.Tensor,
    index: torch.Tensor,
    weights: torch.Tensor,
    outputs: Mapping[int, torch.Tensor],
) -> torch.Tensor:
    """Add up the experts of one token: the sums of `combine_eager` with a quarter of its calls."""
    order = torch.argsort(index[0])
    rows = torch.cat([outputs[expert] for expert in sorted(outputs)])
    weighted = (rows * weights[0, order, None]).to(hidden.dtype)
    result = torch.zeros_like(hidden)
    for row in weighted:
        result.add_(row)
    return result


def combine_grouped(
    hidden: torch.Tensor,
    index: torch.Tensor,
    weights: torch.Tensor,
    outputs: Mapping[int, torch.Tensor],
) -> torch.Tensor:
    """Add up experts' rows as grouped_mm does.

    As `combine_eager`, with rows in the order of `group_rows(index, e, reference="grouped_mm")`.
    """
    count, choices = index.shape
    rows = torch.cat([outputs[expert] for expert in sorted(outputs)])
    places = torch.argsort(index.reshape(-1), stable=True)
    weighted = rows * weights.reshape(-1)[places, None]
    ordered = torch.empty_like(weighted)
    ordered[places] = weighted
    return ordered.view(count, choices, -1).sum(dim=1).to(hidden.dtype)


def combine(
    hidden: torch.Tensor,
    index: torch.Tensor,
    weights: torch.Tensor,
    outputs: Mapping[int, torch.Tensor],
    *,
    reference: Reference,
) -> torch.Tensor:
    """Add up experts' rows in the order of `reference`."""
    if reference == "eager":
        return combine_eager(hidden, index, weights, outputs)
    return combine_grouped(hidden, index, weights, outputs)


class Groups:
    """Rows of each expert in the reference's order, found once."""

    def __init__(self, index: torch.Tensor, *, reference: Reference) -> None:
        """`index` is [n, K]."""
        self._index = index
        self._reference = reference
        self._found: dict[int, Group] = {}

    def of(self, expert: int) -> Group:
        """Tokens and positions of one expert's rows."""
        group = self._found.get(expert)
        if group is None:
            group = group_rows(self._index, expert, reference=self._reference)
            self._found[expert] = group
        return group


def count_experts(index: torch.Tensor, *, num_experts: int) -> tuple[list[int], list[int]]:
    """Distinct experts, ascending, and how many choices fell on each."""
    if index.numel() <= _MOST_CHOICES_IN_PYTHON:
        counts = Counter(index.flatten().tolist())
        experts = sorted(expert for expert in counts if expert < num_experts)
        return experts, [counts[expert] for expert in experts]
    found, sums = torch.unique(index, return_counts=True)
    pairs = [(e, c) for e, c in zip(found.tolist(), sums.tolist(), strict=True) if e < num_experts]
    return [e for e, _ in pairs], [c for _, c in pairs]
