"""A submitted read while it is under way: its chunks, what verification said, how it ends.

Values and pure functions; no threads, clocks or backends. A job is one ticket; its items travel in
chunks, each one post of the backend (or one job of the storage reader). Small chunks let one
thread verify what has landed while the next chunk moves.

Invariants: chunks hold every item exactly once and in order; an item's verdict depends on its own
bytes alone, so one stale item fails no other.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING, Final, NamedTuple

from hotset.transport.base import FileItem, Outcome, ReadItem, Span, Status
from hotset.transport.header import HEADER_BYTES, checksum, inspect

if TYPE_CHECKING:
    from collections.abc import Sequence

    from hotset.transport.base import ItemResult
    from hotset.transport.slab import Slab
    from hotset.transport.storage import StorageJob
    from hotset.transport.ticket import Ticket

CHUNK_BYTES: Final = (
    16 << 20
)  # one post: verifying the last takes ~1 ms; smaller ones cost wake-ups
CHUNK_ITEMS: Final = 1024

_WORST_FIRST: Final = (Status.TIMED_OUT, Status.CANCELLED, Status.FAILED, Status.STALE)


class Stage(Enum):
    """Where a chunk is. POSTED is the only stage in which something else may write its slots."""

    QUEUED = "queued"
    POSTED = "posted"
    VERIFYING = "verifying"
    HELD = "held"  # verified; the pacer holds the news back
    ENDED = "ended"


class Verdict(NamedTuple):
    """What one item's bytes are: DONE, or why not. A tuple: one for each block on the hot path."""

    status: Status
    checksum: int = 0
    epoch: int = 0
    error: str = ""


@dataclass(slots=True, eq=False)
class Chunk:
    """Items `first`.. of a job that travel in one post."""

    job: Job
    first: int
    items: Sequence[ReadItem | FileItem]
    nbytes: int
    stage: Stage = Stage.QUEUED
    handle: int = -1
    storage: StorageJob | None = None
    posted_ns: int = 0
    release_ns: int = 0  # not before this: pacing, or the grace after an error
    verdicts: Sequence[Verdict] = ()
    quarantined: bool = False


@dataclass(slots=True, kw_only=True, eq=False)
class Job:
    """One ticket under way. Times `*_ns` are monotonic, `wall_ns` is the epoch's."""

    ticket: Ticket
    peer: str
    items: Sequence[ReadItem | FileItem]
    deadline_ns: int
    submitted_ns: int
    wall_ns: int
    trace: tuple[int, int] = (0, 0)
    parent: int = 0
    reason: str = ""
    results: list[ItemResult | None] = field(default_factory=list)
    chunks: list[Chunk] = field(default_factory=list)
    open_chunks: int = 0
    first_post_ns: int = 0
    last_wire_ns: int = 0

    @property
    def nbytes(self) -> int:
        """Payload bytes of all items."""
        return sum(item.expect.nbytes for item in self.items)

    def outcome(self, *, now_ns: int) -> Outcome:
        """Sum up; every item must have a result. The worst item names the whole."""
        items = tuple(result for result in self.results if result is not None)
        statuses = {result.status for result in items}
        status = next((worst for worst in _WORST_FIRST if worst in statuses), Status.DONE)
        posted = self.first_post_ns or now_ns
        landed = max(self.last_wire_ns, posted)
        return Outcome(
            status=status,
            items=items,
            peer=self.peer,
            nbytes=sum(
                item.expect.nbytes
                for item, result in zip(self.items, items, strict=True)
                if result.status is Status.DONE
            ),
            started_ns=self.wall_ns,
            ended_ns=self.wall_ns + now_ns - self.submitted_ns,
            queue_ns=posted - self.submitted_ns,
            wire_ns=landed - posted,
            verify_ns=now_ns - landed,
            transfer_id=self.ticket.transfer_id,
        )


def split(job: Job) -> list[Chunk]:
    """Cut a job into chunks of at most CHUNK_BYTES (or one larger item) and CHUNK_ITEMS."""
    chunks: list[Chunk] = []
    first, nbytes = 0, 0
    for index, item in enumerate(job.items):
        size = item.expect.nbytes
        if index > first and (nbytes + size > CHUNK_BYTES or index - first == CHUNK_ITEMS):
            chunks.append(Chunk(job, first, job.items[first:index], nbytes))
            first, nbytes = index, 0
        nbytes += size
    if job.items:
        chunks.append(Chunk(job, first, job.items[first:], nbytes))
    return chunks


def spans(items: Sequence[ReadItem | FileItem]) -> list[Span]:
    """Header and payload of each slot in one span."""
    return [
        Span(
            local_offset=item.dest.offset,
            remote_offset=item.remote_offset,
            nbytes=HEADER_BYTES + item.expect.nbytes,
        )
        for item in items
        if isinstance(item, ReadItem)
    ]


def judge(slab: Slab, chunk: Chunk) -> list[Verdict]:
    """Verify what landed: the header against what was asked, the payload against the header."""
    return [judge_slot(slab, item) for item in chunk.items]


def judge_slot(slab: Slab, item: ReadItem | FileItem, *, found: int | None = None) -> Verdict:
    """Verify one slot; `found` is the payload's checksum when it was computed on the way."""
    seen = inspect(slab.memory.read(item.dest.offset, HEADER_BYTES), item.expect)
    if seen.differs:
        return Verdict(Status.STALE, error=seen.differs)
    if found is None:
        found = checksum(slab.read_payload(item.dest, item.expect.nbytes))
    if found != seen.checksum:
        error = f"the bytes do not match their checksum: {found:x}, expected {seen.checksum:x}"
        return Verdict(Status.STALE, error=error)
    return Verdict(Status.DONE, found, seen.epoch)


def judge_files(chunk: Chunk, job: StorageJob) -> list[Verdict]:
    """What the storage reader found, against a checksum when one was expected."""
    verdicts = []
    for item, result in zip(chunk.items, job.results, strict=True):
        wanted = item.expect.checksum
        if result.error:
            verdicts.append(Verdict(Status.FAILED, error=result.error))
        elif wanted is not None and wanted != result.checksum:
            error = f"the file's bytes have checksum {result.checksum:x}, expected {wanted:x}"
            verdicts.append(Verdict(Status.STALE, error=error))
        else:
            verdicts.append(Verdict(Status.DONE, result.checksum))
    return verdicts
