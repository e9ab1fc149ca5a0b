"""The ucx backend against a tuned plain socket: `python -m tests.transport.bench_ucx`.

The peer of the comparison is that of `bench_tcp.py`: a socket pair between two processes, with
large buffers, no requests and no checks. Rounds are interleaved, so that both see the same machine;
printed are medians, best values and the ratios of both.
"""

from __future__ import annotations

import platform
import statistics
import sys
import threading
import time
from typing import TYPE_CHECKING

from hotset.transport.base import PostState, Span
from hotset.transport.slab import Slab
from hotset.transport.ucx import UcxBackend
from tests.transport.bench_tcp import Plain, read
from tests.transport.peer import PeerProcess, build

if TYPE_CHECKING:
    from tests.transport.peer import Source

SKIPPED = 2  # rounds that warm up


class Bare:
    """The backend without an engine: post all, poll until done."""

    def __init__(self, peer: PeerProcess, *, blocks: int, nbytes: int) -> None:
        self.slab = Slab(
            capacity_bytes=blocks * (nbytes + 128),
            slot_payload_bytes=nbytes,
            name="bare",
            incarnation=1,
        )
        self.backend = UcxBackend()
        self.backend.register(self.slab)
        self.backend.connect(peer.info)
        self._stride = nbytes + 64
        self._tick = threading.Event()

    def read(self, copies: list[Source]) -> int:
        spans = [
            Span(local_offset=i * self._stride, remote_offset=c.offset, nbytes=self._stride)
            for i, c in enumerate(copies)
        ]
        begin = time.perf_counter_ns()
        handle = self.backend.post("source", spans)
        while self.backend.poll(handle)[0] is PostState.PENDING:
            self._tick.wait(5e-5)
        elapsed = time.perf_counter_ns() - begin
        assert self.backend.poll(handle)[0] is PostState.DONE
        self.backend.release(handle)
        return elapsed


def measure(*, blocks: int, nbytes: int, rounds: int) -> None:
    """Print one line for a batch of `blocks` x `nbytes`."""
    shape = {"blocks": blocks, "nbytes": nbytes}
    peer = PeerProcess(name="source", incarnation=1, backend="ucx", room=0, **shape)
    store = build(
        name="sink", incarnation=1, backend=UcxBackend(), blocks=0, nbytes=nbytes, room=blocks
    )
    store.engine.connect(peer.info)
    plain, bare = Plain(**shape), Bare(peer, **shape)
    times: dict[str, list[int]] = {"plain": [], "backend": [], "engine": []}
    for _ in range(rounds):
        times["plain"].append(plain.read())
        times["backend"].append(bare.read(peer.copies))
        times["engine"].append(read(store, peer.copies))
    size, base = blocks * nbytes, times["plain"][SKIPPED:]
    print(f"{blocks:4d} x {nbytes >> 10:6d} KiB", end="")
    for way, all_taken in times.items():
        taken = all_taken[SKIPPED:]
        middle = statistics.median(taken)
        print(
            f" | {way} {middle / 1e3:7.0f} us {size / middle:5.2f} GB/s (best "
            f"{size / min(taken):5.2f}) ratio {statistics.median(base) / middle:.2f} best "
            f"{min(base) / min(taken):.2f}",
            end="",
        )
    print(flush=True)
    bare.backend.close()
    store.engine.close()
    plain.close()
    peer.close()


def main() -> None:
    """Measure the sizes that the target names, and small ones."""
    print(platform.machine(), platform.python_version())
    for blocks, nbytes, rounds in (
        (64, 1 << 20, 31),
        (1, 64 << 20, 31),
        (1, 1 << 20, 101),
        (1, 64 << 10, 201),
    ):
        measure(blocks=blocks, nbytes=nbytes, rounds=rounds)


if __name__ == "__main__":
    sys.exit(main())
