"""Formats with one scale per output channel: `int8` (symmetric) and `fp8` (e4m3).

Body: for each field, in the layout's order, its 8-bit values in the field's own shape (a bias: its
own bytes), then for each matrix its scales. Scales are bfloat16 in a bfloat16 model, else float32.
e4m3 is the OCP form (bias 7, no infinity, largest 448), as torch's float8_e4m3fn.

Must not know where a payload is. Error of int8: half a scale; of fp8: 1/16 of the value, or 2**-10
scales for the smallest; then one rounding of the model's type.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import TYPE_CHECKING

import numpy as np
import torch

from hotset.blocks import formats_decode, formats_encode
from hotset.blocks.experts import ExpertWeights, layout_dtype
from hotset.blocks.formats_base import (
    Section,
    SectionCodec,
    as_bits,
    check_finite,
    field_values,
    has_kernel,
    is_matrix,
    scale_dtype,
    scale_limit,
)
from hotset.blocks.formats_encode import SMALLEST
from hotset.blocks.formats_jit import COMPILED
from hotset.policies.types import Format

if TYPE_CHECKING:
    from collections.abc import Sequence

    from hotset.blocks.checkpoint import BlockLayout

_CHUNK = 1 << 17  # weights quantised at a time, so that the float32 copy stays in cache
_SCALE_SLACK = 1 + 2**-8  # a bf16 scale rounds by at most 2**-8, so no weight exceeds the range


class ChannelCodec(SectionCodec):
    """8-bit values and a scale per output channel. `top` is the largest value."""

    top: float
    kind: torch.dtype
    stored: torch.dtype  # the same bytes in a type that NumPy has

    @property
    def factor(self) -> np.float32:
        """Scale of a channel whose largest weight is 1."""
        return np.float32(_SCALE_SLACK / self.top)

    @abstractmethod
    def to_values(self, scaled: torch.Tensor) -> torch.Tensor:
        """Round float32 weights in units of their scale, on any device; they are used up."""

    def sections(self, layout: BlockLayout) -> Sequence[Section]:
        """As `SectionCodec.sections`."""
        width = layout_dtype(layout).itemsize
        item = scale_dtype(layout).itemsize
        values = [
            Section(role=f.role, nbytes=f.nbytes // width if is_matrix(f) else f.nbytes)
            for f in layout.fields
        ]
        scales = [
            Section(role=f"{f.role}_scale", nbytes=f.shape[_scaled_dim(layout)] * item)
            for f in layout.fields
            if is_matrix(f)
        ]
        return values + scales

    def encode_body(
        self, src: torch.Tensor, layout: BlockLayout, body: torch.Tensor
    ) -> tuple[int, int]:
        """As `BodyCodec.encode_body`."""
        check_finite(src, layout)
        self.clear_gaps(body, layout)
        stored = self.split(body, layout)
        dim = _scaled_dim(layout)
        for field in layout.fields:
            weight = field_values(src, layout, field)
            if not is_matrix(field):
                stored[field.role].view(weight.dtype).view(weight.shape).copy_(weight)
                continue
            values = stored[field.role].view(self.kind).view(field.shape)
            scales = stored[f"{field.role}_scale"].view(scale_dtype(layout))
            if layout.transposed:
                weight, values = weight.t(), values.t()
            many = max(1, _CHUNK // weight.shape[1])
            for start in range(0, field.shape[dim], many):
                rows = weight[start : start + many].to(torch.float32).contiguous()
                found, scale = self.quantise(rows, layout)
                values[start : start + many].copy_(found)
                scales[start : start + many].copy_(scale)
        return 0, body.numel()

    def quantise(
        self, rows: torch.Tensor, layout: BlockLayout
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Give values [R, C] and scales [R] of float32 `rows` [R, C]."""
        limit = scale_limit(layout, self.top)
        kind = scale_dtype(layout)
        if not (COMPILED and rows.device.type == "cpu"):
            return self.quantise_anywhere(rows, kind=kind, limit=limit)
        values = torch.empty(rows.shape, dtype=self.kind)
        scales = torch.empty(len(rows))
        kernel = getattr(formats_encode, f"encode_{self.name}")
        kernel(
            rows.view(-1).numpy(), self.factor, np.float32(limit), kind == torch.bfloat16,
            values.view(-1).view(self.stored).numpy(), scales.numpy(),
        )  # fmt: skip
        return values, scales

    def quantise_anywhere(
        self, rows: torch.Tensor, *, kind: torch.dtype, limit: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Do the kernel's arithmetic with torch, on any device."""
        scale = rows.abs().amax(dim=1).clamp_min_(SMALLEST) * float(self.factor)
        scale = scale.clamp_max_(limit).to(kind).float()
        return self.to_values(rows / scale.unsqueeze(1)), scale

    def decode_body(
        self, body: torch.Tensor, layout: BlockLayout, out: torch.Tensor, *, mode: int
    ) -> None:
        """As `BodyCodec.decode_body`."""
        del mode
        stored = self.view_body(body, layout)
        for field in layout.fields:
            target = field_values(out, layout, field)
            values = getattr(stored, field.role)
            if not is_matrix(field):
                target.copy_(values)
                continue
            scale = getattr(stored, f"{field.role}_scale")
            if has_kernel(layout, body):
                form = "_columns" if layout.transposed else ""
                kernel = getattr(formats_decode, f"decode_{self.name}{form}")
                kernel(
                    values.view(self.stored).view(-1).numpy(),
                    as_bits(scale),
                    as_bits(target.view(-1)),
                )
                continue
            scale = scale.unsqueeze(0 if layout.transposed else 1)
            target.copy_(values.to(torch.float32).mul_(scale))

    def view_body(self, body: torch.Tensor, layout: BlockLayout) -> ExpertWeights:
        """View 8-bit matrices with their scales."""
        stored = self.split(body, layout)
        tensors: dict[str, torch.Tensor] = {}
        for field in layout.fields:
            kind = self.kind if is_matrix(field) else layout_dtype(layout)
            tensors[field.role] = stored[field.role].view(kind).view(field.shape)
            if is_matrix(field):
                role = f"{field.role}_scale"
                tensors[role] = stored[role].view(scale_dtype(layout))
        return ExpertWeights(**tensors)


class Int8Codec(ChannelCodec):
    """Symmetric int8, -127..127. Compute reads it straight."""

    name = Format.INT8
    direct = True
    top = 127.0
    kind = stored = torch.int8

    def to_values(self, scaled: torch.Tensor) -> torch.Tensor:
        """As `ChannelCodec.to_values`."""
        return scaled.round_().clamp_(-self.top, self.top)


class Fp8Codec(ChannelCodec):
    """e4m3 with three bits of mantissa: finer than int8 near zero, coarser at the top."""

    name = Format.FP8
    top = 448.0
    kind = torch.float8_e4m3fn
    stored = torch.uint8

    def to_values(self, scaled: torch.Tensor) -> torch.Tensor:
        """As `ChannelCodec.to_values`; beyond the top the cast would give NaN."""
        return scaled.clamp_(-self.top, self.top).to(torch.float8_e4m3fn)

    def views(
        self, payload: torch.Tensor, layout: BlockLayout, *, scratch: torch.Tensor | None = None
    ) -> ExpertWeights:
        """As `Codec.views`; torch has no product that takes fp8 weights with bf16 rows here."""
        if scratch is None:
            raise ValueError("compute cannot read format fp8: pass scratch to decode into")
        return super().views(payload, layout, scratch=scratch)


def _scaled_dim(layout: BlockLayout) -> int:
    """Give the dimension that counts output channels."""
    return 1 if layout.transposed else 0
