"""The reader's side of one TCP peer: one connection, one thread that receives into the slab.

Requests are sent by whoever posts, without blocking; replies come back in order and are received
by the link's thread straight into the slots, with the GIL released. Connecting happens on that
thread too, so a frozen peer never holds the engine up. It must not know slots or engines.

    WAITING -request sent-> SENT -first byte of the reply-> LANDING -last byte-> DONE
    any of them -> ERROR

**Abandoned reads.** One that is not LANDING ends at once; its reply is skipped when it comes. One
that is LANDING ends as soon as the receiver has left the kernel after a shutdown of the socket;
reads behind it are asked for again on a new connection, which is safe, because they still own
their slots and the handshake proves that it is the same incarnation.

**A lost connection** fails the read that was landing. Those behind it, of whose replies nothing
has come, are asked for once more: a source hangs up on idle or stuck readers, too. A dead source
refuses the new connection at once, and then they fail.

Invariants: a post ends once; after it ended, no byte is written to its slots; whatever the source
sends, only the slots of the post it answers are written, with the length that was asked for.
"""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections import deque
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, Final

from hotset.errors import PeerGoneError, TransportError
from hotset.transport.base import PostState
from hotset.transport.handshake import Identity, greet
from hotset.transport.memory import HostMemory
from hotset.transport.tcp_serve import MOST_REASON_BYTES, OK, REPLY, pack_request
from hotset.transport.wire import RECEIVE_BYTES, dial, pieces, receive_exactly, receive_views

if TYPE_CHECKING:
    from collections.abc import Callable

    from hotset.transport.memory import Memory

CONNECT_NS: Final = 5_000_000_000
SKIP_BYTES: Final = 1 << 20  # a longer reply that nobody wants is cheaper to hang up on
STAGED_BYTES: Final = 4 << 20  # on the way to device memory
PURPOSE: Final = "read"


class _Stage(Enum):
    WAITING = "waiting"
    SENT = "sent"
    LANDING = "landing"


@dataclass(slots=True, eq=False)
class Post:
    """One read. `into` and `ranges` are (offset, nbytes) here and there; `state` ends once."""

    number: int
    into: list[tuple[int, int]]
    ranges: list[tuple[int, int]]
    nbytes: int
    state: PostState = PostState.PENDING
    error: str = ""
    stage: _Stage = _Stage.WAITING
    abandoned: bool = False
    tried_again: bool = False


