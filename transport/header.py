"""The 64 bytes in front of every payload: what a slot holds, and whether it may be believed.

A reader copies header and payload in one one-sided read and then decides from the bytes alone.
So a header carries its own hash, the payload's checksum, and the generation and incarnation of
the store that wrote it. Little endian:

    offset 0   magic u32, version u8, flags u8, format_code u16
    offset 8   key, 16 opaque bytes that name the content
    offset 24  nbytes u32 (payload), epoch u32
    offset 32  generation u64, checksum u64 (of the payload), incarnation u64
    offset 56  hash u64 (xxh3-64 of the first 56 bytes)

While a slot that others may follow is still filling, the same 64 bytes are a progress header: magic
"HOTW", no checksum, and in place of the generation the payload bytes that have come so far.

The checksum of a payload is its xxh3-64 up to 1 MiB. Beyond, it is the xxh3-64 of the chunks'
xxh3-64, u64 each, chunk by chunk of 1 MiB: so chunks can be hashed in any order and by several
threads, each while it is still in a cache.

This module must not know what keys or format codes mean. Invariant: bytes that were torn, zeroed
or flipped anywhere in the 64 unpack to None.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, NamedTuple

import xxhash

if TYPE_CHECKING:
    from collections.abc import Sequence

    from _typeshed import ReadableBuffer

    from hotset.transport.base import Expect

HEADER_BYTES: Final = 64
KEY_BYTES: Final = 16
MAGIC: Final = 0x53544F48  # "HOTS"
PROGRESS_MAGIC: Final = 0x57544F48  # "HOTW"
VERSION: Final = 2  # 1: one xxh3-64 over payloads of any length
CHUNK_BYTES: Final = 1 << 20
VOID: Final = bytes(HEADER_BYTES)

_BODY = struct.Struct("<IBBH16sIIQQQ")
_HASH = struct.Struct("<Q")
_HASHED_BYTES: Final = 56
digest = xxhash.xxh3_64_intdigest
"""xxh3-64 of up to one chunk."""


def checksum(view: ReadableBuffer) -> int:
    """Hash of a block's payload, everywhere in hotset."""
    data = memoryview(view).cast("B")
    if data.nbytes <= CHUNK_BYTES:
        return digest(data)
    return combine(
        [digest(data[at : at + CHUNK_BYTES]) for at in range(0, data.nbytes, CHUNK_BYTES)]
    )


def combine(digests: Sequence[int]) -> int:
    """Checksum of a payload by those of its chunks, which are CHUNK_BYTES but for the last."""
    if len(digests) == 1:
        return digests[0]
    return digest(struct.pack(f"<{len(digests)}Q", *digests))


def pack(  # noqa: PLR0913 - the fields of a header; no object, publishing is on the hot path
    *,
    key: bytes,
    format_code: int,
    nbytes: int,
    generation: int,
    checksum: int,
    incarnation: int,
    epoch: int = 0,
    flags: int = 0,
) -> bytes:
    """Return the 64 bytes. Raises ValueError for a key that is not 16 bytes."""
    if len(key) != KEY_BYTES:
        raise ValueError(f"a key has {KEY_BYTES} bytes, not {len(key)}")
    body = _BODY.pack(
        MAGIC, VERSION, flags, format_code, key, nbytes, epoch, generation, checksum, incarnation
    )
    return body + _HASH.pack(digest(body))


@dataclass(frozen=True, slots=True, kw_only=True)
class Header:
    """What a slot says of its payload. `nbytes` is the payload's length without the header."""

    key: bytes
    format_code: int
    nbytes: int
    generation: int
    checksum: int
    incarnation: int
    epoch: int = 0
    flags: int = 0

    def pack_into(self, buffer: bytearray | memoryview, offset: int = 0) -> None:
        """Write the 64 bytes at `offset`. Raises ValueError for a key that is not 16 bytes."""
        buffer[offset : offset + HEADER_BYTES] = self.pack()

    def pack(self) -> bytes:
        """Return the 64 bytes."""
        return pack(
            key=self.key,
            format_code=self.format_code,
            nbytes=self.nbytes,
            generation=self.generation,
            checksum=self.checksum,
            incarnation=self.incarnation,
            epoch=self.epoch,
            flags=self.flags,
        )

    @classmethod
    def unpack(cls, buffer: ReadableBuffer, offset: int = 0) -> Header | None:
        """Read 64 bytes at `offset`; None when they are void, damaged or of another version."""
        data = bytes(memoryview(buffer)[offset : offset + HEADER_BYTES])
        if len(data) < HEADER_BYTES:
            return None
        magic, version, flags, code, key, nbytes, epoch, generation, payload_sum, incarnation = (
            _BODY.unpack_from(data)
        )
        if magic != MAGIC or version != VERSION:
            return None
        if _HASH.unpack_from(data, _HASHED_BYTES)[0] != digest(data[:_HASHED_BYTES]):
            return None
        return cls(
            key=key,
            format_code=code,
            nbytes=nbytes,
            generation=generation,
            checksum=payload_sum,
            incarnation=incarnation,
            epoch=epoch,
            flags=flags,
        )


