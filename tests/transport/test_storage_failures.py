"""Files that change, shrink or fail while they are read: the storage column of the kill matrix."""

from __future__ import annotations

import os
import random
import threading
import time
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from hotset.transport.base import Expect, FileItem, FileRange, Status
from hotset.transport.header import checksum
from hotset.transport.slab import SlotState
from hotset.transport.storage import StorageReader
from tests.transport.leaks import footprint, leaked
from tests.transport.peer import Store, build
from tests.transport.worlds import deadline, until

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

NBYTES = 24 << 20
CANARY = 0x5A
ROUNDS = 40
SECONDS = 5.0


@pytest.fixture
def store() -> Iterator[Store]:
    made = _reader()
    yield made
    assert made.engine.close()
    made.slab.check_integrity()


def _reader() -> Store:
    return build(
        name="reader", incarnation=1, backend=None, blocks=0, nbytes=NBYTES, room=2,
        storage=StorageReader(),
    )  # fmt: skip


def _write(path: Path, *, seed: int) -> int:
    data = np.random.default_rng(seed).integers(0, 256, NBYTES, dtype=np.uint8)
    path.write_bytes(data.tobytes())
    return checksum(data.data)


def _submit(store: Store, path: Path, *, expected: int | None) -> tuple[FileItem, Any]:
    slot = store.slab.allocate(NBYTES)
    assert slot is not None
    expect = Expect(key=bytes(16), format_code=1, nbytes=NBYTES, checksum=expected)
    ranges = (FileRange(path=str(path), offset=0, nbytes=NBYTES),)
    item = FileItem(ranges=ranges, dest=slot, expect=expect)
    return item, store.engine.read_files([item], deadline_ns=deadline(SECONDS))


def _end(store: Store, ticket: Any) -> Any:
    """The result, in time; what landed is dropped."""
    outcome = ticket.wait(timeout_ns=int((SECONDS + 1) * 1e9))
    result = outcome.items[0]
    if result.status is Status.DONE:
        store.slab.unpin(result.dest)
        store.slab.retire(result.dest)
    return result


def _canaries(store: Store) -> None:
    """Nothing writes to a slot that was given back."""
    assert until(lambda: store.engine.quarantined == 0)
    store.slab.check_integrity()
    slots = [store.slab.allocate(NBYTES) for _ in range(store.slab.super_slots)]
    for slot in slots:
        assert slot is not None
        store.slab.write_payload(slot, bytes([CANARY]) * NBYTES)
    assert not until(lambda: bool(store.engine.quarantined), seconds=0.05)
    for slot in slots:
        assert slot is not None
        assert not np.any(np.frombuffer(store.slab.payload(slot), dtype=np.uint8) != CANARY)
        store.slab.fail(slot)


@pytest.mark.parametrize("seed", range(4))
def test_a_file_that_shrinks_while_it_is_read(store: Store, tmp_path: Path, seed: int) -> None:
    path = tmp_path / "shard.bin"
    total = _write(path, seed=seed)
    size = random.Random(seed).choice([0, 4096, NBYTES // 2, NBYTES - 1])
    _, ticket = _submit(store, path, expected=total)
    os.truncate(path, size)
    result = _end(store, ticket)
    assert result.status in {Status.DONE, Status.FAILED}  # DONE when it was read before
    if result.status is Status.FAILED:
        assert "truncated" in result.error
        assert str(path) in result.error
        assert store.slab.state(result.dest) is SlotState.FREE
    _canaries(store)
    _, again = _submit(store, path, expected=total)
    assert _end(store, again).status is Status.FAILED  # also what has been read before


def test_a_file_that_is_overwritten_while_it_is_read_is_stale(store: Store, tmp_path: Path) -> None:
    path = tmp_path / "shard.bin"
    total = _write(path, seed=1)
    stop = threading.Event()

    def scribble() -> None:
        noise = random.Random(2)
        with path.open("r+b") as file:
            while not stop.is_set():
                file.seek(noise.randrange(NBYTES))
                file.write(bytes([noise.randrange(256)]))
                file.flush()

    thread = threading.Thread(target=scribble)
    thread.start()
    ends = {_end(store, _submit(store, path, expected=total)[1]).status for _ in range(5)}
    stop.set()
    thread.join(10)
    assert ends <= {Status.STALE, Status.DONE}
    assert Status.STALE in ends
    _canaries(store)


def test_a_file_that_is_replaced_is_read_as_it_was_opened(store: Store, tmp_path: Path) -> None:
    path = tmp_path / "shard.bin"
    total = _write(path, seed=1)
    assert _end(store, _submit(store, path, expected=total)[1]).status is Status.DONE
    other = tmp_path / "other.bin"
    wrong = _write(other, seed=2)
    other.replace(path)
    assert _end(store, _submit(store, path, expected=total)[1]).status is Status.DONE
    fresh = _reader()
    assert _end(fresh, _submit(fresh, path, expected=total)[1]).status is Status.STALE
    assert _end(fresh, _submit(fresh, path, expected=wrong)[1]).status is Status.DONE
    assert fresh.engine.close()


def test_a_file_that_cannot_be_read_is_a_typed_failure(store: Store, tmp_path: Path) -> None:
    broken = "/proc/self/mem"  # opens, and every read of page 0 is an input/output error
    for path in (tmp_path, tmp_path / "absent.bin", broken):
        _, ticket = _submit(store, path, expected=None)  # type: ignore[arg-type]
        result = _end(store, ticket)
        assert result.status is Status.FAILED
        assert str(path) in result.error
    _canaries(store)


def test_deadlines_and_cancels_give_slots_back_when_the_disk_is_done(
    store: Store, tmp_path: Path
) -> None:
    path = tmp_path / "shard.bin"
    total = _write(path, seed=1)
    for index in range(6):
        slot = store.slab.allocate(NBYTES)
        assert slot is not None
        expect = Expect(key=bytes(16), format_code=1, nbytes=NBYTES, checksum=total)
        ranges = (FileRange(path=str(path), offset=0, nbytes=NBYTES),)
        item = FileItem(ranges=ranges, dest=slot, expect=expect)
        ends_ns = time.monotonic_ns() + (2_000_000 if index % 2 else 5_000_000_000)
        ticket = store.engine.read_files([item], deadline_ns=ends_ns)
        if index % 2 == 0:
            ticket.cancel()
        status = _end(store, ticket).status
        assert status in {Status.TIMED_OUT, Status.CANCELLED, Status.DONE}
    _canaries(store)


def test_failures_leave_nothing_behind(tmp_path: Path) -> None:
    store = _reader()
    path = tmp_path / "shard.bin"
    total = _write(path, seed=1)
    path_of = {0: path, 1: tmp_path, 2: tmp_path / "absent.bin"}

    def rounds(count: int) -> None:
        for index in range(count):
            os.truncate(path, NBYTES if index % 2 else 4096)
            _end(store, _submit(store, path_of[index % 3], expected=total)[1])

    rounds(6)
    before = footprint(os.getpid())
    rounds(ROUNDS)
    assert leaked(footprint(os.getpid()).since(before), rounds=ROUNDS) == ""
    assert store.engine.close()
