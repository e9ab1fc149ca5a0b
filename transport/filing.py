"""Reads of files in the owner's turns: given to the storage reader's threads, and taken back.

It must not know queues, retries or what a file holds.

Invariant: from `post` until `ended` the slots of a post count as in flight, for threads write them.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from hotset.transport.base import FileItem
from hotset.transport.job import Post, Stage
from hotset.transport.judge import judge_files
from hotset.transport.links import STORAGE

if TYPE_CHECKING:
    from collections.abc import Callable

    from hotset.transport.arrivals import Arrivals
    from hotset.transport.flights import Flights
    from hotset.transport.job import Track
    from hotset.transport.link import Link
    from hotset.transport.slab import Slab
    from hotset.transport.storage import StorageJob, StorageReader


class Filing:
    """The owner's way to the storage reader."""

    def __init__(
        self,
        *,
        storage: StorageReader,
        slab: Slab,
        flights: Flights,
        arrivals: Arrivals,
        tell: Callable[[Post], None],
    ) -> None:
        """`tell` brings a post that has ended to the owner, who calls `ended`."""
        self._storage = storage
        self._slab = slab
        self._flights = flights
        self._arrivals = arrivals
        self._tell = tell

    def post(self, link: Link, tracks: list[Track]) -> None:
        """Start the reads of one ticket's files."""
        files = [track.item for track in tracks if isinstance(track.item, FileItem)]
        nbytes = sum(item.expect.nbytes for item in files)
        post = Post(link=link, tracks=tracks, nbytes=nbytes, priority=tracks[0].job.priority)
        post.posted_ns = time.monotonic_ns()
        link.posted(post, queued_ns=tracks[0].job.submitted_ns)
        for track in tracks:
            track.first_ns = post.posted_ns
        self._flights.add(post, polled=False)

        def ended(job: StorageJob) -> None:
            post.storage = job
            self._tell(post)

        post.storage = self._storage.submit(files, self._slab, ended)

    def ended(self, post: Post) -> None:
        """Take the storage reader's answer: no thread touches the slots any more."""
        assert post.storage is not None  # noqa: S101 - set before the reader started
        now = time.monotonic_ns()
        post.link.ended(post, now)
        verdicts = judge_files(post.tracks, post.storage)
        self._flights.settle(post)
        post.storage = None  # it knows the post: no cycle is left for the garbage collector
        judged = zip(post.tracks, verdicts, strict=True)
        waiting = [pair for pair in judged if pair[0].stage is Stage.WAITING]
        alive = [track for track, _ in waiting]
        post.mark_landed(alive, now)
        self._arrivals.all_judged(alive, STORAGE, [verdict for _, verdict in waiting])
