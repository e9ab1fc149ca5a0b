"""The journal's file: frames that survive a crash at any byte.

Writes `[u32 length | u32 crc32 | payload]`, little endian. Must not know what a payload says; the
controller encodes events, the reader is `hotset.dashboards.journal`.

Invariants: a frame is written by one `write` call, so a crash can tear only the last one; opening a
file with a torn tail cuts the tail off before anything is appended, so the frames after a restart
stay readable; a frame that `flush` has returned for is with the kernel, and on disk when `fsync` is
on.
"""

from __future__ import annotations

import struct
import zlib
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    import os
    from types import TracebackType

HEADER = struct.Struct("<II")
MAX_FRAME_BYTES = 1 << 28
"""A longer length is damage, not a frame."""


class JournalWriter:
    """Appends frames. One writer a file; not safe for several threads.

    `flush_every` frames, or a call of `flush`, hand what was appended to the kernel; the default of
    1 loses nothing when the process dies. `fsync` also waits for the disk at each flush.
    """

    def __init__(
        self, path: str | os.PathLike[str], *, flush_every: int = 1, fsync: bool = False
    ) -> None:
        """Open for appending, after the last whole frame. Creates the file and its folder."""
        raise NotImplementedError

    def append(self, payload: bytes) -> int:
        """Add a frame; returns the file's length after it. Raises ValueError when too long."""
        raise NotImplementedError

    def flush(self) -> None:
        """Hand everything to the kernel, and to the disk when `fsync` is on."""
        raise NotImplementedError

    def close(self) -> None:
        """Flush and close. Idempotent."""
        raise NotImplementedError

    def __enter__(self) -> Self:
        """Use as a context."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        """Close."""
        self.close()


def encode_frame(payload: bytes) -> bytes:
    """Header and payload."""
    return HEADER.pack(len(payload), zlib.crc32(payload)) + payload
