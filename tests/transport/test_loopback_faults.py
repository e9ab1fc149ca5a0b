"""Timeouts, cancels, quarantine and pacing with scripted faults: exact, without a clock to race."""

from __future__ import annotations

import threading
import time
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from hotset.errors import QuarantineFull, TransferTimeout, TransportError
from hotset.transport import link as links
from hotset.transport.base import LinkProfile, Status
from hotset.transport.engine import Engine
from hotset.transport.loopback import Fault, LoopbackBackend, LoopbackNetwork
from hotset.transport.records import ROW, Ring
from hotset.transport.slab import Slab, SlotState
from tests.transport.peer import Source, Store, build
from tests.transport.worlds import deadline, until

if TYPE_CHECKING:
    from collections.abc import Iterator

NBYTES = 4096


class Pair:
    """A source with 8 copies and a sink with room for 8."""

    def __init__(self, **more: Any) -> None:
        self.network = LoopbackNetwork()
        self.source = self._store("source", blocks=8, room=8)
        self.sink = self._store("sink", blocks=0, room=8, **more)
        self.sink.engine.connect(self.source.engine.info())

    def _store(self, name: str, **more: Any) -> Store:
        backend = LoopbackBackend(self.network)
        return build(name=name, incarnation=1, backend=backend, nbytes=NBYTES, **more)

    def submit(self, *copies: Source, seconds: float = 20.0) -> Any:
        items = []
        for copy in copies:
            slot = self.sink.slab.allocate(NBYTES)
            assert slot is not None
            items.append(copy.item(slot))
        return self.sink.engine.read("source", items, deadline_ns=deadline(seconds))

    def close(self) -> None:
        self.network.release()
        assert self.sink.engine.close()
        assert self.source.engine.close()
        self.sink.slab.check_integrity()


@pytest.fixture
def pair() -> Iterator[Pair]:
    made = Pair(max_quarantined=2)
    yield made
    made.close()


def test_a_timeout_quarantines_until_the_bytes_have_landed(pair: Pair) -> None:
    pair.network.script(Fault.DELAY)
    outcome = pair.submit(pair.source.copies[0], seconds=0.05).wait()
    slot = outcome.items[0].dest
    assert outcome.status is Status.TIMED_OUT
    assert pair.sink.slab.state(slot) is SlotState.QUARANTINED
    assert pair.sink.slab.used_bytes > 0
    assert pair.network.release() == 1  # the bytes land now, in a slot that nobody reuses
    assert until(lambda: pair.sink.engine.quarantined == 0)
    assert pair.sink.slab.state(slot) is SlotState.FREE
    assert pair.sink.slab.used_bytes == 0
    pair.sink.slab.check_integrity()  # above all: no valid header in a free slot


def test_a_cancel_ends_the_wait_not_the_transfer(pair: Pair) -> None:
    pair.network.script(Fault.DELAY)
    ticket = pair.submit(pair.source.copies[0])
    assert pair.network.wait_posts(1)
    ticket.cancel()
    ticket.cancel()
    assert ticket.wait().status is Status.CANCELLED
    assert pair.sink.engine.quarantined == 1
    pair.network.release()
    assert until(lambda: pair.sink.engine.quarantined == 0)
    ticket.cancel()  # nothing happens after the end
    assert ticket.wait().status is Status.CANCELLED


def test_over_the_cap_new_reads_are_refused_until_slots_return(pair: Pair) -> None:
    pair.network.script(Fault.DELAY, times=2)
    for copy in pair.source.copies[:2]:
        assert pair.submit(copy, seconds=0.02).wait().status is Status.TIMED_OUT
    with pytest.raises(QuarantineFull, match="new incarnation"):
        pair.submit(pair.source.copies[2])
    pair.network.release()
    assert until(lambda: pair.sink.engine.quarantined == 0)
    slab = pair.sink.slab
    leaked = slab.super_slots - slab.free_slots(NBYTES)
    assert leaked == 1  # the refused read took nothing: its slot is the caller's
    assert pair.submit(pair.source.copies[2]).wait().status is Status.DONE


def test_close_waits_for_what_is_in_flight_and_refuses_new_reads() -> None:
    pair = Pair()
    pair.network.script(Fault.DELAY)
    ticket = pair.submit(pair.source.copies[0])
    assert pair.network.wait_posts(1)
    ended: list[bool] = []
    thread = threading.Thread(target=lambda: ended.append(pair.sink.engine.close()))
    thread.start()
    assert ticket.wait().status is Status.CANCELLED
    assert ended == []
    pair.network.release()
    thread.join(10)
    assert ended == [True]
    assert pair.sink.engine.close()  # idempotent
    with pytest.raises(TransportError):
        pair.submit(pair.source.copies[0])


def test_close_says_when_something_never_ends() -> None:
    pair = Pair()
    pair.network.script(Fault.NEVER)
    ticket = pair.submit(pair.source.copies[0])
    assert pair.network.wait_posts(1)
    assert not pair.sink.engine.close(timeout_ns=20_000_000)
    assert ticket.wait().status is Status.CANCELLED


@pytest.mark.parametrize("fault", [Fault.ERROR, Fault.GONE])
def test_errors_fail_the_ticket_and_free_the_slots(pair: Pair, fault: Fault) -> None:
    pair.network.script(fault)
    outcome = pair.submit(*pair.source.copies[:2]).wait()
    assert outcome.status is Status.FAILED
    assert all(result.error for result in outcome.items)
    assert pair.sink.slab.used_bytes == 0


