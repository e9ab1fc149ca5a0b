"""The controller's core: membership, incarnations, recovery from the journal, refusals."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any

import msgspec
import pytest

from hotset.actors.commandlog import check_replay
from hotset.actors.control import DEAD_AFTER_NS, TICK_NS, ControlCore, ControlSpec, make_brain
from hotset.actors.frames import read_frames
from hotset.actors.messages import Heartbeat, Join, WorkerPlan, decode, encode, pack, unpack_command
from hotset.errors import StaleEpochError
from hotset.policies.types import (
    BlockId,
    Concurrency,
    Copy,
    CopyDropped,
    CopyLanded,
    DropCopy,
    Event,
    Format,
    LayerTimes,
    Reason,
    RouterCounts,
    StartTransfer,
    StoreInfo,
    Tier,
    TransferFailed,
)
from hotset.transport.base import PeerInfo

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from hotset.actors.messages import HeartbeatReply

LAYERS, EXPERTS, NBYTES, REDUCED = (0, 1), 4, 1000, 600
BLOCKS = len(LAYERS) * EXPERTS


class Clock:
    """Time that a test moves."""

    def __init__(self) -> None:
        self.now_ns = 1_000_000_000_000

    def __call__(self) -> int:
        self.now_ns += 1
        return self.now_ns


class Store:
    """A store as the controller sees it: it joins, beats, and does what it is told."""

    def __init__(
        self, core: ControlCore, name: str, *, tier: Tier, slots: int, incarnation: int = 1
    ) -> None:
        self.core = core
        self.info = StoreInfo(
            name=name, tier=tier, node="here", incarnation=incarnation,
            capacity_bytes=slots * 2 * (64 + 640),  # a slot holds two reduced copies
        )  # fmt: skip
        self.copies: dict[tuple[BlockId, Format], Copy] = {}
        self.generations = itertools.count(1)
        self.version = self.members = -1
        self.seen = 0
        self.plan_epoch = -1
        self.plans: list[WorkerPlan] = []
        self.known: dict[str, int] = {}
        self.draining = False

    def join(self) -> list[Any]:
        peer = PeerInfo(
            name=self.info.name, incarnation=self.info.incarnation, backend="loopback",
            backend_metadata=b"", base_address=0, nbytes=1,
        )  # fmt: skip
        message = Join(store=self.info, peer=peer, copies=tuple(self.copies.values()))
        return self._take(self.core.join(decode(encode(message), Join)))

    def beat(self, events: Sequence[Event] = ()) -> list[Any]:
        message = Heartbeat(
            store=self.info.name, incarnation=self.info.incarnation,
            directory_version=self.version, membership_version=self.members,
            events=[pack(event) for event in events], gauges={}, commands_seen=self.seen,
            plan_epoch=self.plan_epoch,
        )  # fmt: skip
        return self._take(self.core.heartbeat(decode(encode(message), Heartbeat)))

    def _take(self, reply: HeartbeatReply) -> list[Any]:
        self.heard = reply
        self.version = reply.directory_version
        if reply.members is not None:
            self.members = reply.membership_version
            self.known = {m.store.name: m.store.incarnation for m in reply.members}
        self.draining = reply.draining
        if reply.plan is not None:
            self.plan_epoch = reply.plan.epoch
            self.plans.append(reply.plan)
        self.seen = reply.command_seq
        return [unpack_command(command) for command in reply.commands]

    def obey(self, commands: Sequence[Any]) -> list[Event]:
        """Carry commands out; the events that tell of it."""
        events: list[Event] = []
        for command in commands:
            assert command.store == self.info.name
            if isinstance(command, StartTransfer):
                events.append(self.landed(command.block, command.format, reason=command.reason))
            elif isinstance(command, DropCopy):
                events.append(self.dropped(command.block, command.format))
        return events

    def landed(
        self, block: BlockId, fmt: Format = Format.BF16, *, reason: Reason = Reason.DEMAND
    ) -> CopyLanded:
        copy = Copy(
            block=block, format=fmt, store=self.info.name, offset=0,
            nbytes=NBYTES if fmt is Format.BF16 else REDUCED, generation=next(self.generations),
            checksum=7, incarnation=self.info.incarnation,
        )  # fmt: skip
        self.copies[block, fmt] = copy
        return CopyLanded(now_ns=self.core._clock_ns(), copy=copy, reason=reason, source="storage")

    def dropped(self, block: BlockId, fmt: Format = Format.BF16) -> CopyDropped:
        copy = self.copies.pop((block, fmt))
        return CopyDropped(
            now_ns=self.core._clock_ns(), store=self.info.name, block=block, format=fmt,
            reason=Reason.EVICT, incarnation=self.info.incarnation, generation=copy.generation,
        )  # fmt: skip


@pytest.fixture
def clock() -> Clock:
    return Clock()


def core_in(folder: Path, clock: Clock, **more: Any) -> ControlCore:
    spec = ControlSpec(
        run="r", run_dir=str(folder), model="m", digest="d", layers=LAYERS, num_experts=EXPERTS,
        nbytes=NBYTES, reduced_nbytes=REDUCED, **more,
    )  # fmt: skip
    # What crosses to the actor is the encoded form.
    return ControlCore(
        msgspec.msgpack.decode(msgspec.msgpack.encode(spec), type=ControlSpec), clock_ns=clock
    )


def filled(core: ControlCore, name: str = "host-0", **more: Any) -> Store:
    pool = Store(core, name, tier=Tier.HOST, slots=BLOCKS, **more)
    pool.beat(pool.obey(pool.join()))
    return pool


def listed(core: ControlCore) -> set[tuple[str, BlockId]]:
    return {(c.store, c.block) for layer in LAYERS for e in range(EXPERTS)
            for c in core.why(BlockId(layer, e))[1]}  # fmt: skip


def test_a_pool_that_joins_is_filled_and_the_states_add_up(tmp_path: Path, clock: Clock) -> None:
    core = core_in(tmp_path, clock)
    assert not core.settled.is_set()
    pool = Store(core, "host-0", tier=Tier.HOST, slots=BLOCKS)
    commands = pool.join()
    assert {command.block for command in commands} == {
        BlockId(layer, expert) for layer in LAYERS for expert in range(EXPERTS)
    }
    assert not core.settled.is_set()
    assert core.status()["states"]["S5"] == BLOCKS
    pool.beat(pool.obey(commands))
    assert core.settled.is_set()
    status = core.status()
    assert status["epoch"] > 0
    assert status["states"]["S4"] == sum(status["states"].values()) == status["blocks"] == BLOCKS
    worker = Store(core, "worker-0", tier=Tier.HBM, slots=3)
    worker.beat(worker.obey(worker.join()))
    assert len(worker.heard.added) > 0
    assert worker.known == {"host-0": 1, "worker-0": 1}
    assert core.status()["states"]["S1"] == 3
    assert sum(core.status()["states"].values()) == BLOCKS


def test_commands_are_given_once(tmp_path: Path, clock: Clock) -> None:
    core = core_in(tmp_path, clock)
    pool = Store(core, "host-0", tier=Tier.HOST, slots=BLOCKS)
    assert pool.join()
    assert not pool.beat()


def test_commands_of_a_lost_reply_are_given_again(tmp_path: Path, clock: Clock) -> None:
    core = core_in(tmp_path, clock)
    pool = Store(core, "host-0", tier=Tier.HOST, slots=BLOCKS)
    first = pool.join()
    pool.seen = 0  # the reply never arrived
    assert pool.beat() == first
    assert not pool.beat()


def test_a_stranger_is_asked_to_join(tmp_path: Path, clock: Clock) -> None:
    core = core_in(tmp_path, clock)
    stranger = Store(core, "host-0", tier=Tier.HOST, slots=4)
    stranger.beat([stranger.landed(BlockId(0, 0))])
    assert not stranger.heard.known
    assert not listed(core)


def test_a_predecessor_changes_nothing(tmp_path: Path, clock: Clock) -> None:
    core = core_in(tmp_path, clock)
    old = filled(core, incarnation=1)
    new = Store(core, "host-0", tier=Tier.HOST, slots=BLOCKS, incarnation=2)
    new.join()
    assert not listed(core)  # the copies died with the old process
    old.beat([old.landed(BlockId(0, 0))])
    assert not old.heard.known
    assert not listed(core)
    with pytest.raises(StaleEpochError, match="successor"):
        old.join()
    new.beat([new.landed(BlockId(1, 1))])
    assert listed(core) == {("host-0", BlockId(1, 1))}


def test_a_silent_store_is_lost(tmp_path: Path, clock: Clock) -> None:
    core = core_in(tmp_path, clock)
    filled(core)
    worker = Store(core, "worker-0", tier=Tier.HBM, slots=2)
    worker.join()
    clock.now_ns += DEAD_AFTER_NS - 1000
    worker.beat()
    assert set(worker.known) == {"host-0", "worker-0"}
    clock.now_ns += 2000
    worker.beat()
    assert set(worker.known) == {"worker-0"}
    assert not any(store == "host-0" for store, _ in listed(core))
    assert {store["name"] for store in core.status()["stores"]} == {"worker-0"}


def test_a_late_report_of_an_older_copy_unlists_nothing(tmp_path: Path, clock: Clock) -> None:
    core = core_in(tmp_path, clock)
    pool = filled(core)
    block = BlockId(0, 2)
    drop = pool.dropped(block)
    events = [drop, pool.landed(block)]
    pool.beat(events)
    pool.beat(events)  # a heartbeat whose answer was lost comes again
    pool.beat([drop])
    assert ("host-0", block) in listed(core)
    assert core.status()["states"]["S4"] == BLOCKS


def test_a_successor_recovers_from_the_journal(tmp_path: Path, clock: Clock) -> None:
    core = core_in(tmp_path, clock)
    pool, gone = filled(core), filled(core, "cxl-0")
    worker = Store(core, "worker-0", tier=Tier.HBM, slots=2)
    worker.beat(worker.obey(worker.join()))
    before, story = core.status(), core.why(BlockId(0, 0))[0]
    # No close: the process was killed.
    successor = core_in(tmp_path, clock)
    assert successor.replayed > 0
    assert successor.status()["epoch"] >= before["epoch"]
    assert successor.why(BlockId(0, 0))[0] == story
    for store in (pool, worker):
        store.core = successor
        store.beat()
        assert not store.heard.known
        store.join()
        assert store.heard.epoch >= before["epoch"]
    assert {s["name"] for s in successor.status()["stores"]} == {"host-0", "worker-0"}
    for step_ns in (DEAD_AFTER_NS // 2, DEAD_AFTER_NS // 2, TICK_NS):
        clock.now_ns += step_ns
        pool.beat()
        worker.beat()
    # What has not joined again is lost; what has, is listed as before.
    assert {name for name, _ in listed(successor)} == {"host-0", "worker-0"}
    assert gone.info.name not in {name for name, _ in listed(successor)}
    assert sum(successor.status()["states"].values()) == BLOCKS
    third = core_in(tmp_path, clock)
    assert third.replayed > successor.replayed


def busy_run(folder: Path, clock: Clock) -> None:
    """A run with a successor, a loss, a drain and refusals."""
    core = core_in(folder, clock, reduced_ratio=0.5, floors={1: "bf16"}, default_floor="int8")
    pool = filled(core)
    worker = Store(core, "worker-0", tier=Tier.HBM, slots=4)
    worker.beat(worker.obey(worker.join()))
    core.drain("host-0")
    successor = core_in(folder, clock, reduced_ratio=0.5, floors={1: "bf16"}, default_floor="int8")
    for store in (pool, worker):
        store.core = successor
        store.join()
    other = filled(successor, "host-1")
    clock.now_ns += DEAD_AFTER_NS - 1000
    other.beat()
    worker.beat()
    clock.now_ns += 2000
    other.beat()  # host-0 is lost
    successor.close()


def test_a_journal_replays_to_the_same_commands_byte_for_byte(tmp_path: Path, clock: Clock) -> None:
    busy_run(tmp_path, clock)
    spec = msgspec.json.decode((tmp_path / "run.json").read_bytes(), type=ControlSpec)
    found = check_replay(tmp_path, lambda: make_brain(spec))
    assert found.differs_at is None
    assert found.commands > 10
    assert found.compared > 10
    other = msgspec.structs.replace(spec, reduced_ratio=0.0)
    differs = check_replay(tmp_path, lambda: make_brain(other))
    assert differs.differs_at is not None
    log = tmp_path / "commands.msgpack"
    log.write_bytes(log.read_bytes()[:-3])
    torn = check_replay(tmp_path, lambda: make_brain(spec))
    assert torn.differs_at is None
    assert 0 < torn.compared <= found.compared


def test_a_torn_journal_still_recovers(tmp_path: Path, clock: Clock) -> None:
    core = core_in(tmp_path, clock)
    filled(core)
    journal = tmp_path / "journal.msgpack"
    journal.write_bytes(journal.read_bytes()[:-5])
    successor = core_in(tmp_path, clock)
    assert successor.replayed > 0
    assert (tmp_path / "journal.msgpack.torn").exists()
    pool = Store(successor, "host-0", tier=Tier.HOST, slots=BLOCKS, incarnation=2)
    pool.beat(pool.obey(pool.join()))
    assert core_in(tmp_path, clock).replayed > successor.replayed


def test_draining_is_told_and_leaving_is_final(tmp_path: Path, clock: Clock) -> None:
    core = core_in(tmp_path, clock)
    filled(core)
    worker = Store(core, "worker-0", tier=Tier.HBM, slots=2)
    worker.beat(worker.obey(worker.join()))
    assert not core.drain("nobody")
    assert core.drain("worker-0")
    worker.beat()
    assert worker.draining
    status = {store["name"]: store for store in core.status()["stores"]}
    assert status["worker-0"]["state"] == "draining"
    core.leave("worker-0", incarnation=0)  # of an older one: no effect
    assert "worker-0" in {store["name"] for store in core.status()["stores"]}
    core.leave("worker-0", incarnation=1)
    assert not any(store == "worker-0" for store, _ in listed(core))


def test_refusals_below_the_floor_are_counted_and_explained(tmp_path: Path, clock: Clock) -> None:
    core = core_in(tmp_path, clock, reduced_ratio=0.5, floors={1: "bf16"}, default_floor="int8")
    worker = Store(core, "worker-0", tier=Tier.HBM, slots=4)
    commands = worker.join()
    reduced = {command.block for command in commands if command.format is Format.INT8}
    assert reduced
    assert {block.layer for block in reduced} == {0}
    vetoes = core.status()["vetoes"]["veto_precision"]
    told = [
        line
        for expert in range(EXPERTS)
        for line in core.why(BlockId(1, expert))[0]
        if line.reason is Reason.VETO_PRECISION
    ]
    assert vetoes == len(told) > 0


def test_a_full_store_is_believed(tmp_path: Path, clock: Clock) -> None:
    """A worker that has no room, although the sums say so, does not break the books."""
    core = core_in(tmp_path, clock)
    worker = Store(core, "worker-0", tier=Tier.HBM, slots=4)
    first, *others = worker.join()
    refused = [
        TransferFailed(
            now_ns=clock(), store="worker-0", block=command.block, format=command.format,
            reason=Reason.VETO_MEMORY, incarnation=1,
        )
        for command in others
    ]  # fmt: skip
    worker.beat([*worker.obey([first]), *refused])
    assert core.settled.is_set()
    for command in others:  # compute needs them: the worker makes room by itself
        worker.beat([worker.landed(command.block)])
    assert core.status()["states"]["S1"] == len(others) + 1


def test_advice_moves_nothing(tmp_path: Path, clock: Clock) -> None:
    core = core_in(tmp_path, clock, mode="advisory")
    pool = Store(core, "host-0", tier=Tier.HOST, slots=BLOCKS)
    assert not pool.join()
    assert not pool.beat()
    assert core.status()["mode"] == "advisory"
    assert any("asked host-0" in line.event for line in core.why(BlockId(0, 0))[0])


def stale(command: StartTransfer, clock: Clock) -> TransferFailed:
    return TransferFailed(
        now_ns=clock(), store=command.store, block=command.block, format=command.format,
        reason=Reason.STALE, incarnation=1,
    )  # fmt: skip


def working(core: ControlCore, store: Store, *, hot: int) -> list[Event]:
    """What a worker reports while its requests use one expert of each layer most."""
    now_ns, name = core._clock_ns(), store.info.name
    counts = tuple(
        (BlockId(layer, expert), 500 if expert == hot else 10)
        for layer in LAYERS
        for expert in range(EXPERTS)
    )
    times = tuple((layer, 1_000_000) for layer in LAYERS)
    return [
        RouterCounts(now_ns=now_ns, store=name, counts=counts, tokens=500),
        Concurrency(now_ns=now_ns, store=name, requests=1, steps=100, tokens=500),
        LayerTimes(now_ns=now_ns, store=name, steps=100, times=times, experts_ns=1_500_000),
    ]


@pytest.mark.parametrize("mode", ["active", "advisory"])
def test_a_plan_is_published_to_the_workers_once(tmp_path: Path, clock: Clock, mode: str) -> None:
    core = core_in(tmp_path, clock, mode=mode)
    workers = [Store(core, f"worker-{at}", tier=Tier.HBM, slots=8) for at in range(2)]
    for at, worker in enumerate(workers):
        for block in [BlockId(layer, 2 * at + e) for layer in LAYERS for e in range(2)]:
            worker.landed(block)
        worker.beat([stale(command, clock) for command in worker.join()])  # no first fill
    for _ in range(25):
        clock.now_ns += TICK_NS
        for worker in workers:
            worker.beat(worker.obey(worker.beat(working(core, worker, hot=0))))
    if mode == "advisory":
        assert not any(worker.plans for worker in workers)
        return
    (first,), (second,) = (worker.plans for worker in workers)
    assert 0 in {share.block.index for share in first.shares}
    assert 0 in {block.index for block in second.keep}
    successor = core_in(tmp_path, clock, mode=mode)
    assert successor._brain.plan_epoch == first.epoch == second.epoch


def test_a_planner_that_is_not_ready_is_not_asked(tmp_path: Path, clock: Clock) -> None:
    core = core_in(tmp_path, clock)
    asked = []
    core.may_plan = lambda: bool(asked.append(1))
    pool = filled(core)
    for _ in range(12):
        clock.now_ns += TICK_NS
        pool.beat()
    assert asked
    core.close()
    events = [msgspec.msgpack.decode(one) for one in read_frames(tmp_path / "journal.msgpack")]
    assert "Replan" not in {kind for kind, _ in events}