class Link:
    """The connection to one incarnation of one peer. Thread-safe."""

    def __init__(
        self,
        peer: Identity,
        *,
        address: tuple[str, int],
        token: bytes,
        memory: Memory,
        notify: Callable[[], None],
    ) -> None:
        """Start to connect; `settle` tells how that went. `notify` is called when a read ends."""
        self._peer = peer
        self._address = address
        self._token = token
        self._memory = memory
        self._notify = notify
        self._lock = threading.Condition()
        self._unsent: deque[Post] = deque()
        self._sent: deque[Post] = deque()
        self._tail = memoryview(b"")  # of a request that the socket had no room for
        self._sock: socket.socket | None = None  # past the handshake
        self._opening: socket.socket | None = None
        self._first = True
        self._leaving = False
        self._closing = False
        self._hung_up = False  # we ended the connection to abandon a read
        self._refusal: TransportError | None = None
        self._thread = threading.Thread(
            target=self._run, name=f"hotset-tcp-{peer.name}", daemon=True
        )
        self._thread.start()

    # --- any thread -------------------------------------------------------------------------------

    def settle(self, *, timeout_s: float) -> TransportError | None:
        """Wait for the first attempt to connect; its error, None when it worked or goes on."""
        with self._lock:
            self._lock.wait_for(lambda: not self._first, timeout_s)
            return self._refusal

    def post(self, post: Post) -> None:
        """Ask for a read, now or when the connection stands."""
        with self._lock:
            self._unsent.append(post)
            if self._sock is None:
                self._lock.notify_all()
            else:
                self._send()

    def flush(self) -> None:
        """Send what the socket had no room for."""
        if self._sock is not None and (self._unsent or self._tail):
            with self._lock:
                self._send()

    def abandon(self, post: Post) -> None:
        """End a read that nobody waits for, see the module's text."""
        with self._lock:
            if post.state is not PostState.PENDING:
                return
            post.abandoned = True
            if post.stage is _Stage.LANDING:
                self._hang_up()
                return
            _end(post, PostState.ERROR, "the read was abandoned")
            if post.stage is _Stage.WAITING:
                self._unsent.remove(post)
            self._wind_down()

    def leave(self) -> None:
        """End the connection once no read is in flight."""
        with self._lock:
            self._leaving = True
            self._wind_down()

    def close(self) -> None:
        """End the connection now; reads in flight end in an error."""
        with self._lock:
            self._closing = self._leaving = True
            for sock in (self._opening, self._sock):
                _shut(sock)
            self._lock.notify_all()

    def join(self, *, timeout_s: float) -> bool:
        """Wait for the thread's end after `leave` or `close`."""
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    @property
    def ended(self) -> bool:
        """Whether the thread has ended, and with it every read."""
        return not self._thread.is_alive()

    # --- with the lock held -----------------------------------------------------------------------

    def _send(self) -> None:
        """Send requests as far as the socket takes them; the receiver finds out about errors."""
        while self._sock is not None:
            if not self._tail:
                if not self._unsent:
                    return
                post = self._unsent.popleft()
                post.stage = _Stage.SENT
                self._sent.append(post)
                self._tail = memoryview(pack_request(post.number, post.ranges))
            try:
                count = self._sock.send(self._tail, socket.MSG_DONTWAIT)
            except OSError:  # no room now, or the connection is lost
                return
            self._tail = self._tail[count:]

    def _hang_up(self) -> None:
        self._hung_up = True
        _shut(self._sock)

    def _wind_down(self) -> None:
        """Hang up when we are leaving and nobody waits for a reply."""
        waiting = any(p.state is PostState.PENDING for p in (*self._sent, *self._unsent))
        if self._leaving and not waiting:
            _shut(self._opening)
            _shut(self._sock)
            self._lock.notify_all()

    # --- the link's thread ------------------------------------------------------------------------

    def _run(self) -> None:
        while self._has_work():
            sock = self._open()
            if sock is None:
                continue
            try:
                why = self._receive(sock)
            except OSError as error:
                why = error.strerror or str(error)
            self._lost(sock, why)

    def _has_work(self) -> bool:
        with self._lock:
            self._lock.wait_for(lambda: self._first or self._unsent or self._leaving)
            if self._closing:
                self._fail_all("the connection was closed")
            return bool(self._unsent) or not self._leaving

    def _open(self) -> socket.socket | None:
        deadline_ns = time.monotonic_ns() + CONNECT_NS
        sock: socket.socket | None = None
        try:
            sock = dial(self._address, deadline_ns=deadline_ns, opened=self._note_opening)
            greet(
                sock,
                purpose=PURPOSE,
                token=self._token,
                wanted=self._peer,
                deadline_ns=deadline_ns,
            )
        except TransportError as error:
            self._not_opened(sock, error)
            return None
        with self._lock:
            self._first, self._refusal, self._opening = False, None, None
            sock.settimeout(None)
            self._sock = sock
            if self._closing:
                _shut(sock)
            self._send()
            self._lock.notify_all()
            self._wind_down()
        return sock

    def _note_opening(self, sock: socket.socket) -> None:
        with self._lock:
            if self._closing:
                raise PeerGoneError("the connection was closed", remedy="connect the store anew")
            self._opening = sock

    def _not_opened(self, sock: socket.socket | None, error: TransportError) -> None:
        with self._lock:
            self._first, self._refusal, self._opening = False, error, None
            if sock is not None:
                sock.close()
            self._fail_all(str(error))
            self._lock.notify_all()

    def _receive(self, sock: socket.socket) -> str:
        """Take replies until the connection ends; returns why."""
        while head := receive_exactly(sock, REPLY.size):
            number, nbytes, status = REPLY.unpack(head)
            post = self._begin(number)
            if post is None:
                return "it answers what was not asked"
            if status != OK:
                if nbytes > MOST_REASON_BYTES:
                    return "its refusal is too long"
                reason = receive_exactly(sock, nbytes).decode("utf-8", errors="replace")
                self._finish(post, PostState.ERROR, f"store {self._peer.name!r} refuses: {reason}")
            elif nbytes != post.nbytes:
                return f"it sends {nbytes} bytes where {post.nbytes} were asked for"
            elif post.stage is _Stage.LANDING:
                if not self._land(sock, post):
                    return "the connection ended"
                self._finish(post, PostState.DONE, "")
            elif not self._skip(sock, post):
                return "the rest of an abandoned read"
        return "the connection ended"

    def _begin(self, number: int) -> Post | None:
        """The post that a reply is for; LANDING unless it has been abandoned."""
        with self._lock:
            if not self._sent or self._sent[0].number != number:
                return None
            post = self._sent[0]
            if post.state is PostState.PENDING:
                post.stage = _Stage.LANDING
            return post

    def _land(self, sock: socket.socket, post: Post) -> bool:
        memory = self._memory
        if isinstance(memory, HostMemory):
            return all(
                receive_views(sock, [memory.view(*part) for part in group])
                for group in pieces(post.into, size=RECEIVE_BYTES)
            )
        for group in pieces(post.into, size=STAGED_BYTES):  # through the host, piece by piece
            for offset, nbytes in group:
                data = receive_exactly(sock, nbytes)
                if not data:
                    return False
                memory.write(offset, data)
        return True

    def _skip(self, sock: socket.socket, post: Post) -> bool:
        """Pass over the reply of an abandoned read; False when hanging up is cheaper."""
        if post.nbytes > SKIP_BYTES:
            with self._lock:
                self._hang_up()
            return False
        whole = not post.nbytes or bool(receive_exactly(sock, post.nbytes))
        with self._lock:
            self._sent.popleft()
            self._wind_down()
        return whole

    def _finish(self, post: Post, state: PostState, error: str) -> None:
        with self._lock:
            self._sent.popleft()
            if post.state is PostState.PENDING:
                _end(post, state, error)
            self._wind_down()
        self._notify()

    def _lost(self, sock: socket.socket, why: str) -> None:
        """Sort out what was in flight: ended, failed, or to be asked for again."""
        with self._lock:
            self._sock, self._tail = None, memoryview(b"")
            sock.close()
            again: list[Post] = []
            for post in (*self._sent, *self._unsent):
                if post.state is not PostState.PENDING:
                    continue
                if post.abandoned:
                    _end(post, PostState.ERROR, "the read was abandoned")
                elif not self._closing and self._may_try_again(post):
                    post.stage = _Stage.WAITING
                    again.append(post)
                else:
                    _end(post, PostState.ERROR, f"store {self._peer.name!r} is gone: {why}")
            self._sent.clear()
            self._unsent = deque(again)
            self._hung_up = False
        self._notify()

    def _may_try_again(self, post: Post) -> bool:
        if self._hung_up:
            return True
        first_time, post.tried_again = not post.tried_again, True
        return first_time and post.stage is not _Stage.LANDING

    def _fail_all(self, error: str) -> None:
        for post in (*self._sent, *self._unsent):
            if post.state is PostState.PENDING:
                _end(post, PostState.ERROR, error)
        self._sent.clear()
        self._unsent.clear()
        self._notify()


def _end(post: Post, state: PostState, error: str) -> None:
    assert post.state is PostState.PENDING, "a post ended twice"  # noqa: S101 - our own bug
    post.error = error  # before the state, which the owner reads without the lock
    post.state = state


def _shut(sock: socket.socket | None) -> None:
    if sock is not None:
        with contextlib.suppress(OSError):  # not connected yet, or gone
            sock.shutdown(socket.SHUT_RDWR)
