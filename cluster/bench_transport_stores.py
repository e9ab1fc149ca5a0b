"""Stores of the transport benchmark, each in its own process: a source, a reader, raw NIXL.

What is timed, on both sides of every ratio: from having the list of what to read and where to,
until all bytes are there and the caller knows. The engine's side includes hand-off to its owner
thread, the transfer, verification of every block, publication and the caller's wake-up; raw
NIXL's includes making the request, posting it and polling to the end. Neither includes taking
slots or building descriptors, and both merge adjacent ones.
"""

from __future__ import annotations

import importlib
import itertools
import sys
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from hotset.cluster.bench_transport_case import MIB
from hotset.errors import DependencyError, TransportError
from hotset.transport.base import Expect, ReadItem, Span, Status
from hotset.transport.bulk import KERNELS
from hotset.transport.engine import Engine
from hotset.transport.header import HEADER_BYTES, checksum
from hotset.transport.nixl_agent import NIXL_MODULES
from hotset.transport.nixl_lane import merge
from hotset.transport.records import Ring
from hotset.transport.slab import Slab

if TYPE_CHECKING:
    from collections.abc import Callable

    from hotset.cluster.bench_transport_case import Case
    from hotset.transport.base import Backend, Outcome, PeerInfo

FORMAT: Final = 1
READ_S: Final = 15
BACKENDS: Final = {
    "nixl": "hotset.transport.nixl:NixlBackend",
    "shm": "hotset.transport.shm:ShmBackend",
    "node": "hotset.transport.node:NodeBackend",
    "tcp": "hotset.transport.tcp:TcpBackend",
    "ucx": "hotset.transport.ucx:UcxBackend",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Visit:
    """One turn of a lane: up to `reads` timed ones within `budget_ns`, after one that is not."""

    reads: int
    budget_ns: int
    warm: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Offer:
    """What a source tells its reader."""

    info: PeerInfo
    copies: tuple[tuple[int, Expect], ...]  # offset of the header, what it says


def timed(read: Callable[[], int], visit: Visit) -> list[int]:
    """Carry out a turn; `read` returns its own time in ns. At least one is kept."""
    if visit.warm:
        read()  # wakes threads and connections, brings code and tables to the caches
    end = time.monotonic_ns() + visit.budget_ns
    found = [read()]
    while len(found) < visit.reads and time.monotonic_ns() < end:
        found.append(read())
    return found


def make_backend(name: str) -> Backend:
    """Build a backend. Raises DependencyError with the reason why it cannot work here."""
    module, _, kind = BACKENDS[name].partition(":")
    try:
        found: Any = getattr(importlib.import_module(module), kind)
    except ImportError as error:
        raise DependencyError(
            f"no backend {name!r} here ({error})", remedy="leave it out"
        ) from error
    reason = found.available() if hasattr(found, "available") else ""
    if reason:
        raise DependencyError(f"backend {name!r} cannot work here", remedy=reason)
    backend: Backend = found()
    return backend


def make_slab(name: str, case: Case, *, slots: int) -> Slab:
    """Slab for `slots` blocks of the case."""
    return Slab(
        capacity_bytes=slots * (case.nbytes + 128),
        slot_payload_bytes=case.nbytes,
        name=name,
        incarnation=1,
    )


class Source:
    """A store whose blocks are read. The child's side."""

    def __init__(self, *, backend: str, case: Case) -> None:
        """Fill and publish all blocks; no two are alike."""
        self._slab = make_slab("source", case, slots=case.slots)
        self._engine = Engine(
            slab=self._slab,
            backend=make_backend(backend),
            ring=Ring(),
            name="source",
            incarnation=1,
        )
        self._engine.start()
        tile = np.random.default_rng(1).integers(0, 256, min(case.nbytes, MIB), dtype=np.uint8)
        self._data = np.resize(tile, case.nbytes)
        self._copies = tuple(self._publish(index, case) for index in range(case.slots))

    def _publish(self, index: int, case: Case) -> tuple[int, Expect]:
        slot = self._slab.allocate(case.nbytes)
        assert slot is not None  # noqa: S101 - the slab was made for this many
        self._data[:8] = np.frombuffer(index.to_bytes(8, "little"), dtype=np.uint8)
        self._slab.write_payload(slot, self._data.data)
        expect = Expect(
            key=index.to_bytes(16, "little"),
            format_code=FORMAT,
            nbytes=case.nbytes,
            checksum=checksum(self._data.data),
        )
        self._slab.publish(
            slot,
            key=expect.key,
            format_code=FORMAT,
            nbytes=case.nbytes,
            checksum=expect.checksum or 0,
        )
        return slot.offset, expect

    def hello(self) -> Offer:
        """Tell what there is to read."""
        return Offer(info=self._engine.info(), copies=self._copies)

    def close(self) -> None:
        """End the engine."""
        self._engine.close()


class Reader:
    """A store that reads a source, through its engine and, for NIXL, without it. Child's side."""

    def __init__(self, *, backend: str, case: Case, offer: Offer, raw: bool) -> None:
        """Connect; `raw` adds a bare NIXL agent over the same memory."""
        KERNELS.load()
        self._slab = make_slab("reader", case, slots=case.slots)
        self._engine = Engine(
            slab=self._slab,
            backend=make_backend(backend),
            ring=Ring(),
            name="reader",
            incarnation=1,
        )
        self._engine.start()
        self._engine.connect(offer.info)
        self._peer = offer.info.name
        self._copies = itertools.cycle(offer.copies)
        self._batch = case.batch
        self._raw = RawNixl(self._slab, offer.info) if raw else None

    def hello(self) -> str:
        """Say that it is connected."""
        return "ready"

    def build(self, case: Case) -> None:
        """Read this many at once."""
        self._batch = case.batch

    def run(self, lane: str, visit: Visit) -> list[int]:
        """Take one turn of the engine, or of raw NIXL."""
        return timed(self._read_raw if lane.startswith("raw-") else self._read, visit)

    def _items(self) -> list[ReadItem]:
        items = []
        for offset, expect in itertools.islice(self._copies, self._batch):
            slot = self._slab.allocate(expect.nbytes)
            assert slot is not None  # noqa: S101 - as many slots as blocks, all freed each time
            items.append(ReadItem(remote_offset=offset, dest=slot, expect=expect))
        return items

    def _read(self) -> int:
        return time_engine(
            self._slab,
            lambda items: self._engine.read_now(
                self._peer, items, deadline_ns=time.monotonic_ns() + READ_S * 10**9
            ),
            self._items(),
        )

    def _read_raw(self) -> int:
        assert self._raw is not None  # noqa: S101 - only NIXL's readers have this lane
        items = self._items()
        elapsed = self._raw.read(items)
        for item in items:
            found = checksum(self._slab.read_payload(item.dest, item.expect.nbytes))
            if found != item.expect.checksum:
                raise TransportError("raw NIXL brought other bytes", remedy="report this")
            self._slab.fail(item.dest)
        return elapsed

    def close(self) -> None:
        """End agent and engine."""
        self._raw = None
        self._engine.close()


def time_engine(slab: Slab, read: Callable[[Any], Outcome], items: list[Any]) -> int:
    """Time one read through an engine in ns, then free what landed. Raises TransportError."""
    begin = time.perf_counter_ns()
    outcome = read(items)
    elapsed = time.perf_counter_ns() - begin
    bad = next((one for one in outcome.items if one.status is not Status.DONE), None)
    if bad is not None:
        raise TransportError(
            f"a read ended as {bad.status.value} ({bad.error})", remedy="run again"
        )
    for result in outcome.items:
        slab.unpin(result.dest)
        slab.retire(result.dest)
    return elapsed


class RawNixl:
    """A NIXL agent driven as its documentation has it: make a request, post it, poll it.

    It differs from NIXL's Python wrapper in one thing, which is to its favour: it has no progress
    thread, where the wrapper's takes a whole core from everybody.
    """

    def __init__(self, slab: Slab, peer: PeerInfo) -> None:
        """Register the slab with a second agent and load the peer's metadata."""
        nixl: Any = next(sys.modules[name] for name in NIXL_MODULES if name in sys.modules)
        config = nixl.nixlAgentConfig()
        config.useProgThread = False
        config.syncMode = nixl.NIXL_THREAD_SYNC_STRICT
        self._nixl, self._peer = nixl, peer
        self._agent = nixl.nixlAgent("raw", config)
        backend = self._agent.createBackend("UCX", {})
        region = [(slab.base_address, slab.nbytes, 0, "")]
        self._agent.registerMem(nixl.nixlRegDList(nixl.DRAM_SEG, region), [backend])
        loaded = self._agent.loadRemoteMD(peer.backend_metadata)
        self._remote = loaded.decode() if isinstance(loaded, bytes) else str(loaded)
        self._base = slab.base_address

    def read(self, items: list[ReadItem]) -> int:
        """Time one transfer of headers and payloads in ns."""
        nixl, agent = self._nixl, self._agent
        plan = merge(_spans(items))
        local = self._list([(self._base + span.local_offset, span.nbytes, 0) for span in plan])
        start = self._peer.base_address
        remote = self._list([(start + span.remote_offset, span.nbytes, 0) for span in plan])
        end = time.monotonic_ns() + READ_S * 10**9
        begin = time.perf_counter_ns()
        request = agent.createXferReq(nixl.NIXL_READ, local, remote, self._remote)
        status = agent.postXferReq(request)
        while status == nixl.NIXL_IN_PROG and time.monotonic_ns() < end:
            status = agent.getXferStatus(request)
        elapsed = time.perf_counter_ns() - begin
        if status != nixl.NIXL_SUCCESS:
            raise TransportError(f"raw NIXL reports {status}", remedy="run again")
        agent.releaseXferReq(request)
        return elapsed

    def _list(self, rows: list[tuple[int, int, int]]) -> Any:
        table = np.array(rows, dtype=np.uint64)
        return self._nixl.nixlXferDList(self._nixl.DRAM_SEG, table)


def _spans(items: list[ReadItem]) -> list[Span]:
    return [
        Span(
            local_offset=item.dest.offset,
            remote_offset=item.remote_offset,
            nbytes=HEADER_BYTES + item.expect.nbytes,
        )
        for item in items
    ]
