"""Copies and hashes together, for backends that copy inside `post`.

Where the peer's memory is mapped here, each chunk is copied and hashed while it is in a core's
cache; else the backend copies a post and then all of it is hashed, without the GIL either way
(`bulk.py`). The engine's owner has one of these, and its second thread another (`hands.py`). It
must not know what the bytes mean.

Invariant: nothing is in flight when it returns or raises, unless it returns a handle.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from hotset.transport.base import NO_HANDLE
from hotset.transport.bulk import NO_HASH, Bulk, Part
from hotset.transport.header import CHUNK_BYTES, HEADER_BYTES
from hotset.transport.job import spans
from hotset.transport.judge import judge

if TYPE_CHECKING:
    from collections.abc import Sequence

    from hotset.transport.base import Backend, Span
    from hotset.transport.job import Post, Track, Verdict
    from hotset.transport.slab import Slab


@dataclass(slots=True)
class Landing:
    """What became of a post: verdicts of whole slots, in order, and how long hashing took.

    `digests` are those of the chunks that a piece has every byte of. With a `handle`, the backend
    has not finished: the post goes on as any other does.
    """

    verdicts: list[Verdict] = field(default_factory=list)
    digests: dict[int, int] = field(default_factory=dict)
    verify_ns: int = 0
    handle: int = NO_HANDLE


class Fused:
    """Reads posts of one backend into one slab, through one of the backend's lanes."""

    def __init__(self, backend: Backend, slab: Slab, *, lane: int = 0) -> None:
        """Keep them."""
        self._backend = backend
        self._slab = slab
        self._bulk = Bulk(slab)
        self._lane = lane

    def read(self, post: Post) -> Landing:
        """Read whole slots and judge them, or one piece of a slot and hash its chunks.

        Notes nothing in slots, tracks or pieces. Raises what the backend's `post` raises.
        """
        return self._read_piece(post) if post.end else self._read_slots(post)

    def _read_slots(self, post: Post) -> Landing:
        peer, tracks = post.link.name, post.tracks
        parts = [part for track in tracks for part in _parts_of_slot(track, peer)]
        landing = Landing()
        digests = self._copy(peer, spans(tracks, peer), parts, landing)
        at = 0
        for track in tracks if digests else ():
            upto = at + max(1, -(-track.item.expect.nbytes // CHUNK_BYTES))
            landing.verdicts.append(judge(self._slab, track, peer, digests[at:upto]))
            at = upto
        return landing

    def _read_piece(self, post: Post) -> Landing:
        [track] = post.tracks
        local, remote = track.item.dest.offset, track.remote_offset(post.link.name)
        pieces = post.pieces
        assert pieces is not None  # noqa: S101 - the mover made it a piece
        whole = pieces.chunks_within(post.begin, post.end)
        parts: list[Part] = []
        at = post.begin
        for number in pieces.chunks_touched(post.begin, post.end):
            upto = min(post.end, pieces.chunk(number)[1])
            skip = HEADER_BYTES - at if at < HEADER_BYTES else 0
            skip = skip if number in whole else NO_HASH
            parts.append(Part(local + at, remote + at, upto - at, skip))
            at = upto
        landing = Landing()
        digests = self._copy(post.link.name, [post.span], parts, landing)
        hashed = [digest for digest, part in zip(digests, parts, strict=False) if part.skip >= 0]
        landing.digests = dict(zip(whole, hashed, strict=False))
        return landing

    def _copy(
        self, peer: str, what: Sequence[Span], parts: Sequence[Part], landing: Landing
    ) -> list[int]:
        """Digests of the parts; none when the landing has a handle: the read has not ended well."""
        far = self._backend.window(peer, what, lane=self._lane)
        if far:
            digests, landing.verify_ns = self._bulk.copy_and_hash(parts, far=far)
            return digests
        backend = self._backend
        landing.handle = backend.post_in_call(peer, what, lane=self._lane)
        if landing.handle != NO_HANDLE:
            return []
        digests, landing.verify_ns = self._bulk.copy_and_hash(parts)
        return digests


def _parts_of_slot(track: Track, peer: str) -> list[Part]:
    """The header with the first chunk of the payload, then the other chunks."""
    item = track.item
    local, remote, nbytes = item.dest.offset, track.remote_offset(peer), item.expect.nbytes
    first = min(nbytes, CHUNK_BYTES)
    parts = [Part(local, remote, HEADER_BYTES + first, HEADER_BYTES)]
    for at in range(CHUNK_BYTES, nbytes, CHUNK_BYTES):
        begin = HEADER_BYTES + at
        parts.append(Part(local + begin, remote + begin, min(CHUNK_BYTES, nbytes - at)))
    return parts
