"""A TCP source whose replies a test decides, byte by byte, behind a true handshake."""

from __future__ import annotations

import queue
import socket
import threading
from typing import TYPE_CHECKING, Self

import msgspec

from hotset.transport.base import PeerInfo
from hotset.transport.handshake import Identity
from hotset.transport.listener import Listener
from hotset.transport.tcp_serve import OK, RANGE_BYTES, REPLY, REQUEST
from hotset.transport.wire import receive_exactly

if TYPE_CHECKING:
    from types import TracebackType

WAIT_S = 10.0


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