def matches(header: Header, expect: Expect) -> str:
    """'' when the header is what was asked for, else the first thing that differs.

    A None in `expect` accepts any value; content (key, format, size) must always agree.
    """
    pairs = (
        ("key", header.key, expect.key),
        ("format", header.format_code, expect.format_code),
        ("nbytes", header.nbytes, expect.nbytes),
        ("incarnation", header.incarnation, expect.incarnation),
        ("generation", header.generation, expect.generation),
        ("checksum", header.checksum, expect.checksum),
    )
    for name, found, wanted in pairs:
        if wanted is not None and found != wanted:
            return f"{name} is {_show(found)}, expected {_show(wanted)}"
    return ""


class Seen(NamedTuple):
    """What a landed header says: why it does not count ('' when it does), and of its payload."""

    differs: str
    checksum: int = 0
    epoch: int = 0


def inspect(buffer: ReadableBuffer, expect: Expect) -> Seen:
    """Judge the 64 bytes of a landed header; no object in the good case, which is the hot path."""
    data = bytes(buffer)
    magic, version, _, code, key, nbytes, epoch, generation, payload_sum, incarnation = (
        _BODY.unpack_from(data)
    )
    if (
        key == expect.key
        and (magic, version, code, nbytes) == (MAGIC, VERSION, expect.format_code, expect.nbytes)
        and (expect.generation is None or expect.generation == generation)
        and (expect.checksum is None or expect.checksum == payload_sum)
        and (expect.incarnation is None or expect.incarnation == incarnation)
        and _HASH.unpack_from(data, _HASHED_BYTES)[0] == digest(data[:_HASHED_BYTES])
    ):
        return Seen("", payload_sum, epoch)
    header = Header.unpack(data)
    if header is None:
        return Seen("the slot is void")
    return Seen(f"the slot holds another copy: {matches(header, expect)}")


def pack_progress(expect: Expect, *, arrived: int, incarnation: int) -> bytes:
    """Return the 64 bytes of a filling slot that has `arrived` payload bytes, in order."""
    body = _BODY.pack(
        PROGRESS_MAGIC, VERSION, 0, expect.format_code, expect.key, expect.nbytes, 0,
        arrived, 0, incarnation,
    )  # fmt: skip
    return body + _HASH.pack(digest(body))


class Progress(NamedTuple):
    """How far a source has come: `arrived` payload bytes; `seen` once it is complete.

    `torn`: the header was being written; ask again. `differs`: it is another content, or none.
    """

    arrived: int = 0
    seen: Seen | None = None
    torn: bool = False
    differs: str = ""


def inspect_progress(buffer: ReadableBuffer, expect: Expect) -> Progress:
    """Judge the header of a slot that is complete or still filling."""
    data = bytes(buffer)
    magic, version, _, code, key, nbytes, _, arrived, _, incarnation = _BODY.unpack_from(data)
    if _HASH.unpack_from(data, _HASHED_BYTES)[0] != digest(data[:_HASHED_BYTES]):
        if magic in {MAGIC, PROGRESS_MAGIC}:
            return Progress(torn=True)
        return Progress(differs="the slot is void")
    if magic == MAGIC:
        seen = inspect(data, expect)
        if seen.differs:
            return Progress(differs=seen.differs)
        return Progress(arrived=nbytes, seen=seen)
    wanted = (PROGRESS_MAGIC, VERSION, expect.key, expect.format_code, expect.nbytes)
    if (magic, version, key, code, nbytes) != wanted or (
        expect.incarnation not in {None, incarnation}
    ):
        return Progress(differs="the slot is filling with another copy")
    return Progress(arrived=arrived)


def _show(value: bytes | int) -> str:
    return value.hex() if isinstance(value, bytes) else str(value)
