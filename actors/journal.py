"""The writer of a journal: appends frames so that a crash loses at most what was not flushed.

Moves opaque payloads into a file of `hotset.actors.frames`. Must not know what they say; the
controller encodes events, `hotset.dashboards.journal` reads.

Invariants: frames reach the kernel whole and in order, so a crash can tear only the last flush;
opening a file with a torn tail moves the tail to `<file>.torn` before anything is appended, so that
frames after a restart stay readable and no byte is destroyed; after `flush` the frames are with
the kernel, and on disk when `fsync` is on.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Self

from hotset.actors.frames import encode_frame, scan

if TYPE_CHECKING:
    from types import TracebackType


class JournalWriter:
    """Appends frames. One writer a file; not safe for several threads.

    `flush_every` frames, or a call of `flush`, hand what was appended to the kernel; the default of
    1 loses nothing when the process dies. `fsync` also waits for the disk at each flush.
    """

    def __init__(
        self, path: str | os.PathLike[str], *, flush_every: int = 1, fsync: bool = False
    ) -> None:
        """Open for appending, after the last whole frame. Creates the file and its folder."""
        if flush_every < 1:
            raise ValueError(f"flush_every is {flush_every}, and counts frames from 1")
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        self.torn_bytes = _cut_torn_tail(target)
        self._file = target.open("ab", buffering=0)
        self._nbytes = target.stat().st_size
        self._flush_every = flush_every
        self._fsync = fsync
        self._waiting: list[bytes] = []

    def append(self, payload: bytes) -> int:
        """Add a frame; returns the file's length once it is flushed. ValueError when too long."""
        frame = encode_frame(payload)
        self._waiting.append(frame)
        self._nbytes += len(frame)
        if len(self._waiting) >= self._flush_every:
            self.flush()
        return self._nbytes

    def flush(self) -> None:
        """Hand everything to the kernel, and to the disk when `fsync` is on."""
        view = memoryview(b"".join(self._waiting))
        self._waiting.clear()
        while view:
            view = view[self._file.write(view) :]
        if self._fsync:
            os.fsync(self._file.fileno())

    def close(self) -> None:
        """Flush and close. Idempotent."""
        if not self._file.closed:
            self.flush()
            self._file.close()

    def __enter__(self) -> Self:
        """Use as a context that closes."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        """Close."""
        self.close()


def _cut_torn_tail(path: Path) -> int:
    """Move what no reader would reach to `<file>.torn`; returns its length."""
    if not path.exists():
        return 0
    found = scan(path)
    torn = found.nbytes - found.good_bytes
    if torn:
        with path.open("r+b") as file:
            file.seek(found.good_bytes)
            with Path(f"{path}.torn").open("ab") as aside:
                aside.write(file.read())
            file.truncate(found.good_bytes)
    return torn
