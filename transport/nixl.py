"""Moves spans between processes with NIXL over UCX: shared memory, TCP, RDMA or CUDA links.

One agent makes the slab readable to peers (`nixl_agent.py`), one or two others read them
(`nixl_lane.py`); the second is made when it is first of use. It must not know what reads
are for.

UCX may abort in the thread that serves reads; then it is parked (`abort_guard.py`), and `fault`
says so: what it was reading goes on, nobody can read it.

Invariants: an older incarnation never replaces a newer one; handles are unique over all lanes.
"""

from __future__ import annotations

import logging
import threading
from typing import TYPE_CHECKING, Any

from hotset.errors import DependencyError, PeerGoneError, TransportError
from hotset.transport.abort_guard import ABORT_GUARD, NewThreads, name_thread, thread_name
from hotset.transport.base import (
    NO_HANDLE,
    Backend,
    PeerInfo,
    PostState,
    Span,
    describe_store,
    other_backend,
    refuse_older,
    registered_twice,
    require_own,
)
from hotset.transport.nixl_agent import agent_name, load_bindings, make_agent
from hotset.transport.nixl_lane import Lane, Read

if TYPE_CHECKING:
    from collections.abc import Sequence

    from hotset.transport.slab import Slab

SERVER_THREAD = "nixl-server"
_UCX_ASYNC = "async"  # UCX's thread for events of all agents: not the one that answers reads
_log = logging.getLogger(__name__)
_parked: list[Any] = []  # agents whose thread sleeps for good: to destroy one would wait for it


class NixlBackend(Backend):
    """NIXL agents with the UCX backend, for one slab."""

    name = "nixl"
    error_grace_ns = 100_000_000  # UCX purges a broken connection's requests within this

    def __init__(self) -> None:
        """Load nothing yet; `register` creates the agents."""
        self._slab: Slab | None = None
        self._nixl: Any = None
        self._agent: Any = None
        self._server = 0  # the thread that answers reads over TCP
        self._peers: dict[str, PeerInfo] = {}
        self._lanes: list[Lane] = []
        self._reads: dict[int, Read] = {}
        self._making = False  # the second lane: made once, or in vain

    @staticmethod
    def available() -> str:
        """'' when NIXL can be used here, else the remedy."""
        try:
            load_bindings(device="cpu")
        except DependencyError as error:
            return error.remedy
        return ""

    def register(self, slab: Slab) -> None:
        """Create the agents and register the slab. Raises DependencyError, TransportError."""
        if self._slab is not None:
            raise registered_twice()
        self._nixl = load_bindings(device=slab.device)
        name = agent_name(slab.name, slab.incarnation)
        with NewThreads() as threads:
            self._agent = make_agent(self._nixl, name, slab, is_read=True)
        found = [thread for thread in threads.found if thread_name(thread) != _UCX_ASYNC]
        if len(found) == 1 and ABORT_GUARD.watch(found[0]):
            self._server = found[0]
            name_thread(self._server, SERVER_THREAD)
        self._lanes = [Lane(self._nixl, slab, number=0)]
        self._slab = slab

    @property
    def fault(self) -> str:
        """'' while peers can read this store."""
        if self._server and ABORT_GUARD.is_parked(self._server):
            return (
                "UCX aborted in the thread that serves reads: nobody can read this store any more"
            )
        return ""

    def info(self, *, name: str, incarnation: int) -> PeerInfo:
        """Describe this side to peers. Raises TransportError before `register`."""
        slab = require_own(self._slab, name=name, incarnation=incarnation)
        return describe_store(slab, backend=self.name, metadata=bytes(self._agent.getLocalMD()))

    def connect(self, peer: PeerInfo) -> None:
        """Load a peer's metadata; replaces an older incarnation, refuses to go back to one."""
        known = self._peers.get(peer.name)
        if peer.backend != self.name:
            raise other_backend(peer, self.name)
        refuse_older(peer, known)
        if known is not None and known != peer:
            self.disconnect(peer.name)
        self._lanes[0].connect(peer)  # others when they read it; a lost one: somebody knows better
        self._peers[peer.name] = peer

    def disconnect(self, name: str) -> None:
        """Forget a peer now, its metadata when the last read from it has ended."""
        if self._peers.pop(name, None) is not None:
            for lane in self._lanes:
                lane.disconnect(name)

    def copies_in_call(self, peer: str) -> bool:
        """Whether the last long read from a peer was done when its post returned."""
        return bool(self._lanes) and self._lanes[0].copies_in_call(peer)

    def has_second_lane(self, peer: str) -> bool:
        """Whether there is one; the first to ask has it made meanwhile, which takes 20 to 50 ms."""
        if len(self._lanes) > 1:
            return self.copies_in_call(peer)
        if not self._making:
            self._making = True
            threading.Thread(target=self._make_second_lane, daemon=True, name="nixl-lane").start()
        return False

    def _make_second_lane(self) -> None:
        assert self._slab is not None  # noqa: S101 - peers are connected after it is registered
        try:
            lane = Lane(self._nixl, self._slab, number=1)
        except TransportError as error:
            _log.warning("large reads keep to one thread: %s", error)
            return
        self._lanes.append(lane)

    def post(self, peer: str, spans: Sequence[Span], *, lane: int = 0) -> int:
        """Start one read. Shared memory copies inside this call, with the GIL released."""
        read = self._lane(peer, lane).post(peer, spans)
        self._reads[read.request] = read
        return read.request

    def post_in_call(self, peer: str, spans: Sequence[Span], *, lane: int = 0) -> int:
        """Read, and release what is done when NIXL returns."""
        read = self._lane(peer, lane).post_in_call(peer, spans)
        if read is None:
            return NO_HANDLE
        self._reads[read.request] = read
        return read.request

    def _lane(self, peer: str, number: int) -> Lane:
        """The lane, which knows the peer."""
        info, slab = self._peers.get(peer), self._slab
        if info is None or slab is None:
            raise PeerGoneError(f"store {peer!r} is not connected", remedy="connect it first")
        lane = self._lanes[number]
        if number:
            lane.connect(info, rejoin=False)
        return lane

    def poll(self, handle: int) -> tuple[PostState, str]:
        """State of a posted read."""
        read = self._reads[handle]
        return read.lane.poll(read)

    def release(self, handle: int) -> None:
        """Free a finished handle."""
        read = self._reads.pop(handle)
        read.lane.release(read)

    def close(self) -> None:
        """Drop the agents; the engine has seen to it that nothing is in flight."""
        for lane in self._lanes:
            lane.close()
        self._lanes.clear()
        if self.fault:
            _parked.append(self._agent)
        self._agent = None
