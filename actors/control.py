"""The controller's core: messages in, replies out, with the brain in the middle and a journal.

Stores call, the controller answers; it never calls a store. A reply to a heartbeat carries lease,
directory changes, peers and commands. So a controller that dies takes nothing with it: stores go
on with their last directory, a successor replays the journal for epochs, popularity and stories,
and every store that it does not know joins again with its whole inventory.

Must not know Ray or how the brain decides. Every event is journalled before the brain handles it.
"""

from __future__ import annotations

import secrets
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from hotset.actors import watch
from hotset.actors.commandlog import FILE, CommandLog
from hotset.actors.controllog import ControlLog
from hotset.actors.frames import read_frames
from hotset.actors.journal import JournalWriter
from hotset.actors.lease import LEASE_NS
from hotset.actors.messages import (
    Heartbeat,
    HeartbeatReply,
    Join,
    Member,
    WorkerPlan,
    pack,
    unpack_event,
)
from hotset.actors.quality import QualitySpec, guardrail
from hotset.errors import StaleEpochError
from hotset.policies.brain import ClusterBrain
from hotset.policies.charge import said_of
from hotset.policies.config import PAYBACK_NS, PLAN_NS, PolicyConfig
from hotset.policies.states import state_of
from hotset.policies.types import (
    LOSSLESS,
    BlockId,
    BlockInfo,
    CancelTransfer,
    ChangeFormat,
    Command,
    DropCopy,
    Event,
    Format,
    PublishEpoch,
    Replan,
    StartTransfer,
    State,
    StoreDraining,
    StoreInfo,
    StoreJoined,
    StoreLost,
    Tick,
    Tier,
    Veto,
)
from hotset.policies.wire import shared_gain

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from hotset.policies.story import StoryLine
    from hotset.policies.types import Copy
    from hotset.policies.wire import Reading
    from hotset.transport.base import PeerInfo

DEAD_AFTER_NS = 3_000_000_000
TICK_NS = 1_000_000_000
RECORDS_BYTES = 4 << 20
"""Most bytes of the journal that one call of `records` returns."""


class ControlSpec(msgspec.Struct, frozen=True, kw_only=True):
    """What a controller is told at birth; the catalog in numbers, because it opens no files."""

    run: str
    run_dir: str
    model: str
    digest: str
    layers: tuple[int, ...]
    num_experts: int
    nbytes: int
    reduced_nbytes: int
    emulated: tuple[str, ...] = ()
    reduced_ratio: float = 0.0
    floors: dict[int, str] = msgspec.field(default_factory=dict)
    default_floor: str = "bf16"
    mode: str = "active"
    telemetry: str = ""
    formats: dict[str, int] = msgspec.field(default_factory=dict)
    quality: QualitySpec | None = None
    plan_ns: int = PLAN_NS
    payback_ns: int = PAYBACK_NS


class Records(msgspec.Struct, frozen=True, kw_only=True):
    """A part of a run's journal: `frames` from byte `offset` on, the last one perhaps cut."""

    spec: ControlSpec
    offset: int
    frames: bytes


def make_brain(spec: ControlSpec) -> ClusterBrain:
    """Build the brain of a run; fed with the run's journal it gives the run's commands again."""
    return ClusterBrain(
        blocks=tuple(
            BlockInfo(
                block=BlockId(layer, index),
                nbytes=spec.nbytes,
                reduced_nbytes=spec.reduced_nbytes,
                by_format=tuple(
                    (Format(name), nbytes) for name, nbytes in sorted(spec.formats.items())
                ),
            )
            for layer in spec.layers
            for index in range(spec.num_experts)
        ),
        config=PolicyConfig(
            hbm_reduced_ratio=spec.reduced_ratio,
            floor={layer: Format(name) for layer, name in spec.floors.items()},
            default_floor=Format(spec.default_floor or Format.BF16),
            formats=spec.quality.planned() if spec.quality else {},
            plan_ns=spec.plan_ns,
            payback_ns=spec.payback_ns,
        ),
        guard=guardrail(spec.quality, floors=spec.floors, default_floor=spec.default_floor),
    )


@dataclass(slots=True)
class _Seen:
    store: StoreInfo
    peer: PeerInfo
    seen_ns: int
    draining: bool = False
    commands: dict[int, Command] = field(default_factory=dict)  # by number, until acknowledged
    command_seq: int = 0
    gauges: dict[str, float] = field(default_factory=dict)
    readings: tuple[Reading, ...] = ()


