"""Whether landed bytes are what was asked for: header against expectation, payload against header.

Pure functions of bytes; any thread may call them. They must not know who reads or why. A verdict
depends on one item's own bytes alone, so one stale item fails no other.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from hotset.transport.base import Status
from hotset.transport.header import HEADER_BYTES, checksum, combine, inspect
from hotset.transport.job import Verdict

if TYPE_CHECKING:
    from collections.abc import Sequence

    from hotset.transport.base import Expect
    from hotset.transport.job import Track
    from hotset.transport.pieces import Pieces
    from hotset.transport.slab import Slab, Slot
    from hotset.transport.storage import StorageJob


def judge(slab: Slab, track: Track, peer: str, digests: Sequence[int] | None = None) -> Verdict:
    """Verify a slot that landed whole from `peer`, header included.

    `digests` are those of its chunks, where whoever copied it has hashed it too.
    """
    dest, expect = track.item.dest, track.item.expect
    return judge_bytes(slab, dest, expect if track.source is None else track.expect(peer), digests)


def judge_bytes(
    slab: Slab, dest: Slot, expect: Expect, digests: Sequence[int] | None = None
) -> Verdict:
    """Verify header and payload that landed in a slot; `digests` as in `judge`."""
    seen = inspect(slab.memory.read(dest.offset, HEADER_BYTES), expect)
    if seen.differs:
        return Verdict(Status.STALE, error=seen.differs)
    if digests is None:
        found = checksum(slab.memory.read(dest.offset + HEADER_BYTES, expect.nbytes))
    else:
        found = combine(digests)
    return _compare(found, seen.checksum, epoch=seen.epoch)


def judge_pieces(slab: Slab, track: Track, pieces: Pieces, peer: str) -> Verdict:
    """Verify a slot that landed in pieces and was hashed on the way."""
    seen = pieces.seen
    if not pieces.bare:
        seen = inspect(slab.memory.read(track.item.dest.offset, HEADER_BYTES), track.expect(peer))
    found = pieces.checksum
    wanted = track.item.expect.checksum
    if seen is None:  # the source was still filling: what was asked for decides
        if wanted is None:
            return Verdict(Status.STALE, error="no header tells the checksum of the bytes")
        return _compare(found, wanted)
    if seen.differs:
        return Verdict(Status.STALE, error=seen.differs)
    return _compare(found, seen.checksum, epoch=seen.epoch)


def _compare(found: int, wanted: int, *, epoch: int = 0) -> Verdict:
    """Compare a payload's checksum with the one that it must have."""
    if found != wanted:
        error = f"the bytes do not match their checksum: {found:x}, expected {wanted:x}"
        return Verdict(Status.STALE, error=error)
    return Verdict(Status.DONE, found, epoch)


def judge_files(tracks: Sequence[Track], job: StorageJob) -> list[Verdict]:
    """What the storage reader found, against a checksum when one was expected."""
    verdicts = []
    for track, result in zip(tracks, job.results, strict=True):
        wanted = track.item.expect.checksum
        if result.error:
            verdicts.append(Verdict(Status.FAILED, error=result.error))
        elif wanted is not None and wanted != result.checksum:
            error = f"the file's bytes have checksum {result.checksum:x}, expected {wanted:x}"
            verdicts.append(Verdict(Status.STALE, error=error))
        else:
            verdicts.append(Verdict(Status.DONE, result.checksum))
    return verdicts


def hash_arrived(slab: Slab, track: Track, pieces: Pieces) -> None:
    """Hash the chunks that have arrived, until there is none; several threads may."""
    while pieces.ready:
        try:
            number = pieces.ready.popleft()
        except IndexError:  # another thread was quicker
            return
        pieces.digests[number] = hash_chunk(slab, track, pieces, number)


def hash_chunk(slab: Slab, track: Track, pieces: Pieces, number: int) -> int:
    """Hash of one chunk, every byte of which is here."""
    begin, end = pieces.chunk(number)
    return checksum(slab.memory.read(track.item.dest.offset + begin, end - begin))