def test_a_source_reused_in_the_middle_of_a_read_is_stale(pair: Pair) -> None:
    slot = pair.source.slots[0]

    def reuse() -> None:
        pair.source.slab.retire(slot)
        pair.source.slab.memory.write(slot.payload_offset, b"another copy")

    pair.network.script(Fault.STALE, during=reuse)
    outcome = pair.submit(pair.source.copies[0]).wait()
    assert outcome.status is Status.STALE
    assert "checksum" in outcome.items[0].error


def test_a_flip_on_the_wire_is_found(pair: Pair) -> None:
    pair.network.script(Fault.FLIP)
    assert pair.submit(pair.source.copies[0]).wait().status is Status.STALE
    assert pair.submit(pair.source.copies[0]).wait().status is Status.DONE


def test_a_job_of_many_posts_ends_once(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(links, "POST_ITEMS", 1)
    outcome = pair.submit(*pair.source.copies).wait()
    assert outcome.status is Status.DONE
    assert pair.network.posts == 8
    assert [r.checksum for r in outcome.items] == [c.checksum for c in pair.source.copies]


def test_only_the_posts_in_flight_time_out(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(links, "POST_ITEMS", 1)
    pair.network.script(Fault.DELAY)  # the first of three
    outcome = pair.submit(*pair.source.copies[:3], seconds=0.1).wait()
    assert [r.status for r in outcome.items] == [Status.TIMED_OUT, Status.DONE, Status.DONE]
    assert outcome.status is Status.TIMED_OUT
    assert pair.sink.slab.pins(outcome.items[1].dest) == 1


def test_a_callback_that_raises_ends_nobody_elses_transfer(pair: Pair) -> None:
    pair.network.script(Fault.DELAY)
    ticket = pair.submit(pair.source.copies[0])

    def bad(outcome: object) -> None:
        raise RuntimeError(str(outcome))

    ticket.add_callback(bad)
    assert pair.network.wait_posts(1)
    pair.network.release()
    assert ticket.wait().status is Status.DONE
    assert pair.submit(pair.source.copies[0]).wait().status is Status.DONE


def test_a_bug_in_the_owner_ends_every_ticket(monkeypatch: pytest.MonkeyPatch) -> None:
    pair = Pair()
    pair.network.script(Fault.NEVER)
    waiting = pair.submit(pair.source.copies[0])
    assert pair.network.wait_posts(1)

    def broken() -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr(pair.sink.engine._mover, "step", broken)
    pair.sink.engine._inbox.put(int)
    assert waiting.wait(timeout_ns=5_000_000_000).status is Status.FAILED
    assert until(lambda: bool(pair.sink.engine._closed))
    with pytest.raises(TransportError, match="broken"):
        pair.submit(pair.source.copies[1])
    assert not pair.sink.engine.close()


def test_a_paced_link_holds_the_news_back() -> None:
    pair = Pair()
    link = LinkProfile(bandwidth_bytes_per_s=1_000_000, latency_ns=20_000_000, emulated=True)
    pair.sink.engine.connect(replace(pair.source.engine.info(), link=link))
    begin = time.monotonic_ns()
    outcome = pair.submit(*pair.source.copies[:5]).wait()
    elapsed = time.monotonic_ns() - begin
    floor = 20_000_000 + 5 * NBYTES * 1_000
    assert outcome.status is Status.DONE
    assert floor <= elapsed < floor + 500_000_000
    assert outcome.wire_ns >= floor * 0.99
    real = replace(link, emulated=False)  # a real link needs no pacing
    pair.sink.engine.connect(replace(pair.source.engine.info(), link=real))
    assert pair.submit(pair.source.copies[0]).wait().wire_ns < floor
    pair.close()


def test_a_paced_read_can_time_out_and_frees_its_slot() -> None:
    pair = Pair()
    link = LinkProfile(bandwidth_bytes_per_s=10**9, latency_ns=10**10, emulated=True)
    pair.sink.engine.connect(replace(pair.source.engine.info(), link=link))
    outcome = pair.submit(pair.source.copies[0], seconds=0.05).wait()
    assert outcome.status is Status.TIMED_OUT
    assert pair.sink.slab.state(outcome.items[0].dest) is SlotState.FREE  # its bytes had landed
    pair.close()


def test_the_earliest_deadline_goes_first(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(links, "POST_ITEMS", 1)
    urgent: list[Any] = []

    def submit_urgent() -> None:  # while the first post of the long read is on the wire
        urgent.append(pair.submit(pair.source.copies[7], seconds=5))

    pair.network.script(Fault.STALE, during=submit_urgent)
    long = pair.submit(*pair.source.copies[:4], seconds=20)
    assert long.wait().status is Status.DONE
    assert urgent[0].wait().status is Status.DONE
    rows = np.frombuffer(pair.sink.ring.drain(), dtype=ROW)["row_id"].tolist()
    later = [long.transfer_id + index for index in range(4)]
    assert rows == [later[0], urgent[0].transfer_id, *later[1:]]


def test_an_engine_that_never_started_refuses_reads_and_closes() -> None:
    backend = LoopbackBackend(LoopbackNetwork())
    slab = Slab(capacity_bytes=8192, slot_payload_bytes=NBYTES, name="idle", incarnation=1)
    engine = Engine(slab=slab, backend=backend, ring=Ring(), name="idle", incarnation=1)
    with pytest.raises(TransportError, match="not started"):
        engine.read("source", [], deadline_ns=deadline())
    with pytest.raises(TransportError, match="start"):
        engine.info()
    assert engine.close()


def test_waiting_less_than_the_read_raises_and_the_read_goes_on(pair: Pair) -> None:
    pair.network.script(Fault.DELAY)
    ticket = pair.submit(pair.source.copies[0])
    with pytest.raises(TransferTimeout):
        ticket.wait(timeout_ns=1_000_000)
    assert pair.network.wait_posts(1)
    pair.network.release()
    assert ticket.wait().status is Status.DONE
