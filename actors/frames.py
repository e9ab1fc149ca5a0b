"""Frames of a journal: how a file of records survives a crash at any byte.

A frame is `[u32 length | u32 crc32 | payload]`, little endian. Decides where the readable part of a
file ends; must not know what a payload says.

Invariants: reading stops at the first frame that is short or damaged and never raises for damage;
what it yields is a prefix of what was written.
"""

from __future__ import annotations

import struct
import zlib
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    import os
    from collections.abc import Iterator

HEADER = struct.Struct("<II")
MAX_FRAME_BYTES = 1 << 28
"""A longer length is damage, not a frame."""


class Scan(NamedTuple):
    """Readable part of a file: `frames` that are whole, in its first `good_bytes` of `nbytes`."""

    frames: int
    good_bytes: int
    nbytes: int


def encode_frame(payload: bytes) -> bytes:
    """Header and payload. Raises ValueError when the payload is longer than a reader accepts."""
    if len(payload) > MAX_FRAME_BYTES:
        raise ValueError(f"frame of {len(payload)} bytes is over the limit of {MAX_FRAME_BYTES}")
    return HEADER.pack(len(payload), zlib.crc32(payload)) + payload


def read_frames(path: str | os.PathLike[str]) -> Iterator[bytes]:
    """Payloads of the whole frames at the start of a file, oldest first."""
    with Path(path).open("rb") as file:
        while len(head := file.read(HEADER.size)) == HEADER.size:
            length, crc = HEADER.unpack(head)
            if length > MAX_FRAME_BYTES:
                return
            payload = file.read(length)
            if len(payload) < length or zlib.crc32(payload) != crc:
                return
            yield payload


def scan(path: str | os.PathLike[str]) -> Scan:
    """Where the readable part of a file ends."""
    frames = good_bytes = 0
    for payload in read_frames(path):
        frames += 1
        good_bytes += HEADER.size + len(payload)
    return Scan(frames, good_bytes, Path(path).stat().st_size)
