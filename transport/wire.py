"""Sockets as hotset uses them: tuned, bounded in time, framed.

Moves bytes between a socket and memory; it must not know stores, tokens or what a frame says.

Invariants: a frame is 4 bytes of length and a body, and a length over the receiver's bound ends
the connection before anything of that size is allocated; every function with a `deadline_ns`
(monotonic) ends by it; a network that is cut ends every wait in about 5 s (keepalive for the side
that listens, the user timeout for the side that sends).
"""

from __future__ import annotations

import contextlib
import itertools
import socket
import struct
import time
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Final

from hotset.errors import PeerGoneError, TransferTimeout, TransportError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from _typeshed import ReadableBuffer

BUFFER_BYTES: Final = 4 << 20
SEND_BYTES: Final = 4 << 20
RECEIVE_BYTES: Final = 16 << 20
"""About this much in one call. After each call the GIL is waited for, 5 ms in a busy process, so
small pieces would starve; one call for 64 MiB keeps both sides from working at once."""
MOST_VIEWS: Final = 512  # of one call; the kernel's bound is 1,024
CUT_MS: Final = 5000
_OPTIONS: Final = (
    (socket.IPPROTO_TCP, socket.TCP_NODELAY, 1),
    (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),
    (socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 2),
    (socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 1),
    (socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 3),
    (socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, CUT_MS),
)
_LENGTH: Final = struct.Struct("<I")
_TIMEVAL: Final = struct.Struct("@ll")


@cache
def _buffers() -> tuple[tuple[int, int, int], ...]:
    """Options for large buffers, where the kernel grants them.

    Where it does not, a fixed size would be smaller than what the kernel's own tuning reaches.
    """
    granted = []
    for name, option in (("wmem_max", socket.SO_SNDBUF), ("rmem_max", socket.SO_RCVBUF)):
        with contextlib.suppress(OSError, ValueError):  # not Linux, or hidden
            if int(Path(f"/proc/sys/net/core/{name}").read_text(encoding="ascii")) >= BUFFER_BYTES:
                granted.append((socket.SOL_SOCKET, option, BUFFER_BYTES))
    return tuple(granted)


def tune(sock: socket.socket) -> None:
    """Set buffers, no delay, keepalive and user timeout; before connect or listen."""
    for level, option, value in (*_buffers(), *_OPTIONS):
        sock.setsockopt(level, option, value)


def patience(sock: socket.socket, seconds: int) -> None:
    """Let a blocking send or receive give up (BlockingIOError) after that long without a byte."""
    for option in (socket.SO_SNDTIMEO, socket.SO_RCVTIMEO):
        sock.setsockopt(socket.SOL_SOCKET, option, _TIMEVAL.pack(seconds, 0))


def left_s(deadline_ns: int) -> float:
    """Seconds until a deadline. Raises TransferTimeout when it has passed."""
    left = (deadline_ns - time.monotonic_ns()) / 1e9
    if left <= 0:
        raise TransferTimeout("the deadline passed", remedy="try again or read another copy")
    return left


def dial(
    address: tuple[str, int],
    *,
    deadline_ns: int,
    opened: Callable[[socket.socket], None] = lambda _: None,
) -> socket.socket:
    """Connect. `opened` gets the socket first, so that another thread can shut it down.

    Advertise numeric addresses: resolving a name takes as long as the resolver likes.
    Raises PeerGoneError when nobody listens, TransferTimeout.
    """
    sock: socket.socket | None = None
    try:
        found = socket.getaddrinfo(*address, type=socket.SOCK_STREAM)
        family, kind, protocol, _, where = found[0]
        sock = socket.socket(family, kind, protocol)
        tune(sock)
        opened(sock)
        sock.settimeout(left_s(deadline_ns))
        sock.connect(where)
    except BaseException as error:
        if sock is not None:
            sock.close()
        if isinstance(error, OSError):
            raise _typed(error, f"{address[0]}:{address[1]}") from error
        raise
    return sock


def send_frame(sock: socket.socket, body: bytes, *, deadline_ns: int) -> None:
    """Send one frame. Raises PeerGoneError, TransferTimeout."""
    try:
        sock.settimeout(left_s(deadline_ns))
        sock.sendall(_LENGTH.pack(len(body)) + body)
    except OSError as error:
        raise _typed(error, "the other side") from error


