"""Compute of one expert on rows of tokens, on any torch device, from views of a block's payload.

Two numerics. **Exact**: one matrix product for the rows that one request sends to an expert, the
very grouping of the eager and grouped_mm references, so the bits are theirs. **Tiled**: rows padded
to tiles of a fixed height, one product a tile, so a row's bits depend on nothing but the row and
the weights; rows of several requests may then share a call. The bits of a CPU product depend on its
number of rows, so the two differ in the last bits and a deployment uses one of them throughout.

Must not know where payloads are, nor which request a row belongs to.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch
from torch.nn import functional

if TYPE_CHECKING:
    from hotset.blocks.checkpoint import BlockLayout

TILE = 16
"""Rows of a tile: the smallest height whose rows were position- and thread-independent in bf16."""


class ExpertsModule(Protocol):
    """What compute asks of a transformers experts module: its activation, not its weights."""

    is_transposed: bool

    def _apply_gate(self, gate_up: torch.Tensor) -> torch.Tensor: ...


@dataclass(frozen=True, slots=True)
class ExpertWeights:
    """One expert's matrices: `gate_up` [2I, H] and `down` [H, I], or transposed as in gpt-oss."""

    gate_up: torch.Tensor
    down: torch.Tensor
    gate_up_bias: torch.Tensor | None = None
    down_bias: torch.Tensor | None = None


def layout_dtype(layout: BlockLayout) -> torch.dtype:
    """Give the torch type of a layout."""
    dtype = getattr(torch, layout.dtype)
    assert isinstance(dtype, torch.dtype)  # noqa: S101 - the catalog admits only torch names
    return dtype


def view_weights(payload: torch.Tensor, layout: BlockLayout) -> ExpertWeights:
    """View a full-precision payload (u8, at least `layout.nbytes`) as weights, without a copy.

    The payload's address must be a multiple of the element size; slots are.
    """
    dtype = layout_dtype(layout)
    tensors = {
        field.role: payload[field.offset : field.offset + field.nbytes]
        .view(dtype)
        .view(field.shape)
        for field in layout.fields
    }
    return ExpertWeights(**tensors)


def run_expert(module: ExpertsModule, rows: torch.Tensor, weights: ExpertWeights) -> torch.Tensor:
    """Run one expert on `rows` [n, H] with the arithmetic of the eager forward; gives [n, H].

    Exact numerics: pass exactly the rows that one request sends to this expert in this layer.
    """
    if module.is_transposed:
        hidden = rows @ weights.gate_up
        if weights.gate_up_bias is not None:
            hidden = hidden + weights.gate_up_bias
        out = module._apply_gate(hidden) @ weights.down  # noqa: SLF001 - the class's own gate
        return out if weights.down_bias is None else out + weights.down_bias
    hidden = functional.linear(rows, weights.gate_up, weights.gate_up_bias)
    gated = module._apply_gate(hidden)  # noqa: SLF001 - the class's own gate
    return functional.linear(gated, weights.down, weights.down_bias)


def run_expert_tiled(
    module: ExpertsModule, rows: torch.Tensor, weights: ExpertWeights, *, tile: int = TILE
) -> torch.Tensor:
    """Run one expert on `rows` [n, H] in tiles; a row's bits are independent of all other rows."""
    count = rows.shape[0]
    whole = -count % tile
    padded = functional.pad(rows, (0, 0, 0, whole)) if whole else rows
    tiles = [run_expert(module, part, weights) for part in padded.split(tile)]
    out = tiles[0] if len(tiles) == 1 else torch.cat(tiles)
    return out[:count]
