"""The vocabulary of hotset: values that every folder may speak, and nothing that acts.

Must not know Ray, torch, clocks or I/O. Values are frozen; times and sizes are int with the unit
in the name. `Event` and `Command` are the two sides of the brain's only door,
`handle(event) -> list[Command]`.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum, StrEnum


class Format(StrEnum):
    """How the bytes of a block are encoded."""

    BF16 = "bf16"
    FP8 = "fp8"
    INT8 = "int8"
    INT4 = "int4"
    BF16Z = "bf16z"
    LOWRANK = "lowrank"
    NF4 = "nf4"
    INT3 = "int3"
    INT2 = "int2"


LOSSLESS = frozenset({Format.BF16, Format.BF16Z})
"""Formats that keep every bit: a copy in one of them stands for the block itself."""


def stand_ins(fmt: Format) -> frozenset[Format]:
    """Formats in which a copy does for who asks for `fmt`, that one included."""
    return LOSSLESS if fmt in LOSSLESS else frozenset({fmt})


FORMAT_CODES = {fmt: code for code, fmt in enumerate(Format, start=1)}
"""Number of each format in slot headers and rows; `Format` is append-only. 0 means none."""


class Tier(IntEnum):
    """How far memory is from compute."""

    HBM = 0
    COMPRESSED = 1
    HOST = 2
    CXL = 3
    STORAGE = 4


class State(StrEnum):
    """State of a block at a device."""

    FULL = "S1"
    REDUCED = "S2"
    COMPRESSED = "S3"
    STAGED = "S4"
    STORED = "S5"
    IN_FLIGHT = "S6"
    RECOMPUTABLE = "S7"


class Reason(StrEnum):
    """Why a command was given or refused. Closed and append-only: journals outlive versions."""

    DEMAND = "demand"  # compute needs the block in this layer
    PREFETCH = "prefetch"  # a predictor expects the block soon
    WARM = "warm"  # first fill of a store that joined
    STAGE = "stage"  # bring a block one tier closer
    REPLICATE = "replicate"  # another copy of a hot block
    SPILL = "spill"  # make room in a faster tier
    EVICT = "evict"  # least valuable copy of a full store
    DRAIN = "drain"  # the store is leaving
    LOST = "lost"  # the store died
    JOINED = "joined"  # a store joined
    DEMOTE = "demote"  # a cheaper format inside the quality budget
    PROMOTE = "promote"  # back to full precision
    VETO_PRECISION = "veto_precision"  # refused: below the precision floor
    VETO_LAST_COPY = "veto_last_copy"  # refused: the last verified copy
    VETO_MEMORY = "veto_memory"  # refused: over the store's budget
    STALE = "stale"  # the source no longer had it
    TIMEOUT = "timeout"  # the deadline passed
    REBALANCE = "rebalance"  # popularity has shifted
    CANCELLED = "cancelled"  # nobody wants it any more
    PRESSURE = "pressure"  # compute needs the link or the memory
    VETO_LATE = "veto_late"  # refused: it cannot land in time
    VETO_SOONER = "veto_sooner"  # refused: it would displace something that is needed sooner
    BALANCED = "balanced"  # a plan would gain too little to be worth an epoch
    VETO_COST = "veto_cost"  # refused: moving takes longer than it saves
    VETO_DRIFT = "veto_drift"  # refused: the live check measured more than the quality budget
    REPAIR = "repair"  # back to full precision: the measured drift is over the budget
    CHECK = "check"  # the live check computes a step again at full precision
    STAND_IN = "stand_in"  # a cheap copy was used while the full one was on its way


@dataclass(frozen=True, slots=True, order=True)
class BlockId:
    """Smallest managed unit of weights: expert `index` of MoE layer `layer` (both from 0).

    `layer` counts the model's decoder layers, so dense layers leave gaps.
    """

    layer: int
    index: int

    def __str__(self) -> str:
        """`3.17`: what the command line prints and reads."""
        return f"{self.layer}.{self.index}"

    @classmethod
    def parse(cls, text: str) -> BlockId:
        """Read `3.17`. Raises ValueError that names the form."""
        layer, dot, index = text.partition(".")
        if not (dot and layer.isdigit() and index.isdigit()):
            raise ValueError(f"block {text!r} is not LAYER.EXPERT, for instance 3.17")
        return cls(int(layer), int(index))


@dataclass(frozen=True, slots=True, kw_only=True)
class Copy:
    """A verified copy: `block` in `format` at `offset` of `store`'s slab.

    `checksum` is xxh3-64 of the payload; `generation` grows with every fill of a slot of that
    store; `incarnation` names the store's process, so a restarted store's old copies are void.
    """

    block: BlockId
    format: Format
    store: str
    offset: int
    nbytes: int
    generation: int
    checksum: int
    incarnation: int


@dataclass(frozen=True, slots=True, kw_only=True)
class StoreInfo:
    """A store as placement sees it. `capacity_bytes` counts block payload and slot headers."""

    name: str
    tier: Tier
    node: str
    incarnation: int
    capacity_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Share:
    """The part of a block's tokens, in thousandths, that other workers should send to `store`.

    Tokens of a worker that holds the block itself are computed there and do not count.
    """

    block: BlockId
    store: str
    permille: int


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockInfo:
    """Size of a block in each format it may take (bytes of payload)."""

    block: BlockId
    nbytes: int
    reduced_nbytes: int
    by_format: tuple[tuple[Format, int], ...] = ()  # formats of other sizes


# --- events: what the cluster tells the brain ---------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class StoreJoined:
    """A store is ready, with the copies it already holds (a new controller learns them so)."""

    now_ns: int
    store: StoreInfo
    copies: tuple[Copy, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class StoreLost:
    """A store's process is gone, and with it its copies."""

    now_ns: int
    store: str
    incarnation: int


