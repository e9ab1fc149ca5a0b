"""Reads peers of this host with one copy: maps their slab read-only and copies out of it.

NIXL reaches a process of the same host through the kernel (cross-memory attach), which pins and
maps pages for each read; a mapping made once is about twice as fast and needs nothing of the peer,
not even a progress thread. It must not know NIXL or what to do about peers that it cannot map: that
is `node.py`'s decision.

A peer is found as /proc/<pid>/fd/<fd>. Numbers are reused, so the description names the boot, the
namespaces of processes and network (an emulated network must not be bypassed), the time at which
the process started and the inode of the memory, and all of them must agree. The memory must be
sealed against shrinking, so that no read is ever hit by SIGBUS.

Invariants: a post copies inside the call and holds no GIL meanwhile, so nothing is in flight when
another call comes and unmapping is always safe; nothing of a peer is mapped writable. A mapping
outlives its process: the copies of a dead peer stay readable (blocks are immutable, headers and
checksums are verified) until the engine disconnects it, which also gives its memory back.
"""

from __future__ import annotations

import ctypes
import fcntl
import mmap
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

import msgspec
import numpy as np

from hotset.errors import PeerGoneError, TransportError
from hotset.transport.base import Backend, PeerInfo, PostState, Span, other_backend, refuse_older
from hotset.transport.memory import HostMemory

if TYPE_CHECKING:
    from collections.abc import Sequence

    from hotset.transport.slab import Slab

_REMEDY: Final = "read this peer over NIXL"
_NAMESPACES: Final = ("pid", "net")


class _Place(msgspec.Struct, frozen=True, array_like=True):
    """Where a store's memory is, precisely enough that nothing else can be taken for it."""

    boot_id: str
    namespaces: tuple[str, ...]
    pid: int
    started_ticks: int
    fd: int
    device: int
    inode: int
    nbytes: int


def boot_id() -> str:
    """Name of this boot of this machine; the same in all its containers."""
    return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()


def _namespaces() -> tuple[str, ...]:
    return tuple(str(Path(f"/proc/self/ns/{kind}").readlink()) for kind in _NAMESPACES)


def _started_ticks(pid: int) -> int:
    """When a process started, in clock ticks since boot. Raises OSError when there is none."""
    text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    return int(text[text.rindex(")") + 2 :].split()[19])  # field 22; the name may hold blanks


def describe(slab: Slab) -> bytes:
    """Say where a slab is, for `Mapping`; b'' for device memory, which cannot be mapped."""
    memory = slab.memory
    if not isinstance(memory, HostMemory):
        return b""
    stat = os.fstat(memory.fd)
    pid = os.getpid()
    place = _Place(
        boot_id=boot_id(),
        namespaces=_namespaces(),
        pid=pid,
        started_ticks=_started_ticks(pid),
        fd=memory.fd,
        device=stat.st_dev,
        inode=stat.st_ino,
        nbytes=memory.nbytes,
    )
    return msgspec.msgpack.encode(place)


def _decode(description: bytes, name: str) -> _Place:
    try:
        return msgspec.msgpack.decode(description, type=_Place)
    except msgspec.DecodeError as error:
        raise TransportError(
            f"the shared-memory metadata of {name!r} is damaged ({error})",
            remedy="ask the store for it anew",
        ) from error


def is_here(description: bytes, name: str) -> bool:
    """Whether the description is of a store on this host. Raises TransportError when damaged."""
    return bool(description) and _decode(description, name).boot_id == boot_id()


