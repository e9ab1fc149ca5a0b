"""Formats: how the bytes of a block are encoded. The registry, and the door for callers.

`bf16` is full precision: the checkpoint's own bytes and type, whatever that type is. `bf16z` is the
same in fewer bytes. The others lose precision: 8 bits a weight in `formats_channel`, fewer in
`formats_group`. docs/formats.md has sizes, speeds and errors. Must not know where a payload is or
who chose its format.

Invariants: codes are stable, since headers and recorded traces carry them; `nbytes` depends on the
layout alone; a block with NaN or infinity is refused; equal payloads give equal blocks.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from hotset.blocks.formats_base import Codec, FullCodec, check_finite
from hotset.blocks.formats_channel import Fp8Codec, Int8Codec
from hotset.blocks.formats_group import group_codecs
from hotset.blocks.formats_lossless import LosslessCodec
from hotset.errors import CheckpointError
from hotset.policies.types import Format

if TYPE_CHECKING:
    from hotset.blocks.checkpoint import BlockLayout

__all__ = ["CODECS", "CODECS_BY_CODE", "Codec", "check_finite", "codec", "reduced_nbytes"]

_CODECS: tuple[Codec, ...] = (
    FullCodec(),
    Fp8Codec(),
    Int8Codec(),
    *group_codecs(),
    LosslessCodec(),
)
CODECS: dict[Format, Codec] = {each.name: each for each in _CODECS}
"""Codec of each format that can be made here."""
CODECS_BY_CODE: dict[int, Codec] = {each.code: each for each in _CODECS}
"""Codec of each code in a slot header. Codes are append-only; 0 means none."""


def codec(name: Format | str) -> Codec:
    """Find a codec. Raises CheckpointError for a format that has none."""
    found = CODECS.get(Format(name)) if name in set(Format) else None
    if found is None:
        known = ", ".join(CODECS)
        raise CheckpointError(f"format {name} cannot be made", remedy=f"choose one of {known}")
    return found


def reduced_nbytes(layout: BlockLayout) -> int:
    """Give the size of a block in the reduced format, int8."""
    return CODECS[Format.INT8].nbytes(layout)
