"""Moves spans between processes over plain TCP sockets: the portable truth for tests.

It needs no library and no privilege, so it is the fallback between hosts where neither NIXL nor
UCX works, and the yardstick that they are measured against. Each store listens (`tcp_serve.py`)
and reads each of its peers through one connection (`tcp_link.py`). It must not know slots or what
bytes mean.

Unlike the other backends it can end a read early: after its socket is shut down and the receiver
has left the kernel, nothing lands any more. A source needs its CPU to answer, so a read from a
stopped process waits; a dead one ends it at once, a cut network in about five seconds.

Invariants: no read reaches outside of a registered slab (checked here and at the source); a store
that came back under another incarnation is refused by its handshake; off loopback both sides prove
that they know the cluster's token.
"""

from __future__ import annotations

import itertools
import socket
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import msgspec

from hotset.errors import PeerGoneError, TransportError
from hotset.transport.base import (
    Backend,
    PeerInfo,
    PostState,
    Span,
    describe_store,
    other_backend,
    refuse_older,
    refuse_outside,
    registered_twice,
    require_own,
    unpack_metadata,
)
from hotset.transport.handshake import Identity
from hotset.transport.listener import Listener, check_host
from hotset.transport.tcp_link import PURPOSE, Link, Post
from hotset.transport.tcp_serve import MOST_RANGES, serve

if TYPE_CHECKING:
    from collections.abc import Sequence

    from hotset.transport.slab import Slab

SETTLE_S: Final = 0.1
"""How long `connect` waits for the handshake; a slower peer goes on connecting behind it."""
_CLOSE_S: Final = 2.0


class _Place(msgspec.Struct, frozen=True, array_like=True):
    """Where a store listens."""

    host: str
    port: int


# Made at import: msgspec crashes when two threads meet a type for the first time.
_PLACE: Final = msgspec.msgpack.Decoder(_Place)


@dataclass(slots=True)
class _Peer:
    info: PeerInfo
    link: Link


