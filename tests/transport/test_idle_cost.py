"""A store that waits costs next to nothing; one that reads adds little to its backend."""

from __future__ import annotations

import statistics
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from hotset.transport.base import PostState, Span, Status
from hotset.transport.header import HEADER_BYTES
from hotset.transport.nixl import NixlBackend
from hotset.transport.slab import Slab
from tests.transport.peer import PeerProcess, Source, Store, build
from tests.transport.worlds import deadline, until

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.nixl
IDLE_SHARE = 0.02  # of a core
WINDOW_S = 3.0
WINDOWS = 3  # the quietest counts: processor time grows when others fill the caches
ADDED_US = 50.0
NBYTES = 64 << 10
TCP = {"UCX_TLS": "tcp"}


def _cpu_ns(pid: int) -> int:
    """Processor time of all threads of a process."""
    return sum(
        int(file.read_text(encoding="ascii").split()[0])
        for file in Path(f"/proc/{pid}/task").glob("*/schedstat")
    )


def _share(*peers: PeerProcess) -> list[float]:
    """Cores that processes use over a window in which nobody asks them for anything."""
    pids = [peer.process.pid or 0 for peer in peers]
    begin, before = time.monotonic_ns(), [_cpu_ns(pid) for pid in pids]
    threading.Event().wait(WINDOW_S)
    after, end = [_cpu_ns(pid) for pid in pids], time.monotonic_ns()
    return [(b - a) / (end - begin) for a, b in zip(before, after, strict=True)]


def _connected(environment: dict[str, str]) -> tuple[PeerProcess, PeerProcess]:
    """A source and a reader that has read from it."""
    source, reader = (
        PeerProcess(
            environment=environment, name=name, incarnation=1, blocks=2, nbytes=NBYTES, room=8
        )
        for name in ("source", "reader")
    )
    read = reader.call("read", (source.info, source.copies))
    assert read == [("done", copy.checksum) for copy in source.copies]
    return source, reader


@pytest.mark.parametrize("environment", [{}, TCP], ids=["default", "tcp"])
def test_connected_stores_that_wait_cost_no_core(environment: dict[str, str]) -> None:
    source, reader = _connected(environment)
    shares = [max(_share(source, reader)) for _ in range(WINDOWS)]
    assert min(shares) < IDLE_SHARE, shares
    reader.close()
    source.close()


def test_a_read_that_hangs_costs_no_core() -> None:
    source, reader = _connected(TCP)
    source.freeze()
    reader.send("read", (source.info, source.copies))
    shares = [_share(reader)[0] for _ in range(WINDOWS)]
    source.thaw()
    assert reader.answer() == [("done", copy.checksum) for copy in source.copies]
    assert min(shares) < IDLE_SHARE, shares
    reader.close()
    source.close()


class Raw:
    """The bare backend with a slab of its own."""

    def __init__(self, peer: PeerProcess) -> None:
        self.slab = Slab(
            capacity_bytes=NBYTES + 128, slot_payload_bytes=NBYTES, name="raw", incarnation=1
        )
        self.backend = NixlBackend()
        self.backend.register(self.slab)
        self.backend.connect(peer.info)

    def read_ns(self, copy: Source) -> int:
        span = Span(local_offset=0, remote_offset=copy.offset, nbytes=HEADER_BYTES + copy.nbytes)
        begin = time.perf_counter_ns()
        handle = self.backend.post("source", [span])
        while self.backend.poll(handle)[0] is PostState.PENDING:
            pass
        elapsed = time.perf_counter_ns() - begin
        self.backend.release(handle)
        return elapsed


def _engine_ns(store: Store, copy: Source) -> int:
    slot = store.slab.allocate(copy.nbytes)
    assert slot is not None
    item = copy.item(slot)
    end = deadline()
    begin = time.perf_counter_ns()
    outcome = store.engine.read_now("source", [item], deadline_ns=end)
    elapsed = time.perf_counter_ns() - begin
    assert outcome.status is Status.DONE
    store.slab.unpin(slot)
    store.slab.retire(slot)
    return elapsed


@pytest.fixture
def source() -> Iterator[PeerProcess]:
    made = PeerProcess(name="source", incarnation=1, blocks=2, nbytes=NBYTES, room=0)
    yield made
    made.close()


def test_an_active_engine_adds_little_to_its_backend(source: PeerProcess) -> None:
    raw = Raw(source)
    store = build(
        name="sink", incarnation=1, backend=NixlBackend(), blocks=0, nbytes=NBYTES, room=4
    )
    store.engine.connect(source.info)
    medians: list[tuple[float, float]] = []
    for _ in range(7):
        bare, full = [], []
        for turn in range(100):
            copy = source.copies[turn % 2]
            bare.append(raw.read_ns(copy))
            full.append(_engine_ns(store, copy))
        medians.append((statistics.median(bare), statistics.median(full)))
    assert until(lambda: store.engine.in_flight == 0)
    raw.backend.close()
    assert store.engine.close()
    bare_ns, full_ns = (min(column) for column in zip(*medians, strict=True))  # machines are shared
    assert (full_ns - bare_ns) / 1e3 < ADDED_US, medians
