"""Looks at headers of sources before, or while, their slots are read in pieces.

A slot that is still filling tells in its header how far it has come, and several sources of one
slot cannot all land their headers in it. So a header is read alone, into a scratch cell behind the
slots. Called by the engine's owner thread only; it must not know links' queues or timers.

Invariant: a cell belongs to one look until that look has settled.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, NamedTuple

from hotset.transport.base import Span
from hotset.transport.header import HEADER_BYTES, inspect_progress
from hotset.transport.job import Post
from hotset.transport.slab import SCRATCH_CELLS

if TYPE_CHECKING:
    from hotset.transport.job import Track
    from hotset.transport.link import Link
    from hotset.transport.pieces import Pieces
    from hotset.transport.slab import Slab

FOLLOW_BYTES: Final = 512 << 10  # a slot that fills is followed in steps of at least this
LOOK_MIN_NS: Final = 50_000
LOOK_MAX_NS: Final = 2_000_000


class Looked(NamedTuple):
    """What a look found: why the source does not count, or how long to wait for more."""

    wait_ns: int
    differs: str


class Looks:
    """The scratch cells of one slab."""

    def __init__(self, slab: Slab) -> None:
        """All cells are free."""
        self._slab = slab
        self._cells = list(range(SCRATCH_CELLS))

    def take(self, link: Link, track: Track, pieces: Pieces) -> Post | None:
        """Make the post of a look; None when every cell is in use."""
        if not self._cells:
            return None
        post = Post(link=link, tracks=[track], nbytes=0, priority=track.job.priority)
        post.cell, post.pieces = self._cells.pop(), pieces
        return post

    def span(self, post: Post) -> Span:
        """What the look copies."""
        return Span(
            local_offset=self._slab.scratch_offset(post.cell),
            remote_offset=post.tracks[0].remote_offset(post.link.name),
            nbytes=HEADER_BYTES,
        )

    def put_back(self, post: Post) -> None:
        """The look has ended; its bytes stay readable until the next look is posted."""
        self._cells.append(post.cell)

    def judge(self, post: Post, track: Track, pieces: Pieces) -> Looked:
        """Take in what the header says of its source."""
        source = post.link.name
        header = self._slab.memory.read(self._slab.scratch_offset(post.cell), HEADER_BYTES)
        progress = inspect_progress(header, track.expect(source))
        if progress.differs:
            return Looked(0, progress.differs)
        if not progress.torn:
            pieces.known[source] = HEADER_BYTES + progress.arrived
            pieces.seen = progress.seen or pieces.seen
        if progress.seen or pieces.available(source) >= FOLLOW_BYTES:
            track.look_wait_ns = 0
            return Looked(0, "")
        track.look_wait_ns = min(LOOK_MAX_NS, max(LOOK_MIN_NS, track.look_wait_ns * 3 // 2))
        return Looked(track.look_wait_ns, "")
