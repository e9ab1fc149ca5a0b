"""Moves spans between processes with NIXL over UCX: shared memory, TCP, RDMA or CUDA links.

It drives NIXL's bindings rather than its Python wrapper, for two measured reasons: the wrapper
sets the progress thread's delay to 0, which burns a core per agent, and its handles release
themselves when collected, although data of a released read keeps landing. A peer that is read
needs its progress thread. That thread sleeps until UCX has an event; the delay is only how often it
looks besides, in case UCX has lost one: 1 ms costs 2 % of a core and 5 ms 0.5 %, at one latency.

Invariants: the agent's name is `store:incarnation`, so a restarted store is never taken for its
former self; a handle is released only after done or error; a peer's metadata is dropped only when
no read from it is in flight. UCX reads its environment when it is loaded: defaults are set here,
before that, and only where the user has set nothing.

Descriptors are made anew for each post, as plain tuples. That adds 3 us to NIXL's own calls for one
span and 23 for 64, where NumPy tables added 17 and 31. NIXL's prepared lists (`makeXferReq`) and
posting a finished request again would save 2 and 3 us more of a post of one span, and 10 of 70 us
of one of 64; but a prepared descriptor is read whole, so they serve neither pieces of a block nor
blocks shorter than their slot, and a request serves one pair of slots. Not worth it next to 170 us
of copying for 1 MiB.
"""

from __future__ import annotations

