"""What actors say to each other: msgspec structs in MessagePack, one envelope for all.

Every message carries the epoch that its sender believes in, an absolute wall-clock deadline and a
W3C traceparent. The receiver refuses what is older than its own epoch where that matters and drops
what is past its deadline. Decoding is strict: an unknown field or a wrong type is an error.
"""

from __future__ import annotations

from typing import Any, TypeVar

import msgspec

from hotset.actors.batches import RowBatch  # noqa: TC001 - msgspec reads annotations
from hotset.policies.directory import CopyKey  # noqa: TC001 - msgspec reads annotations
from hotset.policies.types import (
    BlockId,
    CancelTransfer,
    ChangeFormat,
    Command,
    Concurrency,
    Copy,
    CopyDropped,
    CopyLanded,
    DriftMeasured,
    DropCopy,
    Event,
    LayerTimes,
    PlanDecision,
    Pressure,
    PublishEpoch,
    Replan,
    RouterCounts,
    Share,
    StartTransfer,
    StoreDraining,
    StoreInfo,
    StoreJoined,
    StoreLost,
    Tick,
    TransferFailed,
    Veto,
    WakeAt,
)
from hotset.policies.wire import Reading  # noqa: TC001 - msgspec reads annotations
from hotset.transport.base import PeerInfo  # noqa: TC001 - msgspec reads annotations

_EVENTS: dict[str, type[Any]] = {
    cls.__name__: cls
    for cls in (
        StoreJoined, StoreLost, StoreDraining, RouterCounts,
        CopyLanded, CopyDropped, TransferFailed, LayerTimes, Pressure, Concurrency,
        DriftMeasured, Tick, Replan,
    )
}  # fmt: skip
_COMMANDS: dict[str, type[Any]] = {
    cls.__name__: cls
    for cls in (
        StartTransfer, CancelTransfer, DropCopy, ChangeFormat, PublishEpoch, PlanDecision,
        Veto, WakeAt,
    )
}  # fmt: skip
_encoder = msgspec.msgpack.Encoder()


class Message(msgspec.Struct, kw_only=True, frozen=True, forbid_unknown_fields=True):
    """The envelope. `deadline_ns` is wall clock; 0 means none."""

    epoch: int = 0
    deadline_ns: int = 0
    traceparent: str = ""


class Join(Message, frozen=True, kw_only=True):
    """A store presents itself, with everything that it holds."""

    store: StoreInfo
    peer: PeerInfo
    copies: tuple[Copy, ...]


class Heartbeat(Message, frozen=True, kw_only=True):
    """What happened at a store since its last heartbeat. `events` are encoded by `pack`.

    `commands_seen` is the `command_seq` of the last reply that arrived: a reply can be lost, and
    the controller repeats commands until they are acknowledged so.
    """

    store: str
    incarnation: int
    directory_version: int
    membership_version: int
    events: list[Any]
    gauges: dict[str, float]
    commands_seen: int = 0
    plan_epoch: int = -1
    readings: tuple[Reading, ...] = ()  # what packed blocks would save this reader


class WorkerPlan(msgspec.Struct, frozen=True, kw_only=True):
    """A store's part of the plan for replicas: what it keeps, and where tokens should go."""

    epoch: int
    keep: tuple[BlockId, ...]
    shares: tuple[Share, ...]


class Member(msgspec.Struct, frozen=True, kw_only=True):
    """A store that is in the cluster, and how to read it."""

    store: StoreInfo
    peer: PeerInfo


class HeartbeatReply(Message, frozen=True, kw_only=True):
    """Lease, directory changes and commands for one store.

    `known` False asks the store to join again (the controller is new, or took it for dead).
    With `full` the copies replace the whole directory, else they are changes.
    """

    known: bool
    lease_until_ns: int
    controller_incarnation: int
    full: bool
    directory_version: int
    added: tuple[Copy, ...]
    removed: tuple[CopyKey, ...]
    membership_version: int
    members: tuple[Member, ...] | None
    commands: list[Any]
    draining: bool
    command_seq: int = 0
    plan: WorkerPlan | None = None  # only when the store does not know it yet
    packing_gain: float | None = None  # what readers of this store measure, if any do


class ExpertRows(msgspec.Struct, frozen=True, kw_only=True):
    """Rows for (or from) one expert: [count, hidden] in the model's dtype, row-major bytes."""

    expert: int
    count: int
    data: bytes
    present: bool = True


class ComputeRequest(Message, frozen=True, kw_only=True):
    """Tokens sent to a peer that has the experts."""

    layer: int
    parts: tuple[ExpertRows, ...]


class ComputeReply(Message, frozen=True, kw_only=True):
    """The experts' outputs; `present` False where the peer no longer holds the block."""

    parts: tuple[ExpertRows, ...]
    compute_ns: int


class GenerateRequest(Message, frozen=True, kw_only=True):
    """Greedy generation of one sequence. `skip` tokens were already delivered (a replay)."""

    request_id: str
    prompt_ids: tuple[int, ...]
    max_new_tokens: int
    skip: int = 0


class TokenChunk(Message, frozen=True, kw_only=True):
    """Tokens in the order in which they were generated."""

    request_id: str
    tokens: tuple[int, ...]
    finished: bool = False


class Rows(Message, frozen=True, kw_only=True):
    """Rows and counters of one store on their way to its node's telemetry actor."""

    batch: RowBatch
    resident_bytes: int
    capacity_bytes: int
    quarantined_bytes: int
    peak_rss_bytes: int
    pid: int


M = TypeVar("M", bound=msgspec.Struct)


def encode(message: msgspec.Struct) -> bytes:
    """MessagePack bytes of a message."""
    return _encoder.encode(message)


_decoders: dict[type[Any], msgspec.msgpack.Decoder[Any]] = {}


def decode(data: bytes, kind: type[M]) -> M:
    """Message of `kind` from its bytes. Raises msgspec.ValidationError for anything else."""
    decoder = _decoders.get(kind)
    if decoder is None:
        decoder = _decoders[kind] = msgspec.msgpack.Decoder(kind)
    message: M = decoder.decode(data)
    return message


def pack(value: Event | Command) -> list[Any]:
    """An event or command as [type name, fields]; what the journal stores."""
    return [type(value).__name__, msgspec.to_builtins(value)]


def unpack_event(packed: list[Any]) -> Event:
    """The event that `pack` made."""
    event: Event = msgspec.convert(packed[1], _EVENTS[packed[0]])
    return event


def unpack_command(packed: list[Any]) -> Command:
    """The command that `pack` made."""
    command: Command = msgspec.convert(packed[1], _COMMANDS[packed[0]])
    return command


__all__ = [
    "ComputeReply",
    "ComputeRequest",
    "ExpertRows",
    "GenerateRequest",
    "Heartbeat",
    "HeartbeatReply",
    "Join",
    "Message",
    "Rows",
    "TokenChunk",
    "WorkerPlan",
    "decode",
    "encode",
    "pack",
    "unpack_command",
    "unpack_event",
]
