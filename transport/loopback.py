"""An in-process network with scripted faults: a public tool for tests of anything above transport.

Moves spans between slabs of one process, at once and in order, unless a fault was scripted for the
read. It has no threads and no clocks of its own, so a test decides what happens when:

    network = LoopbackNetwork()
    network.script(Fault.DELAY, source="pool-0")   # the next read from pool-0 stays pending
    ...
    network.release()                              # now its bytes land and it is done

Invariant: a delayed read lands its bytes on `release` and never before, whatever happened to its
ticket: exactly what makes an abandoned transfer dangerous.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING

from hotset.errors import PeerGoneError, TransportError
from hotset.transport.base import Backend, PeerInfo, PostState, Span, refuse_older
from hotset.transport.header import HEADER_BYTES

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from hotset.transport.slab import Slab


class Fault(Enum):
    """What may happen to a read."""

    DELAY = "delay"  # pending until `release`; the bytes land then
    NEVER = "never"  # pending for ever
    ERROR = "error"  # ends in an error, no bytes
    GONE = "gone"  # the peer is found dead when the read is posted
    FLIP = "flip"  # the last byte of each span arrives flipped
    STALE = "stale"  # `during` runs between header and payload of each span


@dataclass(slots=True, kw_only=True)
class _Script:
    fault: Fault
    source: str | None
    times: int
    during: Callable[[], None] | None


@dataclass(slots=True)
class _Read:
    """A posted read: where it goes and where it comes from."""

    into: Slab
    source: Slab
    spans: tuple[Span, ...]
    state: PostState = PostState.DONE
    error: str = ""


class LoopbackNetwork:
    """The stores of one process and the faults of the links between them. Thread-safe."""

    def __init__(self) -> None:
        """Start with no stores and no faults."""
        self._lock = threading.RLock()
        self._stores: dict[str, tuple[int, Slab]] = {}
        self._scripts: list[_Script] = []
        self._held: list[_Read] = []
        self.posts = 0
        self._posted = threading.Condition(self._lock)

    def script(
        self,
        fault: Fault,
        *,
        source: str | None = None,
        times: int = 1,
        during: Callable[[], None] | None = None,
    ) -> None:
        """Let `fault` happen to the next `times` reads (from `source`, or from any store)."""
        with self._lock:
            self._scripts.append(_Script(fault=fault, source=source, times=times, during=during))

    def release(self) -> int:
        """Land the bytes of all delayed reads and finish them; returns how many."""
        with self._lock:
            held, self._held = self._held, []
            for read in held:
                _copy(read)
                read.state = PostState.DONE
            return len(held)

    def wait_posts(self, count: int, *, timeout_s: float = 5.0) -> bool:
        """Wait until `count` reads have been posted since the start; for tests."""
        with self._posted:
            return self._posted.wait_for(lambda: self.posts >= count, timeout=timeout_s)

    def kill(self, name: str) -> None:
        """Remove a store: reads from it fail from now on."""
        with self._lock:
            self._stores.pop(name, None)

    def _join(self, slab: Slab) -> None:
        with self._lock:
            self._stores[slab.name] = (slab.incarnation, slab)

    def _find(self, name: str, incarnation: int) -> Slab:
        found = self._stores.get(name)
        if found is None or found[0] != incarnation:
            raise PeerGoneError(
                f"store {name}:{incarnation} is gone", remedy="read another copy; it will rejoin"
            )
        return found[1]

    def _post(self, into: Slab, name: str, incarnation: int, spans: Sequence[Span]) -> _Read:
        with self._lock:
            script = self._next_script(name)
            fault = script.fault if script else None
            if fault is Fault.GONE:
                self.kill(name)
            read = _Read(into, self._find(name, incarnation), tuple(spans))
            if fault in {Fault.DELAY, Fault.NEVER}:
                read.state = PostState.PENDING
                if fault is Fault.DELAY:
                    self._held.append(read)
            elif fault is Fault.ERROR:
                read.state, read.error = PostState.ERROR, "a scripted error"
            else:
                _copy(read, during=script.during if script else None)
            if fault is Fault.FLIP:
                _flip(read)
            self.posts += 1
            self._posted.notify_all()
            return read

    def _next_script(self, source: str) -> _Script | None:
        for script in self._scripts:
            if script.source in {None, source}:
                script.times -= 1
                if script.times == 0:
                    self._scripts.remove(script)
                return script
        return None


class LoopbackBackend(Backend):
    """One store's end of a `LoopbackNetwork`."""

    name = "loopback"

    def __init__(self, network: LoopbackNetwork) -> None:
        """Join the network when the slab is registered."""
        self._network = network
        self._slab: Slab | None = None
        self._peers: dict[str, PeerInfo] = {}
        self._reads: dict[int, _Read] = {}
        self._next = 1

    def register(self, slab: Slab) -> None:
        """Join the network under the slab's name, replacing an earlier incarnation."""
        self._slab = slab
        self._network._join(slab)  # noqa: SLF001 - the network's other half

    def info(self, *, name: str, incarnation: int) -> PeerInfo:
        """Describe this side."""
        slab = self._slab
        if slab is None:
            raise TransportError("no slab is registered", remedy="register it first")
        return PeerInfo(
            name=name,
            incarnation=incarnation,
            backend=self.name,
            backend_metadata=f"{name}:{incarnation}".encode(),
            base_address=slab.base_address,
            nbytes=slab.nbytes,
            device=slab.device,
        )

    def connect(self, peer: PeerInfo) -> None:
        """Make a peer readable; an older incarnation than the known one is refused."""
        identity = f"{peer.name}:{peer.incarnation}"
        if peer.backend != self.name or peer.backend_metadata != identity.encode():
            raise TransportError(
                f"the metadata of {identity} is damaged or of backend {peer.backend!r}",
                remedy="ask the store for it anew",
            )
        refuse_older(peer, self._peers.get(peer.name))
        self._peers[peer.name] = peer

    def disconnect(self, name: str) -> None:
        """Forget a peer."""
        self._peers.pop(name, None)

    def post(self, peer: str, spans: Sequence[Span], *, lane: int = 0) -> int:  # noqa: ARG002 - one lane
        """Copy at once, or as a scripted fault says."""
        info = self._peers.get(peer)
        if info is None or self._slab is None:
            raise PeerGoneError(f"store {peer!r} is not connected", remedy="connect it first")
        if any(span.remote_offset + span.nbytes > info.nbytes for span in spans):
            raise TransportError(
                f"a read leaves the slab of {peer!r}", remedy="refresh the directory of copies"
            )
        read = self._network._post(self._slab, peer, info.incarnation, spans)  # noqa: SLF001 - as above
        handle, self._next = self._next, self._next + 1
        self._reads[handle] = read
        return handle

    def poll(self, handle: int) -> tuple[PostState, str]:
        """State of a posted read."""
        read = self._reads[handle]
        return read.state, read.error

    def release(self, handle: int) -> None:
        """Free a finished handle."""
        read = self._reads.pop(handle)
        assert read.state is not PostState.PENDING, "released in flight"  # noqa: S101 - our own bug


def _copy(read: _Read, *, during: Callable[[], None] | None = None) -> None:
    for span in read.spans:
        head = min(HEADER_BYTES, span.nbytes)
        _copy_part(read, span, 0, head)
        if during is not None:
            during()
        _copy_part(read, span, head, span.nbytes - head)


def _copy_part(read: _Read, span: Span, offset: int, nbytes: int) -> None:
    data = read.source.memory.read(span.remote_offset + offset, nbytes)
    read.into.memory.write(span.local_offset + offset, data)


def _flip(read: _Read) -> None:
    for span in read.spans:
        last = span.local_offset + span.nbytes - 1
        value = read.into.memory.read(last, 1)[0]
        read.into.memory.write(last, bytes([value ^ 0xFF]))