import importlib
import os
import sys
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from hotset.errors import DependencyError, PeerGoneError, TransportError
from hotset.transport.base import (
    Backend,
    PeerInfo,
    PostState,
    Span,
    describe_store,
    other_backend,
    outside,
    refuse_older,
    registered_twice,
    require_own,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from hotset.transport.slab import Slab

PROGRESS_DELAY_US: Final = 5000
UCX_DEFAULTS: Final = {
    "UCX_TCP_TX_SEG_SIZE": "256k",  # 3x the bandwidth of TCP reads
    "UCX_TCP_RX_SEG_SIZE": "256k",
    "UCX_TCP_SNDBUF": "4m",
    "UCX_TCP_RCVBUF": "4m",
    "UCX_TCP_KEEPIDLE": "2s",  # a read over a dead network ends in about 5 s
    "UCX_TCP_KEEPINTVL": "1s",
    "UCX_TCP_KEEPCNT": "3",
}
RETRY_NS: Final = 5_000_000_000  # longer than a cluster needs to strike off a dead store
MOST_DOUBLINGS: Final = 4
_REJOINS: Final = "read another copy; it will rejoin"
_REMEDY: Final = "pip install nixl"
_WHEELS: Final = ("nixl_cu13", "nixl_cu12")
NIXL_MODULES: Final = tuple(f"{name}._bindings" for name in ("nixl", *_WHEELS))
_OTHER_UCX: Final = ("ucxx", "ucp")

_Descriptor = tuple[int, int, int]  # address, bytes, device: NIXL's own form


def _bindings(*, device: str) -> Any:
    """NIXL's extension module, loaded once, after UCX's defaults are in the environment.

    `import nixl` chooses the wheel that fits CUDA and imports torch to find out (1 s, 250 MB). A
    store in host memory needs no CUDA, so there the first wheel that is installed will do.
    """
    if any(name in sys.modules for name in _OTHER_UCX):  # two UCX in one process crash
        raise DependencyError(
            "NIXL cannot be used in a process that has loaded ucxx or ucx-py",
            remedy="use NIXL and ucx in processes of their own",
        )
    for name, value in UCX_DEFAULTS.items():
        os.environ.setdefault(name, value)
    if device == "cpu" and "nixl" not in sys.modules:
        for wheel in _WHEELS:
            try:
                return importlib.import_module(f"{wheel}._bindings")
            except ImportError:
                continue
    try:
        return importlib.import_module("nixl._bindings")
    except ImportError as error:
        raise DependencyError(f"NIXL cannot be loaded ({error})", remedy=_REMEDY) from error


@dataclass(slots=True)
class _Peer:
    """A remote agent whose metadata is loaded."""

    agent: str
    info: PeerInfo
    memory: Any
    device: int
    in_flight: int = 0
    leaving: bool = False
    lost: bool = False  # NIXL gave the connection up, and would for ever answer so
    reloads: int = 0  # since it last answered
    retry_ns: int = 0  # not before this is it tried anew


@dataclass(slots=True)
class _Post:
    """A posted read; `state` is final once it is not PENDING."""

    request: int
    peer: _Peer
    state: PostState = PostState.PENDING
    error: str = ""


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


class NixlBackend(Backend):
    """One NIXL agent with the UCX backend, for one slab. Called by one thread at a time."""

    name = "nixl"
    error_grace_ns = 100_000_000  # UCX purges a broken connection's requests within this

    def __init__(self) -> None:
        """Load nothing yet; `register` creates the agent."""
        self._slab: Slab | None = None
        self._agent: Any = None
        self._nixl: Any = None
        self._memory: Any = None
        self._device = 0
        self._peers: dict[str, _Peer] = {}
        self._leaving: dict[str, _Peer] = {}
        self._posts: dict[int, _Post] = {}

    @staticmethod
    def available() -> str:
        """'' when NIXL can be used here, else the remedy."""
        try:
            _bindings(device="cpu")
        except DependencyError as error:
            return error.remedy
        return ""

    def register(self, slab: Slab) -> None:
        """Create the agent and register the slab. Raises DependencyError, TransportError."""
        if self._slab is not None:
            raise registered_twice()
        nixl = _bindings(device=slab.device)
        config = nixl.nixlAgentConfig()
        config.useProgThread = True
        config.pthrDelay = PROGRESS_DELAY_US
        config.syncMode = nixl.NIXL_THREAD_SYNC_STRICT
        self._device = _device_index(slab.device)
        self._memory = nixl.DRAM_SEG if slab.device == "cpu" else nixl.VRAM_SEG
        try:
            agent = nixl.nixlAgent(_agent_name(slab.name, slab.incarnation), config)
            backend = agent.createBackend("UCX", {})
            region = [(slab.base_address, slab.nbytes, self._device, "")]
            agent.registerMem(nixl.nixlRegDList(self._memory, region), [backend])
        except Exception as error:  # NIXL's errors share no root but Exception
            raise TransportError(
                f"store {slab.name!r} cannot register {slab.nbytes} bytes with NIXL ({error})",
                remedy="check UCX_TLS and UCX_NET_DEVICES, and `ulimit -l` for RDMA",
            ) from error
        self._nixl, self._agent, self._slab = nixl, agent, slab

    def info(self, *, name: str, incarnation: int) -> PeerInfo:
        """Describe this side to peers. Raises TransportError before `register`."""
        slab = require_own(self._slab, name=name, incarnation=incarnation)
        return describe_store(slab, backend=self.name, metadata=bytes(self._agent.getLocalMD()))

    def connect(self, peer: PeerInfo) -> None:
        """Load a peer's metadata; replaces an older incarnation, refuses to go back to one."""
        known = self._peers.get(peer.name)
        if known is not None and known.info == peer:
            if known.lost and not known.in_flight:  # it was the network, and somebody knows better
                self._reload(known)
            return
        if peer.backend != self.name:
            raise other_backend(peer, self.name)
        refuse_older(peer, known.info if known else None)
        wanted = _agent_name(peer.name, peer.incarnation)
        self.disconnect(peer.name)
        returning = self._leaving.pop(wanted, None)
        if returning is None:
            self._load(wanted, peer.backend_metadata)
        memory = self._nixl.DRAM_SEG if peer.device == "cpu" else self._nixl.VRAM_SEG
        entry = _Peer(wanted, peer, memory, _device_index(peer.device))
        if returning is not None:
            returning.leaving = False
            returning.info = peer
            entry = returning
        self._peers[peer.name] = entry

    def _load(self, wanted: str, metadata: bytes) -> None:
        try:
            loaded = self._agent.loadRemoteMD(metadata)
        except Exception as error:  # NIXL's errors share no root but Exception
            raise TransportError(
                f"the metadata of {wanted} is damaged ({error})", remedy="ask the store for it anew"
            ) from error
        loaded = loaded.decode() if isinstance(loaded, bytes) else str(loaded)
        if loaded != wanted:
            self._agent.invalidateRemoteMD(loaded)
            raise TransportError(
                f"the metadata of {wanted} is that of {loaded}", remedy="ask the store for it anew"
            )

    def disconnect(self, name: str) -> None:
        """Forget a peer now, its metadata when the last read from it has ended."""
        peer = self._peers.pop(name, None)
        if peer is None:
            return
        peer.leaving = True
        self._leaving[peer.agent] = peer
        self._drop_if_idle(peer)

    def post(self, peer: str, spans: Sequence[Span]) -> int:
        """Start one read. Shared memory copies inside this call, with the GIL released."""
        entry = self._peers.get(peer)
        slab = self._slab
        if entry is None or slab is None:
            raise PeerGoneError(f"store {peer!r} is not connected", remedy="connect it first")
        near, far = self._descriptors(entry, slab, spans)
        if entry.lost:
            if entry.in_flight or time.monotonic_ns() < entry.retry_ns:
                raise PeerGoneError(f"store {peer!r} was lost", remedy=_REJOINS)
            self._reload(entry)
        nixl, agent = self._nixl, self._agent
        try:
            request: int = agent.createXferReq(
                nixl.NIXL_READ,
                nixl.nixlXferDList(self._memory, near),
                nixl.nixlXferDList(entry.memory, far),
                entry.agent,
            )
        except Exception as error:  # NIXL's errors share no root but Exception
            raise self._typed(error, peer) from error
        post = _Post(request, entry)
        entry.in_flight += 1
        self._posts[request] = post
        self._advance(post, agent.postXferReq)
        return request

    def poll(self, handle: int) -> tuple[PostState, str]:
        """State of a posted read."""
        post = self._posts[handle]
        if post.state is PostState.PENDING:
            self._advance(post, self._agent.getXferStatus)
        return post.state, post.error

    def release(self, handle: int) -> None:
        """Free a finished handle."""
        post = self._posts.pop(handle)
        assert post.state is not PostState.PENDING, "released in flight"  # noqa: S101 - our own bug
        try:  # noqa: SIM105 - a context manager costs a microsecond
            self._agent.releaseXferReq(handle)
        except self._nixl.nixlRemoteDisconnectError:  # told by poll; freed
            pass
        post.peer.in_flight -= 1
        self._drop_if_idle(post.peer)

    def close(self) -> None:
        """Drop the agent; the engine has seen to it that nothing is in flight."""
        self._agent = None

    def _descriptors(
        self, peer: _Peer, slab: Slab, spans: Sequence[Span]
    ) -> tuple[list[_Descriptor], list[_Descriptor]]:
        """Both sides of a read in addresses. Refuses spans outside the slabs before NIXL does."""
        near: list[_Descriptor] = []
        far: list[_Descriptor] = []
        here, there = slab.base_address, peer.info.base_address
        room, far_room = slab.nbytes, peer.info.nbytes
        for span in merge(spans):
            local, remote, nbytes = span.local_offset, span.remote_offset, span.nbytes
            if local + nbytes > room or remote + nbytes > far_room or local | remote | nbytes < 0:
                near.clear()
                break
            near.append((here + local, nbytes, self._device))
            far.append((there + remote, nbytes, peer.device))
        if not near:
            raise outside(peer.info.name, local=room, remote=far_room)
        return near, far

    def _advance(self, post: _Post, ask: Any) -> None:
        try:
            status = ask(post.request)
        except Exception as error:  # noqa: BLE001 - NIXL's errors share no root; told as ERROR
            post.state, post.error = PostState.ERROR, str(self._typed(error, post.peer.info.name))
            self._lose(post.peer)
            return
        if status == self._nixl.NIXL_SUCCESS:
            post.state = PostState.DONE
            post.peer.reloads = 0
        elif status != self._nixl.NIXL_IN_PROG:
            post.state, post.error = PostState.ERROR, f"NIXL reports {status}"

    def _lose(self, peer: _Peer) -> None:
        if not peer.lost:
            peer.lost = True
            peer.retry_ns = time.monotonic_ns() + (RETRY_NS << min(peer.reloads, MOST_DOUBLINGS))

    def _reload(self, peer: _Peer) -> None:
        """Load a lost peer's metadata anew. Raises PeerGoneError, and leaves it lost.

        UCX leaks a socket when the address refuses, so a dead peer must not be tried at every read.
        """
        peer.reloads += 1
        peer.retry_ns = time.monotonic_ns() + (RETRY_NS << min(peer.reloads, MOST_DOUBLINGS))
        self._agent.invalidateRemoteMD(peer.agent)
        try:
            self._load(peer.agent, peer.info.backend_metadata)
        except TransportError as error:
            what = f"store {peer.info.name!r} is gone ({error.what})"
            raise PeerGoneError(what, remedy=_REJOINS) from error
        peer.lost = False

    def _drop_if_idle(self, peer: _Peer) -> None:
        if peer.leaving and peer.in_flight == 0:
            self._leaving.pop(peer.agent, None)
            self._agent.invalidateRemoteMD(peer.agent)

    def _typed(self, error: Exception, peer: str) -> TransportError:
        gone = (self._nixl.nixlRemoteDisconnectError, self._nixl.nixlNotFoundError)
        if isinstance(error, gone):
            return PeerGoneError(f"store {peer!r} is gone ({error})", remedy=_REJOINS)
        return TransportError(f"a read from {peer!r} failed ({error})", remedy="read another copy")


def _agent_name(name: str, incarnation: int) -> str:
    return f"{name}:{incarnation}"


def _device_index(device: str) -> int:
    _, _, index = device.partition(":")
    return int(index) if index else 0
