"""Reads byte ranges of files into slots: the way in from storage, tier 4.

Ranges that lie side by side in a file are read by one `preadv` that scatters into their slots,
whatever the order in which the slots want them; long ranges are cut so that the pool's threads
share them. Each chunk of a payload is hashed by the thread that reads the last of it. How a run is
read, from the page cache or past it, is `files.py`'s business. It must not know what the bytes
mean.

NIXL's POSIX plugin was measured against bare preadv, 12 MiB reads on a busy machine: 1.04 of
preadv's bandwidth warm, 0.64 cold. preadv also scatters, so preadv it is.

Invariants: a job ends exactly once, after the last thread has stopped touching its slots; an item
is good only when every byte of it was read. The pool's threads release the GIL while they read
and hash.
"""

from __future__ import annotations

import itertools
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Final

from hotset.errors import CheckpointError
from hotset.transport.cores import keep_to_share
from hotset.transport.files import Files
from hotset.transport.header import CHUNK_BYTES, checksum, combine

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from hotset.transport.base import FileItem, FileRange
    from hotset.transport.pacing import Pacer
    from hotset.transport.slab import Slab

RUN_BYTES: Final = 4 << 20  # one preadv: long enough for the disk, short enough to share
IOV_MAX: Final = 1024


@dataclass(slots=True)
class FileResult:
    """What became of one item: an error's text, or the checksum of its payload."""

    error: str = ""
    checksum: int = 0


@dataclass(slots=True)
class _Run:
    """Adjacent bytes of one file and where they go.

    `places[i]` is the item, and the chunk of its payload, that `views[i]` is part of; `read` views
    are complete, and `part` bytes of the next one.
    """

    path: str
    offset: int
    nbytes: int = 0
    views: list[memoryview] = field(default_factory=list)
    places: list[tuple[int, int]] = field(default_factory=list)
    read: int = 0
    part: int = 0

    @property
    def owners(self) -> set[int]:
        """Items that it has bytes of."""
        return {owner for owner, _ in self.places}


class StorageJob:
    """Items under way. `results` may be read once `on_end` was called."""

    def __init__(
        self, items: Sequence[FileItem], slab: Slab, on_end: Callable[[StorageJob], None]
    ) -> None:
        """Lay out the destinations; on device memory they are host buffers copied at the end."""
        self.items = items
        self.slab = slab
        self.results = [FileResult() for _ in items]
        self.cancelled = False  # runs that have not begun are skipped
        self.on_end = on_end
        self.lock = threading.Lock()
        sizes = [sum(r.nbytes for r in item.ranges) for item in items]
        self.views = [
            slab.payload(item.dest, size) if slab.device == "cpu" else memoryview(bytearray(size))
            for item, size in zip(items, sizes, strict=True)
        ]
        self.runs = plan_runs([item.ranges for item in items], self.views)
        self.left = [0] * len(items)
        for run in self.runs:
            for owner in run.owners:
                self.left[owner] += 1
        self.runs_left = len(self.runs)
        self.missing = [
            [min(CHUNK_BYTES, size - at) for at in range(0, size, CHUNK_BYTES)] for size in sizes
        ]
        self.digests = [[0] * len(chunks) for chunks in self.missing]

    def landed(self, run: _Run, nbytes: int) -> list[tuple[int, int]]:
        """Note the next bytes of a run; returns items and chunks that are complete by them."""
        complete = []
        with self.lock:
            run.part += nbytes
            while run.read < len(run.views) and run.part >= run.views[run.read].nbytes:
                size = run.views[run.read].nbytes
                owner, chunk = run.places[run.read]
                run.part -= size
                run.read += 1
                self.missing[owner][chunk] -= size
                if self.missing[owner][chunk] == 0:
                    complete.append((owner, chunk))
        return complete


