"""The reader's side of the ucx backend: connections to sources, and the reads on them.

Posts receives straight into the slab, then asks the source for the ranges. Everything here runs on
the one thread that owns the bindings; `Read` objects are shared with the engine's owner, who only
looks at `state` and `error`. It must not know slots, headers or what bytes mean.

**Ends.** A connection fails as a whole: its endpoint is closed first, then each read on it ends in
ERROR once UCX has given back all its receives; one that UCX keeps stays PENDING. A read that
nobody waits for cannot be recalled alone. Its connection takes no further reads, and is closed
when all reads left on it are such ones.

Invariants: a read is DONE only when every receive has ended well, ERROR only when every receive has
ended and its endpoint is closed or never had them; buffers live as long as their receives.
"""

from __future__ import annotations

import time
from collections import deque
from typing import TYPE_CHECKING, Any, Final

import msgspec

from hotset.errors import HotsetError, PeerGoneError, TransportError
from hotset.transport.base import PeerInfo, PostState, Span
from hotset.transport.ucx_link import (
    MOST_RANGES,
    BrokenError,
    Challenge,
    Frames,
    Get,
    Refusal,
    answer,
    decode,
    hello,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from hotset.transport.ucx_bindings import Bindings, Operation

CONNECT_NS: Final = 5_000_000_000


class Read:
    """One posted read. `state` is written by the thread, last; `error` before it."""

    __slots__ = ("abandoned", "error", "line", "peer", "receives", "spans", "state")

    def __init__(self, peer: str, spans: Sequence[Span]) -> None:
        """Nothing is posted yet."""
        self.peer = peer
        self.spans = spans
        self.state = PostState.PENDING
        self.error = ""
        self.line: Line | None = None
        self.receives: deque[Operation] = deque()
        self.abandoned = False

    def end(self, error: str = "") -> None:
        """Make the end known."""
        self.error = error
        self.state = PostState.ERROR if error else PostState.DONE


class Reads:
    """All connections to sources. Called by the thread that owns the bindings."""

    def __init__(
        self, bindings: Bindings, *, token: bytes, view: Callable[[int, int], Any]
    ) -> None:
        """`view` gives the buffer of a range of our slab."""
        self.bindings = bindings
        self.token = token
        self.view = view
        self._peers: dict[str, tuple[PeerInfo, str, int]] = {}
        self._current: dict[str, Line] = {}
        self._lines: list[Line] = []
        self._kept: list[Read] = []  # broken, but UCX has not given their receives back

    @property
    def is_busy(self) -> bool:
        """Whether there is anything that time alone may change."""
        return bool(self._kept) or any(line.deadline_ns for line in self._lines)

    def connect(self, peer: PeerInfo, host: str, port: int) -> None:
        """Know a peer, in place of its former self, and start to connect."""
        self.disconnect(peer.name)
        self._peers[peer.name] = (peer, host, port)
        self._line(peer.name)

    def disconnect(self, name: str) -> None:
        """Forget a peer; its connection closes when the reads on it have ended."""
        self._peers.pop(name, None)
        line = self._current.pop(name, None)
        if line is not None:
            line.retired = True

    def start(self, read: Read) -> None:
        """Put a read on the peer's connection, a new one if the last one broke."""
        line = self._line(read.peer)
        if line is None:
            read.end(str(_gone(read.peer, "it was disconnected")))
            return
        read.line = line
        line.add(read)

    def abandon(self, read: Read) -> None:
        """Nobody waits for the read: let it end as soon as that is safe."""
        read.abandoned = True
        line = read.line
        if line is None or read.state is not PostState.PENDING:
            return
        line.retired = True
        if self._current.get(read.peer) is line:
            del self._current[read.peer]

    def step(self) -> bool:
        """Do what can be done now; whether there was anything."""
        acted = False
        for line in tuple(self._lines):
            try:
                acted |= line.step()
            except HotsetError as error:
                self._break(line, str(error))
                acted = True
        for read in tuple(self._kept):
            if all(receive.done() for receive in read.receives):
                self._kept.remove(read)
                read.receives.clear()
                read.end(read.error)
                acted = True
        return acted

    def close(self) -> None:
        """Hang up everywhere."""
        for line in tuple(self._lines):
            self._break(line, str(_gone(line.peer.name, "this store closes")))

    def _line(self, name: str) -> Line | None:
        line = self._current.get(name)
        known = self._peers.get(name)
        if line is None and known is not None:
            line = self._current[name] = Line(self, known[0])
            self._lines.append(line)
            line.dial(known[1], known[2])
        return line

    def _break(self, line: Line, error: str) -> None:
        """Close a connection and end its reads."""
        self._lines.remove(line)
        if self._current.get(line.peer.name) is line:
            del self._current[line.peer.name]
        if line.endpoint is not None:
            self.bindings.close_endpoint(line.endpoint)
        for read in (*line.reads, *line.waiting):
            if all(receive.done() for receive in read.receives):
                read.receives.clear()
                read.end(error)
            else:
                read.error = error
                self._kept.append(read)


class Line:
    """One connection to one incarnation of a source."""

    def __init__(self, reads: Reads, peer: PeerInfo) -> None:
        """Nothing is dialled yet."""
        self.peer = peer
        self.endpoint: Any = None
        self.deadline_ns = time.monotonic_ns() + CONNECT_NS  # 0 once welcome
        self.retired = False
        self.reads: list[Read] = []
        self.waiting: list[Read] = []
        self._all = reads
        self._frames: Frames | None = None
        self._said = b""
        self._tag = 0
        self._broken: TransportError | None = None

    def dial(self, host: str, port: int) -> None:
        """Start to connect; a failure is told by the next step."""
        try:
            self.endpoint = self._all.bindings.dial(host, port)
            self._frames = Frames(self._all.bindings, self.endpoint)
            self._tag = self._all.bindings.take_tags()
            self._said = hello(
                name=self.peer.name, incarnation=self.peer.incarnation, tag=self._tag
            )
            self._frames.send(self._said)
        except Exception as error:  # noqa: BLE001 - the bindings' errors share no root
            self._broken = _gone(self.peer.name, str(error))

    def add(self, read: Read) -> None:
        """Post a read now, or when the source has welcomed us."""
        if self.deadline_ns or self._broken:
            self.waiting.append(read)
        else:
            self._post(read)

    def step(self) -> bool:
        """Do what can be done; raises TransportError when the connection is to be closed."""
        if self._broken is not None:
            raise self._broken
        acted, lost = self._prune()
        if self.retired and all(read.abandoned for read in (*self.reads, *self.waiting)):
            raise _gone(self.peer.name, "nobody waits for the reads on this connection")
        assert self._frames is not None  # noqa: S101 - or it were broken
        try:
            frame = self._frames.next()
            if frame is not None:
                self._hear(frame)
                acted = True
        except BrokenError as error:
            raise _gone(self.peer.name, error.what) from error
        if lost or not self._all.bindings.alive(self.endpoint):
            raise _gone(self.peer.name, lost or "the connection ended")
        if self.deadline_ns and time.monotonic_ns() > self.deadline_ns:
            raise _gone(self.peer.name, f"it did not answer for {CONNECT_NS // 10**9} s")
        return acted

    def _prune(self) -> tuple[bool, str]:
        """End the reads whose receives have ended well; whether any did, and what went wrong."""
        acted = False
        for read in tuple(self.reads):
            receives = read.receives
            while receives and receives[0].done():
                error = receives[0].error()
                if error:
                    return acted, error
                receives.popleft()
            if not receives:
                self.reads.remove(read)
                read.end()
                acted = True
        return acted, ""

    def _hear(self, frame: bytes) -> None:
        if not self.deadline_ns:
            reason = decode(frame, Refusal).reason
            raise TransportError(
                f"store {self.peer.name!r} refuses: {reason}",
                remedy="refresh the directory of copies and check the cluster's token",
            )
        assert self._frames is not None  # noqa: S101 - it read the frame
        self._frames.send(answer(self._said, frame, token=self._all.token))
        self._frames.trust(own_tag=self._tag, to_tag=decode(frame, Challenge).tag)
        self.deadline_ns = 0
        waiting, self.waiting = self.waiting, []
        for read in waiting:
            self._post(read)

    def _post(self, read: Read) -> None:
        """Post the receives, then ask: what arrives finds its place."""
        assert self._frames is not None  # noqa: S101 - welcomed
        self.reads.append(read)
        bindings, endpoint, view = self._all.bindings, self.endpoint, self._all.view
        spans = read.spans
        try:
            for start in range(0, len(spans), MOST_RANGES):
                part = spans[start : start + MOST_RANGES]
                tag = bindings.take_tags(len(part))
                for index, span in enumerate(part):
                    into = view(span.local_offset, span.nbytes)
                    read.receives.append(bindings.receive(endpoint, into, tag + index))
                ranges = [(span.remote_offset, span.nbytes) for span in part]
                self._frames.send(msgspec.msgpack.encode(Get(tag, ranges)))
        except Exception as error:  # noqa: BLE001 - the bindings' errors share no root; step tells
            self._broken = _gone(self.peer.name, str(error))


def _gone(name: str, why: str) -> PeerGoneError:
    return PeerGoneError(f"store {name!r} is gone ({why})", remedy="read another copy; it rejoins")
