"""Engines against raw NIXL in one run: `python -m tests.transport.bench_engine`.

Prints medians and the ratio of an engine over NIXL and one over shared memory (hand-off,
verification and publication included) to the bare NIXL backend that posts the same spans in one
transfer, interleaved so that all see the same machine.
"""

from __future__ import annotations

import platform
import statistics
import time
from typing import TYPE_CHECKING

from hotset.transport.base import PostState
from hotset.transport.batch import spans
from hotset.transport.nixl import NixlBackend
from hotset.transport.slab import Slab
from tests.transport.peer import BACKENDS, PeerProcess, Source, Store, build

if TYPE_CHECKING:
    from hotset.transport.base import PeerInfo

ROUNDS = 15
WAYS = ("nixl", "shm")


class Raw:
    """The bare backend with a slab of its own, posting all spans at once."""

    def __init__(self, peer: PeerInfo, *, blocks: int, nbytes: int) -> None:
        self.slab = Slab(
            capacity_bytes=blocks * (nbytes + 128),
            slot_payload_bytes=nbytes,
            name="raw",
            incarnation=1,
        )
        self.backend = NixlBackend()
        self.backend.register(self.slab)
        self.backend.connect(peer)
        self.peer = peer.name
        slots = [self.slab.allocate(nbytes) for _ in range(blocks)]
        self.slots = [slot for slot in slots if slot is not None]

    def read(self, copies: list[Source]) -> int:
        items = [copy.item(slot) for copy, slot in zip(copies, self.slots, strict=True)]
        plan = spans(items)
        begin = time.perf_counter_ns()
        handle = self.backend.post(self.peer, plan)
        while self.backend.poll(handle)[0] is PostState.PENDING:
            pass
        elapsed = time.perf_counter_ns() - begin
        self.backend.release(handle)
        return elapsed


def read(store: Store, peer: str, copies: list[Source]) -> int:
    """One read through the engine, from submission to the caller's wake-up, in ns."""
    slots = [store.slab.allocate(copy.nbytes) for copy in copies]
    items = [copy.item(slot) for copy, slot in zip(copies, slots, strict=True) if slot]
    begin = time.perf_counter_ns()
    outcome = store.engine.read(peer, items, deadline_ns=time.monotonic_ns() + 10**10).wait()
    elapsed = time.perf_counter_ns() - begin
    for result in outcome.items:
        assert result.status.value == "done", result.error
        store.slab.unpin(result.dest)
        store.slab.retire(result.dest)
    return elapsed


def measure(*, blocks: int, nbytes: int, rounds: int) -> None:
    """Print one line for a batch of `blocks` x `nbytes`."""
    stores, peers = {}, {}
    for way in WAYS:
        peer = PeerProcess(
            name="source", incarnation=1, backend=way, blocks=blocks, nbytes=nbytes, room=0
        )
        store = build(
            name=way, incarnation=1, backend=BACKENDS[way](), blocks=0, nbytes=nbytes, room=blocks
        )
        store.engine.connect(peer.info)
        stores[way], peers[way] = store, peer
    raw = Raw(peers["nixl"].info, blocks=blocks, nbytes=nbytes)
    bare: list[int] = []
    full: dict[str, list[int]] = {way: [] for way in WAYS}
    for _ in range(rounds):
        bare.append(raw.read(peers["nixl"].copies))
        for way in WAYS:
            full[way].append(read(stores[way], "source", peers[way].copies))
    size, a = blocks * nbytes, statistics.median(bare[2:])
    print(
        f"{blocks:4d} x {nbytes >> 10:6d} KiB  raw {a / 1e3:7.0f} us {size / a:5.1f} GB/s", end=""
    )
    for way in WAYS:
        b = statistics.median(full[way][2:])
        print(
            f" | {way} {b / 1e3:7.0f} us {size / b:5.1f} GB/s ratio {a / b:.2f}"
            f" best {min(bare) / min(full[way]):.2f}",
            end="",
        )
        stores[way].engine.close()
        peers[way].close()
    print(flush=True)


def main() -> None:
    """Measure the sizes that serving uses."""
    print(platform.machine(), platform.python_version())
    measure(blocks=1, nbytes=64 << 10, rounds=300)
    measure(blocks=1, nbytes=1 << 20, rounds=200)
    measure(blocks=1, nbytes=12 << 20, rounds=5 * ROUNDS)
    measure(blocks=8, nbytes=70 << 10, rounds=200)
    measure(blocks=64, nbytes=1 << 20, rounds=3 * ROUNDS)


if __name__ == "__main__":
    main()