def plan_runs(ranges: Sequence[Sequence[FileRange]], views: Sequence[memoryview]) -> list[_Run]:
    """Cut what is asked for at chunks, sort it by place, join neighbours up to RUN_BYTES."""
    pieces: list[tuple[str, int, memoryview, tuple[int, int]]] = []
    for owner, (parts, view) in enumerate(zip(ranges, views, strict=True)):
        at = 0
        for part in parts:
            begin = at
            while (done := at - begin) < part.nbytes:
                size = min(part.nbytes - done, CHUNK_BYTES - at % CHUNK_BYTES)
                place = (owner, at // CHUNK_BYTES)
                pieces.append((part.path, part.offset + done, view[at : at + size], place))
                at += size
    runs: list[_Run] = []
    for path, offset, view, place in sorted(pieces, key=lambda piece: piece[:2]):
        last = runs[-1] if runs else None
        joins = (
            last is not None
            and last.path == path
            and last.offset + last.nbytes == offset
            and last.nbytes + view.nbytes <= RUN_BYTES
            and len(last.views) < IOV_MAX
        )
        if last is None or not joins:
            last = _Run(path, offset)
            runs.append(last)
        last.nbytes += view.nbytes
        last.views.append(view)
        last.places.append(place)
    return runs


class StorageReader:
    """Reads files with a small pool of threads; open files are kept until `close`."""

    def __init__(
        self, *, threads: int = 2, pacer: Pacer | None = None, direct: bool | None = None
    ) -> None:
        """`pacer` emulates a slower disk; the engine that uses this reader applies it.

        `direct`: None reads past the page cache what it does not hold, where the file system lets
        it; True does not ask the cache; False always goes through it.
        """
        self.pacer = pacer
        numbers = itertools.count()
        self._pool = ThreadPoolExecutor(
            threads,
            thread_name_prefix="hotset-storage",
            initializer=lambda: keep_to_share(next(numbers), threads),
        )
        self._files = Files(run_bytes=RUN_BYTES, direct=direct)

    @property
    def buffered_reason(self) -> str:
        """Why some file is read through the page cache; '' while none is for a reason."""
        return self._files.buffered_reason

    def submit(
        self, items: Sequence[FileItem], slab: Slab, on_end: Callable[[StorageJob], None]
    ) -> StorageJob:
        """Start reading; `on_end(job)` is called once on a thread of the pool (or here if empty).

        Errors are texts in `job.results`. Raises ValueError when ranges exceed their slot.
        """
        job = StorageJob(items, slab, on_end)
        if not job.runs:
            for owner in range(len(items)):
                self._close_item(job, owner)
            on_end(job)
        for run in job.runs:
            self._pool.submit(self._carry_out, job, run)
        return job

    def read_ranges(self, ranges: Sequence[FileRange], into: memoryview) -> None:
        """Read ranges back to back into `into`, on this thread. Raises CheckpointError."""
        for run in plan_runs([ranges], [into]):
            error = self._read(run, lambda _: None)
            if error:
                raise CheckpointError(error, remedy="download the file again")

    def close(self) -> None:
        """Wait for the jobs that run, then close the files."""
        self._pool.shutdown(wait=True)
        self._files.close()

    def _carry_out(self, job: StorageJob, run: _Run) -> None:
        error = "cancelled" if job.cancelled else self._read(run, partial(self._landed, job, run))
        complete: list[int] = []
        with job.lock:
            for owner in run.owners:
                job.results[owner].error = job.results[owner].error or error
                job.left[owner] -= 1
                if job.left[owner] == 0:
                    complete.append(owner)
        for owner in complete:
            self._close_item(job, owner)
        with job.lock:
            job.runs_left -= 1
            last = job.runs_left == 0
        if last:
            job.on_end(job)

    @staticmethod
    def _landed(job: StorageJob, run: _Run, nbytes: int) -> None:
        """Hash what is complete while it is still in the cache."""
        for owner, chunk in job.landed(run, nbytes):
            view = job.views[owner][chunk * CHUNK_BYTES : (chunk + 1) * CHUNK_BYTES]
            job.digests[owner][chunk] = checksum(view)

    @staticmethod
    def _close_item(job: StorageJob, owner: int) -> None:
        """Bring a complete item to its device."""
        result = job.results[owner]
        if result.error or job.cancelled:
            return
        result.checksum = combine(job.digests[owner] or [checksum(b"")])
        if job.slab.device != "cpu":
            job.slab.write_payload(job.items[owner].dest, job.views[owner])

    def _read(self, run: _Run, landed: Callable[[int], None]) -> str:
        return self._files.read(run.path, offset=run.offset, views=run.views, landed=landed)
