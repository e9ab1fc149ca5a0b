"""One contiguous region of bytes for a store: a prefaulted memfd on the host, or a CUDA tensor.

It moves nothing between processes and knows no slots. Invariants: the address never changes, and is
a multiple of 2 MiB on the host; the region is never unmapped while the object or a view of it
lives; host memory is faulted in once, here, so that no transfer pays for page faults. The host path
never imports torch, except in `torch_view`.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import weakref
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Final

import numpy as np

from hotset.errors import ConfigError
from hotset.transport.mapping import HUGE_PAGE_BYTES, Mapping, pool_holds

if TYPE_CHECKING:
    import torch
    from _typeshed import ReadableBuffer

_MFD_HUGETLB: Final = 0x4  # this and the next are not in Python's os
_MFD_HUGE_2MB: Final = 21 << 26
_F_SEAL_FUTURE_WRITE: Final = 0x10  # not in Python's fcntl
_SEALS: Final = (
    fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL,
    _F_SEAL_FUTURE_WRITE,  # before Linux 5.1 there is none
)


class Memory(ABC):
    """Bytes at a fixed address. Offsets count from the region's first byte."""

    address: int
    nbytes: int
    device: str

    @abstractmethod
    def read(self, offset: int, nbytes: int) -> memoryview:
        """Bytes for reading: a view on the host, a copy of device memory."""

    @abstractmethod
    def write(self, offset: int, data: ReadableBuffer) -> None:
        """Copy `data` to `offset`; the bytes are there when this returns."""

    @abstractmethod
    def view(self, offset: int, nbytes: int) -> memoryview:
        """Writable view without a copy. Raises ConfigError on device memory."""

    @abstractmethod
    def torch_view(self, offset: int, nbytes: int) -> torch.Tensor:
        """torch.uint8 [nbytes] without a copy, on the region's device."""


class HostMemory(Memory):
    """An anonymous file in memory (memfd), mapped shared at a multiple of 2 MiB and prefaulted.

    It is sealed: its size never changes, so a peer on this host that maps it cannot be hit by
    SIGBUS, and no mapping made later can write to it. It is in huge pages where the kernel grants
    them (`page_kind` tells), which makes mapping it and NIXL's reads from it cheaper.
    """

    def __init__(self, nbytes: int, *, name: str) -> None:
        """Reserve the pages now. Raises ConfigError when the machine has not enough memory."""
        self.device = "cpu"
        self.nbytes = -(-nbytes // HUGE_PAGE_BYTES) * HUGE_PAGE_BYTES
        try:
            self.fd, self._mapping = _reserve(self.nbytes, f"hotset-{name}"[:200])
        except OSError as error:
            raise ConfigError(
                f"cannot reserve {self.nbytes >> 20} MiB for store {name!r} ({error.strerror})",
                remedy="lower the store's budget or free memory on this node",
            ) from error
        for seals in reversed(_SEALS):  # SEAL_SEAL last: it forbids further ones
            with contextlib.suppress(OSError):  # readers ask for the seals that they need
                fcntl.fcntl(self.fd, fcntl.F_ADD_SEALS, seals)
        weakref.finalize(self._mapping.buffer, os.close, self.fd).atexit = False
        self._view = self._mapping.view()
        self.address = self._mapping.address
        self._tensor: torch.Tensor | None = None

    @property
    def page_kind(self) -> str:
        """Pages in use: "huge", "mixed" or "normal". Asks the kernel: milliseconds."""
        huge = self._mapping.huge_bytes()
        return "huge" if huge == self.nbytes else "mixed" if huge else "normal"

    def read(self, offset: int, nbytes: int) -> memoryview:
        """View the bytes."""
        return self._view[offset : offset + nbytes]

    def write(self, offset: int, data: ReadableBuffer) -> None:
        """Copy bytes in."""
        source = data if isinstance(data, bytes) else memoryview(data).cast("B")
        self._view[offset : offset + len(source)] = source

    def view(self, offset: int, nbytes: int) -> memoryview:
        """View the bytes for writing."""
        return self._view[offset : offset + nbytes]

    def torch_view(self, offset: int, nbytes: int) -> torch.Tensor:
        """View the bytes as a tensor."""
        if self._tensor is None:
            import torch

            self._tensor = torch.frombuffer(self._mapping.buffer, dtype=torch.uint8)
        return self._tensor[offset : offset + nbytes]


def _reserve(nbytes: int, name: str) -> tuple[int, Mapping]:
    """A memfd of `nbytes` with all its pages, and their mapping: from the pool or as they come."""
    if pool_holds(nbytes):
        with contextlib.suppress(OSError):  # somebody else may have been faster
            return _make(nbytes, name, _MFD_HUGETLB | _MFD_HUGE_2MB)
    return _make(nbytes, name, 0)


def _make(nbytes: int, name: str, flags: int) -> tuple[int, Mapping]:
    fd = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING | flags)
    try:
        os.ftruncate(fd, nbytes)
        mapping = Mapping(fd, nbytes, writable=True)
        if not flags:
            mapping.fault_huge(fd)
        os.posix_fallocate(fd, 0, nbytes)  # fails here instead of by SIGBUS later
        mapping.fault()
    except OSError:
        os.close(fd)
        raise
    return fd, mapping


class DeviceMemory(Memory):
    """One torch.uint8 tensor on a device; the host sees it through synchronous copies."""

    def __init__(self, nbytes: int, *, device: str, name: str) -> None:
        """Allocate. Raises ConfigError when the device is absent or full."""
        import torch

        self.device = device
        self.nbytes = -(-nbytes // HUGE_PAGE_BYTES) * HUGE_PAGE_BYTES
        try:
            self._tensor = torch.zeros(self.nbytes, dtype=torch.uint8, device=device)
        except (RuntimeError, AssertionError) as error:  # torch without CUDA asserts
            raise ConfigError(
                f"cannot allocate {self.nbytes >> 20} MiB on {device} for store {name!r}",
                remedy="name a device that exists and lower the store's budget",
            ) from error
        self.address = int(self._tensor.data_ptr())

    def read(self, offset: int, nbytes: int) -> memoryview:
        """Copy the bytes to the host."""
        return self._tensor[offset : offset + nbytes].cpu().numpy().data

    def write(self, offset: int, data: ReadableBuffer) -> None:
        """Copy bytes from the host."""
        import torch

        host = torch.from_numpy(np.frombuffer(memoryview(data), dtype=np.uint8).copy())
        self._tensor[offset : offset + host.numel()].copy_(host)

    def view(self, offset: int, nbytes: int) -> memoryview:
        """Refuse: the host cannot address device memory."""
        raise ConfigError(
            f"bytes {offset}..{offset + nbytes} are on {self.device}",
            remedy="use read and write, or torch_view",
        )

    def torch_view(self, offset: int, nbytes: int) -> torch.Tensor:
        """View the bytes as a tensor."""
        return self._tensor[offset : offset + nbytes]
