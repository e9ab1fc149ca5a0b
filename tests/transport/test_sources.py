"""Items with several sources: retries, stripes, and slots that are followed while they fill."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from hotset.errors import ConfigError
from hotset.transport import link as links
from hotset.transport import mover
from hotset.transport.base import Expect, ReadItem, Status
from hotset.transport.header import checksum
from hotset.transport.loopback import Fault, LoopbackBackend, LoopbackNetwork
from hotset.transport.records import ROW
from hotset.transport.slab import SlotState
from tests.transport.peer import FORMAT, Source, Store, build
from tests.transport.worlds import deadline, until

if TYPE_CHECKING:
    from collections.abc import Iterator

    from hotset.transport.base import Replica
    from hotset.transport.slab import Slot

NBYTES = 3 << 20
NAMES = ("a", "b", "c")


class Three:
    """Three sources of the same blocks and a sink, in one process."""

    def __init__(self) -> None:
        self.network = LoopbackNetwork()
        self.sources = {name: self._store(name, blocks=2, room=1) for name in NAMES}
        self.sink = self._store("sink", blocks=0, room=4)
        for source in self.sources.values():
            self.sink.engine.connect(source.engine.info())

    def _store(self, name: str, **more: Any) -> Store:
        backend = LoopbackBackend(self.network)
        return build(name=name, incarnation=1, backend=backend, nbytes=NBYTES, **more)

    def slot(self) -> Slot:
        slot = self.sink.slab.allocate(NBYTES)
        assert slot is not None
        return slot

    def copy(self, name: str, index: int = 0) -> Source:
        return self.sources[name].copies[index]

    def others(self, *names: str, index: int = 0) -> tuple[Replica, ...]:
        return tuple(self.copy(name, index).replica(name) for name in names)

    def submit(self, first: str = "a", *, seconds: float = 20.0, **how: Any) -> Any:
        item = self.copy(first).item(self.slot(), **how)
        return self.sink.engine.read(first, [item], deadline_ns=deadline(seconds))

    def close(self) -> None:
        self.network.release()
        for store in (self.sink, *self.sources.values()):
            assert store.engine.close()
            store.slab.check_integrity()


@pytest.fixture
def three(monkeypatch: pytest.MonkeyPatch) -> Iterator[Three]:
    monkeypatch.setattr(links, "PIECE_MIN_BYTES", 256 << 10)  # several pieces of a small slot
    made = Three()
    yield made
    made.close()


def _good(three: Three, result: Any) -> bool:
    payload = three.sink.slab.payload(result.dest)
    return result.status is Status.DONE and checksum(payload) == three.copy("a").checksum


@pytest.mark.parametrize("fault", [Fault.ERROR, Fault.GONE, Fault.FLIP])
def test_a_failed_source_is_followed_by_the_next(three: Three, fault: Fault) -> None:
    three.network.script(fault, source="a")
    outcome = three.submit(others=three.others("b")).wait()
    result = outcome.items[0]
    assert _good(three, result)
    assert (result.source, len(result.lost)) == ("b", 1)
    row = np.frombuffer(three.sink.ring.drain(), dtype=ROW)[0]
    assert row["attempt"] == 1
    assert three.sink.ring.names()[row["source"]] == "b"


def test_a_stale_source_is_followed_by_the_next(three: Three) -> None:
    source = three.sources["a"]
    source.slab.retire(source.slots[0])
    result = three.submit(others=three.others("b", "c")).wait().items[0]
    assert _good(three, result)
    assert result.source == "b"


def test_two_retries_and_no_more(three: Three) -> None:
    three.network.script(Fault.ERROR, times=99)
    result = three.submit(others=three.others("b", "c", "a", "b")).wait().items[0]
    assert (result.status, result.source, len(result.lost)) == (Status.FAILED, "c", 2)
    assert three.sink.slab.state(result.dest) is SlotState.FREE


def test_the_next_source_waits_until_nothing_of_the_former_can_land(three: Three) -> None:
    three.network.script(Fault.DELAY, source="a")  # the first piece is still on the wire
    three.network.script(Fault.ERROR, source="a")  # when the second fails
    ticket = three.submit(others=three.others("b"))
    assert three.network.wait_posts(2)
    assert not until(lambda: three.network.posts > 2, seconds=0.1)
    three.network.release()
    result = ticket.wait().items[0]
    assert _good(three, result)
    assert result.source == "b"


def test_a_stripe_takes_pieces_from_every_source(three: Three) -> None:
    item = three.copy("a").item(three.slot(), others=three.others("b", "c"), stripe=True)
    spans = _count_bytes(three)
    result = three.sink.engine.read("a", [item], deadline_ns=deadline()).wait().items[0]
    assert _good(three, result)
    assert sum(spans.values()) == NBYTES + 3 * 64  # each byte once, each header once
    assert min(spans[name] for name in NAMES) >= 256 << 10


def _count_bytes(three: Three) -> dict[str, int]:
    sent = dict.fromkeys(NAMES, 0)
    post = three.network._post

    def counting(into: Any, name: str, incarnation: int, spans: Any) -> Any:
        sent[name] += sum(span.nbytes for span in spans)
        return post(into, name, incarnation, spans)

    three.network._post = counting  # type: ignore[method-assign]
    return sent


@pytest.mark.parametrize("at", [0, 1, 2])
@pytest.mark.parametrize("fault", [Fault.ERROR, Fault.GONE])
def test_a_stripe_goes_on_without_a_source_that_fails(three: Three, fault: Fault, at: int) -> None:
    for _ in range(at):
        three.network.script(Fault.STALE, source="b", during=lambda: None)
    three.network.script(fault, source="b")
    result = three.submit(others=three.others("b", "c"), stripe=True).wait().items[0]
    assert _good(three, result)


def test_a_stripe_with_a_flipped_piece_is_read_again_from_one_source(three: Three) -> None:
    three.network.script(Fault.STALE, source="b", during=lambda: None)  # its header
    three.network.script(Fault.FLIP, source="b")
    result = three.submit(others=three.others("b", "c"), stripe=True).wait().items[0]
    assert _good(three, result)
    assert len(result.lost) == 1


def test_a_stripe_past_its_deadline_is_in_quarantine_until_all_has_landed(three: Three) -> None:
    for _ in NAMES:
        three.network.script(Fault.STALE, during=lambda: None)
    three.network.script(Fault.DELAY, times=99)
    outcome = three.submit(others=three.others("b", "c"), stripe=True, seconds=0.1).wait()
    assert outcome.status is Status.TIMED_OUT
    assert three.sink.slab.state(outcome.items[0].dest) is SlotState.QUARANTINED
    assert three.sink.engine.quarantined >= 1
    three.network.release()
    assert until(lambda: three.sink.engine.quarantined == 0)
    assert three.sink.slab.state(outcome.items[0].dest) is SlotState.FREE


# --- streams --------------------------------------------------------------------------------------


def test_a_slot_is_followed_while_it_fills(three: Three) -> None:
    """`b` fills a slot by hand, in steps; the sink has each step before the next begins."""
    source, block = three.sources["b"], three.copy("a")
    slot = source.slab.allocate(NBYTES)
    assert slot is not None
    expect = Expect(key=block.key, format_code=FORMAT, nbytes=NBYTES, checksum=block.checksum)
    data = bytes(three.sources["a"].slab.payload(three.sources["a"].slots[0]))
    source.slab.show_progress(slot, expect, arrived=0)
    dest = three.slot()
    item = ReadItem(remote_offset=slot.offset, dest=dest, expect=expect, follow=True)
    ticket = three.sink.engine.read("b", [item], deadline_ns=deadline())
    for upto in (1 << 20, 2 << 20, NBYTES):
        begin = upto - (1 << 20)
        assert not ticket.done
        source.slab.write_payload(slot, data[begin:upto], offset=begin)
        source.slab.show_progress(slot, expect, arrived=upto)
        if upto < NBYTES:
            view = three.sink.slab.memory.view(dest.payload_offset + begin, 1 << 20)
            assert until(lambda view=view, part=data[begin:upto]: view == part)
    result = ticket.wait().items[0]
    assert _good(three, result)
    source.slab.fail(slot)


def test_a_follower_whose_source_gives_up_goes_on_with_another(three: Three) -> None:
    source, block = three.sources["b"], three.copy("a")
    slot = source.slab.allocate(NBYTES)
    assert slot is not None
    expect = Expect(key=block.key, format_code=FORMAT, nbytes=NBYTES, checksum=block.checksum)
    data = bytes(three.sources["a"].slab.payload(three.sources["a"].slots[0]))
    source.slab.write_payload(slot, data[: 1 << 20])
    source.slab.show_progress(slot, expect, arrived=1 << 20)
    dest = three.slot()
    item = ReadItem(
        remote_offset=slot.offset, dest=dest, expect=expect, follow=True, others=three.others("a")
    )
    sent = _count_bytes(three)
    ticket = three.sink.engine.read("b", [item], deadline_ns=deadline())
    view = three.sink.slab.memory.view(dest.payload_offset, 1 << 20)
    assert until(lambda: view == data[: 1 << 20])
    source.slab.fail(slot)  # as at a deadline: its header is void
    result = ticket.wait().items[0]
    assert _good(three, result)
    assert (result.source, len(result.lost)) == ("a", 1)
    assert sent["a"] == NBYTES - (1 << 20) + 64  # what had come was kept


def test_followers_of_followers(three: Three, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mover, "STREAM_BYTES", 256 << 10)
    block = three.copy("a")
    chain = [three.sources["b"], three.sources["c"], three.sink]
    source, offset, tickets = "a", block.offset, []
    for store in chain:
        for other in three.sources.values():
            if other is not store:
                store.engine.connect(other.engine.info())
        slot = store.slab.allocate(NBYTES)
        assert slot is not None
        item = block.item(
            slot, remote_offset=offset, follow=True, stream=True, generation=None, incarnation=None
        )
        tickets.append(store.engine.read(source, [item], deadline_ns=deadline()))
        source, offset = store.slab.name, slot.offset
    for store, ticket in zip(chain, tickets, strict=True):
        result = ticket.wait().items[0]
        assert result.status is Status.DONE, result.error
        assert checksum(store.slab.payload(result.dest)) == block.checksum
        store.slab.check_integrity()


def test_following_needs_the_checksum(three: Three) -> None:
    slot = three.slot()
    item = three.copy("a").item(slot, follow=True, checksum=None)
    with pytest.raises(ConfigError, match="checksum"):
        three.sink.engine.read("a", [item], deadline_ns=deadline())
    three.sink.slab.fail(slot)


def test_a_filling_slot_is_stale_for_those_that_do_not_follow(three: Three) -> None:
    source = three.sources["b"]
    slot = source.slab.allocate(NBYTES)
    assert slot is not None
    block = three.copy("a")
    expect = Expect(key=block.key, format_code=FORMAT, nbytes=NBYTES)
    source.slab.show_progress(slot, expect, arrived=NBYTES)
    item = block.item(three.slot(), remote_offset=slot.offset)
    result = three.sink.engine.read("b", [item], deadline_ns=deadline()).wait().items[0]
    assert result.status is Status.STALE
    source.slab.fail(slot)


def test_many_threads_with_faults_end_every_ticket_once(three: Three) -> None:
    for seed in range(60):
        fault = (Fault.ERROR, Fault.FLIP, Fault.STALE)[seed % 3]
        three.network.script(fault, during=lambda: None)
    ends: list[Status] = []
    lock = threading.Lock()

    def work(seed: int) -> None:
        rng = np.random.default_rng(seed)
        for _ in range(12):
            first, *rest = rng.permutation(NAMES).tolist()
            ticket = three.submit(
                first, others=three.others(*rest), stripe=bool(rng.integers(2)),
                seconds=float(rng.choice([0.002, 20.0])),
            )  # fmt: skip
            outcome = ticket.wait(timeout_ns=30_000_000_000)
            with lock:
                ends.append(outcome.status)
            for result in outcome.items:
                if result.status is Status.DONE:
                    assert _good(three, result)
                    three.sink.slab.unpin(result.dest)
                    three.sink.slab.retire(result.dest)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(ends) == 36
    assert set(ends) <= {Status.DONE, Status.TIMED_OUT, Status.STALE, Status.FAILED}
    assert ends.count(Status.DONE) > 10
    assert until(lambda: three.sink.engine.quarantined == 0)
    three.sink.slab.check_integrity()
    assert three.sink.slab.free_slots(NBYTES) == 4
