"""Chooses the way to each peer: a mapping for peers of this host, NIXL for all others.

The choice is made when a peer connects and holds for that incarnation. A peer of this host that
cannot be mapped (another user, another container) is read over NIXL; `refusals` says why for each
such peer, and the first reason is told once. It must not know how either way moves bytes.

Invariants: a peer is connected through exactly one of the two; a handle is polled and released
where it was posted; an older incarnation is refused whichever way the newer one took.
"""

from __future__ import annotations

import itertools
import logging
from dataclasses import replace
from typing import TYPE_CHECKING, Final

import msgspec

from hotset.errors import PeerGoneError, TransportError
from hotset.transport.base import (
    NO_HANDLE,
    Backend,
    PeerInfo,
    PostState,
    other_backend,
    refuse_older,
    unpack_metadata,
)
from hotset.transport.nixl import NixlBackend
from hotset.transport.place import is_here
from hotset.transport.shm import ShmBackend, describe

if TYPE_CHECKING:
    from collections.abc import Sequence

    from hotset.transport.base import Span
    from hotset.transport.slab import Slab

_log = logging.getLogger(__name__)


class _Metadata(msgspec.Struct, frozen=True, array_like=True):
    """Both descriptions of a store; `shm` is empty for device memory."""

    nixl: bytes
    shm: bytes


# Made at import: msgspec crashes when two threads meet a type for the first time.
_METADATA: Final = msgspec.msgpack.Decoder(_Metadata)


class NodeBackend(Backend):
    """Shared memory within the host, NIXL between hosts."""

    name = "node"
    error_grace_ns = NixlBackend.error_grace_ns

    def __init__(self, *, shm: bool = True) -> None:
        """`shm` False reads peers of this host over NIXL as well."""
        self.refusals: dict[str, str] = {}
        self._shm = ShmBackend() if shm else None
        self._nixl = NixlBackend()
        self._description = b""
        self._peers: dict[str, PeerInfo] = {}
        self._ways: dict[str, Backend] = {}
        self._posts: dict[int, tuple[Backend, int]] = {}
        self._numbers = itertools.count(1)  # for any thread

    @staticmethod
    def available() -> str:
        """'' when NIXL can be used here, else the remedy."""
        return NixlBackend.available()

    def register(self, slab: Slab) -> None:
        """Register the slab with both. Raises DependencyError, TransportError."""
        self._nixl.register(slab)
        if slab.device != "cpu":
            self._shm = None
        if self._shm is not None:
            self._shm.register(slab)
        self._description = describe(slab)

    @property
    def fault(self) -> str:
        """'' while peers of other hosts can read this store."""
        return self._nixl.fault

    def info(self, *, name: str, incarnation: int) -> PeerInfo:
        """Describe this side for either way."""
        info = self._nixl.info(name=name, incarnation=incarnation)
        metadata = _Metadata(nixl=info.backend_metadata, shm=self._description)
        return replace(info, backend=self.name, backend_metadata=msgspec.msgpack.encode(metadata))

    def way(self, peer: str) -> str:
        """Name of the backend that a connected peer is read through; '' for an unknown one."""
        backend = self._ways.get(peer)
        return "" if backend is None else backend.name

    def connect(self, peer: PeerInfo) -> None:
        """Make a peer readable the shortest way. A peer of the plain NIXL backend is welcome."""
        known = self._peers.get(peer.name)
        refuse_older(peer, known)
        if peer.backend == self.name:
            metadata = unpack_metadata(_METADATA, peer)
        elif peer.backend == self._nixl.name:
            metadata = _Metadata(nixl=peer.backend_metadata, shm=b"")
        else:
            raise other_backend(peer, self.name)
        if known == peer:
            if self._ways[peer.name] is self._nixl:  # which may have lost it
                self._connect_nixl(peer, metadata)
            return
        way = self._connect(peer, metadata)
        former = self._ways.get(peer.name)
        if former is not None and former is not way:
            former.disconnect(peer.name)
        self._peers[peer.name], self._ways[peer.name] = peer, way

    def _connect(self, peer: PeerInfo, metadata: _Metadata) -> Backend:
        self.refusals.pop(peer.name, None)
        if self._shm is not None and is_here(metadata.shm, peer.name):
            try:
                self._shm.connect(
                    replace(peer, backend=self._shm.name, backend_metadata=metadata.shm)
                )
            except TransportError as error:  # also when it seems gone: NIXL finds out for sure
                self._refuse(peer.name, error.what)
            else:
                return self._shm
        self._connect_nixl(peer, metadata)
        return self._nixl

    def _connect_nixl(self, peer: PeerInfo, metadata: _Metadata) -> None:
        self._nixl.connect(replace(peer, backend=self._nixl.name, backend_metadata=metadata.nixl))

    def _refuse(self, peer: str, reason: str) -> None:
        if not self.refusals:
            _log.warning("peers of this host are read over NIXL: %s", reason)
        self.refusals[peer] = reason

    def disconnect(self, name: str) -> None:
        """Forget a peer."""
        self._peers.pop(name, None)
        self.refusals.pop(name, None)
        way = self._ways.pop(name, None)
        if way is not None:
            way.disconnect(name)

    def post(self, peer: str, spans: Sequence[Span], *, lane: int = 0) -> int:
        """Start one read the peer's way."""
        way = self._way(peer)
        return self._note(way, way.post(peer, spans, lane=lane))

    def post_in_call(self, peer: str, spans: Sequence[Span], *, lane: int = 0) -> int:
        """Read the peer's way in one call."""
        way = self._way(peer)
        inner = way.post_in_call(peer, spans, lane=lane)
        return inner if inner == NO_HANDLE else self._note(way, inner)

    def _note(self, way: Backend, inner: int) -> int:
        handle = next(self._numbers)
        self._posts[handle] = (way, inner)
        return handle

    def _way(self, peer: str) -> Backend:
        way = self._ways.get(peer)
        if way is None:
            raise PeerGoneError(f"store {peer!r} is not connected", remedy="connect it first")
        return way

    def copies_in_call(self, peer: str) -> bool:
        """Ask the way that the peer is read."""
        way = self._ways.get(peer)
        return way is not None and way.copies_in_call(peer)

    def has_second_lane(self, peer: str) -> bool:
        """Ask the way that the peer is read."""
        return self._ways[peer].has_second_lane(peer)

    def window(self, peer: str, spans: Sequence[Span], *, lane: int = 0) -> int:
        """Ask the way that the peer is read."""
        return self._way(peer).window(peer, spans, lane=lane)

    def poll(self, handle: int) -> tuple[PostState, str]:
        """State of a posted read."""
        way, inner = self._posts[handle]
        return way.poll(inner)

    def release(self, handle: int) -> None:
        """Free a finished handle."""
        way, inner = self._posts.pop(handle)
        way.release(inner)

    def close(self) -> None:
        """Unmap peers and drop the agent; the engine has seen to it that nothing is in flight."""
        if self._shm is not None:
            self._shm.close()
        self._nixl.close()
