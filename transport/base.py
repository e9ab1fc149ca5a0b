"""The contract of transport: how bytes move between registered regions, and how every move ends.

This layer moves byte ranges. It knows stores' slabs, peers and files; it must not know experts,
models or Ray.

**Who owns a slot.** A slab's slots are FREE, FILLING (owned by the one transfer that writes it),
READY (readable by local users who pin it and by remote peers who validate what they read),
DRAINING (header already void; freed when the last pin goes) or QUARANTINED (an abandoned transfer
may still write to it). Only the engine moves a slot out of FILLING; only a backend's done or error
moves it out of QUARANTINED.

**One-sided.** A read needs nothing of the source's CPU beyond its backend's progress thread, and
no lock. So the source may reuse the slot at any time: the reader checks header and checksum after
the read, and a mismatch means `STALE`, "try the next source". Peers only pull; nobody writes into
another's memory.

A write is an offer that the other side pulls (`offers.py`).

**Ends.** A ticket ends exactly once: DONE, FAILED, STALE, TIMED_OUT or CANCELLED, at the latest at
its deadline plus one poll. A timeout or a cancel ends the wait, not the transfer: handle,
descriptors and slots of an abandoned transfer stay in quarantine until the backend reports done or
error. Nothing in flight is ever released, deregistered, unmapped or destroyed. What may be recalled
early is the backend's to say (`abort`); what has not been posted is simply dropped.

**Pieces.** A large slot travels in pieces, each a post of its own, so that an urgent read waits for
at most one of them. A slot is in quarantine while any of its pieces is in flight.

**Sources.** An item may name other sources of the same content. STALE and FAILED move it on to the
next one, twice at most, into the same slot, and only after nothing of the former attempt can land
there. `stripe` lets all of them send pieces at once. `follow` reads a slot that is itself still
arriving, as far as it has come; `stream` lets others follow this one. So a hot block travels down a
chain of stores while its source sends it once (`multicast.py`).

**Faults.** A library may break in the thread that serves peers, and then nobody can read this store
(`fault`). Its own reads go on and end as ever; whoever runs it lets it leave soon and come back as
a new incarnation.

**Idempotent:** `connect` with the same info, `disconnect`, `close`, and every read: content is
immutable, so a read that is repeated lands the same bytes.

**Threads.** Any thread may submit and wait. One thread at a time calls a backend: the engine's
owner, or a thread that waits and has taken the owner's turn. Checksums are verified before the
ticket ends; a second thread verifies what has landed while the owner moves the rest.
"""

from __future__ import annotations

import enum
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, NamedTuple, TypeVar

import msgspec

from hotset.errors import UNREADABLE, PeerGoneError, TransportError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from hotset.transport.slab import Slab, Slot

_T = TypeVar("_T")

NO_HANDLE: Final = -1
"""In place of a handle: nothing is in flight, and nothing to release."""


class Priority(enum.IntEnum):
    """Who goes first on a link; within a class, the earliest deadline does."""

    IMMINENT = 0  # compute waits, or will within a layer or two
    STAGING = 1  # wanted soon
    BACKGROUND = 2  # rebalancing, spilling


class Status(enum.Enum):
    """How a read ended, for a whole ticket or for one item of it."""

    DONE = "done"
    FAILED = "failed"  # the backend reported an error, or the peer is gone
    STALE = "stale"  # the bytes came, but not those that were asked for
    TIMED_OUT = "timed_out"  # the deadline passed; the slot is in quarantine
    CANCELLED = "cancelled"  # the caller gave up; the slot is in quarantine


@dataclass(frozen=True, slots=True, kw_only=True)
class LinkProfile:
    """What a store's link gives its readers together. When `emulated`, they pace themselves to it.

    `jitter_ns`: each transfer's latency is up to this much longer, by a seeded sequence.
    """

    bandwidth_bytes_per_s: int
    latency_ns: int
    emulated: bool
    jitter_ns: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class PeerInfo:
    """What a peer must know to read a store: sent once when stores meet, versioned by incarnation.

    `backend_metadata` is opaque (NIXL: agent metadata). `base_address` is the registered address
    of the slab's first byte in the owner's process, `nbytes` its length. `pace` says where the
    readers of an emulated link on this host share its state. `proof` shows that the sender knows
    the cluster's token; it covers all other fields.
    """

    name: str
    incarnation: int
    backend: str
    backend_metadata: bytes
    base_address: int
    nbytes: int
    device: str = "cpu"
    link: LinkProfile | None = None
    pace: bytes = b""
    proof: bytes = b""


