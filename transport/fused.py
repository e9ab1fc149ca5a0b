"""Copies and hashes by turns, for backends that copy inside `post`.

A block that is hashed after all of it was copied comes from memory twice. Taken in parts that fit
the processor's cache, the hash costs a fifth of the copy instead of a half. The engine's owner has
one of these, and its second thread another (`hands.py`). It must not know what the bytes mean.

Invariant: nothing is in flight when it returns or raises, unless it returns a handle.
"""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from hotset.transport.base import PostState, Span
from hotset.transport.header import HEADER_BYTES
from hotset.transport.job import spans
from hotset.transport.judge import hash_arrived, hash_chunk, judge

if TYPE_CHECKING:
    from collections.abc import Sequence

    from hotset.transport.base import Backend
    from hotset.transport.job import Post, Track, Verdict
    from hotset.transport.slab import Slab

DONE: Final = -1


@dataclass(slots=True)
class Landing:
    """What became of a post: verdicts of whole slots, in order, and how long hashing took.

    `digests` are those of the chunks of a piece that was read ahead of the owner's notes. With a
    `handle`, the backend has not finished: the post goes on as any other does.
    """

    verdicts: list[Verdict] = field(default_factory=list)
    digests: dict[int, int] = field(default_factory=dict)
    verify_ns: int = 0
    handle: int = DONE


class Fused:
    """Reads posts of one backend into one slab, through one of the backend's lanes."""

    def __init__(self, backend: Backend, slab: Slab, *, lane: int = 0) -> None:
        """Keep them."""
        self._backend = backend
        self._slab = slab
        self._lane = lane

    def read_slots(self, post: Post) -> Landing:
        """Read whole slots and judge them. Raises what the backend's `post` raises."""
        landing = Landing()
        most = self._backend.part_bytes(post.link.name) or sys.maxsize
        group: list[Track] = []
        nbytes = 0
        for track in post.tracks:
            if group and nbytes + track.slot_bytes > most:
                self._read_group(post, group, landing)
                group, nbytes = [], 0
            group.append(track)
            nbytes += track.slot_bytes
        self._read_group(post, group, landing)
        return landing

    def read_piece(self, post: Post, *, ahead: bool = False) -> Landing:
        """Read one piece of a slot and hash its chunks. Raises as `read_slots`.

        Notes what has landed, and takes it off the post. `ahead`: on another thread than the
        owner's, who then does so by the landing's `digests`.
        """
        landing = Landing()
        track, pieces, peer = post.tracks[0], post.pieces, post.link.name
        assert pieces is not None  # noqa: S101 - the mover made it a piece
        local, remote = track.item.dest.offset, track.remote_offset(peer)
        part = self._backend.part_bytes(peer) or sys.maxsize
        at, end = post.begin, post.end
        while at < end:
            upto = min(end, _next_cut(at, part))
            span = Span(local_offset=local + at, remote_offset=remote + at, nbytes=upto - at)
            landing.handle = self._copy(peer, [span])
            if landing.handle != DONE:
                return landing
            begin = time.monotonic_ns()
            if ahead:
                for number in pieces.chunks_within(at, upto):
                    landing.digests[number] = hash_chunk(self._slab, track, pieces, number)
            else:
                pieces.landed(at, upto)
                post.begin = upto
                if not pieces.hashing:
                    hash_arrived(self._slab, track, pieces)
            landing.verify_ns += time.monotonic_ns() - begin
            at = upto
        return landing

    def _read_group(self, post: Post, group: Sequence[Track], landing: Landing) -> None:
        peer = post.link.name
        landing.handle = self._copy(peer, spans(group, peer))
        if landing.handle == DONE:
            begin = time.monotonic_ns()
            landing.verdicts += [judge(self._slab, track, peer) for track in group]
            landing.verify_ns += time.monotonic_ns() - begin

    def _copy(self, peer: str, parts: Sequence[Span]) -> int:
        """DONE, or the handle of a read that has not ended well, and then it was the only part."""
        backend = self._backend
        handle = backend.post(peer, parts, lane=self._lane)
        state, error = backend.poll(handle)
        if state is PostState.DONE:
            backend.release(handle)
            return DONE
        assert not backend.part_bytes(peer), f"a copy inside a call ended as {state}: {error}"  # noqa: S101 - our own bug
        return handle


def _next_cut(at: int, part_bytes: int) -> int:
    """Where a part of a slot ends that begins at `at`: with a chunk of the payload."""
    return HEADER_BYTES + (max(0, at - HEADER_BYTES) // part_bytes + 1) * part_bytes