class ControlCore:
    """State of the cluster as told by its stores. One thread calls it.

    Any thread may wait on `settled`: all that was asked of the stores so far has been reported.
    """

    def __init__(
        self, spec: ControlSpec, *, clock_ns: Callable[[], int] = time.time_ns, replay: bool = True
    ) -> None:
        """Replay the journal of the run, if there is one, and go on writing to it."""
        self.spec = spec
        self._clock_ns = clock_ns
        self.incarnation = clock_ns()
        self._brain = make_brain(spec)
        self._members: dict[str, _Seen] = {}
        self._membership_version = 0
        self._vetoes: Counter[str] = Counter()
        self._epoch_ns = self.incarnation
        self._next_tick_ns = 0
        self._planned_ns = self.incarnation
        self.may_plan: Callable[[], bool] = lambda: True
        """Whether planning would not hold the stores up: a search is compiled on first use."""
        self._expected: dict[str, int] = {}  # stores of the journal that have not joined again
        self._unsettled_ns = 0  # since when stores owe a report; 0: they owe none
        self.log = ControlLog(
            first_row_id=secrets.randbits(62) | 1,
            nbytes={
                fmt.value: spec.nbytes
                if fmt in LOSSLESS
                else spec.formats.get(fmt.value, spec.reduced_nbytes)
                for fmt in Format
            },
        )
        self.settled = threading.Event()
        self.replayed = 0
        journal = Path(spec.run_dir) / "journal.msgpack"
        if replay and journal.exists():
            self._replay(journal)
        self._journal = JournalWriter(journal)
        self._commands = CommandLog(journal.with_name(FILE), events=self.replayed)
        fresh = journal.with_name("run.json.new")
        fresh.write_bytes(msgspec.json.encode(spec))
        fresh.replace(journal.with_name("run.json"))  # a reader never sees half of it

    # --- calls from stores ----------------------------------------------------------------------

    def join(self, message: Join) -> HeartbeatReply:
        """A store (or a newer incarnation of it) presents itself."""
        name, now_ns = message.store.name, self._clock_ns()
        known = self._members.get(name)
        if known is not None and known.peer.incarnation > message.store.incarnation:
            raise StaleEpochError(
                f"{name} of incarnation {message.store.incarnation} has a successor",
                remedy="this process must end",
            )
        self._members[name] = _Seen(
            store=message.store,
            peer=message.peer,
            seen_ns=now_ns,
        )
        self._expected.pop(name, None)
        self._membership_version += 1
        self._feed(StoreJoined(now_ns=now_ns, store=message.store, copies=message.copies))
        return self._reply(name, directory_version=-1, membership_version=-1)

    def heartbeat(self, message: Heartbeat) -> HeartbeatReply:
        """Events of a store in; its lease, news and commands out."""
        now_ns = self._clock_ns()
        member = self._members.get(message.store)
        if member is None or member.peer.incarnation != message.incarnation:
            return self._unknown()
        member.seen_ns = now_ns
        member.gauges = message.gauges
        member.readings = message.readings
        for number in [n for n in member.commands if n <= message.commands_seen]:
            del member.commands[number]
        for packed in message.events:
            self._feed(unpack_event(packed))
        self._sweep(now_ns)
        return self._reply(
            message.store,
            directory_version=message.directory_version,
            membership_version=message.membership_version,
            plan_epoch=message.plan_epoch,
        )

    # --- calls from operators -------------------------------------------------------------------

    def drain(self, name: str) -> bool:
        """Ask a store to leave; False when there is no such store."""
        member = self._members.get(name)
        if member is None:
            return False
        member.draining = True
        incarnation = member.peer.incarnation
        self._feed(StoreDraining(now_ns=self._clock_ns(), store=name, incarnation=incarnation))
        return True

    def leave(self, name: str, *, incarnation: int) -> None:
        """A store has ended in good order (or was seen to be dead)."""
        member = self._members.get(name)
        if member is not None and member.peer.incarnation <= incarnation:
            self._lose(name)

    def status(self, alerts: tuple[watch.Alert, ...] | None = None) -> dict[str, Any]:
        """The fields of `dashboards.status.Status`; `alerts` when they have just been computed."""
        now_ns = self._clock_ns()
        copies = self._brain.directory()
        holding: dict[str, Counter[str]] = {name: Counter() for name in self._members}
        resident: Counter[str] = Counter()
        for copy in copies:
            if copy.store in holding:
                holding[copy.store][copy.format.value] += 1
                resident[copy.store] += copy.nbytes
        tiers = {name: member.store.tier for name, member in self._members.items()}
        blocks = len(self.spec.layers) * self.spec.num_experts
        gauges = [member.gauges for member in self._members.values()]
        return {
            "run": self.spec.run,
            "model": self.spec.model,
            "digest": self.spec.digest,
            "blocks": blocks,
            "states": best_states(copies, tiers=tiers, blocks=blocks),
            "stores": [
                {
                    "name": name,
                    "tier": member.store.tier.name.lower(),
                    "node": member.store.node,
                    "incarnation": member.peer.incarnation,
                    "capacity_bytes": member.store.capacity_bytes,
                    "resident_bytes": resident[name],
                    "blocks": dict(holding[name]),
                    "state": "draining" if member.draining else "ready",
                    "in_flight": int(member.gauges.get("in_flight", 0)),
                    "quarantined_bytes": int(member.gauges.get("quarantined_bytes", 0)),
                    "emulated": self._emulated(member.store.tier),
                }
                for name, member in sorted(self._members.items())
            ],
            "epoch": self._brain.epoch,
            "epoch_age_ns": now_ns - self._epoch_ns,
            "requests_in_flight": int(sum(g.get("requests", 0) for g in gauges)),
            "tokens": int(sum(g.get("tokens", 0) for g in gauges)),
            "stall_ns": int(sum(g.get("stall_ns", 0) for g in gauges)),
            "predictors": [
                f"{name}: {said}"
                for name, member in sorted(self._members.items())
                if (said := said_of(member.gauges))
            ],
            "vetoes": dict(self._vetoes),
            "emulated": list(self.spec.emulated),
            "mode": self.spec.mode,
            "quality": self._brain.guard.describe(),
            "alerts": [a.text for a in (self.alerts() if alerts is None else alerts)],
        }

    def alerts(self) -> tuple[watch.Alert, ...]:
        """What should have moved on by now and has not."""
        now_ns = self._clock_ns()
        progress = watch.Progress(
            epoch=self._brain.epoch,
            epoch_age_ns=now_ns - self._epoch_ns,
            unsettled_ns=now_ns - self._unsettled_ns if self._unsettled_ns else 0,
            oldest_transfer_ns={
                name: int(member.gauges.get("oldest_transfer_ns", 0))
                for name, member in self._members.items()
            },
        )
        return watch.alerts(progress, bounds=watch.Bounds())

    def drift(self) -> dict[str, float]:
        """Nats a token by kind, as the metric shows them; empty without a sensitivity file."""
        return self._brain.guard.figures()

    def why(self, block: BlockId) -> tuple[tuple[StoryLine, ...], tuple[Copy, ...]]:
        """Story and listed copies of a block."""
        return self._brain.story_lines(block), self._brain.copies(block)

    def records(self, offset: int) -> Records:
        """What an observer at `offset` of the journal is missing, and the spec to read it with."""
        path = Path(self.spec.run_dir) / "journal.msgpack"
        with path.open("rb") as file:
            file.seek(offset)
            frames = file.read(RECORDS_BYTES)
        return Records(spec=self.spec, offset=offset, frames=frames)

    def close(self) -> None:
        """Write the journal out."""
        self._journal.close()
        self._commands.close()

    # --- inside ---------------------------------------------------------------------------------

    def _feed(self, event: Event) -> None:
        self._journal.append(msgspec.msgpack.encode(pack(event)))
        start_ns = self._clock_ns()
        commands = self._brain.handle(event)
        end_ns = self._clock_ns()
        self.log.handled(event, commands, epoch=self._brain.epoch, start_ns=start_ns, end_ns=end_ns)
        self._commands.handled(commands)
        for command in commands:
            self._give(command)
        if self._brain.settled():
            self._unsettled_ns = 0
            self.settled.set()
        else:
            self._unsettled_ns = self._unsettled_ns or end_ns
            self.settled.clear()

    def _give(self, command: Command) -> None:
        match command:
            case StartTransfer() | CancelTransfer() | DropCopy() | ChangeFormat():
                member = self._members.get(command.store)
                if member is not None and self.spec.mode == "active":
                    member.command_seq += 1
                    member.commands[member.command_seq] = command
            case PublishEpoch():
                self._epoch_ns = self._clock_ns()
            case Veto():
                self._vetoes[command.reason.value] += 1
            case _:
                pass  # WakeAt: heartbeats come several times a second and tick for us

    def _sweep(self, now_ns: int) -> None:
        for name, member in list(self._members.items()):
            if now_ns - member.seen_ns > DEAD_AFTER_NS:
                self._lose(name)
        if self._expected and now_ns - self.incarnation > DEAD_AFTER_NS:
            for name, incarnation in sorted(self._expected.items()):
                self._feed(StoreLost(now_ns=now_ns, store=name, incarnation=incarnation))
            self._expected.clear()
        if now_ns >= self._next_tick_ns:
            self._next_tick_ns = now_ns + TICK_NS
            self._feed(Tick(now_ns=now_ns))
        if 0 < self.spec.plan_ns <= now_ns - self._planned_ns and self.may_plan():
            self._planned_ns = now_ns
            self._feed(Replan(now_ns=now_ns))

    def _lose(self, name: str) -> None:
        member = self._members.pop(name)
        self._membership_version += 1
        self._feed(
            StoreLost(now_ns=self._clock_ns(), store=name, incarnation=member.peer.incarnation)
        )

    def _reply(
        self, name: str, *, directory_version: int, membership_version: int, plan_epoch: int = -1
    ) -> HeartbeatReply:
        member = self._members.get(name)
        if member is None:
            return self._unknown()
        changes = self._brain.changes_since(directory_version)
        news = membership_version != self._membership_version
        return HeartbeatReply(
            epoch=self._brain.epoch,
            known=True,
            lease_until_ns=self._clock_ns() + LEASE_NS,
            controller_incarnation=self.incarnation,
            full=changes.whole,
            directory_version=changes.version,
            added=changes.added,
            removed=changes.removed,
            membership_version=self._membership_version,
            members=self._present() if news else None,
            commands=[pack(command) for command in member.commands.values()],
            draining=member.draining,
            command_seq=member.command_seq,
            plan=self._plan_of(name) if plan_epoch != self._brain.plan_epoch else None,
            packing_gain=shared_gain(
                one
                for other in self._members.values()
                for one in other.readings
                if one.source == name
            ),
        )

    def _plan_of(self, name: str) -> WorkerPlan | None:
        """A store's part of the plan for replicas; none in advisory mode, where none has come."""
        if self.spec.mode != "active" or not self._brain.plan_epoch:
            return None
        return WorkerPlan(
            epoch=self._brain.plan_epoch,
            keep=self._brain.keeps(name),
            shares=self._brain.shares(),
        )

    def _emulated(self, tier: Tier) -> str:
        """What is emulated of a tier: the text behind its name in the spec."""
        said = (text.partition(": ") for text in self.spec.emulated)
        return next((what for name, _, what in said if name == tier.name.lower()), "")

    def _present(self) -> tuple[Member, ...]:
        return tuple(Member(store=m.store, peer=m.peer) for m in self._members.values())

    def _unknown(self) -> HeartbeatReply:
        return HeartbeatReply(
            epoch=self._brain.epoch,
            known=False,
            lease_until_ns=0,
            controller_incarnation=self.incarnation,
            full=False,
            directory_version=-1,
            added=(),
            removed=(),
            membership_version=-1,
            members=None,
            commands=[],
            draining=False,
        )

    def _replay(self, journal: Path) -> None:
        # The commands were given by the predecessor; carrying them out twice would be wrong.
        for frame in read_frames(journal):
            event = unpack_event(msgspec.msgpack.decode(frame))
            self._brain.handle(event)
            self.replayed += 1
            if isinstance(event, StoreJoined):
                self._expected[event.store.name] = event.store.incarnation
            elif isinstance(event, StoreLost):
                self._expected.pop(event.store, None)


def best_states(copies: Iterable[Copy], *, tiers: dict[str, Tier], blocks: int) -> dict[str, int]:
    """Count blocks by the state of their copy that is nearest to compute; the sum is `blocks`."""
    best: dict[BlockId, str] = {}
    for copy in copies:
        state = State.RECOMPUTABLE if copy.format is Format.LOWRANK else State.STAGED
        if tiers.get(copy.store) is Tier.HBM:
            state = state_of(copy.format)
        best[copy.block] = min(best.get(copy.block, state.value), state.value)
    counts = Counter(best.values())
    counts[State.STORED.value] += blocks - len(best)
    return {state.value: counts[state.value] for state in State}