def _open(place: _Place, name: str) -> int:
    """Open a peer's memory and make sure that it is the described one."""
    here = (boot_id(), _namespaces())
    if here != (place.boot_id, place.namespaces):
        raise TransportError(
            f"store {name!r} is on another host or in another pid or network namespace",
            remedy=_REMEDY,
        )
    try:
        handle = os.open(f"/proc/{place.pid}/fd/{place.fd}", os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError as error:
        raise _gone(name) from error
    except OSError as error:
        raise TransportError(
            f"the memory of store {name!r} cannot be opened ({error.strerror})", remedy=_REMEDY
        ) from error
    try:
        _check(handle, place, name)
    except BaseException:
        os.close(handle)
        raise
    return handle


def _check(handle: int, place: _Place, name: str) -> None:
    """After opening, so that a process that takes over the pid meanwhile is found out."""
    stat = os.fstat(handle)
    try:
        started = _started_ticks(place.pid)
    except OSError:
        started = -1
    found = (started, stat.st_dev, stat.st_ino, stat.st_size)
    if found != (place.started_ticks, place.device, place.inode, place.nbytes):
        raise _gone(name)
    if not fcntl.fcntl(handle, fcntl.F_GET_SEALS) & fcntl.F_SEAL_SHRINK:
        raise TransportError(
            f"the memory of store {name!r} is not sealed against shrinking", remedy=_REMEDY
        )


def _gone(name: str) -> PeerGoneError:
    return PeerGoneError(
        f"the process of store {name!r} has ended", remedy="read another copy; it will rejoin"
    )


@dataclass(slots=True)
class _Peer:
    """A mapped peer."""

    info: PeerInfo
    memory: mmap.mmap
    address: int


class ShmBackend(Backend):
    """Copies out of mapped slabs of this host's peers. Called by one thread only."""

    name = "shm"

    def __init__(self) -> None:
        """Know nobody yet."""
        self._slab: Slab | None = None
        self._peers: dict[str, _Peer] = {}
        self._posts: set[int] = set()
        self._next = 1

    def register(self, slab: Slab) -> None:
        """Keep the slab, which must be host memory. Raises TransportError."""
        if self._slab is not None:
            raise TransportError("a slab is registered already", remedy="one backend per store")
        if slab.device != "cpu":
            raise TransportError(
                f"store {slab.name!r} is on {slab.device}, which cannot be mapped",
                remedy="use the NIXL backend for device memory",
            )
        self._slab = slab

    def info(self, *, name: str, incarnation: int) -> PeerInfo:
        """Describe this side to peers. Raises TransportError before `register`."""
        slab = self._slab
        if slab is None or (name, incarnation) != (slab.name, slab.incarnation):
            raise TransportError(
                f"no slab of {name}:{incarnation} is registered",
                remedy="give the slab and the engine the same name and incarnation",
            )
        return PeerInfo(
            name=name,
            incarnation=incarnation,
            backend=self.name,
            backend_metadata=describe(slab),
            base_address=slab.base_address,
            nbytes=slab.nbytes,
            device=slab.device,
        )

    def connect(self, peer: PeerInfo) -> None:
        """Map a peer; replaces an older incarnation, refuses to go back to one.

        Raises PeerGoneError when its process has ended, TransportError when it cannot be mapped.
        """
        known = self._peers.get(peer.name)
        if known is not None and known.info == peer:
            return
        if peer.backend != self.name:
            raise other_backend(peer, self.name)
        refuse_older(peer, known.info if known else None)
        place = _decode(peer.backend_metadata, peer.name)
        if place.nbytes != peer.nbytes:
            raise TransportError(
                f"the metadata of {peer.name!r} tells of {place.nbytes} bytes, not {peer.nbytes}",
                remedy="ask the store for it anew",
            )
        handle = _open(place, peer.name)
        try:
            memory = mmap.mmap(handle, place.nbytes, flags=mmap.MAP_SHARED, prot=mmap.PROT_READ)
        except OSError as error:
            raise TransportError(
                f"the memory of store {peer.name!r} cannot be mapped ({error.strerror})",
                remedy=_REMEDY,
            ) from error
        finally:
            os.close(handle)
        self.disconnect(peer.name)
        address = int(np.frombuffer(memory, dtype=np.uint8).ctypes.data)
        self._peers[peer.name] = _Peer(peer, memory, address)

    def disconnect(self, name: str) -> None:
        """Unmap a peer; nothing is ever in flight between two calls."""
        peer = self._peers.pop(name, None)
        if peer is not None:
            peer.memory.close()

    def post(self, peer: str, spans: Sequence[Span]) -> int:
        """Copy all spans before returning, with the GIL released."""
        entry, slab = self._peers.get(peer), self._slab
        if entry is None or slab is None:
            raise PeerGoneError(f"store {peer!r} is not connected", remedy="connect it first")
        if any(
            span.local_offset + span.nbytes > slab.nbytes
            or span.remote_offset + span.nbytes > entry.info.nbytes
            or min(span.local_offset, span.remote_offset, span.nbytes) < 0
            for span in spans
        ):
            raise TransportError(
                f"a read from {peer!r} leaves its slab of {entry.info.nbytes} bytes "
                f"or ours of {slab.nbytes}",
                remedy="refresh the directory of copies",
            )
        local, remote, copy = slab.base_address, entry.address, ctypes.memmove
        for span in spans:
            copy(local + span.local_offset, remote + span.remote_offset, span.nbytes)
        handle, self._next = self._next, self._next + 1
        self._posts.add(handle)
        return handle

    def copies_in_call(self, peer: str) -> bool:
        """Say so of every peer that is mapped."""
        return peer in self._peers

    def poll(self, handle: int) -> tuple[PostState, str]:
        """Every post is done when it returns."""
        assert handle in self._posts, "polled after release"  # noqa: S101 - our own bug
        return PostState.DONE, ""

    def release(self, handle: int) -> None:
        """Free a handle."""
        self._posts.remove(handle)

    def close(self) -> None:
        """Unmap all peers."""
        for name in list(self._peers):
            self.disconnect(name)
