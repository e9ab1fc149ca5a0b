"""What every backend must do, seen through the engine: one suite, over each of them."""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING

import numpy as np
import pytest

from hotset.errors import ConfigError, DependencyError, InvalidTransition, TransportError
from hotset.transport.base import Status
from hotset.transport.header import checksum
from hotset.transport.records import ROW, Code, Kind
from hotset.transport.slab import SlotState
from hotset.transport.ucx import UcxBackend
from tests.transport.worlds import NBYTES, World, deadline

if TYPE_CHECKING:
    from collections.abc import Iterator

    from hotset.transport.base import Outcome


@pytest.fixture(
    scope="module",
    params=[
        "loopback",
        "shm",
        "tcp",
        pytest.param(
            "ucx",
            marks=pytest.mark.skipif(
                bool(UcxBackend.available()), reason=f"UCX: {UcxBackend.available()}"
            ),
        ),
        pytest.param("nixl", marks=pytest.mark.nixl),
        pytest.param("node", marks=pytest.mark.nixl),
    ],
)
def world(request: pytest.FixtureRequest) -> Iterator[World]:
    try:
        made = World(request.param)
    except DependencyError as error:  # NIXL and ucxx do not live in one process
        pytest.skip(str(error))
    yield made
    made.close()


def test_a_batch_lands_verified_ready_and_pinned(world: World) -> None:
    outcome = world.read(*world.copies[:8])
    assert outcome.status is Status.DONE
    for copy, result in zip(world.copies[:8], outcome.items, strict=True):
        slab = world.sink.slab
        assert slab.state(result.dest) is SlotState.READY
        assert slab.pins(result.dest) == 1
        assert checksum(slab.payload(result.dest)) == copy.checksum == result.checksum
        header = slab.header(result.dest)
        assert header is not None
        assert (header.key, header.incarnation) == (copy.key, 9)
        assert header.generation == result.generation
    assert outcome.nbytes == 8 * NBYTES
    world.drop(outcome)


def test_times_add_up_and_rows_tell_each_item(world: World) -> None:
    world.sink.ring.drain()
    before = time.time_ns()
    items = [copy.item(world.slot()) for copy in world.copies[:3]]
    ticket = world.sink.engine.read(
        "source", items, deadline_ns=deadline(), trace=(11, 12), parent=13, reason="demand"
    )
    outcome = ticket.wait()
    life = outcome.queue_ns + outcome.wire_ns + outcome.verify_ns + outcome.activate_ns
    assert life == outcome.ended_ns - outcome.started_ns
    assert before <= outcome.started_ns <= time.time_ns()
    rows = np.frombuffer(world.sink.ring.drain(), dtype=ROW)
    assert rows["row_id"].tolist() == [ticket.transfer_id + i for i in range(3)]
    assert set(rows["kind"]) == {Kind.TRANSFER}
    assert set(rows["code"]) == {Code.OK}
    assert set(rows["layer"]) == {3}
    assert rows["index"].tolist() == [1, 2, 3]
    assert set(rows["trace_hi"]) == {11}
    assert set(rows["parent"]) == {13}
    names = world.sink.ring.names()
    assert {names[i] for i in rows["source"]} == {"source"}
    assert {names[i] for i in rows["reason"]} == {"demand"}
    world.drop(outcome)


def test_a_stale_generation_fails_no_other_item(world: World) -> None:
    world.obey("refill", 8)
    outcome = world.read(world.copies[7], world.copies[8], world.copies[9])
    assert [result.status for result in outcome.items] == [
        Status.DONE, Status.STALE, Status.DONE,
    ]  # fmt: skip
    assert outcome.status is Status.STALE
    assert "another copy" in outcome.items[1].error
    assert world.sink.slab.state(outcome.items[1].dest) is SlotState.FREE
    world.drop(outcome)


def test_a_void_slot_is_stale(world: World) -> None:
    world.obey("retire", 10)
    outcome = world.read(world.copies[10])
    assert outcome.items[0].status is Status.STALE
    assert "void" in outcome.items[0].error
    world.drop(outcome)


def test_a_flipped_byte_is_stale(world: World) -> None:
    world.obey("flip", 11)
    outcome = world.read(world.copies[11])
    assert outcome.items[0].status is Status.STALE
    assert "checksum" in outcome.items[0].error
    world.drop(outcome)


@pytest.mark.parametrize(
    "change", [{"generation": 999}, {"incarnation": 4}, {"key": bytes(16)}, {"checksum": 1}]
)
def test_another_copy_than_expected_is_stale(world: World, change: dict[str, object]) -> None:
    outcome = world.read(world.copies[0], **change)
    assert outcome.status is Status.STALE
    world.drop(outcome)