@dataclass(frozen=True, slots=True, kw_only=True)
class Expect:
    """What the header of a slot must say for a read to count.

    `key` is 16 opaque bytes that name the content, `format_code` an opaque small int.
    `generation` and `checksum` of None accept any value (the checksum is still verified against
    the header's own).
    """

    key: bytes
    format_code: int
    nbytes: int
    generation: int | None = None
    checksum: int | None = None
    incarnation: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Replica:
    """Another copy of an item's content. None accepts any generation or incarnation."""

    peer: str
    remote_offset: int
    generation: int | None = None
    incarnation: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ReadItem:
    """Read one slot of a peer (header and payload) into a FILLING slot here.

    `remote_offset` counts bytes from the start of the peer's slab to the slot's header. `others`
    are further sources, the best first. `stripe`: all sources send pieces at once; worth it for
    large slots over separate links. `follow`: the sources may still be receiving what they shall
    send. `stream`: readers may follow this slot while it fills.
    """

    remote_offset: int
    dest: Slot
    expect: Expect
    others: tuple[Replica, ...] = ()
    stripe: bool = False
    follow: bool = False
    stream: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class FileRange:
    """`nbytes` at `offset` of the file at `path`."""

    path: str
    offset: int
    nbytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class FileItem:
    """Read ranges of files, back to back, into the payload of a FILLING slot here.

    `expect.checksum` of None means that the file is the truth and its checksum is computed.
    """

    ranges: tuple[FileRange, ...]
    dest: Slot
    expect: Expect


class Loss(NamedTuple):
    """A source that was given up: FAILED or STALE."""

    peer: str
    status: Status


class ItemResult(msgspec.Struct, frozen=True, kw_only=True):
    """The end of one item. On DONE the slot is READY with a header of this store's own.

    `source` is the peer that was read last, `lost` are the sources given up before it.
    """

    status: Status
    dest: Slot
    checksum: int = 0
    generation: int = 0
    error: str = ""
    source: str = ""
    lost: tuple[Loss, ...] = ()


class Outcome(msgspec.Struct, frozen=True, kw_only=True):
    """The end of a ticket. Times are monotonic-clock durations in ns; they add up to its life.

    Queue: until the first post. Wire: until the last bytes landed (or the emulated link let them).
    Verify: until the last checksum was known. Activate: until the slots were READY and the caller
    was told. `started_ns` and `ended_ns` are wall-clock (epoch) times for traces.
    """

    status: Status
    items: tuple[ItemResult, ...]
    peer: str
    nbytes: int
    started_ns: int
    ended_ns: int
    queue_ns: int
    wire_ns: int
    verify_ns: int
    activate_ns: int
    transfer_id: int


def refuse_older(peer: PeerInfo, known: PeerInfo | None) -> None:
    """Raise PeerGoneError when `known`, of the same name, is a newer incarnation than `peer`."""
    if known is not None and known.incarnation > peer.incarnation:
        raise PeerGoneError(
            f"{peer.name}:{peer.incarnation} was replaced by {known.incarnation}",
            remedy="use the newer store",
        )


def other_backend(peer: PeerInfo, mine: str) -> TransportError:
    """Make the error for a peer whose backend is not `mine`."""
    return TransportError(
        f"store {peer.name!r} speaks {peer.backend!r}, this one {mine!r}",
        remedy="start all stores of a cluster with one backend",
    )


def unpack_metadata(decoder: msgspec.msgpack.Decoder[_T], peer: PeerInfo) -> _T:
    """What a peer's backend has to add. Raises TransportError when it is damaged."""
    try:
        return decoder.decode(peer.backend_metadata)
    except UNREADABLE as error:
        raise TransportError(
            f"the metadata of {peer.name!r} is damaged ({error})",
            remedy="ask the store for it anew",
        ) from error


def registered_twice() -> TransportError:
    """Make the error for a second slab."""
    return TransportError("a slab is registered already", remedy="one backend per store")


def require_own(slab: Slab | None, *, name: str, incarnation: int) -> Slab:
    """Return the registered slab. Raises TransportError when it is not that store's."""
    if slab is None or (name, incarnation) != (slab.name, slab.incarnation):
        raise TransportError(
            f"no slab of {name}:{incarnation} is registered",
            remedy="give the slab and the engine the same name and incarnation",
        )
    return slab


def describe_store(slab: Slab, *, backend: str, metadata: bytes) -> PeerInfo:
    """Describe a store to peers by its slab and what its backend has to add."""
    return PeerInfo(
        name=slab.name,
        incarnation=slab.incarnation,
        backend=backend,
        backend_metadata=metadata,
        base_address=slab.base_address,
        nbytes=slab.nbytes,
        device=slab.device,
    )


