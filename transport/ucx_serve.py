"""The source's side of the ucx backend: answers range requests from one slab.

Moves ranges of the registered slab, and of nothing else, to readers that were welcomed. One-sided
for the caller: the store's own threads take no part, and its slots may be reused at any time (the
reader checks header and checksum). It must not know slots, or what bytes mean.

Invariants: every range is checked against the slab before a byte of it is read; a stranger sends
at most a small frame and has HANDSHAKE_NS to prove himself; a reader that misbehaves is told why
and is then heard no more, and no other reader notices.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from typing import TYPE_CHECKING, Any, Final

import msgspec

from hotset.errors import TransportError
from hotset.transport.ucx_bindings import TAGS
from hotset.transport.ucx_link import (
    MOST_RANGES,
    Frames,
    Get,
    Hello,
    Refusal,
    challenge,
    decode,
    is_trusted,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from hotset.transport.ucx_bindings import Bindings, Operation

HANDSHAKE_NS: Final = 5_000_000_000
MOST_READERS: Final = 1024
MOST_SENDS: Final = 4096  # of one reader; further requests wait in its stream
_log = logging.getLogger(__name__)


class Server:
    """Readers of one slab. Called by the thread that owns the bindings."""

    def __init__(  # noqa: PLR0913 - what a source consists of, by keyword
        self,
        bindings: Bindings,
        *,
        name: str,
        incarnation: int,
        token: bytes,
        nbytes: int,
        view: Callable[[int, int], Any],
    ) -> None:
        """`view` gives the buffer of a range of the slab."""
        self.bindings = bindings
        self.name = name
        self.incarnation = incarnation
        self.token = token
        self.nbytes = nbytes
        self.view = view
        self._met: deque[Any] = deque()
        self._readers: list[_Reader] = []

    def listen(self, port: int) -> int:
        """Take readers in; returns the port. Raises Exception of the bindings."""
        return self.bindings.listen(port, self._met.append)  # called while UCX progresses

    @property
    def has_strangers(self) -> bool:
        """Whether somebody's time to prove himself is running."""
        return any(reader.deadline_ns for reader in self._readers)

    def step(self) -> bool:
        """Do what can be done now; whether there was anything."""
        acted = bool(self._met)
        while self._met:
            self._take(self._met.popleft())
        for reader in tuple(self._readers):
            try:
                acted |= reader.step()
            except TransportError as error:
                _log.info("store %s: a reader left: %s", self.name, error.what)
                self._drop(reader)
                acted = True
        return acted

    def _take(self, endpoint: Any) -> None:
        if len(self._readers) >= MOST_READERS:
            self.bindings.close_endpoint(endpoint)
            return
        self._readers.append(_Reader(self, endpoint))

    def _drop(self, reader: _Reader) -> None:
        self._readers.remove(reader)
        self.bindings.close_endpoint(reader.endpoint)

    def close(self) -> None:
        """Hang up on everybody; their reads end in errors."""
        for endpoint in self._met:
            self.bindings.close_endpoint(endpoint)
        for reader in tuple(self._readers):
            self._drop(reader)


class _Reader:
    """One connection of a reader."""

    def __init__(self, server: Server, endpoint: Any) -> None:
        self.endpoint = endpoint
        self.deadline_ns = time.monotonic_ns() + HANDSHAKE_NS  # 0 once welcome
        self._server = server
        self._frames = Frames(server.bindings, endpoint)
        self._said = self._challenged = b""
        self._tag = 0
        self._sends: deque[Operation] = deque()
        self._last_words = ""

    def step(self) -> bool:
        """Do what can be done; raises TransportError when the connection is to be dropped."""
        acted = self._prune()
        if self._last_words:
            if time.monotonic_ns() > self.deadline_ns:
                raise TransportError(self._last_words)
            self._frames.next()  # raises when the reader has heard them and hung up
            return acted
        if self.deadline_ns and time.monotonic_ns() > self.deadline_ns:
            raise TransportError("it did not introduce itself in time")
        while len(self._sends) < MOST_SENDS and not self._last_words:
            frame = self._frames.next()
            if frame is None:
                break
            self._hear(frame)
            acted = True
        if not self._server.bindings.alive(self.endpoint):
            raise TransportError("the connection ended")
        return acted

    def _prune(self) -> bool:
        acted = False
        while self._sends and self._sends[0].done():
            error = self._sends.popleft().error()
            acted = True
            if error:
                raise TransportError(f"sending failed ({error})")
        return acted

    def _hear(self, frame: bytes) -> None:
        server = self._server
        if not self._said:
            self._tag = server.bindings.take_tags()
            made, refusal = challenge(
                frame,
                name=server.name,
                incarnation=server.incarnation,
                token=server.token,
                tag=self._tag,
            )
            self._said, self._challenged = frame, made
            self._frames.send(made)
            self._last_words = refusal and f"it wanted {refusal}"
        elif self.deadline_ns:
            to_tag = decode(self._said, Hello).tag
            if not 0 <= to_tag < TAGS:
                raise TransportError("a tag out of range")
            self._frames.trust(own_tag=self._tag, to_tag=to_tag)
            if not is_trusted(self._said, self._challenged, frame, token=server.token):
                self._refuse("the reader does not prove that it knows the cluster's token")
                return
            self.deadline_ns = 0
        else:
            self._serve(decode(frame, Get))

    def _serve(self, get: Get) -> None:
        """Send every range, each as one message."""
        server = self._server
        fits = all(at >= 0 and 0 < n <= server.nbytes - at for at, n in get.ranges)
        if not fits or not 0 < len(get.ranges) <= MOST_RANGES or not 0 <= get.tag < TAGS:
            self._refuse(f"a range is outside of the slab of {server.nbytes} bytes")
            return
        bindings, endpoint, view = server.bindings, self.endpoint, server.view
        try:
            for index, (at, nbytes) in enumerate(get.ranges):
                self._sends.append(bindings.send(endpoint, view(at, nbytes), get.tag + index))
        except Exception as error:  # the bindings' errors share no root but Exception
            raise TransportError(f"sending failed ({error})") from error

    def _refuse(self, reason: str) -> None:
        self._last_words = reason
        self.deadline_ns = time.monotonic_ns() + HANDSHAKE_NS
        self._frames.send(msgspec.msgpack.encode(Refusal(reason)))