class TcpBackend(Backend):
    """One store's listener and its connections to peers. Called by one thread at a time."""

    name = "tcp"
    notifies = True

    def __init__(self, *, host: str = "127.0.0.1", port: int = 0, token: bytes = b"") -> None:
        """`host` is the address to listen on and to tell peers. Raises ConfigError.

        Off loopback a token is required.
        """
        check_host(host, token=token)
        self._host = host
        self._port = port
        self._token = token
        self._slab: Slab | None = None
        self._listener: Listener | None = None
        self._peers: dict[str, _Peer] = {}
        self._leaving: list[Link] = []
        self._posts: dict[int, tuple[Link, Post]] = {}
        self._numbers = itertools.count(1)
        self.notify = _nobody

    @staticmethod
    def available() -> str:
        """'' when sockets work here, else the remedy."""
        try:
            socket.create_server(("127.0.0.1", 0)).close()
        except OSError as error:
            return f"allow this process to listen on 127.0.0.1 ({error.strerror})"
        return ""

    def register(self, slab: Slab) -> None:
        """Listen for readers of the slab. Raises ConfigError, TransportError."""
        if self._slab is not None:
            raise registered_twice()
        memory = slab.memory
        self._listener = Listener(
            host=self._host,
            port=self._port,
            token=self._token,
            identity=Identity(name=slab.name, incarnation=slab.incarnation),
            purpose=PURPOSE,
            serve=lambda sock: serve(sock, memory),
        )
        self._slab = slab

    def info(self, *, name: str, incarnation: int) -> PeerInfo:
        """Describe this side to peers. Raises TransportError before `register`."""
        slab = require_own(self._slab, name=name, incarnation=incarnation)
        assert self._listener is not None  # noqa: S101 - made before the slab is kept
        host, port = self._listener.address
        return describe_store(
            slab, backend=self.name, metadata=msgspec.msgpack.encode(_Place(host, port))
        )

    def connect(self, peer: PeerInfo) -> None:
        """Start to connect to a peer; replaces an older incarnation, refuses to go back to one.

        Raises TransportError for damaged metadata; PeerGoneError and TransportError when the peer
        or its address turns out wrong within SETTLE_S. Later than that, reads tell.
        """
        known = self._peers.get(peer.name)
        if peer.backend != self.name:
            raise other_backend(peer, self.name)
        refuse_older(peer, known.info if known else None)
        place = _decode(peer)
        if known is not None and _life(known.info) == _life(peer):
            known.info = peer
            return
        slab = self._require_slab()
        self.disconnect(peer.name)
        link = Link(
            Identity(name=peer.name, incarnation=peer.incarnation),
            address=(place.host, place.port),
            token=self._token,
            memory=slab.memory,
            notify=self.notify,
        )
        refusal = link.settle(timeout_s=SETTLE_S)
        if refusal is not None:
            link.leave()
            self._leaving.append(link)
            raise refusal
        self._peers[peer.name] = _Peer(peer, link)

    def disconnect(self, name: str) -> None:
        """Forget a peer now; its connection ends when the last read from it has."""
        self._leaving = [link for link in self._leaving if not link.ended]
        peer = self._peers.pop(name, None)
        if peer is not None:
            peer.link.leave()
            self._leaving.append(peer.link)

    def post(self, peer: str, spans: Sequence[Span], *, lane: int = 0) -> int:  # noqa: ARG002 - one lane
        """Ask for one read; its bytes arrive on the link's thread."""
        entry = self._peers.get(peer)
        if entry is None:
            raise PeerGoneError(f"store {peer!r} is not connected", remedy="connect it first")
        if len(spans) > MOST_RANGES:
            raise TransportError(
                f"a read from {peer!r} has over {MOST_RANGES} spans", remedy="read fewer at once"
            )
        local = self._require_slab().nbytes
        refuse_outside(spans, peer=peer, local=local, remote=entry.info.nbytes)
        handle = next(self._numbers)
        post = Post(
            handle,
            [(span.local_offset, span.nbytes) for span in spans],
            [(span.remote_offset, span.nbytes) for span in spans],
            sum(span.nbytes for span in spans),
        )
        self._posts[handle] = (entry.link, post)
        entry.link.post(post)
        return handle

    def poll(self, handle: int) -> tuple[PostState, str]:
        """State of a posted read."""
        link, post = self._posts[handle]
        if post.state is PostState.PENDING:
            link.flush()
        return post.state, post.error

    def release(self, handle: int) -> None:
        """Free a finished handle."""
        _, post = self._posts.pop(handle)
        assert post.state is not PostState.PENDING, "released in flight"  # noqa: S101 - our own bug

    def abort(self, handle: int) -> None:
        """End a read that nobody waits for: at once, or when the receiver has left the kernel."""
        link, post = self._posts[handle]
        link.abandon(post)

    def close(self) -> None:
        """Hang up on readers and peers, and wait for the threads, two seconds at the most."""
        for name in list(self._peers):
            self.disconnect(name)
        for link in self._leaving:
            link.close()
        if self._listener is not None:
            self._listener.close()
        end = time.monotonic() + _CLOSE_S
        for link in self._leaving:
            link.join(timeout_s=max(0.0, end - time.monotonic()))

    def _require_slab(self) -> Slab:
        if self._slab is None:
            raise TransportError("no slab is registered", remedy="register it first")
        return self._slab


def _nobody() -> None:
    """A backend without an engine has nobody to wake."""


def _decode(peer: PeerInfo) -> _Place:
    place = unpack_metadata(_PLACE, peer)
    if not 0 < place.port < 1 << 16:
        raise TransportError(
            f"the metadata of {peer.name!r} names port {place.port}",
            remedy="ask the store for it anew",
        )
    return place


def _life(info: PeerInfo) -> tuple[object, ...]:
    """What makes another connection necessary when it differs."""
    return info.incarnation, info.backend_metadata, info.nbytes, info.device
