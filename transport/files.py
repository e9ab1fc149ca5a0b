"""Reads one run of a file by the cheapest way: from the page cache, else past it with O_DIRECT.

A cold buffered read copies through the page cache: on an idle disk it has two thirds of the
bandwidth of a direct one and costs twice the CPU, and inside a memory limit its pages push out
others or must be reclaimed at once. A warm buffered read is four times as fast as the disk. So a
run is asked of the cache first, and read directly when the cache does not have it.

Direct reads want whole blocks of the disk in aligned memory, and slots are aligned to neither. So
a run is widened to whole pages, read into an aligned buffer of the thread and copied out; memory is
bounded by threads x (run + 2 pages). The cache is asked with one page read under RWF_NOWAIT,
because `mincore` and `cachestat` answer only the file's owner. Asking makes the kernel fetch that
page, so the page asked for differs from time to time: else a question would answer the next one.

It must not know slots or items. Invariants: '' is returned only when every byte was read; where
O_DIRECT is refused the read is buffered and `buffered_reason` says why, told once.
"""

from __future__ import annotations

import errno
import itertools
import logging
import mmap
import os
import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

PAGE_BYTES: Final = 4096
PART_BYTES: Final = 1 << 20  # of what is cached: to be hashed while a core has it
DIRECT_MIN_BYTES: Final = 256 << 10  # 128 KiB: 0.9 of a buffered read, 512 KiB: 1.2
_STRIDE: Final = 0x9E3779B1  # odd: successive multiples spread over all pages of a run
_REFUSED: Final = frozenset({errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS})

_log = logging.getLogger(__name__)


@dataclass(slots=True)
class _File:
    """An open file; `direct` is -1 when it was refused at once, `refused` when at a read."""

    handle: int
    direct: int = -1
    refused: bool = False


class _Bounce(threading.local):
    """The aligned buffer of a thread, made at its first direct read."""

    array: np.ndarray[tuple[int], np.dtype[np.uint8]] | None = None


