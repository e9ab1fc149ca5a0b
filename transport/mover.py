"""What the engine's owner thread does with reads: queue, post, poll, retry, give up.

Single-threaded: every method is called by the owner alone (verifier and storage threads report
through the engine's queue). It moves bytes through a backend and a storage reader; what becomes of
them when they have landed is `arrivals.py`. It must not know threads or how anyone waits.

**Quarantine.** A timeout or cancel ends the ticket at once. What was posted lives on: its slots are
QUARANTINED and its handle is polled until the backend says done or error; only then are handle and
slots given back. Slots without a post in flight are free at once, because nothing can write there.

**Retry.** A track whose source failed waits until nothing of that attempt can land any more, then
joins the queue of its next source with the same slot.
"""

from __future__ import annotations

import time
from functools import partial
from typing import TYPE_CHECKING, Final

from hotset.errors import TransportError
from hotset.transport.arrivals import INLINE_BYTES, Arrivals, Check
from hotset.transport.base import (
    NO_HANDLE,
    FileItem,
    ItemResult,
    Loss,
    Outcome,
    ReadItem,
    Span,
    Status,
)
from hotset.transport.express import Express
from hotset.transport.filing import Filing
from hotset.transport.flights import Flights
from hotset.transport.hands import Haul
from hotset.transport.incall import InCall
from hotset.transport.job import Job, Post, Stage, Track, spans
from hotset.transport.links import Links
from hotset.transport.looks import FOLLOW_BYTES, LOOK_MIN_NS, Looks
from hotset.transport.pieces import Pieces
from hotset.transport.timers import Deadlines, Timers

if TYPE_CHECKING:
    from collections.abc import Callable

    from hotset.transport.base import Backend, PeerInfo
    from hotset.transport.express import Begun, Request
    from hotset.transport.inbox import Inbox
    from hotset.transport.link import Link
    from hotset.transport.pacing import Pacer
    from hotset.transport.records import Ring
    from hotset.transport.slab import Slab
    from hotset.transport.storage import StorageReader
    from hotset.transport.ticket import Ticket

STREAM_BYTES: Final = 1 << 20  # pieces on the way down a chain of stores


