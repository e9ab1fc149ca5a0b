"""The interface of all formats, and what encoded formats share: header, checks, sections.

Must not know any one format. Sizes are known before encoding: `Codec.nbytes` depends on the layout
alone. Invariants: a payload with NaN or infinity is refused; every section of a body starts on a
cache line; the bytes between sections are zero, so equal payloads give equal blocks.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np
import torch

from hotset.blocks.experts import ExpertWeights, layout_dtype, view_weights
from hotset.blocks.formats_decode import all_finite
from hotset.blocks.formats_header import (
    HEADER_NBYTES,
    BlockHeader,
    body_checksum,
    layout_fingerprint,
)
from hotset.blocks.formats_jit import COMPILED
from hotset.errors import CheckpointError
from hotset.policies.types import FORMAT_CODES, Format

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from hotset.blocks.checkpoint import BlockLayout, Field

ALIGN = 64  # bytes; a cache line


class Codec(ABC):
    """Encodes full-precision payloads into one format. Stateless; any torch device.

    `direct` says whether compute reads the format's views without a scratch slot.
    """

    name: Format
    direct = False

    @property
    def code(self) -> int:
        """Number of the format in headers and rows."""
        return FORMAT_CODES[self.name]

    @abstractmethod
    def nbytes(self, layout: BlockLayout) -> int:
        """Give the bytes that an encoded payload needs: exact, or for `bf16z` the most."""

    @abstractmethod
    def stored_nbytes(self, payload: torch.Tensor, layout: BlockLayout) -> int:
        """Give the bytes that this encoded payload takes; what follows need not be moved."""

    @abstractmethod
    def encode(self, src: torch.Tensor, layout: BlockLayout, dst: torch.Tensor) -> int:
        """Encode the full-precision payload `src` (u8) into `dst` (u8, `nbytes(layout)` long).

        Gives the bytes used. Raises CheckpointError when a weight is not finite.
        """

    @abstractmethod
    def decode(
        self,
        payload: torch.Tensor,
        layout: BlockLayout,
        out: torch.Tensor,
        *,
        verified: bool = False,
    ) -> None:
        """Restore a full-precision payload into `out` (u8, `layout.nbytes` long).

        `verified`: the caller has checked the bytes (a slot's checksum), so the body is not hashed
        again. Raises FormatError for a truncated or damaged block.
        """

    @abstractmethod
    def views(
        self, payload: torch.Tensor, layout: BlockLayout, *, scratch: torch.Tensor | None = None
    ) -> ExpertWeights:
        """View an encoded payload (u8, 64-byte aligned, of a verified slot) as weights.

        Zero-copy for a `direct` format. With `scratch` (u8, `layout.nbytes` long) a format is
        decoded there and the views are of full precision: needed for one that is not direct, and
        better for many rows or for a device without a product of the format. Raises ValueError
        when a scratch is needed and absent.
        """


class FullCodec(Codec):
    """The checkpoint's own bytes, without a header."""

    name = Format.BF16
    direct = True

    def nbytes(self, layout: BlockLayout) -> int:
        """As `Codec.nbytes`."""
        return layout.nbytes

    def stored_nbytes(self, payload: torch.Tensor, layout: BlockLayout) -> int:
        """As `Codec.stored_nbytes`."""
        del payload
        return layout.nbytes

    def encode(self, src: torch.Tensor, layout: BlockLayout, dst: torch.Tensor) -> int:
        """As `Codec.encode`: check and copy."""
        check_finite(src, layout)
        dst[: layout.nbytes].copy_(src[: layout.nbytes])
        return layout.nbytes

    def decode(
        self,
        payload: torch.Tensor,
        layout: BlockLayout,
        out: torch.Tensor,
        *,
        verified: bool = False,
    ) -> None:
        """As `Codec.decode`: copy. There is no header to check; a slot's checksum guards it."""
        del verified
        if payload.numel() < layout.nbytes:
            raise ValueError(
                f"payload has {payload.numel()} bytes; give the {layout.nbytes} of the layout"
            )
        out[: layout.nbytes].copy_(payload[: layout.nbytes])

    def views(
        self, payload: torch.Tensor, layout: BlockLayout, *, scratch: torch.Tensor | None = None
    ) -> ExpertWeights:
        """As `Codec.views`; needs no scratch."""
        del scratch
        return view_weights(payload, layout)


@dataclass(frozen=True, slots=True, kw_only=True)
class Section:
    """One run of bytes of a body."""

    role: str
    nbytes: int


class BodyCodec(Codec):
    """A format with a header. Subclasses make and read bodies; here is all that guards them."""

    group = 0

    @abstractmethod
    def body_nbytes(self, layout: BlockLayout) -> int:
        """Give the most bytes that a body takes."""

    @abstractmethod
    def encode_body(
        self, src: torch.Tensor, layout: BlockLayout, body: torch.Tensor
    ) -> tuple[int, int]:
        """Fill `body`; gives (mode, bytes used)."""

    @abstractmethod
    def decode_body(
        self, body: torch.Tensor, layout: BlockLayout, out: torch.Tensor, *, mode: int
    ) -> None:
        """Restore the payload from a body that is whole."""

    def view_body(self, body: torch.Tensor, layout: BlockLayout) -> ExpertWeights:
        """View a body as weights. Raises ValueError unless the format is direct."""
        del body, layout
        raise ValueError(f"compute cannot read format {self.name}: pass scratch to decode into")

    def nbytes(self, layout: BlockLayout) -> int:
        """As `Codec.nbytes`."""
        return HEADER_NBYTES + self.body_nbytes(layout)

    def stored_nbytes(self, payload: torch.Tensor, layout: BlockLayout) -> int:
        """As `Codec.stored_nbytes`, read from the header. Raises FormatError for a damaged one."""
        return HEADER_NBYTES + self.header(payload, layout).body_nbytes

    def encode(self, src: torch.Tensor, layout: BlockLayout, dst: torch.Tensor) -> int:
        """As `Codec.encode`."""
        if dst.numel() < self.nbytes(layout):
            raise ValueError(f"dst has {dst.numel()} bytes; give nbytes(layout)")
        mode, used = self.encode_body(src, layout, dst[HEADER_NBYTES : self.nbytes(layout)])
        header = BlockHeader(
            format=self.name,
            mode=mode,
            body_nbytes=used,
            full_nbytes=layout.nbytes,
            layout=layout_fingerprint(layout),
            body_checksum=body_checksum(_host(dst[HEADER_NBYTES : HEADER_NBYTES + used]).numpy()),
            group=self.group,
        )
        raw = torch.frombuffer(bytearray(header.pack()), dtype=torch.uint8)
        dst[:HEADER_NBYTES].copy_(raw)
        return HEADER_NBYTES + used

    def header(self, payload: torch.Tensor, layout: BlockLayout) -> BlockHeader:
        """Read and check the header. Raises FormatError."""
        found = BlockHeader.parse(_host(payload[:HEADER_NBYTES]).numpy().tobytes())
        found.expect(
            self.name,
            layout,
            available=payload.numel() - HEADER_NBYTES,
            most=self.body_nbytes(layout),
        )
        return found

    def decode(
        self,
        payload: torch.Tensor,
        layout: BlockLayout,
        out: torch.Tensor,
        *,
        verified: bool = False,
    ) -> None:
        """As `Codec.decode`."""
        header = self.header(payload, layout)
        body = payload[HEADER_NBYTES : HEADER_NBYTES + header.body_nbytes]
        if not verified:
            header.expect_body(_host(body).numpy())
        self.decode_body(body, layout, out[: layout.nbytes], mode=header.mode)

    def views(
        self, payload: torch.Tensor, layout: BlockLayout, *, scratch: torch.Tensor | None = None
    ) -> ExpertWeights:
        """As `Codec.views`."""
        if scratch is not None:
            self.decode(payload, layout, scratch, verified=True)
            return view_weights(scratch, layout)
        if payload.device.type == "cpu":
            self.header(payload, layout)
        return self.view_body(payload[HEADER_NBYTES:], layout)


class SectionCodec(BodyCodec):
    """A body that is a row of sections of fixed sizes: values by field, then scales by matrix."""

    @abstractmethod
    def sections(self, layout: BlockLayout) -> Sequence[Section]:
        """Name the sections in order."""

    def body_nbytes(self, layout: BlockLayout) -> int:
        """As `BodyCodec.body_nbytes`: exact."""
        return _places(self, layout)[-1].end

    def split(self, body: torch.Tensor, layout: BlockLayout) -> dict[str, torch.Tensor]:
        """Cut a body into its sections, without a copy."""
        return {
            part.role: body[part.start : part.start + part.nbytes] for part in _places(self, layout)
        }

    def clear_gaps(self, body: torch.Tensor, layout: BlockLayout) -> None:
        """Zero the bytes between sections."""
        for part in _places(self, layout):
            body[part.start + part.nbytes : part.end] = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class _Place:
    """Where a section is; `end` is where the next one starts."""

    role: str
    start: int
    nbytes: int
    end: int


@lru_cache(maxsize=256)
def _places(codec: SectionCodec, layout: BlockLayout) -> tuple[_Place, ...]:
    found, start = [], 0
    for section in codec.sections(layout):
        end = start + aligned(section.nbytes)
        found.append(_Place(role=section.role, start=start, nbytes=section.nbytes, end=end))
        start = end
    return tuple(found)


def check_finite(payload: torch.Tensor, layout: BlockLayout) -> None:
    """Refuse a full-precision payload with NaN or infinity. Raises CheckpointError."""
    values = payload[: layout.nbytes].view(layout_dtype(layout))
    if has_kernel(layout, payload):
        if not all_finite(as_bits(values)):
            raise not_finite()
        return
    total = values.sum(dtype=torch.float32)  # one pass without a copy; NaN and infinity stay
    if not bool(torch.isfinite(total)) and not bool(torch.isfinite(values).all()):
        raise not_finite()


def not_finite() -> CheckpointError:
    """Make the error for weights that no format takes."""
    return CheckpointError(
        "an expert's weights hold NaN or infinity",
        remedy="the checkpoint is damaged or diverged in training; use another one",
    )


def scale_dtype(layout: BlockLayout) -> torch.dtype:
    """bfloat16 in a bfloat16 model, as torch's int8 product takes it; float16 would underflow."""
    return torch.bfloat16 if layout.dtype == "bfloat16" else torch.float32


def scale_limit(layout: BlockLayout, top: float) -> float:
    """Give the largest scale for which `top` scales still fit the model's type."""
    return _scale_limit(layout_dtype(layout), scale_dtype(layout), top)


@lru_cache(maxsize=64)
def _scale_limit(dtype: torch.dtype, kind: torch.dtype, top: float) -> float:
    most = torch.finfo(dtype).max
    limit = torch.tensor(most / top, dtype=torch.float64).to(kind)
    while float(limit) * top > most:
        limit = torch.nextafter(limit, torch.zeros((), dtype=kind))
    return float(limit)


def has_kernel(layout: BlockLayout, payload: torch.Tensor) -> bool:
    """Tell whether the compiled kernels serve: bfloat16 in host memory."""
    return COMPILED and layout.dtype == "bfloat16" and payload.device.type == "cpu"


def as_bits(values: torch.Tensor) -> NDArray[np.uint16]:
    """View 16-bit values or bytes in host memory as u16."""
    return values.view(torch.int16).numpy().view(np.uint16)


def is_matrix(field: Field) -> bool:
    """Biases are kept as they are; matrices are encoded."""
    return len(field.shape) == 2


def field_values(payload: torch.Tensor, layout: BlockLayout, field: Field) -> torch.Tensor:
    """View one tensor of a full-precision payload."""
    raw = payload[field.offset : field.offset + field.nbytes]
    return raw.view(layout_dtype(layout)).view(field.shape)


def aligned(nbytes: int) -> int:
    """Round up to whole cache lines."""
    return math.ceil(nbytes / ALIGN) * ALIGN


def _host(part: torch.Tensor) -> torch.Tensor:
    return part if part.device.type == "cpu" else part.cpu()
