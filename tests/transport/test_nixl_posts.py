"""What one post over NIXL costs and moves, next to NIXL's own calls in the same run."""

from __future__ import annotations

import random
import statistics
import time
from typing import TYPE_CHECKING, Any

import pytest

from hotset.errors import PeerGoneError, TransportError
from hotset.transport.base import PostState, Span, Status
from hotset.transport.nixl import NixlBackend
from hotset.transport.nixl_lane import merge
from hotset.transport.slab import Slab
from tests.transport.peer import PeerProcess, build
from tests.transport.worlds import deadline, until

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

pytestmark = pytest.mark.nixl
NBYTES = 1 << 20
BLOCKS = 4


class Pair:
    """A source in a process of its own and a bare backend here."""

    def __init__(self) -> None:
        self.peer = PeerProcess(name="source", incarnation=1, blocks=BLOCKS, nbytes=NBYTES, room=0)
        self.slab = Slab(
            capacity_bytes=BLOCKS * (NBYTES + 128),
            slot_payload_bytes=NBYTES,
            name="sink",
            incarnation=1,
        )
        self.backend = NixlBackend()
        self.backend.register(self.slab)
        self.backend.connect(self.peer.info)

    def read(self, spans: Sequence[Span]) -> PostState:
        handle = self.backend.post("source", spans)
        assert until(lambda: self.backend.poll(handle)[0] is not PostState.PENDING)
        state = self.backend.poll(handle)[0]
        self.backend.release(handle)
        return state

    def bytes_at(self, offset: int, nbytes: int) -> bytes:
        return bytes(self.slab.memory.read(offset, nbytes))


@pytest.fixture(scope="module")
def pair() -> Iterator[Pair]:
    made = Pair()
    yield made
    made.backend.close()
    made.peer.close()


