"""One agent that reads peers into a store's slab: a lane. A store has one, or two.

Two threads that read through one agent take turns inside UCX; with an agent each they do not, and
on shared memory two copy 1.6 times as fast as one. A lane has no progress thread: who waits for a
read polls it. It must not know other lanes, nor who calls it: a lock makes that one thread at a
time.

Invariants: a handle is released only after done or error; a peer's metadata is dropped only when no
read of this lane from it is in flight.

Descriptors are made anew for each post, as plain tuples. That adds 3 us to NIXL's own calls for one
span and 23 for 64, where NumPy tables added 17 and 31. NIXL's prepared lists (`makeXferReq`) and
posting a finished request again would save 2 and 3 us more of a post of one span, and 10 of 70 us
of one of 64; but a prepared descriptor is read whole, so they serve neither pieces of a block nor
blocks shorter than their slot, and a request serves one pair of slots. Not worth it next to 170 us
of copying for 1 MiB.
"""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from hotset.errors import PeerGoneError, TransportError
from hotset.transport.base import PeerInfo, PostState, Span, outside
from hotset.transport.nixl_agent import agent_name, device_index, make_agent, memory_kind

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from hotset.transport.slab import Slab

RETRY_NS: Final = 15_000_000_000  # a cluster strikes off a dead store, or starts it anew, sooner
MOST_DOUBLINGS: Final = 4
CLOSING_TURNS: Final = 20
JUDGED_BYTES: Final = 256 << 10  # of a post that shows whether reads from a peer copy in the call
JUDGED_POSTS: Final = 4  # so many: over TCP one may happen to be done
_REJOINS: Final = "read another copy; it will rejoin"

_Descriptor = tuple[int, int, int]  # address, bytes, device: NIXL's own form


@dataclass(slots=True)
class _Peer:
    """A remote agent whose metadata is loaded."""

    agent: str
    info: PeerInfo
    in_flight: int = 0
    leaving: bool = False
    lost: bool = False  # NIXL gave the connection up, and would for ever answer so
    reloads: int = 0  # since it last answered
    retry_ns: int = 0  # not before this is it tried anew
    in_call: int = 0  # long posts in a row that were done when they returned


@dataclass(slots=True)
class Read:
    """A posted read; `state` is final once it is not PENDING."""

    request: int
    lane: Lane
    peer: _Peer
    state: PostState = PostState.PENDING
    error: str = ""


