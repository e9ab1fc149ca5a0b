"""Header of an encoded block: what its bytes are, and proof that they are whole.

64 bytes before the body of every format but `bf16`, which is the checkpoint's own bytes. All
numbers are little endian, whatever the machine:

| offset | type | field |
|---|---|---|
| 0 | 4 bytes | magic `HSBF` |
| 4 | u16 | version of this header and of the bodies, now 1 |
| 6 | u8 | code of the format (`FORMAT_CODES`) |
| 7 | u8 | mode: a format's own variant, 0 where there is one only |
| 8 | u64 | bytes of the body |
| 16 | u64 | bytes of the full-precision payload |
| 24 | u64 | fingerprint of the layout: xxh3-64 of its type, roles and shapes |
| 32 | u64 | xxh3-64 of the body |
| 40 | u16 | weights of a group, 0 without groups |
| 42 | 14 bytes | zero |
| 56 | u64 | xxh3-64 of the 56 bytes before |

Must not know how a body is made. Invariants: a header that was cut, changed or made for another
layout is refused before the body is touched; a version is read by every later one.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

import xxhash

from hotset.errors import FormatError
from hotset.policies.types import FORMAT_CODES, Format

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from hotset.blocks.checkpoint import BlockLayout

HEADER_NBYTES = 64
VERSION = 1
_MAGIC = b"HSBF"
_FIELDS = struct.Struct("<4sHBBQQQQH14x")
_SEAL = struct.Struct("<Q")
_AGAIN = "fetch or encode the block again"
_FORMATS = {code: fmt for fmt, code in FORMAT_CODES.items()}


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockHeader:
    """What is known of an encoded block. `body_checksum` is xxh3-64 of `body_nbytes` bytes."""

    format: Format
    mode: int
    body_nbytes: int
    full_nbytes: int
    layout: int
    body_checksum: int
    group: int = 0
    version: int = VERSION

    def pack(self) -> bytes:
        """Write the 64 bytes."""
        fields = _FIELDS.pack(
            _MAGIC,
            self.version,
            FORMAT_CODES[self.format],
            self.mode,
            self.body_nbytes,
            self.full_nbytes,
            self.layout,
            self.body_checksum,
            self.group,
        )
        return fields + _SEAL.pack(xxhash.xxh3_64_intdigest(fields))

    @classmethod
    def parse(cls, raw: bytes) -> BlockHeader:
        """Read a header. Raises FormatError when it is cut, damaged or newer than this version."""
        if len(raw) < HEADER_NBYTES:
            raise FormatError(
                f"an encoded block of {len(raw)} bytes is shorter than its header", remedy=_AGAIN
            )
        fields = raw[: _FIELDS.size]
        magic, version, code, mode, body, full, layout, checksum, group = _FIELDS.unpack(fields)
        if magic != _MAGIC:
            raise FormatError("the bytes are no encoded block (no HSBF in front)", remedy=_AGAIN)
        (seal,) = _SEAL.unpack(raw[_FIELDS.size : HEADER_NBYTES])
        if seal != xxhash.xxh3_64_intdigest(fields):
            raise FormatError("the header of an encoded block is damaged", remedy=_AGAIN)
        if version > VERSION:
            raise FormatError(
                f"the block was written by version {version} of the format, this one reads up to "
                f"{VERSION}",
                remedy="upgrade hotset, or encode the block again with this version",
            )
        if code not in _FORMATS:
            raise FormatError(f"format code {code} is unknown", remedy="upgrade hotset")
        return cls(
            format=_FORMATS[code],
            mode=mode,
            body_nbytes=body,
            full_nbytes=full,
            layout=layout,
            body_checksum=checksum,
            group=group,
            version=version,
        )

    def expect(self, fmt: Format, layout: BlockLayout, *, available: int, most: int) -> None:
        """Refuse a block of another format or layout, or one of which bytes are missing.

        `available` bytes of body are there; `most` is the longest that the format allows.
        Raises FormatError.
        """
        if self.format is not fmt:
            raise FormatError(
                f"the block is in format {self.format}, not {fmt}",
                remedy=f"decode it with codec('{self.format}')",
            )
        if self.full_nbytes != layout.nbytes or self.layout != layout_fingerprint(layout):
            raise FormatError(
                "the block was encoded for another layout",
                remedy="take the layout of the checkpoint that the block came from",
            )
        if self.body_nbytes > available:
            raise FormatError(
                f"an encoded block is truncated: {available} of {self.body_nbytes} bytes",
                remedy=_AGAIN,
            )
        if self.body_nbytes > most:
            raise FormatError("an encoded block is longer than its format allows", remedy=_AGAIN)

    def expect_body(self, body: NDArray[np.uint8]) -> None:
        """Refuse a body that differs from the one that was encoded. Raises FormatError."""
        if body_checksum(body) != self.body_checksum:
            raise FormatError(
                f"the body of an encoded block ({self.format}) is damaged", remedy=_AGAIN
            )


def body_checksum(body: NDArray[np.uint8]) -> int:
    """xxh3-64 of contiguous bytes in host memory."""
    return int(xxhash.xxh3_64_intdigest(body.data))


@lru_cache(maxsize=64)
def layout_fingerprint(layout: BlockLayout) -> int:
    """Give the number that tells layouts apart."""
    fields = ";".join(
        f"{field.role}@{field.offset}:{'x'.join(map(str, field.shape))}" for field in layout.fields
    )
    text = f"{layout.dtype}|{int(layout.transposed)}|{layout.nbytes}|{fields}"
    return int(xxhash.xxh3_64_intdigest(text.encode()))