def receive_frame(sock: socket.socket, *, most_bytes: int, deadline_ns: int) -> bytes:
    """Receive one frame; b'' when the other side has closed between two frames.

    Raises TransportError for a frame that is cut short or too long, PeerGoneError, TransferTimeout.
    """
    head = _receive(sock, _LENGTH.size, deadline_ns)
    if not head:
        return b""
    (nbytes,) = _LENGTH.unpack(head) if len(head) == _LENGTH.size else (-1,)
    if nbytes > most_bytes:
        raise TransportError(
            f"a frame of {nbytes} bytes where {most_bytes} are allowed",
            remedy="check that both ends are stores of the same version of hotset",
        )
    body = _receive(sock, nbytes, deadline_ns) if nbytes > 0 else b""
    if len(body) != nbytes or not body:
        raise TransportError(
            "a frame is empty or cut short", remedy="check that the other end is a store of hotset"
        )
    return body


def _receive(sock: socket.socket, nbytes: int, deadline_ns: int) -> bytes:
    """Up to `nbytes`; fewer when the other side closes."""
    data = bytearray()
    try:
        while len(data) < nbytes:
            sock.settimeout(left_s(deadline_ns))
            part = sock.recv(nbytes - len(data))
            if not part:
                break
            data += part
    except OSError as error:
        raise _typed(error, "the other side") from error
    return bytes(data)


def _typed(error: OSError, who: str) -> TransportError:
    if isinstance(error, TimeoutError) and error.errno is None:  # ours; ETIMEDOUT has a number
        return TransferTimeout(
            f"{who} does not answer in time", remedy="try again or read another copy"
        )
    return PeerGoneError(
        f"{who} cannot be reached ({error.strerror or error})",
        remedy="read another copy; it will rejoin",
    )


# --- bulk bytes -----------------------------------------------------------------------------------


def pieces(ranges: Sequence[tuple[int, int]], *, size: int) -> Iterator[list[tuple[int, int]]]:
    """Group (offset, nbytes) ranges for one call each: about `size` bytes, at most MOST_VIEWS."""
    group: list[tuple[int, int]] = []
    room = size
    for first, length in ranges:
        offset, nbytes = first, length
        while nbytes:
            take = nbytes if nbytes <= room + size // 2 else room  # no crumbs
            group.append((offset, take))
            offset, nbytes, room = offset + take, nbytes - take, room - take
            if room <= 0 or len(group) == MOST_VIEWS:
                yield group
                group, room = [], size
    if group:
        yield group


def send_views(sock: socket.socket, views: Sequence[ReadableBuffer]) -> None:
    """Send all views on a blocking socket, with the GIL released. Raises OSError."""
    total = sum(memoryview(view).nbytes for view in views)
    sent = sock.sendmsg(views)
    if sent == total:
        return
    for view in _rest(views, sent):
        sock.sendall(view)


def receive_views(sock: socket.socket, views: Sequence[memoryview]) -> bool:
    """Fill all views from a blocking socket, with the GIL released; False at the stream's end.

    Raises OSError.
    """
    total = sum(view.nbytes for view in views)
    received = sock.recvmsg_into(views, 0, socket.MSG_WAITALL)[0]
    if received == total:
        return True
    for view in _rest(views, received):  # a signal, or the end
        rest = view
        while rest.nbytes:
            count = sock.recv_into(rest, rest.nbytes, socket.MSG_WAITALL)
            if not count:
                return False
            rest = rest[count:]
    return True


def receive_exactly(sock: socket.socket, nbytes: int) -> bytes:
    """Receive `nbytes` from a blocking socket; b'' at the stream's end. Raises OSError."""
    data = bytearray(nbytes)
    return bytes(data) if receive_views(sock, [memoryview(data)]) else b""


def _rest(views: Sequence[ReadableBuffer], done: int) -> list[memoryview]:
    """What remains of the views after their first `done` bytes."""
    flat = [memoryview(view).cast("B") for view in views]
    ends = itertools.accumulate(view.nbytes for view in flat)
    return [
        view[max(0, done - (end - view.nbytes)) :]
        for view, end in zip(flat, ends, strict=True)
        if end > done
    ]
