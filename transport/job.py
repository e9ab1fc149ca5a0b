"""A submitted read while it is under way: its tracks, their pieces and posts, how it ends.

Values and small pure steps; no threads, clocks or backends. A job is one ticket. Each of its items
is a track that moves from stage to stage; a post is one read of the backend (or one job of the
storage reader) that carries whole small slots, or one piece of a large one.

Invariants: a track ends once; `posts` counts what may still write to its slot, so the slot is free
for reuse only at zero; pieces cover a slot exactly once unless a failed one is given back.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from enum import Enum
from typing import TYPE_CHECKING, Final, NamedTuple

from hotset.transport.base import FileItem, Outcome, Priority, ReadItem, Replica, Span, Status
from hotset.transport.header import HEADER_BYTES

if TYPE_CHECKING:
    from collections.abc import Sequence

    from hotset.transport.base import Expect, ItemResult, Loss
    from hotset.transport.link import Link
    from hotset.transport.pieces import Pieces
    from hotset.transport.storage import StorageJob
    from hotset.transport.ticket import Ticket

MAX_RETRIES: Final = 2

_BADNESS: Final = {
    Status.DONE: 0,
    Status.STALE: 1,
    Status.FAILED: 2,
    Status.CANCELLED: 3,
    Status.TIMED_OUT: 4,
}


class Stage(Enum):
    """Where a track is."""

    WAITING = "waiting"  # in a link's queue, or on the wire
    RETIRING = "retiring"  # its source failed; the next one waits until nothing more can land
    VERIFYING = "verifying"  # all bytes are here
    HELD = "held"  # verified; the pacer holds the news back
    ENDED = "ended"


class Verdict(NamedTuple):
    """What one item's bytes are: DONE, or why not. A tuple: one for each block on the hot path."""

    status: Status
    checksum: int = 0
    epoch: int = 0
    error: str = ""


@dataclass(slots=True, eq=False)
class Track:
    """One item on its way. `source` of None is the job's peer at the item's own offset.

    Times are monotonic ns, 0 while unknown; `release_ns` is when an emulated link lets go.
    """

    job: Job
    index: int
    item: ReadItem | FileItem
    rest: tuple[Replica, ...] = ()
    source: Replica | None = None
    stage: Stage = Stage.WAITING
    posts: int = 0
    lost: tuple[Loss, ...] = ()
    pieces: Pieces | None = None
    verdict: Verdict | None = None
    first_ns: int = 0
    landed_ns: int = 0
    verified_ns: int = 0
    release_ns: int = 0
    look_wait_ns: int = 0

    @property
    def peer(self) -> str:
        """The store that it is read from now."""
        return self.job.peer if self.source is None else self.source.peer

    @property
    def first_hand(self) -> bool:
        """Whether it is read from the job's peer, whole or with its header."""
        return self.source is None and (self.pieces is None or not self.pieces.bare)

    def reads_from(self, peer: str) -> bool:
        """Whether `peer` is among its sources now."""
        pieces = self.pieces
        return self.peer == peer if pieces is None or not pieces.bare else peer in pieces.known

    @property
    def slot_bytes(self) -> int:
        """Header and payload."""
        return HEADER_BYTES + self.item.expect.nbytes

    def remote_offset(self, peer: str) -> int:
        """Where `peer` has the slot."""
        if self.source is None and peer == self.job.peer and isinstance(self.item, ReadItem):
            return self.item.remote_offset  # the hot path makes no object
        return self.replica(peer).remote_offset

    def replica(self, peer: str) -> Replica:
        """The source of that name. A striped track has several at once."""
        assert isinstance(self.item, ReadItem)  # noqa: S101 - files have no replicas
        if self.source is not None and self.source.peer == peer:
            return self.source
        for other in self.rest:
            if other.peer == peer:
                return other
        expect = self.item.expect
        return Replica(
            peer=self.job.peer,
            remote_offset=self.item.remote_offset,
            generation=expect.generation,
            incarnation=expect.incarnation,
        )

    def expect(self, peer: str) -> Expect:
        """What the header at `peer` must say."""
        expect = self.item.expect
        if self.source is None and peer == self.job.peer:
            return expect
        copy = self.replica(peer)
        return replace(expect, generation=copy.generation, incarnation=copy.incarnation)

    def next_source(self, loss: Loss) -> bool:
        """Go on to the next source; False when there is none or enough were tried."""
        if not self.rest or len(self.lost) >= MAX_RETRIES:
            return False
        self.source, self.rest = self.rest[0], self.rest[1:]
        self.lost = (*self.lost, loss)
        self.pieces = None
        return True


