"""Formats: how the bytes of a block are encoded, and how compute reads them.

`bf16` is full precision: the checkpoint's own bytes and type, whatever that type is. `int8` is
symmetric, one scale per output channel; biases stay as they are. Compute reads both as zero-copy
views of the payload. Must not know where a payload is or who chose its format.

Invariants: codes are stable, since slot headers and recorded traces carry them; the size of an
encoded block depends on the layout alone; a block with NaN or infinity is refused.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING

import torch

from hotset.blocks.experts import ExpertWeights, layout_dtype, view_weights
from hotset.errors import CheckpointError
from hotset.policies.types import FORMAT_CODES, Format

if TYPE_CHECKING:
    from hotset.blocks.checkpoint import BlockLayout, Field

_ALIGN = 64  # bytes; every tensor of an encoded payload starts on a cache line
_LEVELS = 127
_CHUNK = 128  # output channels quantised at a time, so that the float32 copy stays in cache
_SCALE_SLACK = 1 + 2**-8  # a bf16 scale rounds by at most 2**-8, so no weight exceeds 127 levels
_SMALLEST = 1e-30  # amplitude of an all-zero channel


class Codec(ABC):
    """Encodes full-precision payloads into one format. Stateless; any torch device."""

    name: Format
    code: int

    @abstractmethod
    def nbytes(self, layout: BlockLayout) -> int:
        """Give the size of an encoded payload."""

    @abstractmethod
    def encode(self, src: torch.Tensor, layout: BlockLayout, dst: torch.Tensor) -> None:
        """Encode the full-precision payload `src` (u8) into `dst` (u8, `nbytes(layout)` long).

        Raises CheckpointError when a weight is not finite.
        """

    @abstractmethod
    def decode(self, payload: torch.Tensor, layout: BlockLayout, out: torch.Tensor) -> None:
        """Restore a full-precision payload into `out` (u8, `layout.nbytes` long)."""

    @abstractmethod
    def views(
        self, payload: torch.Tensor, layout: BlockLayout, *, scratch: torch.Tensor | None = None
    ) -> ExpertWeights:
        """View an encoded payload (u8, 64-byte aligned) as weights, without a copy.

        With `scratch` (u8, `layout.nbytes` long) a reduced format is decoded there and the views
        are of full precision: better for many rows, or for a device without an int8 product.
        """


class FullCodec(Codec):
    """The checkpoint's own bytes."""

    name = Format.BF16
    code = FORMAT_CODES[Format.BF16]

    def nbytes(self, layout: BlockLayout) -> int:
        """As `Codec.nbytes`."""
        return layout.nbytes

    def encode(self, src: torch.Tensor, layout: BlockLayout, dst: torch.Tensor) -> None:
        """As `Codec.encode`: check and copy."""
        check_finite(src, layout)
        dst[: layout.nbytes].copy_(src[: layout.nbytes])

    def decode(self, payload: torch.Tensor, layout: BlockLayout, out: torch.Tensor) -> None:
        """As `Codec.decode`: copy."""
        out[: layout.nbytes].copy_(payload[: layout.nbytes])

    def views(
        self, payload: torch.Tensor, layout: BlockLayout, *, scratch: torch.Tensor | None = None
    ) -> ExpertWeights:
        """As `Codec.views`; needs no scratch."""
        del scratch
        return view_weights(payload, layout)


