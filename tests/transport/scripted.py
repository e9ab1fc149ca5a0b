"""Both ends of TCP reads without engines: a bare backend with a marked slab, and a source whose
replies a test decides, byte by byte, behind a true handshake.
"""

from __future__ import annotations

import queue
import socket
import threading
from typing import TYPE_CHECKING, Self

import msgspec
import numpy as np

from hotset.transport.base import PeerInfo, PostState, Span
from hotset.transport.handshake import Identity
from hotset.transport.listener import Listener
from hotset.transport.memory import DeviceMemory
from hotset.transport.slab import Slab
from hotset.transport.tcp import TcpBackend
from hotset.transport.tcp_serve import OK, RANGE_BYTES, REPLY, REQUEST
from hotset.transport.wire import receive_exactly
from tests.transport.worlds import until

if TYPE_CHECKING:
    from types import TracebackType

WAIT_S = 10.0
NBYTES = 300_000
MARK = 0xEE


class Reader:
    """A backend with a slab of marked bytes and no engine."""

    def __init__(self, *, device_memory: bool = False) -> None:
        self.slab = Slab(
            capacity_bytes=16 << 20, slot_payload_bytes=1 << 20, name="reader", incarnation=1
        )
        if device_memory:
            self.slab.memory = DeviceMemory(self.slab.nbytes, device="cpu", name="reader")
        self.slab.memory.write(0, bytes([MARK]) * self.slab.nbytes)
        self.backend = TcpBackend()
        self.backend.register(self.slab)

    def post(self, at: int, nbytes: int = NBYTES, remote: int = 0) -> int:
        span = Span(local_offset=at, remote_offset=remote, nbytes=nbytes)
        return self.backend.post("source", [span])

    def state(self, handle: int, *, seconds: float = 10.0) -> tuple[PostState, str]:
        """How a post ends, or PENDING when it does not within `seconds`."""
        until(lambda: self.backend.poll(handle)[0] is not PostState.PENDING, seconds=seconds)
        return self.backend.poll(handle)

    def holds(self, at: int, value: int, nbytes: int = NBYTES) -> bool:
        return bool((np.frombuffer(self.slab.memory.read(at, nbytes), np.uint8) == value).all())


class ScriptedSource:
    """Claims a slab of `nbytes`; hands each connection to the test as a `Line`."""

    def __init__(self, *, nbytes: int, incarnation: int = 1) -> None:
        self._lines: queue.SimpleQueue[Line] = queue.SimpleQueue()
        self._listener = Listener(
            host="127.0.0.1", port=0, token=b"", purpose="read", serve=self._serve,
            identity=Identity(name="source", incarnation=incarnation),
        )  # fmt: skip
        self.info = PeerInfo(
            name="source",
            incarnation=incarnation,
            backend="tcp",
            backend_metadata=msgspec.msgpack.encode(self._listener.address),
            base_address=0,
            nbytes=nbytes,
        )

    def _serve(self, sock: socket.socket) -> None:
        line = Line(sock)
        self._lines.put(line)
        line.ended.wait()

    def line(self) -> Line:
        """The next connection that a reader opens."""
        return self._lines.get(timeout=WAIT_S)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:  # fmt: skip
        while not self._lines.empty():
            self._lines.get().hang_up()
        assert self._listener.close()


class Line:
    """One connection from a reader."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.ended = threading.Event()
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\0" * 8)

    def request(self) -> tuple[int, int]:
        """Number and total bytes of the next request."""
        number, count = REQUEST.unpack(receive_exactly(self.sock, REQUEST.size))
        table = receive_exactly(self.sock, count * RANGE_BYTES)
        sizes = memoryview(table).cast("Q")[1::2]
        return number, sum(sizes)

    def head(self, number: int, nbytes: int, status: int = OK) -> None:
        """Start a reply."""
        self.sock.sendall(REPLY.pack(number, nbytes, status))

    def answer(self, fill: bytes) -> None:
        """Take the next request and answer it with one byte over and over."""
        number, nbytes = self.request()
        self.head(number, nbytes)
        self.sock.sendall(fill * nbytes)

    def hang_up(self) -> None:
        """End the connection."""
        self.ended.set()
