"""What the engine's owner thread does with reads: post, poll, verify, hold back, end.

Single-threaded: every method is called by the owner alone (verifier and storage threads report
through the engine's queue). It moves bytes through a backend and a storage reader and must not
know threads or how anyone waits.

**Quarantine.** A timeout or cancel ends the ticket at once. Chunks that were posted live on: their
slots are QUARANTINED and their handles are polled until the backend says done or error; only then
are handle and slots given back. Chunks that were never posted, or whose bytes have landed, free
their slots at once, because nothing can write to them.
"""

from __future__ import annotations

import heapq
import time
from typing import TYPE_CHECKING, Final

from hotset.errors import TransportError
from hotset.transport.base import FileItem, ItemResult, PostState, ReadItem, Status
from hotset.transport.batch import Chunk, Job, Stage, Verdict, judge, judge_files, spans, split
from hotset.transport.fused import read_fused
from hotset.transport.header import HEADER_BYTES
from hotset.transport.pacing import Pacer
from hotset.transport.records import Code, Kind

if TYPE_CHECKING:
    from collections.abc import Callable

    from hotset.transport.base import Backend, PeerInfo
    from hotset.transport.records import Ring
    from hotset.transport.slab import Slab
    from hotset.transport.storage import StorageJob, StorageReader
    from hotset.transport.ticket import Ticket

IN_FLIGHT_BYTES: Final = 64 << 20  # posted to one peer at a time; the rest waits its turn
INLINE_BYTES: Final = 512 << 10  # verifying this much costs less than waking another thread
SPIN_NS: Final = 50_000
POLL_MIN_NS: Final = 50_000
POLL_MAX_NS: Final = 1_000_000