class PostState(enum.Enum):
    """What a backend says of a posted read."""

    PENDING = "pending"
    DONE = "done"
    ERROR = "error"


class Span(msgspec.Struct, frozen=True, kw_only=True):
    """One contiguous copy of a post: offsets from the start of the two slabs."""

    local_offset: int
    remote_offset: int
    nbytes: int


def outside(peer: str, *, local: int, remote: int) -> TransportError:
    """Make the error for spans that leave one of the two slabs, of `local` and `remote` bytes."""
    return TransportError(
        f"a read from {peer!r} leaves its slab of {remote} bytes or ours of {local}",
        remedy="refresh the directory of copies",
    )


def refuse_outside(spans: Sequence[Span], *, peer: str, local: int, remote: int) -> None:
    """Raise TransportError unless every span lies in both slabs."""
    if any(
        span.local_offset + span.nbytes > local
        or span.remote_offset + span.nbytes > remote
        or min(span.local_offset, span.remote_offset, span.nbytes) < 0
        for span in spans
    ):
        raise outside(peer, local=local, remote=remote)


class Backend(ABC):
    """Moves spans from a peer's slab into ours. Called by one thread at a time in each lane.

    A backend never blocks for longer than one post of local memory copying, never raises out of
    `poll`, and never frees anything that may still be written to.
    """

    name: str
    notifies: bool = False
    """Whether it calls `notify` when a read has ended; such a backend is polled seldom."""
    notify: Callable[[], None]
    """Wakes the owner, from any thread. Set by the engine before `register`."""
    error_grace_ns: int = 0
    """How long after an ERROR the slots of a post are kept from reuse."""

    @property
    def fault(self) -> str:
        """'' while peers can read this store; else why they cannot, until a new process does."""
        return ""

    def copies_in_call(self, peer: str) -> bool:  # noqa: ARG002 - most backends copy on their own
        """Whether posts to `peer` are DONE when they return."""
        return False

    def has_second_lane(self, peer: str) -> bool:
        """Whether a second thread may post to `peer` now. Asked where posts copy in the call."""
        return self.copies_in_call(peer)

    def window(self, peer: str, spans: Sequence[Span], *, lane: int = 0) -> int:  # noqa: ARG002 - most map nothing
        """Address at which the slab of `peer` is mapped here, so that the spans may be copied.

        0 where `post` has to copy. Raises as `post`.
        """
        return 0

    @abstractmethod
    def register(self, slab: Slab) -> None:
        """Register the store's slab, once, before `info`; it is never deregistered."""

    @abstractmethod
    def info(self, *, name: str, incarnation: int) -> PeerInfo:
        """Describe this side to peers."""

    @abstractmethod
    def connect(self, peer: PeerInfo) -> None:
        """Make `peer` readable. A newer incarnation replaces an older one of the same name.

        Raises TransportError for metadata that is damaged or of another backend.
        """

    @abstractmethod
    def disconnect(self, name: str) -> None:
        """Forget a peer; reads in flight from it stay owned until they end."""

    @abstractmethod
    def post(self, peer: str, spans: Sequence[Span], *, lane: int = 0) -> int:
        """Start one read of many spans; returns a handle. Raises PeerGoneError, TransportError.

        Lane 1 is for a second thread, which may post, poll and release at the same time as the
        owner. It is used for peers whose posts copy in the call, and never while the owner
        connects or disconnects.
        """

    def post_in_call(self, peer: str, spans: Sequence[Span], *, lane: int = 0) -> int:
        """Post and look once: NO_HANDLE when all is here and nothing left to release.

        Else the handle, PENDING or in ERROR. Raises as `post`.
        """
        handle = self.post(peer, spans, lane=lane)
        if self.poll(handle)[0] is not PostState.DONE:
            return handle
        self.release(handle)
        return NO_HANDLE

    @abstractmethod
    def poll(self, handle: int) -> tuple[PostState, str]:
        """State of a posted read and the error's text. DONE and ERROR are final."""

    @abstractmethod
    def release(self, handle: int) -> None:
        """Free a handle that is DONE or in ERROR. Calling it on a PENDING one is a bug."""

    def abort(self, handle: int) -> None:  # noqa: B027 - most backends cannot end a read early
        """Hasten the end of a PENDING read that nobody waits for, where that is safe.

        After it `poll` may report ERROR sooner, and then nothing lands any more. A backend whose
        reads cannot be recalled does nothing: the slots stay in quarantine until the read ends.
        """

    def close(self) -> None:  # noqa: B027 - most backends have nothing to tear down
        """Tear down after everything posted has ended; the engine sees to that."""