class Mover:
    """The reads of one engine. `step` does what is due and says when to come back."""

    def __init__(  # noqa: PLR0913 - what the engine was given, by keyword
        self,
        *,
        slab: Slab,
        backend: Backend | None,
        ring: Ring,
        storage: StorageReader | None,
        pacer: Pacer | None,
        time_scale: float,
        describe: Callable[[bytes], tuple[int, int]] | None,
        verifier: Inbox[Check | Haul | None],
        files_ended: Callable[[Post], None],
    ) -> None:
        """`verifier` is the queue of the verifier thread, `files_ended` tells the owner."""
        self._slab = slab
        self._backend = backend
        self._timers = Timers()
        self._arrivals = Arrivals(
            slab=slab,
            ring=ring,
            timers=self._timers,
            owner=self,
            describe=describe,
            verify=verifier.put,
        )
        self._links = Links(own_pacer=pacer, time_scale=time_scale)
        self._looks = Looks(slab)
        self.jobs: dict[Ticket, Job] = {}
        self._flights = Flights(backend=backend, slab=slab, timers=self._timers, owner=self)
        if backend is not None:
            self._in_call = InCall(
                backend=backend,
                slab=slab,
                flights=self._flights,
                arrivals=self._arrivals,
                give=verifier.put,
                again=self._send,
            )
            self._express = Express(backend=backend, slab=slab, ring=ring, describe=describe)
        self._deadlines = Deadlines()
        self._fresh: list[Job] = []  # whose deadline nobody watches yet
        self._filing: Filing | None = None
        if storage is not None:
            self._links.add_files(storage.pacer)
            self._filing = Filing(
                storage=storage,
                slab=slab,
                flights=self._flights,
                arrivals=self._arrivals,
                tell=files_ended,
            )

    @property
    def idle(self) -> bool:
        """Whether no job runs and nothing is in flight."""
        return not self.jobs and self._flights.empty

    @property
    def quarantine(self) -> dict[int, Post]:
        """Posts that nobody waits for, by id."""
        return self._flights.quarantine

    # --- peers ------------------------------------------------------------------------------------

    def connect(self, peer: PeerInfo) -> None:
        """Make a peer readable. Raises TransportError."""
        if self._backend is None:
            raise TransportError(
                "this engine reads files only", remedy="give it a backend to read peers"
            )
        self._in_call.take_all_back()
        self._backend.connect(peer)
        self._links.connect(peer)

    def disconnect(self, name: str) -> None:
        """Forget a peer; queued reads from it will fail, posted ones go on."""
        if self._backend is not None:
            self._in_call.take_all_back()
            self._backend.disconnect(name)
        self._links.disconnect(name)

    # --- from outside -----------------------------------------------------------------------------

    def read_alone(
        self, peer: str, item: ReadItem, request: Request | Job, transfer_id: int
    ) -> Outcome | Begun | None:
        """Read one item at once when nothing else is under way, else None; see `express.py`."""
        link = self._links.find(peer)
        if link is None or self.jobs or not self._flights.empty or self._backend is None:
            return None
        return self._express.read(link, item, request, transfer_id)

    def go_on(self, job: Job, begun: Begun) -> None:
        """Take a job on whose only item `read_alone` has begun."""
        self._take(job)
        [item] = job.items
        assert isinstance(item, ReadItem)  # noqa: S101 - so it began
        track = Track(job, 0, item, item.others, first_ns=begun.posted_ns)
        job.tracks.append(track)
        link, nbytes = self._links.get(job.peer), item.expect.nbytes
        post = Post(link=link, tracks=[track], nbytes=nbytes, priority=job.priority)
        post.posted_ns, post.handle = begun.posted_ns, begun.handle
        if begun.handle != NO_HANDLE:
            link.posted(post, queued_ns=job.submitted_ns)
            self._flights.add(post)
            self._flights.last_progress_ns = begun.posted_ns
        elif begun.verdict is None:
            self.post_failed(post, begun.error)
        else:
            track.stage, track.landed_ns = Stage.VERIFYING, begun.landed_ns
            self._arrivals.judged(track, job.peer, begun.verdict)
        if job.open_tracks:
            self._fresh.append(job)

    def _take(self, job: Job) -> None:
        job.open_tracks = len(job.items)
        job.results = [None] * job.open_tracks
        job.tracks = []
        self.jobs[job.ticket] = job

    def add(self, job: Job) -> None:
        """Take a job on; its slots are FILLING."""
        if len(job.items) == 1 and isinstance(job.items[0], ReadItem):
            got = self.read_alone(job.peer, job.items[0], job, job.ticket.transfer_id)
            if isinstance(got, Outcome):
                job.ticket._finish(got)  # noqa: SLF001 - its other half
                return
            if got is not None:
                self.go_on(job, got)
                return
        self._take(job)
        tracks = job.tracks
        if not job.items:
            self.job_ended(job)
            return
        link = self._links.get(job.peer)
        for index, item in enumerate(job.items):
            track = Track(job, index, item)
            tracks.append(track)
            if isinstance(item, ReadItem):
                track.rest = item.others
                if item.follow or item.stream or item.stripe:
                    self._queue(track)
                    continue
            link.push(track)
        if job.open_tracks:
            self._fresh.append(job)

    def cancel(self, ticket: Ticket) -> None:
        """End a ticket as CANCELLED; nothing happens when it has ended."""
        job = self.jobs.get(ticket)
        if job is not None:
            self._give_up(job, Status.CANCELLED, "the caller gave up")

    def carry_out(self, work: Check | Haul) -> Check | None:
        """On the second thread: read a post, or hash; returns what `checked` must be told."""
        if isinstance(work, Haul):
            self._in_call.carry_out(work)
            return None
        self._arrivals.verify(work)
        return work

    def checked(self, check: Check) -> None:
        """Take the verifier's answer."""
        self._arrivals.checked(check)

    def files_ended(self, post: Post) -> None:
        """Take the storage reader's answer."""
        assert self._filing is not None  # noqa: S101 - it asked
        self._filing.ended(post)

    def give_up_all(self) -> None:
        """Cancel every ticket; what was posted goes to quarantine."""
        for ticket in list(self.jobs):
            self.cancel(ticket)

    def fail_all(self, error: str) -> None:
        """End every ticket as FAILED after the owner broke; slots stay as they are."""
        for job in list(self.jobs.values()):
            for index, item in enumerate(job.items):
                if job.results[index] is None:
                    job.results[index] = ItemResult(
                        status=Status.FAILED, dest=item.dest, error=error
                    )
            self.job_ended(job)

    # --- the owner's turn -------------------------------------------------------------------------

    def step(self) -> int | None:
        """Do what is due. Returns ns until the next turn: 0 at once, None when a message wakes."""
        now = time.monotonic_ns()
        self._expire(now)  # first: what is late is not posted
        link = self._links.next(now)
        if link is not None:
            self._post(link, link.pop())
        ended = self._flights.poll()
        ended |= self._backend is not None and self._in_call.take_back()
        for job in self._fresh:
            if job.open_tracks:  # small reads end before it costs anything to watch them
                self._deadlines.add(job)
        self._fresh.clear()
        now = time.monotonic_ns()
        ran = self._timers.run(now)
        if link is not None:
            self._flights.last_progress_ns = now
        if self._backend is not None and self._in_call.given:
            if link is None:  # a copy ends sooner than anything else can be due
                self._in_call.take_back(wait=True)
            return 0
        if (
            link is not None or ended or ran
        ) and self._links.has_queued():  # each may have made room
            return 0
        return self._rest(now)

    def _expire(self, now: int) -> None:
        for job in self._fresh:
            if job.deadline_ns <= now:
                self._give_up(job, Status.TIMED_OUT, "the deadline passed")
        while (late := self._deadlines.late(now)) is not None:
            self._give_up(late, Status.TIMED_OUT, "the deadline passed")

    def _rest(self, now: int) -> int | None:
        late = self._deadlines.next_ns()
        first = [] if late is None else [late]
        poll = self._flights.rest_ns(now)
        if poll is not None:
            first.append(now + poll)
        if self._links.free_ns:
            first.append(self._links.free_ns)
        due = self._timers.next_ns()
        if due is not None:
            first.append(due)
        return max(0, min(first) - now) if first else None

    # --- posting ----------------------------------------------------------------------------------

    def _queue(self, track: Track) -> None:
        """Join the queue of the track's source; of all its sources when it is striped."""
        item = track.item
        assert isinstance(item, ReadItem)  # noqa: S101 - files have one source and no pieces
        striped = item.stripe and not track.lost and bool(track.rest)
        names = [track.peer, *(copy.peer for copy in track.rest)] if striped else [track.peer]
        if track.pieces is None and (striped or item.follow or item.stream):
            track.pieces = Pieces(end=track.slot_bytes, bare=True)
        if track.pieces is not None:
            track.pieces.known.update(dict.fromkeys(names, 0))
        for name in names:
            self._links.get(name).push(track)

    def _post(self, link: Link, track: Track) -> None:
        link.in_call = self._backend is not None and self._backend.copies_in_call(link.name)
        if link.is_files and self._filing is not None:
            self._filing.post(link, link.pop_group(track))
        elif isinstance(track.item, FileItem):
            self._arrivals.end(track, Status.FAILED, "this engine has no storage reader")
        elif error := link.unreadable(track):
            self._lose(track, link.name, Status.FAILED, error)
            self._links.forget_if_idle(link)
        elif link.is_small(track):
            self._send(self._group(link, track))
        else:
            self._post_piece(link, track)

    def _group(self, link: Link, track: Track) -> Post:
        """A post of small slots of one ticket."""
        job, nbytes = track.job, track.item.expect.nbytes
        if len(job.items) == 1:
            return Post(link=link, tracks=[track], nbytes=nbytes, priority=job.priority)
        group = [t for t in link.pop_group(track) if t is track or self._check_range(t, link)]
        nbytes = sum(t.item.expect.nbytes for t in group)
        post = Post(link=link, tracks=group, nbytes=nbytes, priority=job.priority)
        post.more = (len(job.items) - group[-1].index - 1) * track.slot_bytes
        return post

    def _check_range(self, track: Track, link: Link) -> bool:
        """Whether it lies in the peer's slab; a bad one fails alone."""
        error = link.unreadable(track)
        if error:
            self._lose(track, link.name, Status.FAILED, error)
        return not error

    def _post_piece(self, link: Link, track: Track) -> None:
        pieces = track.pieces
        if pieces is None:
            pieces = track.pieces = Pieces(end=track.slot_bytes, bare=False)
        if not pieces.todo:
            if track.posts == 0:  # the last piece landed while the source was given up
                self._arrivals.piece_landed(track, link.name, alone=True)
            return
        ready = pieces.available(link.name)
        if pieces.bare and ready < min(FOLLOW_BYTES, pieces.todo[0][1] - pieces.todo[0][0]):
            self._look(link, track, pieces)
            return
        assert isinstance(track.item, ReadItem)  # noqa: S101 - files are not cut
        most = STREAM_BYTES if track.item.stream or track.item.follow else ready
        job = track.job
        after = (len(job.items) - track.index - 1) * track.slot_bytes
        whole = len(job.items) * track.slot_bytes
        begin, end = pieces.take(min(ready, most, link.piece_bytes(pieces.left, whole)))
        if pieces.todo:
            link.push(track)  # the rest competes anew
        post = Post(link=link, tracks=[track], nbytes=end - begin, priority=job.priority)
        post.begin, post.end, post.pieces, post.more = begin, end, pieces, pieces.left + after
        self._send(post)

    def _look(self, link: Link, track: Track, pieces: Pieces) -> None:
        """Read the header of a source into a scratch cell."""
        post = self._looks.take(link, track, pieces)
        if post is None:
            self._timers.add(time.monotonic_ns() + LOOK_MIN_NS, partial(link.push, track))
            return
        self._send(post)

    def _parts(self, post: Post) -> list[Span]:
        """What a post copies."""
        if post.cell >= 0:
            return [self._looks.span(post)]
        return [post.span] if post.end else spans(post.tracks, post.link.name)

    def _send(self, post: Post) -> None:
        assert self._backend is not None  # noqa: S101 - checked
        link, job = post.link, post.tracks[0].job
        post.posted_ns = time.monotonic_ns()
        if post.cell < 0:
            link.posted(post, queued_ns=job.submitted_ns)
        for track in post.tracks:
            track.first_ns = track.first_ns or post.posted_ns
        try:
            if link.in_call and post.cell < 0:
                self._in_call.read(post)
                return
            post.handle = self._backend.post(link.name, self._parts(post))
        except TransportError as error:
            link.ended(post, time.monotonic_ns())
            if post.cell >= 0:
                self._looks.put_back(post)
            self.post_failed(post, str(error))
            return
        self._flights.add(post)

    # --- what flights tell ------------------------------------------------------------------------

    def post_landed(self, post: Post, alive: list[Track], now_ns: int) -> None:
        """The bytes of a post are here."""
        peer = post.link.name
        post.mark_landed(alive, now_ns)
        if post.cell >= 0:
            for track in alive:
                self._looked(post, track)
            return
        small = post.nbytes <= INLINE_BYTES
        alone = small or (self._flights.empty and not self._links.has_queued())
        if post.pieces is None:
            if alive:
                self._arrivals.slots_landed(alive, peer, alone=alone)
            return
        post.pieces.landed(post.begin, post.end)
        for track in alive:
            self._arrivals.piece_landed(track, peer, alone=alone)

    def _looked(self, post: Post, track: Track) -> None:
        link, pieces = post.link, post.pieces
        assert pieces is not None  # noqa: S101 - only pieces look
        if track.pieces is not pieces or link.name not in pieces.known:
            return
        wait_ns, differs = self._looks.judge(post, track, pieces)
        if differs:
            self._lose(track, link.name, Status.STALE, differs)
        elif wait_ns:
            self._timers.add(time.monotonic_ns() + wait_ns, partial(link.push, track))
        else:
            link.push(track)

    def post_settled(self, post: Post) -> None:
        """Nothing of a post can land any more."""
        if post.cell >= 0:
            self._looks.put_back(post)
        if post.link.peer is None:
            self._links.forget_if_idle(post.link)

    # --- failures ---------------------------------------------------------------------------------

    def post_failed(self, post: Post, error: str) -> None:
        """A post ended, or never began, without its bytes."""
        if post.pieces is not None and post.begin < post.end:
            post.pieces.give_back(post.begin, post.end)
        for track in post.tracks:
            if track.stage is Stage.WAITING:
                self._lose(track, post.link.name, Status.FAILED, error)

    def source_failed(self, track: Track, peer: str, status: Status, error: str) -> None:
        """Judge says no: what landed from `peer` is not what was asked for."""
        self._advance(track, status, error, keep=False, peer=peer)

    def _lose(self, track: Track, peer: str, status: Status, error: str) -> None:
        """A source of a waiting track is lost. Stripes go on with the others."""
        pieces = track.pieces
        if pieces is not None and pieces.bare:
            pieces.known.pop(peer, None)
            for name in pieces.known:
                self._links.get(name).push(track)
            if pieces.known:
                return
        self._advance(track, status, error, keep=pieces is not None and pieces.bare, peer=peer)

    def _advance(self, track: Track, status: Status, error: str, *, keep: bool, peer: str) -> None:
        """Go on to the next source, or end the track."""
        pieces = track.pieces
        if not track.next_source(Loss(peer, status)):
            self._arrivals.end(track, status, f"{peer}: {error}" if track.lost else error)
            return
        if keep:
            track.pieces = pieces  # content is the same everywhere: what has landed counts
        track.stage = Stage.RETIRING
        if track.posts == 0:
            self.requeue(track)

    def requeue(self, track: Track) -> None:
        """Join the queue of the next source: nothing of the former one can land any more."""
        track.stage = Stage.WAITING
        self._queue(track)

    def track_abandoned(self, track: Track) -> None:
        """Posts of an ended track are still in flight."""
        self._flights.abandon(track)

    def job_ended(self, job: Job) -> None:
        """Tell the caller; every item has its result."""
        del self.jobs[job.ticket]
        job.tracks.clear()  # they know the job: no cycle is left for the garbage collector
        job.ticket._finish(job.outcome(now_ns=time.monotonic_ns()))  # noqa: SLF001 - its other half

    def _give_up(self, job: Job, status: Status, error: str) -> None:
        """End what has not ended: what is posted goes to quarantine, other slots are free."""
        for track in job.tracks:
            if track.stage is not Stage.ENDED:
                self._arrivals.end(track, status, error)
