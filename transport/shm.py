"""Reads peers of this host with one copy: maps their slab read-only and copies out of it.

NIXL reaches a process of the same host through the kernel (cross-memory attach), which pins and
maps pages for each read; a mapping made once is about twice as fast and needs nothing of the peer,
not even a progress thread. It must not know NIXL or what to do about peers that it cannot map: that
is `node.py`'s decision.

A peer's memory is found as `place.py` describes: nothing else can be taken for it, and it is sealed
against shrinking, so that no read is ever hit by SIGBUS.

Invariants: a post copies inside the call and holds no GIL meanwhile, so nothing is in flight when
another call comes and unmapping is always safe; nothing of a peer is mapped writable. A mapping
outlives its process: the copies of a dead peer stay readable (blocks are immutable, headers and
checksums are verified) until the engine disconnects it, which also gives its memory back.
"""

from __future__ import annotations

import ctypes
import itertools
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from hotset.errors import PeerGoneError, TransportError
from hotset.transport.base import (
    NO_HANDLE,
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
)
from hotset.transport.mapping import Mapping
from hotset.transport.memory import HostMemory
from hotset.transport.place import decode_place, describe_memory, open_place

if TYPE_CHECKING:
    from collections.abc import Sequence

    from hotset.transport.slab import Slab

_REMEDY: Final = "read this peer over NIXL"


def describe(slab: Slab) -> bytes:
    """Say where a slab is, for `connect`; b'' for device memory, which cannot be mapped."""
    memory = slab.memory
    return describe_memory(memory.fd) if isinstance(memory, HostMemory) else b""


@dataclass(slots=True)
class _Peer:
    """A mapped peer."""

    info: PeerInfo
    memory: Mapping


class ShmBackend(Backend):
    """Copies out of mapped slabs of this host's peers."""

    name = "shm"

    def __init__(self) -> None:
        """Know nobody yet."""
        self._slab: Slab | None = None
        self._peers: dict[str, _Peer] = {}
        self._posts: set[int] = set()
        self._numbers = itertools.count(1)  # for any thread

    def register(self, slab: Slab) -> None:
        """Keep the slab, which must be host memory. Raises TransportError."""
        if self._slab is not None:
            raise registered_twice()
        if slab.device != "cpu":
            raise TransportError(
                f"store {slab.name!r} is on {slab.device}, which cannot be mapped",
                remedy="use the NIXL backend for device memory",
            )
        self._slab = slab

    def info(self, *, name: str, incarnation: int) -> PeerInfo:
        """Describe this side to peers. Raises TransportError before `register`."""
        slab = require_own(self._slab, name=name, incarnation=incarnation)
        return describe_store(slab, backend=self.name, metadata=describe(slab))

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
        place = decode_place(peer.backend_metadata, peer.name)
        if place.nbytes != peer.nbytes:
            raise TransportError(
                f"the metadata of {peer.name!r} tells of {place.nbytes} bytes, not {peer.nbytes}",
                remedy="ask the store for it anew",
            )
        handle = open_place(place, peer.name, remedy=_REMEDY)
        try:
            memory = Mapping(handle, place.nbytes, writable=False)
        except OSError as error:
            raise TransportError(
                f"the memory of store {peer.name!r} cannot be mapped ({error.strerror})",
                remedy=_REMEDY,
            ) from error
        finally:
            os.close(handle)
        self.disconnect(peer.name)
        self._peers[peer.name] = _Peer(peer, memory)

    def disconnect(self, name: str) -> None:
        """Unmap a peer; nothing is ever in flight between two calls."""
        peer = self._peers.pop(name, None)
        if peer is not None:
            peer.memory.close()

    def post(self, peer: str, spans: Sequence[Span], *, lane: int = 0) -> int:  # noqa: ARG002 - all lanes are alike
        """Copy all spans before returning, with the GIL released."""
        self.post_in_call(peer, spans)
        handle = next(self._numbers)
        self._posts.add(handle)
        return handle

    def post_in_call(self, peer: str, spans: Sequence[Span], *, lane: int = 0) -> int:  # noqa: ARG002 - all lanes are alike
        """Copy all spans; nothing is left to release."""
        remote, slab = self.window(peer, spans), self._slab
        assert slab is not None  # noqa: S101 - asked there
        local, copy = slab.base_address, ctypes.memmove
        for span in spans:
            copy(local + span.local_offset, remote + span.remote_offset, span.nbytes)
        return NO_HANDLE

    def window(self, peer: str, spans: Sequence[Span], *, lane: int = 0) -> int:  # noqa: ARG002 - all lanes are alike
        """Address of a mapped peer. Raises as `post`."""
        entry, slab = self._peers.get(peer), self._slab
        if entry is None or slab is None:
            raise PeerGoneError(f"store {peer!r} is not connected", remedy="connect it first")
        refuse_outside(spans, peer=peer, local=slab.nbytes, remote=entry.info.nbytes)
        return entry.memory.address

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
