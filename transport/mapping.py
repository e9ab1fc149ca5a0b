"""Maps a file of memory at an address that is a multiple of 2 MiB, in huge pages where there are.

Python's own mmap cannot choose the address, and the processor maps 2 MiB at once only where address
and offset are multiples of that. It must not know what the memory is for.

**Huge pages** of a memfd come from the kernel's pool (MFD_HUGETLB, decided by who makes the memfd),
or from `fault_huge`: on first touch where the kernel's `shmem_enabled` lets programs ask, else by
MADV_COLLAPSE, which the kernel offers apart from that setting. All of this is best effort: what
cannot be huge is normal. HOTSET_HUGEPAGES=0 in the environment asks for none.

Invariants: the address never changes; the memory stays mapped while any view of `buffer` lives,
also past the death of the `Mapping` itself, unless `close` is called, which only the owner of all
views may do; nothing is unmapped at the exit of the interpreter, when other threads still read.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import weakref
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Iterator

HUGE_PAGE_BYTES: Final = 2 << 20
_MAP_FIXED: Final = 0x10  # this and the next are not in Python's mmap
_MAP_NORESERVE: Final = 0x4000
_MAP_FAILED: Final = 2**64 - 1
_MADV_POPULATE_WRITE: Final = 23  # Linux 5.14
_MADV_COLLAPSE: Final = 25  # Linux 6.1
_SHMEM_ENABLED: Final = Path("/sys/kernel/mm/transparent_hugepage/shmem_enabled")
_POOL: Final = Path("/sys/kernel/mm/hugepages/hugepages-2048kB")
_ON_FAULT: Final = ("always", "within_size", "advise", "force")


def _libc() -> ctypes.CDLL:
    libc = ctypes.CDLL(None, use_errno=True)
    size, address = ctypes.c_size_t, ctypes.c_void_p
    libc.mmap.restype = address
    libc.mmap.argtypes = [address, size, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_int64]
    libc.munmap.argtypes = [address, size]
    libc.madvise.argtypes = [address, size, ctypes.c_int]
    return libc


_LIBC: Final = _libc()


class Mapping:
    """`nbytes` (a multiple of 2 MiB) of the file behind `fd`, mapped shared and aligned."""

    def __init__(self, fd: int, nbytes: int, *, writable: bool) -> None:
        """Map it; touches no page. `fd` is not needed afterwards. Raises OSError."""
        self.nbytes = nbytes
        prot = mmap.PROT_READ | (mmap.PROT_WRITE if writable else 0)
        self.address = _map_aligned(fd, nbytes, prot)
        self.buffer: Any = (ctypes.c_ubyte * nbytes).from_address(self.address)
        self._unmap = weakref.finalize(self.buffer, _LIBC.munmap, self.address, nbytes)
        self._unmap.atexit = False  # threads of NIXL may still read

    def view(self) -> memoryview:
        """All bytes; keeps them mapped. Writable whatever the mapping is: do not."""
        return memoryview(self.buffer).cast("B")

    def close(self) -> None:
        """Unmap now, when no view is left. Idempotent."""
        self._unmap()

    def fault_huge(self, fd: int) -> None:
        """Back empty memory with huge pages as far as the kernel grants them; `fd` is its file."""
        if os.environ.get("HOTSET_HUGEPAGES", "") == "0":
            return
        if _shmem_enabled() in _ON_FAULT:
            self._advise(mmap.MADV_HUGEPAGE)
            self._advise(_MADV_POPULATE_WRITE)
            return
        for offset in range(0, self.nbytes, HUGE_PAGE_BYTES):  # a seed: nothing is copied
            os.posix_fallocate(fd, offset, mmap.PAGESIZE)
        self._advise(_MADV_COLLAPSE)

    def fault(self) -> None:
        """Enter all pages into the page table, for writing; the file must have them already."""
        if not self._advise(_MADV_POPULATE_WRITE):
            np.frombuffer(self.buffer, dtype=np.uint8)[:: mmap.PAGESIZE] = 0  # new memory is zero

    def huge_bytes(self) -> int:
        """How much of the memory is mapped in huge pages, by the kernel's own account."""
        for line in _smaps_of(self.address):
            name, _, value = line.partition(":")
            if name in {"ShmemPmdMapped", "Shared_Hugetlb", "Private_Hugetlb"}:
                kib = int(value.split()[0])
                if kib:
                    return kib << 10
        return 0

    def _advise(self, advice: int) -> bool:
        return bool(_LIBC.madvise(self.address, self.nbytes, advice) == 0)


def pool_holds(nbytes: int) -> bool:
    """Whether the kernel's pool of 2 MiB pages has that many bytes that nobody has reserved."""
    try:
        free, reserved = (
            int((_POOL / name).read_text(encoding="ascii"))
            for name in ("free_hugepages", "resv_hugepages")
        )
    except OSError:
        return False
    return (free - reserved) * HUGE_PAGE_BYTES >= nbytes


def _shmem_enabled() -> str:
    try:
        text = _SHMEM_ENABLED.read_text(encoding="ascii")
    except OSError:
        return ""
    return text.partition("[")[2].partition("]")[0]


def _map_aligned(fd: int, nbytes: int, prot: int) -> int:
    """Reserve 2 MiB more than needed, map over the aligned part, give the rest back."""
    anonymous = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE
    room = nbytes + HUGE_PAGE_BYTES
    start = _mmap(0, room, 0, anonymous, -1)
    address = -(-start // HUGE_PAGE_BYTES) * HUGE_PAGE_BYTES
    try:
        _mmap(address, nbytes, prot, mmap.MAP_SHARED | _MAP_FIXED, fd)
    except OSError:
        _LIBC.munmap(start, room)
        raise
    if address > start:
        _LIBC.munmap(start, address - start)
    if tail := start + room - address - nbytes:
        _LIBC.munmap(address + nbytes, tail)
    return address


def _mmap(address: int, nbytes: int, prot: int, flags: int, fd: int) -> int:
    found: int | None = _LIBC.mmap(address, nbytes, prot, flags, fd, 0)
    if found is None or found == _MAP_FAILED:
        error = ctypes.get_errno()
        raise OSError(error, os.strerror(error))
    return found


def _smaps_of(address: int) -> Iterator[str]:
    """Lines of /proc/self/smaps about the mapping that begins at `address`."""
    inside = False
    with Path("/proc/self/smaps").open(encoding="ascii", errors="replace") as smaps:
        for line in smaps:
            first = line.split(maxsplit=1)[0]
            if not first.endswith(":"):
                if inside:
                    return
                inside = int(first.partition("-")[0], 16) == address
            elif inside:
                yield line