@pytest.mark.parametrize("seed", range(5))
def test_scattered_spans_land_where_they_belong(pair: Pair, seed: int) -> None:
    whole = [Span(local_offset=0, remote_offset=0, nbytes=pair.peer.info.nbytes // 2)]
    assert pair.read(whole) is PostState.DONE
    half = pair.peer.info.nbytes // 2
    truth = pair.bytes_at(0, half)
    draw = random.Random(seed)
    grid = 4096
    places = draw.sample(range((pair.slab.nbytes - half) // grid), 100)
    spans = [
        Span(
            local_offset=half + place * grid,
            remote_offset=draw.randrange(half - grid),
            nbytes=draw.randint(1, grid),
        )
        for place in places
    ]
    assert pair.read(spans) is PostState.DONE
    for span in spans:
        landed = pair.bytes_at(span.local_offset, span.nbytes)
        assert landed == truth[span.remote_offset : span.remote_offset + span.nbytes]


def test_merging_changes_no_byte(pair: Pair) -> None:
    step = 3000
    spans = [
        Span(local_offset=at, remote_offset=at, nbytes=step) for at in range(0, 30 * step, step)
    ]
    assert merge(spans) == [Span(local_offset=0, remote_offset=0, nbytes=30 * step)]
    pair.slab.memory.write(0, bytes(30 * step))
    assert pair.read(spans) is PostState.DONE
    together = pair.bytes_at(0, 30 * step)
    for span in reversed(spans):
        assert pair.read([span]) is PostState.DONE
    assert pair.bytes_at(0, 30 * step) == together
    assert any(together)


@pytest.mark.parametrize(
    "change",
    [
        {"local_offset": 1 << 40},
        {"remote_offset": 1 << 40},
        {"local_offset": -64},
        {"remote_offset": -64},
        {"nbytes": 1 << 40},
        {"nbytes": -1},
    ],
)
def test_spans_outside_of_a_slab_are_refused_whole(pair: Pair, change: dict[str, int]) -> None:
    good = {"local_offset": 0, "remote_offset": 0, "nbytes": 64}
    with pytest.raises(TransportError, match="leaves its slab"):
        pair.backend.post("source", [Span(**good), Span(**(good | change))])
    assert not pair.backend._reads


def test_an_empty_post_and_an_unknown_peer_are_refused(pair: Pair) -> None:
    with pytest.raises(TransportError):
        pair.backend.post("source", [])
    with pytest.raises(PeerGoneError):
        pair.backend.post("nobody", [Span(local_offset=0, remote_offset=0, nbytes=64)])


def _bare(pair: Pair, spans: Sequence[Span]) -> None:
    """The least that NIXL needs for this read."""
    [lane], nixl = pair.backend._lanes, pair.backend._nixl
    agent = lane._agent
    here, there = pair.slab.base_address, pair.peer.info.base_address
    near = [(here + span.local_offset, span.nbytes, 0) for span in spans]
    far = [(there + span.remote_offset, span.nbytes, 0) for span in spans]
    lists = (
        nixl.nixlXferDList(nixl.DRAM_SEG, near),
        nixl.nixlXferDList(nixl.DRAM_SEG, far),
    )
    request = agent.createXferReq(nixl.NIXL_READ, *lists, lane._peers["source"].agent)
    status = agent.postXferReq(request)
    while status == nixl.NIXL_IN_PROG:
        status = agent.getXferStatus(request)
    assert status == nixl.NIXL_SUCCESS
    agent.releaseXferReq(request)


def _ours(pair: Pair, spans: Sequence[Span]) -> None:
    handle = pair.backend.post("source", spans)
    while pair.backend.poll(handle)[0] is PostState.PENDING:
        pass
    pair.backend.release(handle)


def _median_us(call: Any, pair: Pair, spans: Sequence[Span]) -> float:
    costs = []
    for _ in range(200):
        begin = time.perf_counter_ns()
        call(pair, spans)
        costs.append(time.perf_counter_ns() - begin)
    return statistics.median(costs) / 1e3


@pytest.mark.parametrize(("count", "limit_us"), [(1, 8.0), (16, 20.0)])
def test_a_post_adds_microseconds_to_nixls_own_calls(
    pair: Pair, count: int, limit_us: float
) -> None:
    spans = [
        Span(local_offset=at * 8192, remote_offset=at * 8192, nbytes=4096) for at in range(count)
    ]
    added = [_median_us(_ours, pair, spans) - _median_us(_bare, pair, spans) for _ in range(5)]
    assert min(added) < limit_us  # the best of five: others share this machine


def test_long_reads_of_this_host_are_shared_by_two_lanes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda _pid: {0, 1})
    nbytes, blocks = 2 << 20, 12
    peer = PeerProcess(name="source", incarnation=1, blocks=blocks, nbytes=nbytes, room=0)
    backend = NixlBackend()
    store = build(name="sink", incarnation=1, backend=backend, blocks=0, nbytes=nbytes, room=blocks)
    store.engine.connect(peer.info)

    def read() -> None:
        slots = [store.slab.allocate(nbytes) for _ in range(blocks)]
        items = [copy.item(slot) for copy, slot in zip(peer.copies, slots, strict=True) if slot]
        outcome = store.engine.read_now("source", items, deadline_ns=deadline())
        assert outcome.status is Status.DONE, outcome.items
        for result, copy in zip(outcome.items, peer.copies, strict=True):
            assert result.checksum == copy.checksum
            store.slab.unpin(result.dest)
            store.slab.retire(result.dest)

    read()
    assert until(lambda: len(backend._lanes) == 2)  # made beside the reads, once they copy in calls
    read()
    assert "source" in backend._lanes[1]._peers  # the second thread has read it
    peer.kill()
    slots = [store.slab.allocate(nbytes) for _ in range(blocks)]
    items = [copy.item(slot) for copy, slot in zip(peer.copies, slots, strict=True) if slot]
    outcome = store.engine.read_now("source", items, deadline_ns=deadline())
    assert {result.status for result in outcome.items} == {Status.FAILED}
    assert until(lambda: store.engine.quarantined == 0)
    store.slab.check_integrity()
    assert store.engine.close()