class Files:
    """Open files, kept until `close`; any thread may read."""

    def __init__(self, *, run_bytes: int, direct: bool | None = None) -> None:
        """`run_bytes` bounds one read. `direct`: None asks the cache first, True does not."""
        self.buffered_reason = "" if direct is not False else "direct reads are switched off"
        self._direct = direct
        self._room = run_bytes + 2 * PAGE_BYTES
        self._files: dict[str, _File] = {}
        self._lock = threading.Lock()
        self._bounce = _Bounce()
        self._probes = itertools.count(1)

    def read(
        self,
        path: str,
        *,
        offset: int,
        views: Sequence[memoryview],
        landed: Callable[[int], None] = lambda _: None,
    ) -> str:
        """Read the bytes at `offset` into `views`, back to back; '' or what went wrong.

        `landed(count)` is told of them in order, and soon: while they are still in a cache.
        """
        try:
            file = self._open(path)
            nbytes = sum(view.nbytes for view in views)
            left = list(views)
            done = 0
            if nbytes >= DIRECT_MIN_BYTES and file.direct >= 0 and not file.refused:
                if self._direct is None:
                    done = self._read_cached(path, file, left, offset, landed)
                if done < nbytes and not file.refused:
                    count = self._read_direct(path, file, left, offset + done)
                    landed(count)
                    done += count
            done += _read_buffered(file.handle, left, offset + done, landed)
        except OSError as error:
            return f"cannot read {path} ({error.strerror})"
        if done == nbytes:
            return ""
        size = os.fstat(file.handle).st_size
        return f"{path} is truncated: it has {size} bytes, {offset + nbytes} needed"

    def close(self) -> None:
        """Close the files; nobody may be reading."""
        with self._lock:
            for file in self._files.values():
                for handle in {file.handle, file.direct} - {-1}:
                    os.close(handle)
            self._files.clear()

    def _open(self, path: str) -> _File:
        file = self._files.get(path)
        if file is not None:
            return file
        with self._lock:
            if path not in self._files:
                file = _File(os.open(path, os.O_RDONLY | os.O_CLOEXEC))
                if self._direct is not False:
                    try:
                        file.direct = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_DIRECT)
                    except OSError as error:
                        self._give_up(path, error)
                self._files[path] = file
            return self._files[path]

    def _give_up(self, path: str, error: OSError) -> None:
        if self.buffered_reason:
            return
        self.buffered_reason = f"the file system refuses it for {path} ({error.strerror})"
        _log.warning("storage is read through the page cache: %s", self.buffered_reason)

    def _refuse(self, path: str, file: _File, error: OSError) -> None:
        """Read this file through the cache from now on. Raises what is not a refusal."""
        if error.errno not in _REFUSED:
            raise error
        file.refused = True
        self._give_up(path, error)

    def _read_cached(
        self,
        path: str,
        file: _File,
        views: list[memoryview],
        offset: int,
        landed: Callable[[int], None],
    ) -> int:
        """Read up to the first byte that is not cached, if one page somewhere in the run is."""
        done = 0
        pages = sum(view.nbytes for view in views) // PAGE_BYTES
        asked = offset + next(self._probes) * _STRIDE % pages * PAGE_BYTES
        try:
            if os.preadv(file.handle, [bytearray(1)], asked, os.RWF_NOWAIT) == 0:
                return 0
            while views:
                part = _first(views, PART_BYTES)
                count = os.preadv(file.handle, part, offset + done, os.RWF_NOWAIT)
                landed(count)
                _advance(views, count)
                done += count
                if count < sum(view.nbytes for view in part):
                    break
        except BlockingIOError:
            pass
        except OSError as error:  # its cache cannot be asked, so the kernel shall decide
            self._refuse(path, file, error)
        return done

    def _read_direct(self, path: str, file: _File, views: list[memoryview], offset: int) -> int:
        """Read directly what can be; drops what is complete from `views`; returns the bytes."""
        nbytes = sum(view.nbytes for view in views)
        begin = offset - offset % PAGE_BYTES
        end = -(-(offset + nbytes) // PAGE_BYTES) * PAGE_BYTES
        if end - begin > self._room:
            raise ValueError(f"a run of {nbytes} bytes, at most {self._room} are read at once")
        bounce = self._buffer()
        have = 0
        while have < end - begin:
            try:
                count = os.preadv(file.direct, [bounce[have : end - begin].data], begin + have)
            except OSError as error:
                self._refuse(path, file, error)
                break
            have += count
            if count == 0 or have % PAGE_BYTES:  # the end of the file, seldom a short read
                break
        done, skip = 0, offset - begin
        left = min(nbytes, max(0, have - skip))
        while left:
            part = min(left, views[0].nbytes)
            into = np.frombuffer(views[0], dtype=np.uint8)
            np.copyto(into[:part], bounce[skip + done : skip + done + part])  # without the GIL
            done += part
            left -= part
            _advance(views, part)
        return done

    def _buffer(self) -> np.ndarray[tuple[int], np.dtype[np.uint8]]:
        if self._bounce.array is None:
            memory = mmap.mmap(-1, self._room, flags=mmap.MAP_PRIVATE | mmap.MAP_POPULATE)
            self._bounce.array = np.frombuffer(memory, dtype=np.uint8)
        return self._bounce.array


def _read_buffered(
    handle: int, views: list[memoryview], offset: int, landed: Callable[[int], None]
) -> int:
    """Read until the views are full or the file ends; returns the bytes."""
    done = 0
    while views:
        count = os.preadv(handle, views, offset + done)
        if count == 0:
            break
        done += count
        landed(count)
        _advance(views, count)
    return done


def _first(views: Sequence[memoryview], nbytes: int) -> list[memoryview]:
    """Views from the front that have up to `nbytes`, but one at least."""
    part = [views[0]]
    have = views[0].nbytes
    for view in views[1:]:
        have += view.nbytes
        if have > nbytes:
            break
        part.append(view)
    return part


def _advance(views: list[memoryview], count: int) -> None:
    """Drop the first `count` bytes of the views, and views that have none left."""
    while views and count >= views[0].nbytes:
        count -= views[0].nbytes
        del views[0]
    if count:
        views[0] = views[0][count:]
