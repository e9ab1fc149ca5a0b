"""A second thread that reads along: the same results, whatever becomes of it."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

import pytest

from hotset.errors import TransportError
from hotset.transport.base import Priority, Status
from hotset.transport.shm import ShmBackend
from hotset.transport.slab import SlotState
from tests.transport.peer import build, fill
from tests.transport.worlds import deadline, until

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from hotset.transport.base import ReadItem, Span

MIB = 1 << 20
COUNT = 16
SLOT = 6 * MIB + 12_345


class Watched(ShmBackend):
    """Notes the lane of each read; `before` may hold one up or fail it."""

    def __init__(self) -> None:
        super().__init__()
        self.lanes: list[int] = []
        self.before: Callable[[int], None] = lambda _lane: None

    def window(self, peer: str, spans: Sequence[Span], *, lane: int = 0) -> int:
        self.lanes.append(lane)
        self.before(lane)
        return super().window(peer, spans, lane=lane)


class Pair:
    """Two stores of one process; one maps the other."""

    def __init__(self) -> None:
        shape: dict[str, Any] = {"blocks": 0, "nbytes": SLOT, "room": COUNT + 1}
        self.backend = Watched()
        self.source = build(name="source", incarnation=1, backend=ShmBackend(), **shape)
        self.sink = build(name="sink", incarnation=1, backend=self.backend, **shape)
        self.sink.engine.connect(self.source.engine.info())
        self.copies, self.slots = [], []
        for number in range(COUNT):
            slot = self.source.slab.allocate(SLOT if number % 2 else MIB)
            assert slot is not None
            self.slots.append(slot)
            self.copies.append(fill(self.source.slab, slot, seed=number + 1))

    def items(self, numbers: Sequence[int]) -> list[ReadItem]:
        found = []
        for number in numbers:
            copy = self.copies[number]
            slot = self.sink.slab.allocate(copy.nbytes)
            assert slot is not None
            found.append(copy.item(slot))
        return found

    def close(self) -> None:
        for store in (self.sink, self.source):
            assert store.engine.close()
            store.slab.check_integrity()


@pytest.fixture
def pair(monkeypatch: pytest.MonkeyPatch) -> Iterator[Pair]:
    monkeypatch.setattr("os.sched_getaffinity", lambda _pid: {0, 1})
    made = Pair()
    yield made
    made.close()


def _read(pair: Pair, numbers: Sequence[int], **options: Any) -> Any:
    return pair.sink.engine.read(
        "source", pair.items(numbers), deadline_ns=options.pop("end", deadline()), **options
    )


def _hold(pair: Pair) -> tuple[threading.Event, threading.Event]:
    """Hold the second thread up until the first event is set; the second one tells that it is."""
    gate, held = threading.Event(), threading.Event()

    def hold(lane: int) -> None:
        if lane:
            held.set()
            assert gate.wait(30)

    pair.backend.before = hold
    return gate, held


@pytest.mark.parametrize(
    "numbers",
    [range(0, COUNT, 2), range(1, COUNT, 2), range(COUNT), [1]],
    ids=["whole slots", "slots in pieces", "both", "one slot"],
)
def test_two_threads_bring_what_one_does(pair: Pair, numbers: Sequence[int]) -> None:
    outcome = _read(pair, numbers).wait()
    assert outcome.status is Status.DONE, outcome.items
    for number, result in zip(numbers, outcome.items, strict=True):
        assert result.checksum == pair.copies[number].checksum
        payload = pair.sink.slab.payload(result.dest)
        assert payload == pair.source.slab.payload(pair.slots[number])
    assert set(pair.backend.lanes) == {0, 1}


def test_nobody_waits_for_background_reads_so_one_thread_does_them(pair: Pair) -> None:
    outcome = _read(pair, range(COUNT), priority=Priority.BACKGROUND).wait()
    assert outcome.status is Status.DONE
    assert set(pair.backend.lanes) == {0}


def test_small_reads_wake_nobody(pair: Pair) -> None:
    assert _read(pair, [0, 2]).wait().status is Status.DONE
    assert set(pair.backend.lanes) == {0}


def test_a_flipped_byte_is_found_whoever_reads_it(pair: Pair) -> None:
    numbers = range(COUNT)
    for number in numbers:
        pair.source.slab.payload(pair.slots[number])[number * 1000] ^= 1
    outcome = _read(pair, numbers).wait()
    assert [result.status for result in outcome.items] == [Status.STALE] * COUNT
    assert 1 in pair.backend.lanes


def test_what_the_second_thread_cannot_read_the_owner_reads(pair: Pair) -> None:
    def refuse(lane: int) -> None:
        if lane:
            raise TransportError("no second lane", remedy="none")

    pair.backend.before = refuse
    outcome = _read(pair, range(COUNT)).wait()
    assert outcome.status is Status.DONE, outcome.items
    assert 1 in pair.backend.lanes


def test_slots_of_a_second_thread_that_is_late_stay_in_quarantine(pair: Pair) -> None:
    gate, held = _hold(pair)
    ticket = _read(pair, range(COUNT), end=deadline(0.3))
    outcome = ticket.wait()
    assert held.is_set()
    late = [result for result in outcome.items if result.status is Status.TIMED_OUT]
    assert late
    states = {pair.sink.slab.state(result.dest) for result in late}
    assert SlotState.QUARANTINED in states
    assert pair.sink.engine.quarantined > 0
    gate.set()
    assert until(lambda: pair.sink.engine.quarantined == 0)
    assert {pair.sink.slab.state(result.dest) for result in late} == {SlotState.FREE}
    for result in outcome.items:
        if result.status is Status.DONE:
            pair.sink.slab.unpin(result.dest)
            pair.sink.slab.retire(result.dest)
    assert _read(pair, [1]).wait().status is Status.DONE


def test_a_peer_is_not_unmapped_while_the_second_thread_reads_it(pair: Pair) -> None:
    gate, held = _hold(pair)
    ticket = _read(pair, [1, 3])
    assert held.wait(10)
    leaving = threading.Thread(target=pair.sink.engine.disconnect, args=("source",))
    leaving.start()
    leaving.join(0.2)
    assert leaving.is_alive()
    gate.set()
    leaving.join(10)
    assert not leaving.is_alive()
    assert ticket.wait().status in {Status.DONE, Status.FAILED}


def test_a_bug_over_there_ends_every_ticket(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda _pid: {0, 1})
    pair = Pair()

    def stumble(lane: int) -> None:
        if lane:
            raise ZeroDivisionError

    pair.backend.before = stumble
    outcome = _read(pair, range(COUNT)).wait()
    assert outcome.status is Status.FAILED
    assert "ZeroDivisionError" in " ".join(result.error for result in outcome.items)
    with pytest.raises(TransportError, match="broken"):
        _read(pair, [0])
    assert not pair.sink.engine.close()  # kept alive: who knows what still writes there
    assert pair.source.engine.close()
