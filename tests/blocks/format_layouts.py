from __future__ import annotations

import torch

from hotset.blocks.checkpoint import BlockLayout, Field


def make_layout(
    *,
    hidden: int,
    inter: int,
    dtype: str = "bfloat16",
    transposed: bool = False,
    bias: bool = False,
) -> BlockLayout:
    shapes = {
        "gate_up": (hidden, 2 * inter) if transposed else (2 * inter, hidden),
        "down": (inter, hidden) if transposed else (hidden, inter),
    }
    if bias:
        shapes |= {"gate_up_bias": (2 * inter,), "down_bias": (hidden,)}
    fields, offset = [], 0
    for role, shape in shapes.items():
        nbytes = torch.Size(shape).numel() * getattr(torch, dtype).itemsize
        fields.append(Field(role=role, offset=offset, nbytes=nbytes, shape=shape))
        offset += nbytes
    return BlockLayout(fields=tuple(fields), dtype=dtype, transposed=transposed, nbytes=offset)


def make_payload(layout: BlockLayout, *, seed: int, spread: float = 1.0) -> torch.Tensor:
    random = torch.Generator().manual_seed(seed)
    dtype = getattr(torch, layout.dtype)
    count = layout.nbytes // dtype.itemsize
    values = torch.randn(count, generator=random) * 0.02
    values *= 2.0 ** (torch.randn(count, generator=random) * spread)
    return values.to(dtype).view(torch.uint8)


def any_payload(layout: BlockLayout, *, seed: int, zeros: float) -> torch.Tensor:
    """Every finite bit pattern is as likely: denormals, the largest numbers, both zeros."""
    random = torch.Generator().manual_seed(seed)
    dtype = getattr(torch, layout.dtype)
    payload = torch.randint(0, 256, (layout.nbytes,), generator=random, dtype=torch.uint8)
    values = payload.view(dtype)
    values[~torch.isfinite(values)] = torch.finfo(dtype).max
    values[torch.rand(values.shape, generator=random) < zeros] = 0.0
    return payload


def values_of(payload: torch.Tensor, layout: BlockLayout, role: str) -> torch.Tensor:
    """One tensor of a full payload, in float64."""
    field = layout.field(role)
    assert field is not None
    raw = payload[field.offset : field.offset + field.nbytes]
    return raw.view(getattr(torch, layout.dtype)).view(field.shape).double()