@dataclass(frozen=True, slots=True, kw_only=True)
class StoreDraining:
    """A store was asked to leave; its copies stay readable until it has left."""

    now_ns: int
    store: str
    incarnation: int = 0  # 0: whichever is current
    deadline_ns: int = 0  # when it will be gone; 0: it waits until it is empty


@dataclass(frozen=True, slots=True, kw_only=True)
class RouterCounts:
    """Tokens routed to each block at one worker since its last report."""

    now_ns: int
    store: str
    counts: tuple[tuple[BlockId, int], ...]
    tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class CopyLanded:
    """A verified copy now exists. `reason` is that of the transfer."""

    now_ns: int
    copy: Copy
    reason: Reason
    source: str


@dataclass(frozen=True, slots=True, kw_only=True)
class CopyDropped:
    """A store freed its copy. `incarnation` and `generation` of 0 mean the current one."""

    now_ns: int
    store: str
    block: BlockId
    format: Format
    reason: Reason
    incarnation: int = 0
    generation: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class TransferFailed:
    """A transfer that the brain had asked for ended without a copy.

    `reason` is VETO_MEMORY when the store had no room, VETO_LATE when its window had passed before
    it began, CANCELLED when the brain had withdrawn it, STALE, TIMEOUT or LOST otherwise.
    """

    now_ns: int
    store: str
    block: BlockId
    format: Format
    reason: Reason
    incarnation: int = 0  # 0: whichever is current


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerTimes:
    """Mean time of each MoE layer at one worker over `steps` forward passes, its stalls left out.

    `times` holds (layer, ns), stall_ns the waits of all layers together, for one pass, and
    experts_ns the part of the times that experts took; 0: nobody measured it.
    """

    now_ns: int
    store: str
    steps: int
    times: tuple[tuple[int, int], ...]
    stall_ns: int = 0
    experts_ns: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class LinkUse:
    """How a link was used in `span_ns`: occupied for `busy_ns`, by demand for `demand_ns` of it."""

    source: str
    span_ns: int
    busy_ns: int
    demand_ns: int
    nbytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Pressure:
    """Memory and link pressure at one store since its last report.

    `used_bytes` counts everything that occupies its memory, quarantined slots included.
    """

    now_ns: int
    store: str
    used_bytes: int
    links: tuple[LinkUse, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Concurrency:
    """Requests in flight at one worker, and its forward passes and tokens since the last report."""

    now_ns: int
    store: str
    requests: int
    steps: int
    tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class DriftMeasured:
    """Tokens of one request that were computed again at full precision, off the token path.

    `kl` is the divergence of each in nats, `flips` whether its top choice changed; `since_ns` is
    when the request began, `spent_ns` what computing again took.
    """

    now_ns: int
    store: str
    since_ns: int
    kl: tuple[float, ...]
    flips: tuple[bool, ...]
    spent_ns: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Tick:
    """Time has passed."""

    now_ns: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Replan:
    """Consider which workers keep which replicas. Comes slowly; what it finds may be nothing."""

    now_ns: int


Event = (
    StoreJoined
    | StoreLost
    | StoreDraining
    | RouterCounts
    | CopyLanded
    | CopyDropped
    | TransferFailed
    | LayerTimes
    | Pressure
    | Concurrency
    | DriftMeasured
    | Tick
    | Replan
)


# --- commands: what the brain asks of the cluster -----------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class StartTransfer:
    """`store` fetches `block` in `format` from the first of `sources` that still has it.

    A source is a store's name or `storage`. `cause` names the event that led here. The window of
    the transfer ends at `due_ns`; 0: whenever the link is free.
    """

    epoch: int
    store: str
    block: BlockId
    format: Format
    sources: tuple[str, ...]
    cause: str
    reason: Reason
    due_ns: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class CancelTransfer:
    """`store` gives up a transfer that it was asked for, and answers with how it ended."""

    epoch: int
    store: str
    block: BlockId
    format: Format
    cause: str
    reason: Reason


@dataclass(frozen=True, slots=True, kw_only=True)
class ChangeFormat:
    """`store` holds its copy of `block` in format `into` from now on, instead of `format`."""

    epoch: int
    store: str
    block: BlockId
    format: Format
    into: Format
    cause: str
    reason: Reason


@dataclass(frozen=True, slots=True, kw_only=True)
class DropCopy:
    """`store` frees its copy once no reader holds it."""

    epoch: int
    store: str
    block: BlockId
    format: Format
    cause: str
    reason: Reason


@dataclass(frozen=True, slots=True, kw_only=True)
class PublishEpoch:
    """A new placement is in force."""

    epoch: int
    cause: str
    reason: Reason


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanDecision:
    """What became of a plan for the workers' replicas; refused ones are told of as well.

    Balancedness is the mean over layers of mean by largest load of a worker, in millionths: before,
    and after `moves` copies of `nbytes` together. `reason` is REBALANCE for a plan in force,
    BALANCED when it would gain too little, VETO_COST when moving would take longer than it saves.
    """

    epoch: int
    cause: str
    reason: Reason
    before_ppm: int
    after_ppm: int
    moves: int
    nbytes: int
    saved_ns_per_step: int
    move_ns: int
    horizon_steps: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Veto:
    """A decision that was refused, with the bound that the refusal protects."""

    epoch: int
    store: str
    block: BlockId
    format: Format
    reason: Reason
    bound: str


@dataclass(frozen=True, slots=True, kw_only=True)
class WakeAt:
    """Send a `Tick` at this time."""

    at_ns: int


Command = (
    StartTransfer
    | CancelTransfer
    | DropCopy
    | ChangeFormat
    | PublishEpoch
    | PlanDecision
    | Veto
    | WakeAt
)

STORAGE = "storage"
"""Name of the store of tier 4 that every process reads by itself: the checkpoint's files."""
