"""Storage, cold and warm, direct against buffered: `python -m tests.transport.bench_storage FILE`.

Reads the same random blocks of FILE (on the disk to be measured; made when it is absent) through
`StorageReader(direct=False)` and the default, interleaved so that both see the same disk. Cold:
the file was dropped from the page cache. CPU is user and system time of this process.
"""

from __future__ import annotations

import os
import platform
import random
import resource
import statistics
import sys
import threading
import time
from pathlib import Path

import numpy as np

from hotset.transport.base import Expect, FileItem, FileRange
from hotset.transport.slab import Slab
from hotset.transport.storage import StorageReader

FILE_BYTES = 512 << 20
ROUNDS = 7


def _make(path: Path) -> None:
    rng = np.random.default_rng(1)
    with path.open("wb") as file:
        for _ in range(FILE_BYTES >> 24):
            file.write(rng.bytes(1 << 24))
        file.flush()
        os.fsync(file.fileno())


def _drop(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(handle)


def _cpu_s() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


class Bench:
    """One reader, one slab; blocks are read one after the other, as decode asks for them."""

    def __init__(self, path: Path, *, nbytes: int, direct: bool | None) -> None:
        self.reader = StorageReader(direct=direct)
        self.slab = Slab(
            capacity_bytes=2 * nbytes + 256, slot_payload_bytes=nbytes, name="b", incarnation=1
        )
        slot = self.slab.allocate(nbytes)
        assert slot is not None
        self.slot, self.path, self.nbytes = slot, str(path), nbytes

    def read(self, offsets: list[int]) -> tuple[float, float]:
        """GB/s and CPU seconds a GB."""
        cpu, begin = _cpu_s(), time.perf_counter()
        for offset in offsets:
            part = FileRange(path=self.path, offset=offset, nbytes=self.nbytes)
            expect = Expect(key=bytes(16), format_code=1, nbytes=self.nbytes)
            ended = threading.Event()
            item = FileItem(ranges=(part,), dest=self.slot, expect=expect)
            job = self.reader.submit([item], self.slab, lambda _job, ended=ended: ended.set())
            assert ended.wait(60)
            assert not job.results[0].error
        size = len(offsets) * self.nbytes / 1e9
        return size / (time.perf_counter() - begin), (_cpu_s() - cpu) / size


def measure(path: Path, *, nbytes: int) -> None:
    """Print one line for cold and one for warm reads of blocks of `nbytes`."""
    ways = {"buffered": False, "default": None}
    benches = {name: Bench(path, nbytes=nbytes, direct=direct) for name, direct in ways.items()}
    found: dict[tuple[str, str], list[tuple[float, float]]] = {}
    last = FILE_BYTES // nbytes - 1
    for seed in range(ROUNDS):
        picked = random.Random(seed).sample(range(last), min(last, max(8, (128 << 20) // nbytes)))
        offsets = [block * nbytes + 1704 for block in picked]
        for name, bench in benches.items():
            _drop(path)
            found.setdefault(("cold", name), []).append(bench.read(offsets))
        benches["buffered"].read(offsets)
        for name, bench in benches.items():
            found.setdefault(("warm", name), []).append(bench.read(offsets))
    for state in ("cold", "warm"):
        rate = {n: statistics.median(x[0] for x in found[state, n]) for n in ways}
        cpu = {n: statistics.median(x[1] for x in found[state, n]) for n in ways}
        spread = [round(x[0], 2) for x in sorted(found[state, "default"])]
        print(
            f"{state} {nbytes >> 10:6d} KiB  buffered {rate['buffered']:5.2f} GB/s"
            f" {cpu['buffered']:.2f} s/GB  default {rate['default']:5.2f} GB/s"
            f" {cpu['default']:.2f} s/GB  ratio {rate['default'] / rate['buffered']:.2f}"
            f"  default {spread[0]}..{spread[-1]}  {benches['default'].reader.buffered_reason}",
            flush=True,
        )
    for bench in benches.values():
        bench.reader.close()


def main() -> None:
    """Measure block sizes of small and large experts."""
    path = Path(sys.argv[1])
    if not path.exists():
        _make(path)
    print(platform.machine(), platform.release(), f"{os.cpu_count()} cores")
    for nbytes in (128 << 10, 512 << 10, 3 << 20, 12 << 20):
        measure(path, nbytes=nbytes)


if __name__ == "__main__":
    main()
