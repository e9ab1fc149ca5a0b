from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from hotset.errors import CheckpointError, ConfigError
from hotset.transport import files
from hotset.transport.base import Expect, FileItem, FileRange, LinkProfile, Status
from hotset.transport.engine import STORAGE
from hotset.transport.header import checksum
from hotset.transport.pacing import Pacer
from hotset.transport.slab import SlotState
from hotset.transport.storage import RUN_BYTES, StorageReader, plan_runs
from tests.transport.peer import Store, build
from tests.transport.worlds import deadline

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

NBYTES = 5000


@pytest.fixture
def store() -> Iterator[Store]:
    made = build(
        name="reader", incarnation=1, backend=None, blocks=0, nbytes=NBYTES, room=8,
        storage=StorageReader(),
    )  # fmt: skip
    yield made
    assert made.engine.close()
    made.slab.check_integrity()


def _file(folder: Path, nbytes: int, *, seed: int = 1) -> tuple[str, bytes]:
    data = np.random.default_rng(seed).integers(0, 256, nbytes, dtype=np.uint8).tobytes()
    path = folder / f"shard-{seed}.bin"
    path.write_bytes(data)
    return str(path), data


def _item(store: Store, *ranges: FileRange, expected: int | None = None) -> FileItem:
    nbytes = sum(part.nbytes for part in ranges)
    slot = store.slab.allocate(nbytes)
    assert slot is not None
    expect = Expect(key=bytes(16), format_code=1, nbytes=nbytes, checksum=expected)
    return FileItem(ranges=tuple(ranges), dest=slot, expect=expect)


def _read(store: Store, *items: FileItem) -> Any:
    return store.engine.read_files(list(items), deadline_ns=deadline(), reason="demand").wait()


def test_ranges_are_gathered_in_the_order_of_the_item(store: Store, tmp_path: Path) -> None:
    path, data = _file(tmp_path, 20_000)
    item = _item(
        store,
        FileRange(path=path, offset=9_000, nbytes=1_000),
        FileRange(path=path, offset=100, nbytes=2_000),
        FileRange(path=path, offset=8_000, nbytes=1_000),
    )
    outcome = _read(store, item)
    wanted = data[9_000:10_000] + data[100:2_100] + data[8_000:9_000]
    assert outcome.status is Status.DONE
    assert outcome.peer == STORAGE
    assert bytes(store.slab.payload(item.dest)) == wanted
    assert outcome.items[0].checksum == checksum(wanted)
    assert store.slab.state(item.dest) is SlotState.READY
    assert store.slab.pins(item.dest) == 1
    header = store.slab.header(item.dest)
    assert header is not None
    assert header.checksum == checksum(wanted)


def test_neighbours_of_several_items_are_one_read() -> None:
    views = [memoryview(bytearray(30)), memoryview(bytearray(20))]
    ranges = [
        [FileRange(path="a", offset=20, nbytes=10), FileRange(path="a", offset=0, nbytes=20)],
        [FileRange(path="a", offset=30, nbytes=15), FileRange(path="b", offset=45, nbytes=5)],
    ]
    runs = plan_runs(ranges, views)
    assert [(run.path, run.offset, run.nbytes, run.owners) for run in runs] == [
        ("a", 0, 45, {0, 1}),
        ("b", 45, 5, {1}),
    ]


def test_long_ranges_are_cut_so_that_threads_share_them() -> None:
    view = memoryview(bytearray(RUN_BYTES * 2 + 5))
    runs = plan_runs([[FileRange(path="a", offset=7, nbytes=view.nbytes)]], [view])
    assert [run.nbytes for run in runs] == [RUN_BYTES, RUN_BYTES, 5]
    assert [run.offset for run in runs] == [7, 7 + RUN_BYTES, 7 + 2 * RUN_BYTES]


def test_short_reads_are_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, data = _file(tmp_path, 10_000)
    real = files.os.preadv

    def short(handle: int, views: list[memoryview], offset: int) -> int:
        return real(handle, [views[0][:333]], offset)

    monkeypatch.setattr(files.os, "preadv", short)
    into = memoryview(bytearray(6_000))
    reader = StorageReader(threads=1)
    parts = [FileRange(path=path, offset=at, nbytes=1_500) for at in (3_000, 0, 4_500, 1_500)]
    reader.read_ranges(parts, into)
    reader.close()
    wanted = b"".join(data[part.offset : part.offset + 1_500] for part in parts)
    assert bytes(into) == wanted


def test_a_truncated_file_fails_its_item_alone(store: Store, tmp_path: Path) -> None:
    path, data = _file(tmp_path, 3_000)
    good = _item(store, FileRange(path=path, offset=0, nbytes=1_000))
    bad = _item(store, FileRange(path=path, offset=2_500, nbytes=1_000))
    outcome = _read(store, good, bad)
    assert [result.status for result in outcome.items] == [Status.DONE, Status.FAILED]
    assert "truncated: it has 3000 bytes, 3500 needed" in outcome.items[1].error
    assert bytes(store.slab.payload(good.dest)) == data[:1_000]
    assert store.slab.state(bad.dest) is SlotState.FREE


def test_a_missing_file_names_itself(store: Store, tmp_path: Path) -> None:
    missing = str(tmp_path / "absent.bin")
    outcome = _read(store, _item(store, FileRange(path=missing, offset=0, nbytes=10)))
    assert outcome.status is Status.FAILED
    assert missing in outcome.items[0].error
    reader = StorageReader()
    with pytest.raises(CheckpointError, match="absent"):
        reader.read_ranges([FileRange(path=missing, offset=0, nbytes=1)], memoryview(bytearray(1)))
    reader.close()


def test_bytes_that_differ_from_the_catalog_are_stale(store: Store, tmp_path: Path) -> None:
    path, _ = _file(tmp_path, 3_000)
    item = _item(store, FileRange(path=path, offset=0, nbytes=1_000), expected=1)
    outcome = _read(store, item)
    assert outcome.status is Status.STALE


def test_a_paced_disk_is_slow_and_says_when_it_times_out(tmp_path: Path) -> None:
    path, _ = _file(tmp_path, 3_000)
    link = LinkProfile(bandwidth_bytes_per_s=10**9, latency_ns=10**10, emulated=True)
    slow = StorageReader(pacer=Pacer(link))
    store = build(
        name="paced", incarnation=1, backend=None, blocks=0, nbytes=NBYTES, room=8, storage=slow
    )
    item = _item(store, FileRange(path=path, offset=0, nbytes=1_000))
    outcome = store.engine.read_files([item], deadline_ns=deadline(0.05)).wait()
    assert outcome.status is Status.TIMED_OUT
    assert store.engine.close()
    store.slab.check_integrity()


def test_ranges_must_add_up_to_the_block(store: Store, tmp_path: Path) -> None:
    path, _ = _file(tmp_path, 100)
    slot = store.slab.allocate(100)
    assert slot is not None
    item = FileItem(
        ranges=(FileRange(path=path, offset=0, nbytes=99),),
        dest=slot,
        expect=Expect(key=bytes(16), format_code=1, nbytes=100),
    )
    with pytest.raises(ConfigError):
        store.engine.read_files([item], deadline_ns=deadline())
    store.slab.fail(slot)


def test_empty_ranges_end(store: Store) -> None:
    slot = store.slab.allocate(0)
    assert slot is not None
    item = FileItem(ranges=(), dest=slot, expect=Expect(key=bytes(16), format_code=1, nbytes=0))
    assert _read(store, item).status is Status.DONE
