"""Who goes first on a link, and for how long anybody is held back."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from hotset.transport.base import LinkProfile, Priority, Status
from hotset.transport.link import WINDOW_NS
from hotset.transport.loopback import LoopbackBackend, LoopbackNetwork
from hotset.transport.records import ROW
from tests.transport.peer import PeerProcess, Store, build
from tests.transport.worlds import deadline

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

NBYTES = 4 << 20
BLOCKS = 4
LATENCY_NS = 200_000
SLACK_NS = 8_000_000  # two shared cores: the owner thread may wake late


def _profile(rate: int) -> LinkProfile:
    return LinkProfile(bandwidth_bytes_per_s=rate, latency_ns=LATENCY_NS, emulated=True)


class Paced:
    """A source behind an emulated link, read by a sink of the same process."""

    def __init__(self, rate: int) -> None:
        network = LoopbackNetwork()
        more: dict[str, Any] = {"incarnation": 1, "nbytes": NBYTES}
        self.source = build(
            name="source", backend=LoopbackBackend(network), blocks=BLOCKS, room=0,
            link=_profile(rate), **more,
        )  # fmt: skip
        self.sink = build(
            name="sink", backend=LoopbackBackend(network), blocks=0, room=2 * BLOCKS, **more
        )
        self.sink.engine.connect(self.source.engine.info())

    def submit(self, count: int, *, priority: Priority, seconds: float = 30.0) -> Any:
        return submit(self.sink, self.source.copies[:count], priority=priority, seconds=seconds)

    def close(self) -> None:
        for store in (self.sink, self.source):
            assert store.engine.close()
            store.slab.check_integrity()


def submit(store: Store, copies: Any, *, priority: Priority, seconds: float = 30.0) -> Any:
    items = []
    for copy in copies:
        slot = store.slab.allocate(copy.nbytes)
        assert slot is not None
        items.append(copy.item(slot))
    return store.engine.read("source", items, deadline_ns=deadline(seconds), priority=priority)


@pytest.fixture
def paced() -> Iterator[Callable[[int], Paced]]:
    made: list[Paced] = []

    def make(rate: int) -> Paced:
        made.append(Paced(rate))
        return made[-1]

    yield make
    for one in made:
        one.close()


@pytest.mark.parametrize("rate", [100_000_000, 400_000_000, 1_600_000_000])
def test_an_imminent_block_waits_for_one_piece_of_background(
    paced: Callable[[int], Paced], rate: int
) -> None:
    world = paced(rate)
    waited = []
    for _ in range(3):
        background = world.submit(BLOCKS, priority=Priority.BACKGROUND)
        first = world.submit(1, priority=Priority.IMMINENT)
        outcome = first.wait()
        assert outcome.status is Status.DONE
        assert not background.done
        own_ns = NBYTES * 10**9 // rate + LATENCY_NS
        waited.append(outcome.ended_ns - outcome.started_ns - own_ns)
        assert background.wait().status is Status.DONE
        for ended in (first, background):
            for result in ended.wait().items:
                world.sink.slab.unpin(result.dest)
                world.sink.slab.retire(result.dest)
    piece_ns = max(WINDOW_NS // 2, (512 << 10) // 2 * 10**9 // rate)
    assert min(waited) <= piece_ns + SLACK_NS, [w / 1e6 for w in waited]


def test_classes_go_before_deadlines_and_deadlines_before_order(
    paced: Callable[[int], Paced],
) -> None:
    world = paced(1_000_000_000)
    order = [
        (Priority.BACKGROUND, 1.5), (Priority.BACKGROUND, 1.0), (Priority.STAGING, 3.0),
        (Priority.STAGING, 2.0), (Priority.IMMINENT, 9.0), (Priority.IMMINENT, 8.0),
    ]  # fmt: skip
    tickets = [world.submit(1, priority=p, seconds=s) for p, s in order]
    for ticket in tickets:
        assert ticket.wait().status is Status.DONE
    rows = np.frombuffer(world.sink.ring.drain(), dtype=ROW)["row_id"].tolist()
    ended = [rows.index(ticket.transfer_id) for ticket in tickets]
    assert ended[5] < ended[4] < ended[3] < ended[2] < ended[1] < ended[0]


@pytest.mark.parametrize("rate", [100_000_000, 1_000_000_000])
def test_a_paced_link_has_the_bandwidth_of_its_profile(
    paced: Callable[[int], Paced], rate: int
) -> None:
    world = paced(rate)
    found = []
    for _ in range(3):
        begin = time.monotonic_ns()
        outcome = world.submit(BLOCKS, priority=Priority.STAGING).wait()
        elapsed = time.monotonic_ns() - begin - LATENCY_NS
        assert outcome.status is Status.DONE
        found.append(BLOCKS * NBYTES * 10**9 / elapsed / rate)
        for result in outcome.items:
            world.sink.slab.unpin(result.dest)
            world.sink.slab.retire(result.dest)
    assert max(found) <= 1.05, found
    assert max(found) >= 0.95, found


@pytest.mark.parametrize("kind", ["shm", pytest.param("nixl", marks=pytest.mark.nixl)])
def test_two_readers_of_a_pool_share_its_link(kind: str) -> None:
    """Each in its own process; together they have the profile's bandwidth, not twice that."""
    rate = 200_000_000
    shape: dict[str, Any] = {"incarnation": 1, "backend": kind, "nbytes": NBYTES}
    source = PeerProcess(name="source", blocks=BLOCKS, room=0, link=_profile(rate), **shape)
    readers = [PeerProcess(name=f"r{i}", blocks=0, room=BLOCKS, **shape) for i in range(2)]
    for reader in readers:  # connected, and warm
        reader.call("read", (source.info, source.copies[:1]))
    found = []
    for _ in range(3):
        for reader in readers:
            reader.call("drop", None)
        begin = time.monotonic_ns()
        for reader in readers:
            reader.send("read", (source.info, source.copies[1:]))
        for reader in readers:
            assert {status for status, _ in reader.answer()} == {"done"}
        found.append(time.monotonic_ns() - begin)
    least = 2 * (BLOCKS - 1) * NBYTES * 10**9 // rate
    assert least * 0.95 <= min(found) <= least * 1.25, found
    for process in (*readers, source):
        process.close()