def test_none_in_expect_accepts_any_value(world: World) -> None:
    outcome = world.read(world.copies[0], generation=None, checksum=None, incarnation=None)
    assert outcome.status is Status.DONE
    world.drop(outcome)


def test_an_item_out_of_range_fails_alone(world: World) -> None:
    items = [
        world.copies[0].item(world.slot()),
        world.copies[1].item(world.slot(), remote_offset=world.info.nbytes - 64),
        world.copies[2].item(world.slot()),
    ]
    outcome = world.sink.engine.read("source", items, deadline_ns=deadline()).wait()
    assert [r.status for r in outcome.items] == [Status.DONE, Status.FAILED, Status.DONE]
    assert "outside" in outcome.items[1].error
    world.drop(outcome)


def test_zero_items_end_at_once(world: World) -> None:
    outcome = world.read()
    assert outcome.status is Status.DONE
    assert outcome.items == ()


def test_an_unknown_peer_fails_and_frees_the_slot(world: World) -> None:
    slot = world.slot()
    item = world.copies[0].item(slot)
    outcome = world.sink.engine.read("nobody", [item], deadline_ns=deadline()).wait()
    assert outcome.status is Status.FAILED
    assert "not connected" in outcome.items[0].error
    assert world.sink.slab.state(slot) is SlotState.FREE


def test_a_past_deadline_posts_nothing(world: World) -> None:
    outcome = world.read(world.copies[0], seconds=-1.0)
    assert outcome.status is Status.TIMED_OUT
    assert world.sink.slab.state(outcome.items[0].dest) is SlotState.FREE
    assert world.sink.engine.quarantined == 0


def test_slots_are_checked_before_anything_is_taken(world: World) -> None:
    slot = world.slot()
    engine = world.sink.engine
    with pytest.raises(ConfigError):
        engine.read(
            "source", [world.copies[0].item(slot, nbytes=NBYTES + 1)], deadline_ns=deadline()
        )
    assert world.sink.slab.state(slot) is SlotState.FILLING
    world.sink.slab.fail(slot)
    with pytest.raises(InvalidTransition):
        engine.read("source", [world.copies[0].item(slot)], deadline_ns=deadline())


def test_callbacks_run_once_before_and_after_the_end(world: World) -> None:
    seen: list[str] = []
    came = threading.Event()
    items = [world.copies[0].item(world.slot())]
    ticket = world.sink.engine.read("source", items, deadline_ns=deadline())

    def note(outcome: Outcome) -> None:
        seen.append(outcome.status.value)
        came.set()

    ticket.add_callback(note)
    outcome = ticket.wait()
    assert came.wait(10)
    ticket.add_callback(lambda outcome: seen.append("late " + outcome.status.value))
    assert seen == ["done", "late done"]
    assert ticket.done
    world.drop(outcome)


def test_many_threads_submit(world: World) -> None:
    outcomes = []
    lock = threading.Lock()

    def work() -> None:
        for _ in range(20):
            outcome = world.read(world.copies[0], world.copies[1])
            with lock:
                outcomes.append(outcome.status)
            world.drop(outcome)

    threads = [threading.Thread(target=work) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert outcomes == [Status.DONE] * 120
    assert world.sink.engine.in_flight == 0


def test_two_engines_read_each_other_at_once(world: World) -> None:
    theirs: list[object] = []
    request = (world.sink.engine.info(), world.sink.copies)
    thread = threading.Thread(target=lambda: theirs.append(world.obey("read", request)))
    thread.start()
    for _ in range(10):
        outcome = world.read(*world.copies[:4])
        assert outcome.status is Status.DONE
        world.drop(outcome)
    thread.join(30)
    assert theirs == [[("done", copy.checksum) for copy in world.sink.copies]]


def test_damaged_metadata_is_refused_with_a_typed_error(world: World) -> None:
    from dataclasses import replace

    broken = replace(world.info, name="other", backend_metadata=b"\x00garbage")
    with pytest.raises(TransportError):
        world.sink.engine.connect(broken)
    world.sink.engine.connect(world.info)  # idempotent
    outcome = world.read(world.copies[0])
    assert outcome.status is Status.DONE
    world.drop(outcome)


def test_disconnect_then_connect_again(world: World) -> None:
    world.sink.engine.disconnect("source")
    world.sink.engine.disconnect("source")
    failed = world.read(world.copies[0])
    assert failed.status is Status.FAILED
    world.sink.engine.connect(world.info)
    outcome = world.read(world.copies[0])
    assert outcome.status is Status.DONE
    world.drop(outcome)