class Lane:
    """A reading agent. Any thread may call it; each call holds the lock."""

    def __init__(self, nixl: Any, slab: Slab, *, number: int) -> None:
        """Create the agent. Raises TransportError."""
        self._nixl = nixl
        self._slab = slab
        name = f"{agent_name(slab.name, slab.incarnation)}/lane{number}"
        self._agent = make_agent(nixl, name, slab, is_read=False)
        self._memory = memory_kind(nixl, slab.device)
        self._device = device_index(slab.device)
        self._lock = threading.Lock()
        self._peers: dict[str, _Peer] = {}
        self._leaving: dict[str, _Peer] = {}

    def copies_in_call(self, name: str) -> bool:
        """Whether the last long reads from a peer were done when their posts returned."""
        peer = self._peers.get(name)
        return peer is not None and peer.in_call >= JUDGED_POSTS

    # --- peers ------------------------------------------------------------------------------------

    def connect(self, peer: PeerInfo, *, rejoin: bool = True) -> None:
        """Load a peer's metadata, in place of another incarnation's; a lost one's if `rejoin`.

        Raises TransportError when it is damaged, PeerGoneError when the peer does not answer.
        """
        with self._lock:
            known = self._peers.get(peer.name)
            if known is not None and known.info == peer:
                if rejoin and known.lost and not known.in_flight:
                    self._reload(known)
                return
            wanted = agent_name(peer.name, peer.incarnation)
            self._forget(peer.name)
            entry = self._leaving.pop(wanted, None)
            if entry is None:
                self._load(wanted, peer.backend_metadata)
                entry = _Peer(wanted, peer)
            entry.leaving, entry.info = False, peer
            self._peers[peer.name] = entry

    def disconnect(self, name: str) -> None:
        """Forget a peer now, its metadata when the last read from it has ended."""
        with self._lock:
            self._forget(name)

    def _forget(self, name: str) -> None:
        peer = self._peers.pop(name, None)
        if peer is None:
            return
        peer.leaving = True
        self._leaving[peer.agent] = peer
        self._drop_if_idle(peer)

    def _load(self, wanted: str, metadata: bytes) -> None:
        try:
            loaded = self._agent.loadRemoteMD(metadata)
        except Exception as error:  # NIXL's errors share no root but Exception
            raise TransportError(
                f"the metadata of {wanted} is damaged ({error})", remedy="ask the store for it anew"
            ) from error
        loaded = loaded.decode() if isinstance(loaded, bytes) else str(loaded)
        if loaded != wanted:
            self._invalidate(loaded)
            raise TransportError(
                f"the metadata of {wanted} is that of {loaded}", remedy="ask the store for it anew"
            )

    def _lose(self, peer: _Peer) -> None:
        if not peer.lost:
            peer.lost, peer.in_call = True, 0
            peer.retry_ns = time.monotonic_ns() + (RETRY_NS << min(peer.reloads, MOST_DOUBLINGS))

    def _reload(self, peer: _Peer) -> None:
        """Load a lost peer's metadata anew. Raises PeerGoneError, and leaves it lost.

        UCX leaks a socket when the address refuses, so a dead peer must not be tried at every read.
        """
        peer.reloads += 1
        peer.retry_ns = time.monotonic_ns() + (RETRY_NS << min(peer.reloads, MOST_DOUBLINGS))
        self._invalidate(peer.agent)
        try:
            self._load(peer.agent, peer.info.backend_metadata)
        except TransportError as error:
            what = f"store {peer.info.name!r} is gone ({error.what})"
            raise PeerGoneError(what, remedy=_REJOINS) from error
        peer.lost = False

    def _drop_if_idle(self, peer: _Peer) -> None:
        if peer.leaving and peer.in_flight == 0:
            self._leaving.pop(peer.agent, None)
            self._invalidate(peer.agent)

    def _invalidate(self, agent: str) -> None:
        """Drop a peer's metadata. UCX closes its sockets only while somebody drives it."""
        self._agent.invalidateRemoteMD(agent)
        for _ in range(CLOSING_TURNS):
            self._agent.getNotifs({})

    # --- reads ------------------------------------------------------------------------------------

    def post(self, name: str, spans: Sequence[Span]) -> Read:
        """Start one read. Shared memory copies inside this call, with the GIL released.

        Raises PeerGoneError, TransportError; then nothing is in flight.
        """
        with self._lock:
            return self._post(name, spans)

    def post_in_call(self, name: str, spans: Sequence[Span]) -> Read | None:
        """Read as `post`; None when it is done and released already."""
        with self._lock:
            read = self._post(name, spans)
            if read.state is PostState.PENDING:
                self._advance(read, self._agent.getXferStatus)
            if read.state is not PostState.DONE:
                return read
            self._release(read)
            return None

    def _post(self, name: str, spans: Sequence[Span]) -> Read:
        peer = self._peers.get(name)
        if peer is None:
            raise PeerGoneError(f"store {name!r} is not connected", remedy="connect it first")
        near, far = self._descriptors(peer, spans)
        if peer.lost:
            if peer.in_flight or time.monotonic_ns() < peer.retry_ns:
                raise PeerGoneError(f"store {name!r} was lost", remedy=_REJOINS)
            self._reload(peer)
        nixl, agent = self._nixl, self._agent
        try:
            request: int = agent.createXferReq(
                nixl.NIXL_READ,
                nixl.nixlXferDList(self._memory, near),
                nixl.nixlXferDList(memory_kind(nixl, peer.info.device), far),
                peer.agent,
            )
        except Exception as error:  # NIXL's errors share no root but Exception
            raise self._typed(error, name) from error
        read = Read(request, self, peer)
        peer.in_flight += 1
        self._advance(read, agent.postXferReq)
        if sum(span[1] for span in near) >= JUDGED_BYTES:
            peer.in_call = peer.in_call + 1 if read.state is PostState.DONE else 0
        return read

    def poll(self, read: Read) -> tuple[PostState, str]:
        """State of a posted read."""
        if read.state is PostState.PENDING:
            with self._lock:
                self._advance(read, self._agent.getXferStatus)
        return read.state, read.error

    def release(self, read: Read) -> None:
        """Free the handle of a finished read."""
        assert read.state is not PostState.PENDING, "released in flight"  # noqa: S101 - our own bug
        with self._lock:
            self._release(read)

    def _release(self, read: Read) -> None:
        try:  # noqa: SIM105 - a context manager costs a microsecond
            self._agent.releaseXferReq(read.request)
        except self._nixl.nixlRemoteDisconnectError:  # told by poll; freed
            pass
        read.peer.in_flight -= 1
        self._drop_if_idle(read.peer)

    def close(self) -> None:
        """Drop the agent; nothing is in flight."""
        self._agent = None

    def _descriptors(
        self, peer: _Peer, spans: Sequence[Span]
    ) -> tuple[list[_Descriptor], list[_Descriptor]]:
        """Both sides of a read in addresses. Refuses spans outside the slabs before NIXL does."""
        near: list[_Descriptor] = []
        far: list[_Descriptor] = []
        slab, info = self._slab, peer.info
        here, there, far_device = slab.base_address, info.base_address, device_index(info.device)
        room, far_room = slab.nbytes, info.nbytes
        for span in merge(spans):
            local, remote, nbytes = span.local_offset, span.remote_offset, span.nbytes
            if local + nbytes > room or remote + nbytes > far_room or local | remote | nbytes < 0:
                near.clear()
                break
            near.append((here + local, nbytes, self._device))
            far.append((there + remote, nbytes, far_device))
        if not near:
            raise outside(info.name, local=room, remote=far_room)
        return near, far

    def _advance(self, read: Read, ask: Callable[[int], Any]) -> None:
        try:
            status = ask(read.request)
        except Exception as error:  # noqa: BLE001 - NIXL's errors share no root; told as ERROR
            read.state, read.error = PostState.ERROR, str(self._typed(error, read.peer.info.name))
            self._lose(read.peer)
            return
        if status == self._nixl.NIXL_SUCCESS:
            read.state = PostState.DONE
            read.peer.reloads = 0
        elif status != self._nixl.NIXL_IN_PROG:
            read.state, read.error = PostState.ERROR, f"NIXL reports {status}"

    def _typed(self, error: Exception, peer: str) -> TransportError:
        gone = (self._nixl.nixlRemoteDisconnectError, self._nixl.nixlNotFoundError)
        if isinstance(error, gone):
            return PeerGoneError(f"store {peer!r} is gone ({error})", remedy=_REJOINS)
        return TransportError(f"a read from {peer!r} failed ({error})", remedy="read another copy")


def merge(spans: Sequence[Span]) -> list[Span]:
    """Join spans that are adjacent on both sides; NIXL's own path does not."""
    if len(spans) == 1:
        return list(spans)
    merged: list[Span] = []
    for span in spans:
        last = merged[-1] if merged else None
        if (
            last is not None
            and last.local_offset + last.nbytes == span.local_offset
            and last.remote_offset + last.nbytes == span.remote_offset
        ):
            merged[-1] = Span(
                local_offset=last.local_offset,
                remote_offset=last.remote_offset,
                nbytes=last.nbytes + span.nbytes,
            )
        else:
            merged.append(span)
    return merged
