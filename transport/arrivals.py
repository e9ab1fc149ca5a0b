"""What happens to bytes that have landed: verified, held back, published; how an item ends.

Every method is called by the engine's owner, but for `verify`, which the verifier thread calls: it
hashes and publishes whole slots while the owner moves the next. When the owner gives such a slot up
meanwhile, the slab's lock decides who was first. This module must not know backends, links' queues
or how anyone waits.

Invariants: an item ends once, with one result and one row; a slot is READY only after its verdict
is DONE; a slot that something may still write to is abandoned, every other is given back.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, Protocol

from hotset.errors import InvalidTransition
from hotset.transport.base import ItemResult, ReadItem, Status
from hotset.transport.header import HEADER_BYTES
from hotset.transport.job import Job, Stage, Track, Verdict, phases
from hotset.transport.judge import hash_arrived, judge, judge_pieces
from hotset.transport.records import Code, Kind

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from hotset.transport.pieces import Pieces
    from hotset.transport.records import Ring
    from hotset.transport.slab import Slab
    from hotset.transport.timers import Timers

INLINE_BYTES: Final = 512 << 10  # verifying this much costs less than waking another thread

_CODES: Final = {
    Status.DONE: Code.OK,
    Status.FAILED: Code.FAILED,
    Status.STALE: Code.STALE,
    Status.TIMED_OUT: Code.TIMED_OUT,
    Status.CANCELLED: Code.CANCELLED,
}


@dataclass(slots=True, eq=False)
class Check:
    """Work for the verifier: whole slots, or what has arrived of one in pieces.

    Afterwards there is a verdict for each slot, and a result for each that was published.
    """

    tracks: Sequence[Track]
    peer: str
    pieces: Pieces | None = None
    verdicts: list[Verdict] = field(default_factory=list)
    results: list[ItemResult | None] = field(default_factory=list)


class Owner(Protocol):
    """What arrivals ask of the mover."""

    def source_failed(self, track: Track, peer: str, status: Status, error: str) -> None:
        """Try another source, or end the track."""

    def track_abandoned(self, track: Track) -> None:
        """Posts of an ended track are still in flight."""

    def job_ended(self, job: Job) -> None:
        """Every item has its result."""


class Arrivals:
    """Verifies, holds back and publishes; ends tracks."""

    def __init__(  # noqa: PLR0913 - the collaborators of the owner thread, by keyword
        self,
        *,
        slab: Slab,
        ring: Ring,
        timers: Timers,
        owner: Owner,
        describe: Callable[[bytes], tuple[int, int]] | None,
        verify: Callable[[Check], None],
    ) -> None:
        """`verify` hands a check to the verifier, which answers through `checked`."""
        self._slab = slab
        self._ring = ring
        self._timers = timers
        self._owner = owner
        self._describe = describe
        self._verify = verify

    # --- landed -----------------------------------------------------------------------------------

    def slots_landed(self, tracks: Sequence[Track], peer: str, *, alone: bool) -> None:
        """Whole slots are here. `alone`: they are small, or nothing else moves meanwhile."""
        for track in tracks:
            track.stage = Stage.VERIFYING
        if not alone:
            self._verify(Check(tracks, peer))
            return
        self.all_judged(tracks, peer, [judge(self._slab, track, peer) for track in tracks])

    def piece_landed(self, track: Track, peer: str, *, alone: bool) -> None:
        """More of a slot is here; whole chunks are hashed while the rest moves."""
        pieces, item = track.pieces, track.item
        assert pieces is not None  # noqa: S101 - the caller's piece
        if isinstance(item, ReadItem) and item.stream:
            self._slab.show_progress(
                item.dest, item.expect, arrived=max(0, pieces.arrived - HEADER_BYTES)
            )
        if not pieces.hashing:  # else the verifier sees what has arrived, or is told next time
            self._hash(track, pieces, peer, alone=alone)

    def _hash(self, track: Track, pieces: Pieces, peer: str, *, alone: bool) -> None:
        if pieces.ready and not alone:
            pieces.hashing = True
            self._verify(Check([track], peer, pieces))
            return
        if alone or pieces.arrived == pieces.end:
            hash_arrived(self._slab, track, pieces)
        self._finish_pieces(track, pieces, peer)

    def verify(self, check: Check) -> None:
        """On the verifier thread: hash, and publish what is good and not held back."""
        if check.pieces is not None:
            hash_arrived(self._slab, check.tracks[0], check.pieces)
            return
        for track in check.tracks:
            verdict = judge(self._slab, track, check.peer)
            track.verdict, track.verified_ns = verdict, time.monotonic_ns()
            good = verdict.status is Status.DONE and track.release_ns <= track.verified_ns
            check.verdicts.append(verdict)
            check.results.append(self._try_publish(track) if good else None)

    def checked(self, check: Check) -> None:
        """Take the verifier's answer."""
        if check.pieces is None:
            ends = zip(check.tracks, check.verdicts, check.results, strict=True)
            for track, verdict, result in ends:
                if track.stage is not Stage.VERIFYING:
                    continue  # given up, its slot is free already
                if result is not None:
                    self._close(track, result)
                else:
                    self.judged(track, check.peer, verdict)
            return
        track, pieces = check.tracks[0], check.pieces
        pieces.hashing = False
        if track.stage is Stage.WAITING and track.pieces is pieces:  # more came meanwhile
            self._hash(track, pieces, check.peer, alone=pieces.arrived == pieces.end)

    def _finish_pieces(self, track: Track, pieces: Pieces, peer: str) -> None:
        if pieces.complete and track.stage is Stage.WAITING:
            track.stage = Stage.VERIFYING
            self.judged(track, peer, judge_pieces(self._slab, track, pieces, peer))

    def judged(self, track: Track, peer: str, verdict: Verdict) -> None:
        """Publish good bytes when the link lets go of them; else the source has failed."""
        if verdict.status is not Status.DONE:
            self._owner.source_failed(track, peer, verdict.status, verdict.error)
            return
        now = time.monotonic_ns()
        track.verdict = verdict
        track.verified_ns = now
        track.landed_ns = max(track.landed_ns, track.release_ns)
        if track.release_ns > now:
            track.stage = Stage.HELD
            self._timers.add(track.release_ns, lambda: self._release(track))
        else:
            self._close(track, *self._make_ready([track]))

    def all_judged(self, tracks: Sequence[Track], peer: str, verdicts: Sequence[Verdict]) -> None:
        """Do as `judged` with each; what is good and not held back, in one go."""
        now = time.monotonic_ns()
        good = []
        for track, verdict in zip(tracks, verdicts, strict=True):
            if verdict.status is not Status.DONE or track.release_ns > now:
                self.judged(track, peer, verdict)
                continue
            track.verdict, track.verified_ns = verdict, now
            track.landed_ns = max(track.landed_ns, track.release_ns)
            good.append(track)
        for track, result in zip(good, self._make_ready(good), strict=True):
            self._close(track, result)

    def _release(self, track: Track) -> None:
        if track.stage is Stage.HELD:
            self._close(track, *self._make_ready([track]))

    # --- ends -------------------------------------------------------------------------------------

    def _try_publish(self, track: Track) -> ItemResult | None:
        """Publish from the verifier thread; None when the owner has given the slot up."""
        try:
            [result] = self._make_ready([track])
        except InvalidTransition:
            return None
        return result

    def _make_ready(self, tracks: Sequence[Track]) -> list[ItemResult]:
        """Publish slots whose verdicts are good, and record them."""
        landed = []
        for track in tracks:
            verdict, item = track.verdict, track.item
            assert verdict is not None  # noqa: S101 - judged
            landed.append((item.dest, item.expect, verdict.checksum, verdict.epoch))
        generations = self._slab.publish_landed(landed)
        results = [
            ItemResult(
                status=Status.DONE,
                dest=dest,
                checksum=checksum,
                generation=generation,
                source=track.peer,
                lost=track.lost,
            )
            for track, (dest, _, checksum, _), generation in zip(
                tracks, landed, generations, strict=True
            )
        ]
        self._record(tracks, results)
        return results

    def end(self, track: Track, status: Status, error: str) -> None:
        """End a track without its bytes, unless the verifier has just published it."""
        if track.posts:
            self._slab.abandon(track.item.dest)
        elif not self._slab.try_fail(track.item.dest):
            assert track.stage is Stage.VERIFYING, "gave up a slot that is not ours"  # noqa: S101 - our own bug
            return  # `checked` brings its result
        result = ItemResult(
            status=status,
            dest=track.item.dest,
            error=error,
            source=track.peer,
            lost=track.lost,
        )
        self._record([track], [result])
        self._close(track, result)
        if track.posts:
            self._owner.track_abandoned(track)

    def _close(self, track: Track, result: ItemResult) -> None:
        job = track.job
        track.stage = Stage.ENDED
        job.results[track.index] = result
        if track.first_ns and not 0 < job.first_ns <= track.first_ns:
            job.first_ns = track.first_ns
        job.landed_ns = max(job.landed_ns, track.landed_ns)
        job.verified_ns = max(job.verified_ns, track.verified_ns)
        job.open_tracks -= 1
        if job.open_tracks == 0:
            self._owner.job_ended(job)

    def _record(self, tracks: Sequence[Track], results: Sequence[ItemResult]) -> None:
        """Write a row for each: the columns of `records.ROW`, by place."""
        ring, describe = self._ring, self._describe
        now = time.monotonic_ns()
        rows = []
        for track, result in zip(tracks, results, strict=True):
            job, expect = track.job, track.item.expect
            layer, expert = describe(expect.key) if describe else (-1, -1)
            rows.append(
                (
                    Kind.TRANSFER,
                    0 if result.status is Status.DONE else _CODES[result.status],
                    ring.name(result.source),
                    expect.format_code,
                    layer,
                    expert,
                    job.wall_ns,
                    job.wall_ns + now - job.submitted_ns,
                    job.ticket.transfer_id + track.index,
                    0,  # waits for nothing
                    job.parent,
                    *job.trace,
                    expect.nbytes,
                    *phases(track, submitted_ns=job.submitted_ns, now_ns=now),
                    ring.name(job.reason),
                    0,  # whether it is of use is not known yet
                    len(result.lost),
                )
            )
        ring.extend(rows)
