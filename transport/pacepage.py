"""The state of a source's emulated link, shared by all its readers on this host.

A page of memory of the source holds when the link is free and counters; readers find it as
`place.py` finds a slab and map it writable. It decides nothing: `pacing.py` does the arithmetic.

**The lock** is flock on a file description that each opener has for itself, so the kernel drops
it with its holder, however that dies. A holder that is stopped (SIGSTOP) keeps it; the others wait
for LOCK_WAIT_NS once, then go on without it until it can be had again. The worst of that is that
two chunks occupy the link at the same time; it is counted.

Invariants: all times are CLOCK_MONOTONIC, which the processes of a host share; nobody waits for
the lock longer than LOCK_WAIT_NS; nothing that a reader leaves behind holds up the others for
longer than the chunks that it reserved.
"""

from __future__ import annotations

import fcntl
import logging
import mmap
import os
import threading
import time
import weakref
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Self

from hotset.errors import TransportError
from hotset.transport.place import decode_place, describe_memory, is_here, open_place

if TYPE_CHECKING:
    from types import TracebackType

PAGE_BYTES: Final = 4096
LOCK_WAIT_NS: Final = 2_000_000  # a holder needs 2 us, or a time slice when it is preempted
_SEALS: Final = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL

_log = logging.getLogger(__name__)
_told: set[str] = set()


# The 8-byte integers of a page.
FREE_AT_NS: Final = 0  # when the link has sent everything that was reserved
LONGEST_NS: Final = 1  # the longest occupation by one chunk so far
URGENT_UNTIL_NS: Final = 2  # an imminent chunk waits: others leave it the next turn until then
CHUNKS: Final = 3
NBYTES: Final = 4
CLAMPED: Final = 5  # reservations that found a time too far ahead to be true
UNLOCKED: Final = 6  # reservations made without the lock
FIELDS: Final = 7


@dataclass(frozen=True, slots=True, kw_only=True)
class PaceCounts:
    """What the readers of a source have reserved together so far."""

    chunks: int
    nbytes: int
    clamped: int
    unlocked: int


class PacePage:
    """One mapping of a page; a context manager that holds its lock. Thread-safe."""

    def __init__(self, fd: int, description: bytes) -> None:
        """Map the page behind `fd`, which this object owns from now on."""
        self.description = description
        self._fd = fd
        self._map = mmap.mmap(fd, PAGE_BYTES)
        self.fields = memoryview(self._map).cast("q")
        self._threads = threading.Lock()
        self._locked = False
        self._impatient = False  # the lock could not be had last time
        self._close_fd = weakref.finalize(self, os.close, fd)

    @classmethod
    def create(cls) -> Self:
        """Make the page of an idle link; the source keeps it as long as it lives."""
        fd = os.memfd_create("hotset-pace", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        os.ftruncate(fd, PAGE_BYTES)
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _SEALS)
        return cls(fd, describe_memory(fd))

    @classmethod
    def open(cls, description: bytes, name: str) -> Self | None:
        """Map the page of store `name`; None, told once, when it is out of reach from here.

        Then this reader paces itself as if it were alone. Raises TransportError for a damaged
        description.
        """
        if not description:
            return None
        if not is_here(description, name):
            _tell(name, "it is on another host")
            return None
        place = decode_place(description, name)
        try:
            fd = open_place(place, name, remedy="", writable=True)
        except TransportError as error:
            _tell(name, error.what)
            return None
        if place.nbytes < PAGE_BYTES:
            os.close(fd)
            raise TransportError(
                f"the pace page of {name!r} has {place.nbytes} bytes",
                remedy="ask the store for it anew",
            )
        return cls(fd, description)

    @property
    def counts(self) -> PaceCounts:
        """Read the counters."""
        fields = self.fields
        return PaceCounts(
            chunks=fields[CHUNKS],
            nbytes=fields[NBYTES],
            clamped=fields[CLAMPED],
            unlocked=fields[UNLOCKED],
        )

    def close(self) -> None:
        """Unmap; the page lives on while another process has it. Idempotent."""
        with self._threads:
            self.fields.release()
            self._map.close()
            self._close_fd()

    def __enter__(self) -> Self:
        """Take the lock, or go on without it after LOCK_WAIT_NS."""
        self._threads.acquire()
        self._locked = self._try() or (not self._impatient and self._wait())
        self._impatient = not self._locked
        if self._impatient:
            self.fields[UNLOCKED] += 1
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Give the lock back."""
        if self._locked:
            fcntl.flock(self._fd, fcntl.LOCK_UN)
        self._threads.release()

    def _try(self) -> bool:
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True

    def _wait(self) -> bool:
        end = time.monotonic_ns() + LOCK_WAIT_NS
        while time.monotonic_ns() < end:
            os.sched_yield()
            if self._try():
                return True
        return False


def _tell(name: str, reason: str) -> None:
    """Warn once for each store."""
    if name not in _told:
        _told.add(name)
        _log.warning("the link of store %s is paced by this reader alone: %s", name, reason)