class Int8Codec(Codec):
    """Symmetric int8 with a scale per output channel.

    Payload: for each field, in the layout's order, its int8 values (a bias: its own bytes), then
    for each matrix its scales; all aligned. Scales are bfloat16 in a bfloat16 model, so that torch
    takes them for its int8 product, else float32 (float16 would underflow).
    Error: at most half a scale plus one rounding of the model's type.
    """

    name = Format.INT8
    code = FORMAT_CODES[Format.INT8]

    def nbytes(self, layout: BlockLayout) -> int:
        """As `Codec.nbytes`."""
        return sum(_aligned(n) for n in self._sizes(layout))

    def encode(self, src: torch.Tensor, layout: BlockLayout, dst: torch.Tensor) -> None:
        """As `Codec.encode`."""
        stored = self._split(dst, layout)
        for field in layout.fields:
            weight = _field(src, layout, field)
            if not _is_matrix(field):
                stored[field.role].view(weight.dtype).view(weight.shape).copy_(weight)
                continue
            values = stored[field.role].view(torch.int8).view(field.shape)
            scales = stored[f"{field.role}_scale"].view(_scale_dtype(layout))
            dim = _scaled_dim(layout)
            for start in range(0, field.shape[dim], _CHUNK):
                size = min(_CHUNK, field.shape[dim] - start)
                part, scale = _quantise(
                    weight.narrow(dim, start, size).to(torch.float32, copy=True), layout
                )
                values.narrow(dim, start, size).copy_(part)
                scales.narrow(0, start, size).copy_(scale.flatten())

    def decode(self, payload: torch.Tensor, layout: BlockLayout, out: torch.Tensor) -> None:
        """As `Codec.decode`."""
        weights = self.views(payload, layout)
        for field in layout.fields:
            target = _field(out, layout, field)
            target.copy_(getattr(weights, field.role))
            scale = getattr(weights, f"{field.role}_scale", None)
            if scale is not None:
                target.mul_(scale.unsqueeze(_channel_dim(layout)))

    def views(
        self, payload: torch.Tensor, layout: BlockLayout, *, scratch: torch.Tensor | None = None
    ) -> ExpertWeights:
        """As `Codec.views`: int8 matrices with scales, or decoded ones."""
        if scratch is not None:
            self.decode(payload, layout, scratch)
            return view_weights(scratch, layout)
        stored = self._split(payload, layout)
        tensors: dict[str, torch.Tensor] = {}
        for field in layout.fields:
            kind = torch.int8 if _is_matrix(field) else layout_dtype(layout)
            tensors[field.role] = stored[field.role].view(kind).view(field.shape)
            if _is_matrix(field):
                role = f"{field.role}_scale"
                tensors[role] = stored[role].view(_scale_dtype(layout))
        return ExpertWeights(**tensors)

    def _sizes(self, layout: BlockLayout) -> list[int]:
        width = layout_dtype(layout).itemsize
        values = [f.nbytes // width if _is_matrix(f) else f.nbytes for f in layout.fields]
        item = _scale_dtype(layout).itemsize
        scales = [f.shape[_scaled_dim(layout)] * item for f in layout.fields if _is_matrix(f)]
        return values + scales

    def _split(self, payload: torch.Tensor, layout: BlockLayout) -> dict[str, torch.Tensor]:
        roles = [f.role for f in layout.fields]
        roles += [f"{f.role}_scale" for f in layout.fields if _is_matrix(f)]
        parts: dict[str, torch.Tensor] = {}
        place = 0
        for role, size in zip(roles, self._sizes(layout), strict=True):
            parts[role] = payload[place : place + size]
            place += _aligned(size)
        return parts


def reduced_nbytes(layout: BlockLayout) -> int:
    """Give the size of a block in the reduced format, int8."""
    return CODECS[Format.INT8].nbytes(layout)


def check_finite(payload: torch.Tensor, layout: BlockLayout) -> None:
    """Refuse a full-precision payload with NaN or infinity. Raises CheckpointError."""
    values = payload[: layout.nbytes].view(layout_dtype(layout))
    total = values.sum(dtype=torch.float32)  # one pass without a copy; NaN and infinity stay
    if not bool(torch.isfinite(total)) and not bool(torch.isfinite(values).all()):
        raise _not_finite()


def _not_finite() -> CheckpointError:
    return CheckpointError(
        "an expert's weights hold NaN or infinity",
        remedy="the checkpoint is damaged or diverged in training; use another one",
    )


def _quantise(weight: torch.Tensor, layout: BlockLayout) -> tuple[torch.Tensor, torch.Tensor]:
    """Give values (integral, within +-127) and scales of a float32 matrix, which is used up."""
    amplitude = weight.abs().amax(dim=_channel_dim(layout), keepdim=True)
    if not bool(torch.isfinite(amplitude).all()):
        raise _not_finite()
    scale = (amplitude.clamp_min(_SMALLEST) / _LEVELS * _SCALE_SLACK).to(_scale_dtype(layout))
    return weight.div_(scale.float()).round_(), scale


def _channel_dim(layout: BlockLayout) -> int:
    """Give the dimension along which one output channel extends (its inputs)."""
    return 0 if layout.transposed else 1


def _scaled_dim(layout: BlockLayout) -> int:
    """Give the dimension that counts output channels."""
    return 1 if layout.transposed else 0


def _scale_dtype(layout: BlockLayout) -> torch.dtype:
    return torch.bfloat16 if layout.dtype == "bfloat16" else torch.float32


def _is_matrix(field: Field) -> bool:
    return len(field.shape) == 2


def _field(payload: torch.Tensor, layout: BlockLayout, field: Field) -> torch.Tensor:
    raw = payload[field.offset : field.offset + field.nbytes]
    return raw.view(layout_dtype(layout)).view(field.shape)


def _aligned(nbytes: int) -> int:
    return math.ceil(nbytes / _ALIGN) * _ALIGN


_CODECS: tuple[Codec, ...] = (FullCodec(), Int8Codec())
CODECS: dict[Format, Codec] = {each.name: each for each in _CODECS}
"""Codec of each format that can be made here."""
CODECS_BY_CODE: dict[int, Codec] = {each.code: each for each in _CODECS}
"""Codec of each code in a slot header. Codes are append-only; 0 means none."""


def codec(name: Format | str) -> Codec:
    """Find a codec. Raises CheckpointError for a format that has none yet."""
    found = CODECS.get(Format(name))
    if found is None:
        known = ", ".join(CODECS)
        raise CheckpointError(f"format {name} cannot be made yet", remedy=f"choose one of {known}")
    return found