_CODES: Final = {
    Status.DONE: Code.OK,
    Status.FAILED: Code.FAILED,
    Status.STALE: Code.STALE,
    Status.TIMED_OUT: Code.TIMED_OUT,
    Status.CANCELLED: Code.CANCELLED,
}


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
        verify: Callable[[Chunk], None],
        files_ended: Callable[[Chunk], None],
    ) -> None:
        """`verify` hands a chunk to the verifier, `files_ended` a notice to the owner."""
        self._slab = slab
        self._backend = backend
        self._ring = ring
        self._storage = storage
        self._pacer = pacer
        self._time_scale = time_scale
        self._describe = describe
        self._verify = verify
        self._files_ended = files_ended
        self._peers: dict[str, PeerInfo] = {}
        self._pacers: dict[str, Pacer] = {}
        self._posted_bytes: dict[str, int] = {}
        self.jobs: dict[Ticket, Job] = {}
        self.quarantine: dict[int, Chunk] = {}  # by id
        self._queued: list[Chunk] = []
        self._posted: list[Chunk] = []
        self._held: list[Chunk] = []
        self._deadlines: list[tuple[int, int, Job]] = []
        self._last_progress_ns = 0

    # --- peers ------------------------------------------------------------------------------------

    def connect(self, peer: PeerInfo) -> None:
        """Make a peer readable, at the pace of its profile when that is emulated."""
        if self._backend is None:
            raise TransportError(
                "this engine reads files only", remedy="give it a backend to read peers"
            )
        self._backend.connect(peer)
        if self._peers.get(peer.name) != peer:
            self._pacers.pop(peer.name, None)
            if peer.link is not None and peer.link.emulated:
                self._pacers[peer.name] = Pacer(
                    peer.link.bandwidth_bytes_per_s, peer.link.latency_ns, self._time_scale
                )
        self._peers[peer.name] = peer

    def disconnect(self, name: str) -> None:
        """Forget a peer; queued reads from it will fail, posted ones go on."""
        if self._backend is not None:
            self._backend.disconnect(name)
        self._peers.pop(name, None)
        self._pacers.pop(name, None)

    # --- from outside -----------------------------------------------------------------------------

    def add(self, job: Job) -> None:
        """Take a job on; its slots are FILLING."""
        job.results = [None] * len(job.items)
        job.chunks = (
            [Chunk(job, 0, job.items, job.nbytes)]
            if job.items and isinstance(job.items[0], FileItem)
            else split(job)
        )
        job.open_chunks = len(job.chunks)
        self.jobs[job.ticket] = job
        heapq.heappush(self._deadlines, (job.deadline_ns, job.ticket.transfer_id, job))
        self._queued.extend(job.chunks)
        if not job.chunks:
            self._finish(job)

    def cancel(self, ticket: Ticket) -> None:
        """End a ticket as CANCELLED; nothing happens when it has ended."""
        job = self.jobs.get(ticket)
        if job is not None:
            self._give_up(job, Status.CANCELLED, "the caller gave up")

    def verified(self, chunk: Chunk, verdicts: list[Verdict]) -> None:
        """Take the verifier's answer."""
        if chunk.stage is not Stage.VERIFYING:
            return  # given up meanwhile, its slots are free already
        chunk.verdicts = verdicts
        chunk.stage = Stage.HELD
        self._held.append(chunk)

    def files_ended(self, chunk: Chunk) -> None:
        """Take the storage reader's answer: no thread touches the slots any more."""
        if chunk.quarantined:
            self._restore(chunk)
            return
        assert chunk.storage is not None  # noqa: S101 - set before the reader started
        now = time.monotonic_ns()
        verdicts = judge_files(chunk, chunk.storage)
        pacer = None if self._storage is None else self._storage.pacer
        self._landed(chunk, now, pacer)
        chunk.stage = Stage.VERIFYING
        self.verified(chunk, verdicts)

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
            self._finish(job)

    # --- the owner's turn -------------------------------------------------------------------------

    def step(self) -> int | None:
        """Do what is due. Returns ns until the next turn: 0 at once, None when a message wakes."""
        self._expire(time.monotonic_ns())  # first: what is late is not posted
        posted = self._post_next()
        if self._posted:
            self._poll()
        now = time.monotonic_ns()
        if self._held:
            self._release_held(now)
        if posted:
            self._last_progress_ns = now
            return 0
        return self._rest(now)

    def _rest(self, now: int) -> int | None:
        while self._deadlines and self._deadlines[0][2].ticket not in self.jobs:
            heapq.heappop(self._deadlines)
        waits = []
        if self._posted:
            since = now - self._last_progress_ns
            poll = 0 if since < SPIN_NS else min(POLL_MAX_NS, max(POLL_MIN_NS, since // 4))
            waits.append(poll)
        if self._deadlines:
            waits.append(max(0, self._deadlines[0][0] - now))
        waits.extend(max(0, chunk.release_ns - now) for chunk in self._held)
        return min(waits) if waits else None

    def _post_next(self) -> bool:
        """Post the chunk with the earliest deadline whose peer has room.

        So a demand read waits for at most one chunk of a prefetch that came before it.
        """
        best: Chunk | None = None
        for chunk in self._queued:
            busy = self._posted_bytes.get(chunk.job.peer, 0)
            full = busy > 0 and busy + chunk.nbytes > IN_FLIGHT_BYTES
            if not full and (best is None or chunk.job.deadline_ns < best.job.deadline_ns):
                best = chunk
        if best is None:
            return False
        self._queued.remove(best)
        self._post(best)
        return True

    def _post(self, chunk: Chunk) -> None:
        chunk.posted_ns = time.monotonic_ns()
        chunk.job.first_post_ns = chunk.job.first_post_ns or chunk.posted_ns
        if isinstance(chunk.items[0], FileItem):
            self._post_files(chunk)
            return
        peer = chunk.job.peer
        info = self._peers.get(peer)
        if info is None or self._backend is None:
            self._end_all(chunk, Status.FAILED, f"store {peer!r} is not connected")
            return
        if self._drop_out_of_range(chunk, info):
            return
        if self._backend.copies_in_call(peer):
            self._read_in_call(chunk)
            return
        try:
            chunk.handle = self._backend.post(peer, spans(chunk.items))
        except TransportError as error:
            self._end_all(chunk, Status.FAILED, str(error))
            return
        chunk.stage = Stage.POSTED
        self._posted.append(chunk)
        self._posted_bytes[peer] = self._posted_bytes.get(peer, 0) + chunk.nbytes

    def _read_in_call(self, chunk: Chunk) -> None:
        """Copy and verify now; nothing is in flight between, so nothing can be abandoned."""
        assert self._backend is not None  # noqa: S101 - the caller asked it
        peer = chunk.job.peer
        try:
            fused = read_fused(self._backend, self._slab, peer, chunk.items)
        except TransportError as error:
            self._end_all(chunk, Status.FAILED, str(error))
            return
        landed = time.monotonic_ns() - fused.verify_ns  # copying and hashing took turns
        self._landed(chunk, landed, self._pacers.get(peer))
        chunk.stage = Stage.VERIFYING
        self.verified(chunk, fused.verdicts)

    def _drop_out_of_range(self, chunk: Chunk, peer: PeerInfo) -> bool:
        """Fail items outside the peer's slab alone; the rest is queued anew. True when any."""
        outside = [
            not 0 <= item.remote_offset <= peer.nbytes - HEADER_BYTES - item.expect.nbytes
            for item in chunk.items
            if isinstance(item, ReadItem)
        ]
        if not any(outside):
            return False
        job = chunk.job
        parts = [
            Chunk(job, chunk.first + index, [item], item.expect.nbytes)
            for index, item in enumerate(chunk.items)
        ]
        job.chunks.remove(chunk)
        job.chunks.extend(parts)
        job.open_chunks += len(parts) - 1
        self._queued.extend(part for part, bad in zip(parts, outside, strict=True) if not bad)
        for part, bad in zip(parts, outside, strict=True):
            if bad:
                error = f"the slot is outside of store {peer.name!r}'s slab"
                self._end_all(part, Status.FAILED, error)
        return True

    def _post_files(self, chunk: Chunk) -> None:
        files = [item for item in chunk.items if isinstance(item, FileItem)]
        if self._storage is None:
            self._end_all(chunk, Status.FAILED, "this engine has no storage reader")
            return
        chunk.stage = Stage.POSTED

        def ended(job: StorageJob) -> None:
            chunk.storage = job
            self._files_ended(chunk)

        chunk.storage = self._storage.submit(files, self._slab, ended)

    def _poll(self) -> None:
        assert self._backend is not None  # noqa: S101 - posted chunks came through it
        still: list[Chunk] = []
        posted, self._posted = self._posted, still
        for chunk in posted:
            state, error = self._backend.poll(chunk.handle)
            if state is PostState.PENDING:
                still.append(chunk)
                continue
            self._last_progress_ns = time.monotonic_ns()
            self._wire_ended(chunk, state, error)

    def _wire_ended(self, chunk: Chunk, state: PostState, error: str) -> None:
        assert self._backend is not None  # noqa: S101 - as above
        now = time.monotonic_ns()
        peer = chunk.job.peer
        self._posted_bytes[peer] -= chunk.nbytes
        grace = self._backend.error_grace_ns if state is PostState.ERROR else 0
        if not grace:
            self._backend.release(chunk.handle)
        if chunk.quarantined and not grace:
            self._restore(chunk)
        elif state is PostState.ERROR:
            self._wire_failed(chunk, error, release_ns=now + grace if grace else 0)
        else:
            self._landed(chunk, now, self._pacers.get(peer))
            chunk.stage = Stage.VERIFYING
            if chunk.nbytes <= INLINE_BYTES or not (self._queued or self._posted):
                self.verified(chunk, judge(self._slab, chunk))
            else:
                self._verify(chunk)

    def _wire_failed(self, chunk: Chunk, error: str, *, release_ns: int) -> None:
        """End the items now; with a grace, keep their slots from reuse until it has passed."""
        chunk.job.last_wire_ns = time.monotonic_ns()
        if not release_ns:
            self._end_all(chunk, Status.FAILED, error)
            return
        chunk.release_ns = release_ns
        self._held.append(chunk)
        if not chunk.quarantined:
            self._abandon(chunk, Status.FAILED, error)

    def _landed(self, chunk: Chunk, now: int, pacer: Pacer | None) -> None:
        """Note when the bytes are there, or when the emulated links let them be there."""
        chunk.release_ns = now
        for link in (pacer, self._pacer):
            if link is not None:
                delay = link.delay_ns(chunk.nbytes, now, started_ns=chunk.posted_ns)
                chunk.release_ns = max(chunk.release_ns, now + delay)
        chunk.job.last_wire_ns = max(chunk.job.last_wire_ns, chunk.release_ns)

    def _release_held(self, now: int) -> None:
        due = [chunk for chunk in self._held if chunk.release_ns <= now]
        if not due:
            return
        self._held = [chunk for chunk in self._held if chunk.release_ns > now]
        for chunk in due:
            if chunk.quarantined:  # the grace after an error has passed
                assert self._backend is not None  # noqa: S101 - as above
                self._backend.release(chunk.handle)
                self._restore(chunk)
            elif chunk.stage is Stage.HELD:
                self._publish(chunk)

    # --- ends -------------------------------------------------------------------------------------

    def _publish(self, chunk: Chunk) -> None:
        job = chunk.job
        for index, (item, verdict) in enumerate(zip(chunk.items, chunk.verdicts, strict=True)):
            generation = 0
            if verdict.status is Status.DONE:
                generation = self._slab.publish(
                    item.dest,
                    key=item.expect.key,
                    format_code=item.expect.format_code,
                    nbytes=item.expect.nbytes,
                    checksum=verdict.checksum,
                    epoch=verdict.epoch,
                    pins=1,
                )
            else:
                self._slab.fail(item.dest)
            job.results[chunk.first + index] = ItemResult(
                status=verdict.status,
                dest=item.dest,
                checksum=verdict.checksum,
                generation=generation,
                error=verdict.error,
            )
        self._close(chunk)

    def _end_all(self, chunk: Chunk, status: Status, error: str) -> None:
        """End a chunk that nothing writes to; its slots are free at once."""
        for index, item in enumerate(chunk.items):
            self._slab.fail(item.dest)
            chunk.job.results[chunk.first + index] = ItemResult(
                status=status, dest=item.dest, error=error
            )
        self._close(chunk)

    def _abandon(self, chunk: Chunk, status: Status, error: str) -> None:
        """End a chunk that something may still write to; slots and handle are quarantined."""
        chunk.quarantined = True
        self.quarantine[id(chunk)] = chunk
        if chunk.storage is not None:
            chunk.storage.cancelled = True
        for index, item in enumerate(chunk.items):
            self._slab.abandon(item.dest)
            chunk.job.results[chunk.first + index] = ItemResult(
                status=status, dest=item.dest, error=error
            )
        self._close(chunk)

    def _restore(self, chunk: Chunk) -> None:
        del self.quarantine[id(chunk)]
        for item in chunk.items:
            self._slab.restore(item.dest)

    def _close(self, chunk: Chunk) -> None:
        chunk.stage = Stage.ENDED
        chunk.job.open_chunks -= 1
        if chunk.job.open_chunks == 0:
            self._finish(chunk.job)

    def _expire(self, now: int) -> None:
        while self._deadlines and self._deadlines[0][0] <= now:
            job = heapq.heappop(self._deadlines)[2]
            if job.ticket in self.jobs:
                self._give_up(job, Status.TIMED_OUT, "the deadline passed")

    def _give_up(self, job: Job, status: Status, error: str) -> None:
        """End what has not ended: posted chunks go to quarantine, the others free their slots."""
        gone = [chunk for chunk in job.chunks if chunk.stage is not Stage.ENDED]
        self._queued = [chunk for chunk in self._queued if chunk.job is not job]
        self._held = [c for c in self._held if c.job is not job or c.quarantined]
        for chunk in gone:
            if chunk.stage is Stage.POSTED:
                self._abandon(chunk, status, error)
            else:
                self._end_all(chunk, status, error)

    def _finish(self, job: Job) -> None:
        del self.jobs[job.ticket]
        outcome = job.outcome(now_ns=time.monotonic_ns())
        source, reason = self._ring.name(job.peer), self._ring.name(job.reason)
        for index, (item, result) in enumerate(zip(job.items, outcome.items, strict=True)):
            layer, expert = self._describe(item.expect.key) if self._describe else (-1, -1)
            self._ring.append(
                Kind.TRANSFER,
                code=_CODES[result.status],
                source=source,
                format_code=item.expect.format_code,
                layer=layer,
                index=expert,
                start_ns=outcome.started_ns,
                end_ns=outcome.ended_ns,
                row_id=outcome.transfer_id + index,
                parent=job.parent,
                trace_hi=job.trace[0],
                trace_lo=job.trace[1],
                nbytes=item.expect.nbytes,
                queue_ns=outcome.queue_ns,
                wire_ns=outcome.wire_ns,
                verify_ns=outcome.verify_ns,
                reason=reason,
            )
        job.ticket._finish(outcome)  # noqa: SLF001 - the ticket's other half
