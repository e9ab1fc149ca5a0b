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
"""Rows of a tile. Each product of a tile has one shape, so only a row's place in the tile could
change its bits; `tile_holds` checks that it does not on this machine."""


class ExpertsModule(Protocol):
    """What compute asks of a transformers experts module: its activation, not its weights."""

    is_transposed: bool

    def _apply_gate(self, gate_up: torch.Tensor) -> torch.Tensor: ...


@dataclass(frozen=True, slots=True)
class ExpertWeights:
    """One expert's matrices: `gate_up` [2I, H] and `down` [H, I], or transposed as in gpt-oss.

    With scales (one per output channel) the matrices are int8.
    """

    gate_up: torch.Tensor
    down: torch.Tensor
    gate_up_bias: torch.Tensor | None = None
    down_bias: torch.Tensor | None = None
    gate_up_scale: torch.Tensor | None = None
    down_scale: torch.Tensor | None = None


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
    w = weights
    if module.is_transposed:
        hidden = rows @ _plain(w.gate_up, w.gate_up_scale, rows.dtype, channel=0)
        if w.gate_up_bias is not None:
            hidden = hidden + w.gate_up_bias
        gated = module._apply_gate(hidden)  # noqa: SLF001 - the class's own gate
        out = gated @ _plain(w.down, w.down_scale, rows.dtype, channel=0)
        return out if w.down_bias is None else out + w.down_bias
    hidden = _linear(rows, w.gate_up, w.gate_up_bias, w.gate_up_scale)
    gated = module._apply_gate(hidden)  # noqa: SLF001 - the class's own gate
    return _linear(gated, w.down, w.down_bias, w.down_scale)


def run_expert_tiled(
    module: ExpertsModule, rows: torch.Tensor, weights: ExpertWeights, *, tile: int = TILE
) -> torch.Tensor:
    """Run one expert on `rows` [n, H] in tiles; a row's bits are independent of all other rows."""
    count = rows.shape[0]
    if count == 0:
        return run_expert(module, rows, weights)
    whole = -count % tile
    padded = functional.pad(rows, (0, 0, 0, whole)) if whole else rows
    parts = [
        run_expert(module, padded[start : start + tile], weights) for start in range(0, count, tile)
    ]
    out = parts[0] if len(parts) == 1 else torch.cat(parts)
    return out[:count]


def tile_holds(
    module: ExpertsModule,
    weights: ExpertWeights,
    *,
    dtype: torch.dtype,
    tile: int = TILE,
    seed: int = 0,
) -> bool:
    """Tell whether a row's bits are the same in every place of a tile, here and for this shape.

    A check for the start of a worker: a few products. Thread counts are not tried; in float32 they
    can change the bits of any product, so all workers of a deployment use one count.
    """
    random = torch.Generator().manual_seed(seed)
    width = weights.gate_up.shape[0 if module.is_transposed else 1]
    rows = torch.randn(2 * tile, width, generator=random).to(weights.gate_up.device, dtype)
    expected = run_expert_tiled(module, rows, weights, tile=tile)
    order = torch.randperm(2 * tile, generator=random).to(rows.device)
    return all(
        torch.equal(run_expert_tiled(module, rows[chosen], weights, tile=tile), expected[chosen])
        for chosen in (order, order[:1], order[: tile - 1], order.roll(1), order.flip(0))
    )


def _linear(
    rows: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    scale: torch.Tensor | None,
) -> torch.Tensor:
    """Multiply by [out, in]; int8 goes to torch's int8 product where it exists and else decodes."""
    if scale is None:
        return functional.linear(rows, weight, bias)
    if rows.device.type == "cpu" and rows.dtype == scale.dtype == torch.bfloat16:
        out = torch._weight_int8pack_mm(rows, weight, scale)  # noqa: SLF001 - as torchao calls it
        return out if bias is None else out + bias
    return functional.linear(rows, _plain(weight, scale, rows.dtype, channel=1), bias)


def _plain(
    weight: torch.Tensor, scale: torch.Tensor | None, dtype: torch.dtype, *, channel: int
) -> torch.Tensor:
    """Decode int8 [.., ..] with scales along the other dimension than `channel`; else pass on."""
    if scale is None:
        return weight
    return weight.to(dtype).mul_(scale.unsqueeze(channel))
