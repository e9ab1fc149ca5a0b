from __future__ import annotations

import errno
import itertools
import os
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from hotset.transport import files
from hotset.transport.base import FileRange
from hotset.transport.files import DIRECT_MIN_BYTES, PAGE_BYTES, Files
from hotset.transport.storage import RUN_BYTES, StorageReader

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

NBYTES = 3 * DIRECT_MIN_BYTES + 1234  # ends inside a page
WHERE = [
    pytest.param(0, NBYTES, id="whole"),
    pytest.param(0, DIRECT_MIN_BYTES, id="aligned"),
    pytest.param(1704, DIRECT_MIN_BYTES + 1, id="odd"),
    pytest.param(PAGE_BYTES - 1, DIRECT_MIN_BYTES + 2, id="one-byte-of-two-pages"),
    pytest.param(NBYTES - DIRECT_MIN_BYTES - 5, DIRECT_MIN_BYTES + 5, id="tail"),
    pytest.param(77, 100, id="short"),
]


@pytest.fixture
def file(tmp_path: Path) -> tuple[str, bytes]:
    data = np.random.default_rng(5).integers(0, 256, NBYTES, dtype=np.uint8).tobytes()
    path = tmp_path / "shard.bin"
    path.write_bytes(data)
    return str(path), data


def _drop(path: str) -> None:
    handle = os.open(path, os.O_RDONLY)
    os.fsync(handle)
    os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(handle)


def _cached_pages(path: str) -> int:
    handle = os.open(path, os.O_RDONLY)
    os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_RANDOM)  # counting must not read ahead
    count = 0
    for at in range(0, os.fstat(handle).st_size, PAGE_BYTES):
        try:
            count += os.preadv(handle, [bytearray(1)], at, os.RWF_NOWAIT)
        except BlockingIOError:
            continue
    os.close(handle)
    return count


def _refuses_direct(path: str) -> bool:
    try:
        os.close(os.open(path, os.O_RDONLY | os.O_DIRECT))
    except OSError:
        return True
    return False


@pytest.mark.parametrize("direct", [None, True, False])
@pytest.mark.parametrize(("offset", "nbytes"), WHERE)
@pytest.mark.parametrize("cold", [True, False], ids=["cold", "warm"])
def test_every_way_reads_the_same_bytes(
    file: tuple[str, bytes], *, direct: bool | None, offset: int, nbytes: int, cold: bool
) -> None:
    path, data = file
    opened = Files(run_bytes=RUN_BYTES, direct=direct)
    into = bytearray(nbytes)
    cuts = [0, nbytes // 3, nbytes // 3 + 7, nbytes]  # scattered over three places
    views = [memoryview(into)[a:b] for a, b in itertools.pairwise(cuts)]
    if cold:
        _drop(path)
    assert opened.read(path, offset=offset, views=views) == ""
    assert into == data[offset : offset + nbytes]
    opened.close()


@pytest.mark.parametrize("direct", [None, True, False])
def test_a_run_beyond_the_end_says_how_much_is_missing(
    file: tuple[str, bytes], *, direct: bool | None
) -> None:
    path, _ = file
    opened = Files(run_bytes=RUN_BYTES, direct=direct)
    _drop(path)
    for offset, nbytes in ((PAGE_BYTES, NBYTES), (2 * NBYTES, DIRECT_MIN_BYTES)):
        error = opened.read(path, offset=offset, views=[memoryview(bytearray(nbytes))])
        assert f"truncated: it has {NBYTES} bytes, {offset + nbytes} needed" in error
    opened.close()


def test_a_cold_read_leaves_the_page_cache_alone(file: tuple[str, bytes]) -> None:
    path, data = file
    if _refuses_direct(path):
        pytest.skip("this file system refuses O_DIRECT")
    opened = Files(run_bytes=RUN_BYTES)
    into = bytearray(NBYTES)
    for _ in range(5):
        _drop(path)
        assert opened.read(path, offset=0, views=[memoryview(into)]) == ""
        assert into == data
        assert _cached_pages(path) <= NBYTES // PAGE_BYTES // 10  # the page that was asked for
    opened.close()
    assert opened.buffered_reason == ""


def test_a_file_in_the_cache_is_not_read_from_the_disk(
    file: tuple[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    path, data = file
    opened = Files(run_bytes=RUN_BYTES)
    flags_seen: list[Sequence[int]] = []
    real = os.preadv

    def noting(handle: int, views: Any, offset: int, *flags: int) -> int:
        flags_seen.append(flags)
        return real(handle, views, offset, *flags)

    monkeypatch.setattr(files.os, "preadv", noting)
    into = bytearray(NBYTES)
    assert opened.read(path, offset=0, views=[memoryview(into)]) == ""
    assert into == data
    assert set(flags_seen) == {(os.RWF_NOWAIT,)}
    opened.close()


@pytest.mark.parametrize("when", ["open", "read", "probe"])
def test_where_direct_reads_are_refused_the_reason_is_told_once(
    file: tuple[str, bytes],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    when: str,
) -> None:
    path, data = file
    real_open, real_read = os.open, os.preadv
    refused: set[int] = set()

    def opening(name: str, flags: int) -> int:
        if flags & os.O_DIRECT and when == "open":
            raise OSError(errno.EINVAL, "Invalid argument")
        handle = real_open(name, flags)
        if flags & os.O_DIRECT:
            refused.add(handle)
        return handle

    def reading(handle: int, views: Any, offset: int, flags: int = 0) -> int:
        if when == "read" and handle in refused:
            raise OSError(errno.EINVAL, "Invalid argument")
        if when == "probe" and flags:
            raise OSError(errno.EOPNOTSUPP, "Operation not supported")
        return real_read(handle, views, offset, flags)

    _drop(path)
    monkeypatch.setattr(files.os, "open", opening)
    monkeypatch.setattr(files.os, "preadv", reading)
    reader = StorageReader()
    for _ in range(3):
        into = bytearray(NBYTES)
        reader.read_ranges([FileRange(path=path, offset=0, nbytes=NBYTES)], memoryview(into))
        assert into == data
    assert path in reader.buffered_reason
    assert caplog.text.count("page cache") == 1
    reader.close()


def test_an_error_of_the_disk_is_told_and_not_retried_another_way(
    file: tuple[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    path, _ = file

    def failing(*_: Any) -> int:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(files.os, "preadv", failing)
    opened = Files(run_bytes=RUN_BYTES)
    error = opened.read(path, offset=0, views=[memoryview(bytearray(NBYTES))])
    assert error == f"cannot read {path} (Input/output error)"
    opened.close()
