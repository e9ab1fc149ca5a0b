"""Names a piece of shared memory so that another process of this host finds it, or nothing.

Memory is found as /proc/<pid>/fd/<fd>. Numbers are reused, so a description names the boot, the
namespaces of processes and network (an emulated network must not be bypassed), the time at which
the process started and the inode of the memory, and all of them must agree. It must not know what
the memory holds or who reads it.

Invariant: what `open_place` returns is the described memory, sealed against shrinking, so that no
access to a mapping of it is ever hit by SIGBUS.
"""

from __future__ import annotations

import fcntl
import os
from pathlib import Path
from typing import Final

import msgspec

from hotset.errors import UNREADABLE, PeerGoneError, TransportError

_NAMESPACES: Final = ("pid", "net")


class Place(msgspec.Struct, frozen=True, array_like=True):
    """Where memory is, precisely enough that nothing else can be taken for it."""

    boot_id: str
    namespaces: tuple[str, ...]
    pid: int
    started_ticks: int
    fd: int
    device: int
    inode: int
    nbytes: int


# Made at import: msgspec crashes when two threads meet a type for the first time.
_PLACE: Final = msgspec.msgpack.Decoder(Place)


def boot_id() -> str:
    """Name of this boot of this machine; the same in all its containers."""
    return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()


def _namespaces() -> tuple[str, ...]:
    return tuple(str(Path(f"/proc/self/ns/{kind}").readlink()) for kind in _NAMESPACES)


def _started_ticks(pid: int) -> int:
    """When a process started, in clock ticks since boot. Raises OSError when there is none."""
    text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    return int(text[text.rindex(")") + 2 :].split()[19])  # field 22; the name may hold blanks


def describe_memory(fd: int) -> bytes:
    """Say where this process keeps the memory behind `fd`, for `open_place` in another."""
    stat = os.fstat(fd)
    pid = os.getpid()
    place = Place(
        boot_id=boot_id(),
        namespaces=_namespaces(),
        pid=pid,
        started_ticks=_started_ticks(pid),
        fd=fd,
        device=stat.st_dev,
        inode=stat.st_ino,
        nbytes=stat.st_size,
    )
    return msgspec.msgpack.encode(place)


def decode_place(description: bytes, name: str) -> Place:
    """Read a description of store `name`. Raises TransportError when it is damaged."""
    try:
        return _PLACE.decode(description)
    except UNREADABLE as error:
        raise TransportError(
            f"the shared-memory metadata of {name!r} is damaged ({error})",
            remedy="ask the store for it anew",
        ) from error


def is_here(description: bytes, name: str) -> bool:
    """Whether the description is of a store on this host. Raises TransportError when damaged."""
    return bool(description) and decode_place(description, name).boot_id == boot_id()


def open_place(place: Place, name: str, *, remedy: str, writable: bool = False) -> int:
    """Open memory of store `name` anew (a file description of our own) and check that it is it.

    Raises PeerGoneError when its process has ended, TransportError with `remedy` when it cannot be
    reached from here.
    """
    if (boot_id(), _namespaces()) != (place.boot_id, place.namespaces):
        raise TransportError(
            f"store {name!r} is on another host or in another pid or network namespace",
            remedy=remedy,
        )
    mode = os.O_RDWR if writable else os.O_RDONLY
    try:
        handle = os.open(f"/proc/{place.pid}/fd/{place.fd}", mode | os.O_CLOEXEC)
    except FileNotFoundError as error:
        raise _gone(name) from error
    except OSError as error:
        raise TransportError(
            f"the memory of store {name!r} cannot be opened ({error.strerror})", remedy=remedy
        ) from error
    try:
        _check(handle, place, name, remedy)
    except BaseException:
        os.close(handle)
        raise
    return handle


def _check(handle: int, place: Place, name: str, remedy: str) -> None:
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
            f"the memory of store {name!r} is not sealed against shrinking", remedy=remedy
        )


def _gone(name: str) -> PeerGoneError:
    return PeerGoneError(
        f"the process of store {name!r} has ended", remedy="read another copy; it will rejoin"
    )