@dataclass(slots=True, eq=False, kw_only=True)
class Post:
    """What one call of the backend (or of the storage reader) carries.

    `begin`..`end` is the piece of its only track; `end` is 0 for whole slots. `more` is what its
    job has left to post. `cell` is the scratch cell of a look at a header, -1 for bytes of slots.
    `shared` is whether a second thread may read it.
    """

    link: Link
    tracks: list[Track]
    nbytes: int
    priority: Priority
    begin: int = 0
    end: int = 0
    more: int = 0
    cell: int = -1
    shared: bool = True
    pieces: Pieces | None = None
    handle: int = -1
    storage: StorageJob | None = None
    posted_ns: int = 0
    release_ns: int = 0

    def mark_landed(self, tracks: Sequence[Track], now_ns: int) -> None:
        """Note when bytes came, and when an emulated link lets go of them."""
        for track in tracks:
            track.landed_ns = now_ns
            track.release_ns = max(track.release_ns, self.release_ns)

    @property
    def span(self) -> Span:
        """The piece of its only track."""
        [track] = self.tracks
        return Span(
            local_offset=track.item.dest.offset + self.begin,
            remote_offset=track.remote_offset(self.link.name) + self.begin,
            nbytes=self.end - self.begin,
        )

    @property
    def abandoned(self) -> bool:
        """Whether nobody waits for it any more."""
        return all(track.stage is Stage.ENDED for track in self.tracks)


@dataclass(slots=True, kw_only=True, eq=False)
class Job:
    """One ticket under way. Times `*_ns` are monotonic, `wall_ns` is the epoch's.

    `results` and `tracks` are there once the mover has taken it on.
    """

    ticket: Ticket
    peer: str
    items: Sequence[ReadItem | FileItem]
    deadline_ns: int
    submitted_ns: int
    wall_ns: int
    priority: Priority = Priority.IMMINENT
    trace: tuple[int, int] = (0, 0)
    parent: int = 0
    reason: str = ""
    results: list[ItemResult | None] = field(init=False)
    tracks: list[Track] = field(init=False)
    open_tracks: int = 0
    first_ns: int = 0
    landed_ns: int = 0
    verified_ns: int = 0

    def outcome(self, *, now_ns: int) -> Outcome:
        """Sum up; every item must have a result. The worst item names the whole."""
        status, nbytes = Status.DONE, 0
        items: list[ItemResult] = []
        for item, result in zip(self.items, self.results, strict=True):
            assert result is not None  # noqa: S101 - the last open track has just ended
            items.append(result)
            if result.status is Status.DONE:
                nbytes += item.expect.nbytes
            elif _BADNESS[result.status] > _BADNESS[status]:
                status = result.status
        queue_ns, wire_ns, verify_ns, activate_ns = phases(
            self, submitted_ns=self.submitted_ns, now_ns=now_ns
        )
        return Outcome(
            status=status,
            items=tuple(items),
            peer=self.peer,
            nbytes=nbytes,
            started_ns=self.wall_ns,
            ended_ns=self.wall_ns + now_ns - self.submitted_ns,
            queue_ns=queue_ns,
            wire_ns=wire_ns,
            verify_ns=verify_ns,
            activate_ns=activate_ns,
            transfer_id=self.ticket.transfer_id,
        )


Phases = tuple[int, int, int, int]
"""Queue, wire, verify and activate in ns: how a life divides; the parts add up to it."""


def phases(what: Job | Track, *, submitted_ns: int, now_ns: int) -> Phases:
    """Divide the time from submission to now; what did not happen took no time."""
    posted = what.first_ns or now_ns
    landed, verified = what.landed_ns, what.verified_ns
    if not posted <= landed <= verified <= now_ns:
        landed = min(max(landed, posted), now_ns)
        verified = min(max(verified, landed), now_ns)
    return posted - submitted_ns, landed - posted, verified - landed, now_ns - verified


def spans(tracks: Sequence[Track], peer: str) -> list[Span]:
    """Header and payload of each slot in one span."""
    return [
        Span(
            local_offset=item.dest.offset,
            remote_offset=item.remote_offset if track.source is None else track.remote_offset(peer),
            nbytes=HEADER_BYTES + item.expect.nbytes,
        )
        for track in tracks
        if isinstance(item := track.item, ReadItem)
    ]
