"""A lone block takes the express way and ends as on the ordinary one, whatever happens to it."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from hotset.transport.base import Status
from hotset.transport.express import Express
from hotset.transport.loopback import Fault, LoopbackBackend, LoopbackNetwork
from hotset.transport.mover import Mover
from hotset.transport.records import ROW
from hotset.transport.slab import SlotState
from tests.transport.peer import Store, build
from tests.transport.worlds import deadline, until

if TYPE_CHECKING:
    from collections.abc import Iterator

    from hotset.transport.base import Outcome

NBYTES = 4096
CLOCKS = ("start_ns", "end_ns", "row_id", "queue_ns", "wire_ns", "verify_ns", "activate_ns")


class Trio:
    """Two sources with the same copies, and a sink."""

    def __init__(self) -> None:
        self.network = LoopbackNetwork()
        self.one, self.two = (self._store(name, blocks=4) for name in ("one", "two"))
        self.sink = self._store("sink", blocks=0, describe=lambda key: (5, key[0]))
        for source in (self.one, self.two):
            self.sink.engine.connect(source.engine.info())

    def _store(self, name: str, **more: Any) -> Store:
        backend = LoopbackBackend(self.network)
        return build(name=name, incarnation=3, backend=backend, nbytes=NBYTES, room=6, **more)

    def read(self, *, others: bool = False, now: bool = True, **more: Any) -> Outcome:
        slot = self.sink.slab.allocate(NBYTES)
        assert slot is not None
        if others:
            more["others"] = (self.two.copies[1].replica("two"),)
        item = self.one.copies[1].item(slot, **more)
        ask = self.sink.engine.read_now if now else self.sink.engine.read
        answer = ask("one", [item], deadline_ns=deadline(), trace=(7, 8), parent=9, reason="test")
        return answer if now else answer.wait()

    def facts(self, outcome: Outcome) -> dict[str, Any]:
        """What must not depend on the way: all but times and numbers that count up."""
        [result] = outcome.items
        state = self.sink.slab.state(result.dest)
        pins = self.sink.slab.pins(result.dest)
        if outcome.status is Status.DONE:
            assert bytes(self.sink.slab.read_payload(result.dest)) == bytes(
                self.one.slab.read_payload(self.one.slots[1])
            )
            assert result.generation
            self.sink.slab.unpin(result.dest)
            self.sink.slab.retire(result.dest)
        rows = np.frombuffer(self.sink.ring.drain(), dtype=ROW)
        names = self.sink.ring.names()
        [row] = [
            {name: row[name] for name in ROW.names or () if name not in CLOCKS} for row in rows
        ]
        row["source"], row["reason"] = names[row["source"]], names[row["reason"]]
        assert rows["row_id"][0] == outcome.transfer_id
        parts = sum(int(rows[name][0]) for name in CLOCKS[3:])
        assert parts == rows["end_ns"][0] - rows["start_ns"][0]
        phases = outcome.queue_ns + outcome.wire_ns + outcome.verify_ns + outcome.activate_ns
        assert phases == outcome.ended_ns - outcome.started_ns
        said = (result.status, result.checksum, result.error, result.source, result.lost)
        return {
            "outcome": (outcome.status, outcome.peer, outcome.nbytes),
            "result": said, "slot": (state, pins), "row": row,
        }  # fmt: skip

    def close(self) -> None:
        self.network.release()
        for store in (self.sink, self.one, self.two):
            assert store.engine.close()
            store.slab.check_integrity()


@pytest.fixture
def trio() -> Iterator[Trio]:
    made = Trio()
    yield made
    made.close()


@pytest.mark.parametrize("now", [True, False], ids=["caller", "owner"])
@pytest.mark.parametrize("others", [False, True], ids=["alone", "another-source"])
@pytest.mark.parametrize("fault", [None, Fault.DELAY, Fault.ERROR, Fault.GONE, Fault.FLIP])
def test_both_ways_end_alike(
    fault: Fault | None, *, others: bool, now: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = []
    for express in (True, False):
        trio = Trio()
        with monkeypatch.context() as patch:
            if not express:
                patch.setattr(Mover, "read_alone", lambda *_: None)
            if fault is not None:
                trio.network.script(fault, source="one")
            if fault is Fault.DELAY:
                lander = threading.Thread(
                    target=lambda net=trio.network: net.wait_posts(1) and net.release()
                )
                lander.start()
            found.append(trio.facts(trio.read(others=others, now=now)))
            trio.close()
    assert found[0] == found[1]
    good = fault in {None, Fault.DELAY} or others
    assert (found[0]["outcome"][0] is Status.DONE) == good


@pytest.mark.parametrize(
    ("change", "status"),
    [
        ({"generation": 99}, Status.STALE),
        ({"checksum": 1}, Status.STALE),
        ({"remote_offset": 1 << 40}, Status.FAILED),
        ({"remote_offset": -64}, Status.FAILED),
    ],
)
def test_what_is_not_there_is_told(trio: Trio, change: dict[str, int], status: Status) -> None:
    outcome = trio.read(**change)
    assert outcome.status is status
    assert outcome.items[0].error
    assert trio.sink.slab.state(outcome.items[0].dest) is SlotState.FREE


def test_a_block_is_read_without_queues_only_while_nothing_else_moves(
    trio: Trio, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    plain = Express.read
    monkeypatch.setattr(Express, "read", lambda *args: calls.append(1) or plain(*args))
    trio.facts(trio.read())
    assert len(calls) == 1
    trio.network.script(Fault.DELAY, source="one")
    slot = trio.sink.slab.allocate(NBYTES)
    assert slot is not None
    slow = trio.sink.engine.read("one", [trio.one.copies[0].item(slot)], deadline_ns=deadline())
    assert trio.network.wait_posts(2)
    assert until(lambda: trio.sink.engine.in_flight == 1)
    assert len(calls) == 2
    outcome = trio.read()
    assert outcome.status is Status.DONE
    assert len(calls) == 2, "something is in flight: it queues, by priority and credits"
    trio.network.release()
    for result in (*outcome.items, *slow.wait().items):
        trio.sink.slab.unpin(result.dest)
        trio.sink.slab.retire(result.dest)


def test_closing_cancels_a_read_that_a_caller_has_posted(trio: Trio) -> None:
    trio.network.script(Fault.DELAY, source="one")
    ends: list[Outcome] = []
    caller = threading.Thread(target=lambda: ends.append(trio.read()))
    caller.start()
    assert trio.network.wait_posts(1)
    threading.Thread(target=lambda: until(lambda: bool(ends)) and trio.network.release()).start()
    assert trio.sink.engine.close()  # once the bytes have landed, in a slot that is nobody's
    caller.join()
    assert [one.status for one in ends] == [Status.CANCELLED]
