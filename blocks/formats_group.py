"""Formats with 64 weights to a scale and a few bits to a weight: `int4`, `nf4`, `int3`, `int2`.

A matrix is cut into groups of 64 neighbours in the order of the payload. A weight is `scale` times
a level of the format's codebook, and the code is the level's index:

| format | levels | bits a weight with its bf16 scale |
|---|---|---|
| int4 | -8 .. 7 | 4.25 |
| nf4 | quantiles of the normal distribution (Dettmers et al., QLoRA, 2023) | 4.25 |
| int3 | -4 .. 3 | 3.25 |
| int2 | -1.5, -0.5, 0.5, 1.5 | 2.25 |

The scale's sign is chosen so that the group's largest weight meets the outermost level, as in the
Q4_0 format of ggml, and its size by trying a few shares of the largest weight and keeping the one
with the least squared error; so an outlier is cut off where that helps the other 63.

Body: for each field its codes (a bias: its own bytes), then for each matrix its scales (bfloat16
in a bfloat16 model, else float32). Codes of a group: 4 bits, byte j has weight j low and j + 32
high. 2 bits, byte j has weights j, j + 16, j + 32, j + 48 from the lowest bits up. 3 bits, the two
lower bits so, then 8 bytes in which byte j has the third bit of weights j, j + 8, ... upwards. The
last group is filled up with zeros, which are cut off on decoding.

Must not know where a payload is. Invariants: the squared error of a group is at most that of plain
rounding to the full range; an all-zero group stays zero.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch.nn import functional

from hotset.blocks import formats_decode, formats_encode_group
from hotset.blocks.experts import layout_dtype
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
from hotset.blocks.formats_decode import GROUP
from hotset.blocks.formats_encode_group import LEAST_SCALE
from hotset.blocks.formats_jit import COMPILED
from hotset.policies.types import Format

if TYPE_CHECKING:
    from collections.abc import Sequence

    from hotset.blocks.checkpoint import BlockLayout

_CHUNK = 2048  # groups at a time, so that the float32 copies stay in cache
_SHARES_FINE = (1.0, 0.95, 0.9, 0.85, 0.8)
_SHARES_COARSE = (1.0, 0.93, 0.86, 0.79, 0.72, 0.65, 0.58, 0.51)
NF4_LEVELS = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
    -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
    0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
    0.7229568362236023, 1.0,
)  # fmt: skip


class GroupCodec(SectionCodec):
    """A codebook of `2 ** bits` levels, ascending, the lowest being the outermost."""

    group = GROUP

    def __init__(
        self, name: Format, *, bits: int, levels: Sequence[float], shares: Sequence[float]
    ) -> None:
        """`shares` of the largest weight are tried as the outermost level; the first is 1."""
        self.name = name
        self.bits = bits
        self.levels = np.array(levels, dtype=np.float32)
        self.filled = np.zeros(16, dtype=np.float32)
        self.filled[: len(self.levels)] = self.levels
        self.middles = (self.levels[1:] + self.levels[:-1]) / np.float32(2)
        self.between = np.full(16, np.inf, dtype=np.float32)
        self.between[: len(self.middles)] = self.middles
        self.linear = bool((np.diff(self.levels) == 1).all())
        self.top = -float(self.levels[0])
        self.factors = np.array([share / self.top for share in shares], dtype=np.float32)

    def sections(self, layout: BlockLayout) -> Sequence[Section]:
        """As `SectionCodec.sections`."""
        item = scale_dtype(layout).itemsize
        values, scales = [], []
        for field in layout.fields:
            groups = _groups(field.shape)
            if not is_matrix(field):
                values.append(Section(role=field.role, nbytes=field.nbytes))
                continue
            values.append(Section(role=field.role, nbytes=groups * GROUP * self.bits // 8))
            scales.append(Section(role=f"{field.role}_scale", nbytes=groups * item))
        return values + scales

    def encode_body(
        self, src: torch.Tensor, layout: BlockLayout, body: torch.Tensor
    ) -> tuple[int, int]:
        """As `BodyCodec.encode_body`."""
        check_finite(src, layout)
        self.clear_gaps(body, layout)
        stored = self.split(body, layout)
        for field in layout.fields:
            weight = field_values(src, layout, field)
            if not is_matrix(field):
                stored[field.role].view(weight.dtype).view(weight.shape).copy_(weight)
                continue
            codes = stored[field.role].view(-1, GROUP * self.bits // 8)
            scales = stored[f"{field.role}_scale"].view(scale_dtype(layout))
            self._encode(weight.reshape(-1), layout, codes, scales)
        return 0, body.numel()

    def _encode(
        self, flat: torch.Tensor, layout: BlockLayout, codes: torch.Tensor, scales: torch.Tensor
    ) -> None:
        """Fill `codes` [G, 8 * bits] and `scales` [G] from all weights of a matrix."""
        kind, limit = scale_dtype(layout), scale_limit(layout, self.top)
        if COMPILED and flat.device.type == "cpu":
            if layout.dtype == "bfloat16":
                weights = as_bits(flat)
            else:
                weights = flat.to(torch.float32).numpy()
            found = torch.empty(len(scales))
            formats_encode_group.encode_groups(
                weights, self.filled, self.between, len(self.middles), self.bits, self.linear,
                self.factors, np.float32(limit), kind == torch.bfloat16,
                codes.view(-1).numpy(), found.numpy(),
            )  # fmt: skip
            scales.copy_(found)
            return
        for start in range(0, len(scales), _CHUNK):
            part = flat[start * GROUP : (start + _CHUNK) * GROUP].to(torch.float32)
            part = functional.pad(part, (0, -part.numel() % GROUP)).view(-1, GROUP)
            made, scale = self.quantise_anywhere(part, kind=kind, limit=limit)
            codes[start : start + _CHUNK].copy_(pack(made, bits=self.bits))
            scales[start : start + _CHUNK].copy_(scale)

    def quantise_anywhere(
        self, weight: torch.Tensor, *, kind: torch.dtype, limit: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Do the kernel's arithmetic in its order with torch, on any device."""
        levels = torch.from_numpy(self.levels).to(weight.device)
        middles = torch.from_numpy(self.middles).to(weight.device)
        high, low = weight.amax(dim=1), weight.amin(dim=1)
        outermost = torch.where(high >= -low, -high, -low)
        unit = _inverse(outermost).unsqueeze(1)
        best = torch.full_like(outermost, torch.inf)
        codes = torch.zeros(weight.shape, dtype=torch.uint8, device=weight.device)
        scales = torch.zeros_like(outermost)
        for factor in self.factors.tolist():
            scale = (outermost * factor).to(kind).float().clamp_(-limit, limit)
            scale = torch.where(scale.abs() < LEAST_SCALE, 0.0, scale)
            scaled = weight * _inverse(scale).unsqueeze(1)
            if self.linear:
                found = (scaled - middles[0]).ceil_().clamp_(0, len(levels) - 1).long()
            else:
                found = torch.bucketize(scaled, middles)
            miss = (levels[found] * scale.unsqueeze(1) - weight).mul_(unit)
            squares = miss.square_().view(-1, 4, 16)
            error = squares[:, 0] + squares[:, 1] + squares[:, 2] + squares[:, 3]
            for width in (8, 4, 2, 1):
                error = error[:, :width] + error[:, width : 2 * width]
            better = error[:, 0] < best
            best = torch.where(better, error[:, 0], best)
            scales = torch.where(better, scale, scales)
            codes = torch.where(better.unsqueeze(1), found.to(torch.uint8), codes)
        return codes, scales

    def decode_body(
        self, body: torch.Tensor, layout: BlockLayout, out: torch.Tensor, *, mode: int
    ) -> None:
        """As `BodyCodec.decode_body`."""
        del mode
        stored = self.split(body, layout)
        for field in layout.fields:
            target = field_values(out, layout, field)
            codes = stored[field.role]
            if not is_matrix(field):
                target.copy_(codes.view(layout_dtype(layout)))
                continue
            scales = stored[f"{field.role}_scale"]
            done = 0
            if has_kernel(layout, body):
                kernel = getattr(formats_decode, f"decode{self.bits}")
                done = kernel(codes.numpy(), as_bits(scales), self.filled, as_bits(target.view(-1)))
            if done < target.numel():
                self._decode_rest(codes, scales, layout, target.view(-1), done=done)

    def _decode_rest(
        self,
        codes: torch.Tensor,
        scales: torch.Tensor,
        layout: BlockLayout,
        target: torch.Tensor,
        *,
        done: int,
    ) -> None:
        """Decode from weight `done`, the start of a group, to the end with torch."""
        first = done // GROUP
        levels = torch.from_numpy(self.levels).to(codes.device)
        found = unpack(codes.view(-1, GROUP * self.bits // 8)[first:], bits=self.bits)
        scale = scales.view(scale_dtype(layout))[first:].float()
        values = (levels[found.long()] * scale.unsqueeze(1)).view(-1)
        target[done:].copy_(values[: target.numel() - done])


def pack(codes: torch.Tensor, *, bits: int) -> torch.Tensor:
    """Pack codes u8 [G, 64] into bytes u8 [G, 8 * bits]."""
    if bits == 4:
        return codes[:, :32] | codes[:, 32:] << 4
    pairs = (codes & 3).view(-1, 4, 16)
    low = pairs[:, 0] | pairs[:, 1] << 2 | pairs[:, 2] << 4 | pairs[:, 3] << 6
    if bits == 2:
        return low
    ones = (codes >> 2).view(-1, 8, 8)
    high = ones[:, 0].clone()
    for place in range(1, 8):
        high |= ones[:, place] << place
    return torch.cat((low, high), dim=1)


def unpack(packed: torch.Tensor, *, bits: int) -> torch.Tensor:
    """Give the codes u8 [G, 64] of bytes u8 [G, 8 * bits]."""
    if bits == 4:
        return torch.cat((packed & 15, packed >> 4), dim=1)
    low = torch.cat([packed[:, :16] >> place & 3 for place in (0, 2, 4, 6)], dim=1)
    if bits == 2:
        return low
    high = torch.cat([packed[:, 16:] >> place & 1 for place in range(8)], dim=1)
    return low | high << 2


def _inverse(scale: torch.Tensor) -> torch.Tensor:
    return torch.where(scale.abs() < LEAST_SCALE, 0.0, 1 / scale)


def group_codecs() -> tuple[GroupCodec, ...]:
    """Make the four formats."""
    return (
        GroupCodec(Format.INT4, bits=4, levels=range(-8, 8), shares=_SHARES_FINE),
        GroupCodec(Format.NF4, bits=4, levels=NF4_LEVELS, shares=_SHARES_FINE),
        GroupCodec(Format.INT3, bits=3, levels=range(-4, 4), shares=_SHARES_COARSE),
        GroupCodec(Format.INT2, bits=2, levels=(-1.5, -0.5, 0.5, 1.5), shares=_SHARES_COARSE),
    )


def _groups(shape: tuple[int, ...]) -> int:
    return -(-torch.Size(shape).numel() // GROUP)
