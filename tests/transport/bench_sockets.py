"""Two-sided backends against a tuned plain socket: `python -m tests.transport.bench_sockets tcp`.

The backend alone and an engine over it, `tcp` or `ucx`.

The peer of the comparison is a Python socket pair with the same buffers between two processes, the
sender's `sendall` of at most 1 MiB at once out of a memory file (more is slower), the receiver's
`recv_into` into another: no requests, no framing, no checks. Rounds are interleaved, so that both
see the same machine; printed are medians, best values and the ratios of both.
"""

from __future__ import annotations

import argparse
import multiprocessing as mp
import platform
import socket
import statistics
import sys
import threading
import time
from typing import TYPE_CHECKING

from hotset.transport.base import PostState, Span
from hotset.transport.memory import HostMemory
from hotset.transport.slab import Slab
from hotset.transport.wire import tune
from tests.transport.peer import BACKENDS, PeerProcess, build

if TYPE_CHECKING:
    from multiprocessing.connection import Connection

    from tests.transport.peer import Source, Store


def _send(pipe: Connection, blocks: int, nbytes: int) -> None:
    memory = HostMemory(blocks * nbytes, name="plain")
    listener = socket.socket()
    tune(listener)
    listener.bind(("127.0.0.1", 0))
    listener.listen()
    pipe.send(listener.getsockname())
    sock, _ = listener.accept()
    tune(sock)
    while sock.recv(1):
        for offset in range(0, blocks * nbytes, min(nbytes, 1 << 20)):
            sock.sendall(memory.read(offset, min(nbytes, 1 << 20)))


class Plain:
    """The tuned plain socket."""

    def __init__(self, *, blocks: int, nbytes: int) -> None:
        pipe, theirs = mp.get_context("spawn").Pipe()
        self.process = mp.get_context("spawn").Process(
            target=_send, args=(theirs, blocks, nbytes), daemon=True
        )
        self.process.start()
        self.sock = socket.socket()
        tune(self.sock)
        self.sock.connect(pipe.recv())
        self.blocks, self.nbytes = blocks, nbytes
        self.memory = HostMemory(blocks * nbytes, name="plain-sink")

    def read(self) -> int:
        begin = time.perf_counter_ns()
        self.sock.sendall(b"x")
        for index in range(self.blocks):
            view = self.memory.view(index * self.nbytes, self.nbytes)
            while view.nbytes:
                view = view[self.sock.recv_into(view) :]
        return time.perf_counter_ns() - begin

    def close(self) -> None:
        self.sock.close()
        self.process.join(10)


class Bare:
    """The backend without an engine: post all, poll until done."""

    def __init__(self, way: str, peer: PeerProcess, *, blocks: int, nbytes: int) -> None:
        self.slab = Slab(
            capacity_bytes=blocks * (nbytes + 128), slot_payload_bytes=nbytes, name="bare",
            incarnation=1,
        )  # fmt: skip
        self.backend = BACKENDS[way]()
        self.backend.register(self.slab)
        self.backend.connect(peer.info)
        self.nbytes = nbytes
        self.tick = threading.Event()

    def read(self, copies: list[Source]) -> int:
        spans = [
            Span(local_offset=i * (self.nbytes + 64), remote_offset=c.offset, nbytes=c.nbytes + 64)
            for i, c in enumerate(copies)
        ]
        begin = time.perf_counter_ns()
        handle = self.backend.post("source", spans)
        while self.backend.poll(handle)[0] is PostState.PENDING:
            self.tick.wait(5e-5)
        elapsed = time.perf_counter_ns() - begin
        assert self.backend.poll(handle)[0] is PostState.DONE
        self.backend.release(handle)
        return elapsed


def read(store: Store, copies: list[Source]) -> int:
    """One read through the engine, verification included, in ns."""
    slots = [store.slab.allocate(copy.nbytes) for copy in copies]
    items = [copy.item(slot) for copy, slot in zip(copies, slots, strict=True) if slot]
    begin = time.perf_counter_ns()
    outcome = store.engine.read("source", items, deadline_ns=time.monotonic_ns() + 10**10).wait()
    elapsed = time.perf_counter_ns() - begin
    for result in outcome.items:
        assert result.status.value == "done", result.error
        store.slab.unpin(result.dest)
        store.slab.retire(result.dest)
    return elapsed


def measure(way: str, *, blocks: int, nbytes: int, rounds: int) -> None:
    """Print one line for a batch of `blocks` x `nbytes`."""
    shape = {"blocks": blocks, "nbytes": nbytes}
    peer = PeerProcess(name="source", incarnation=1, backend=way, room=0, **shape)
    store = build(
        name="sink", incarnation=1, backend=BACKENDS[way](), blocks=0, nbytes=nbytes, room=blocks
    )
    store.engine.connect(peer.info)
    plain, bare = Plain(**shape), Bare(way, peer, **shape)
    times: dict[str, list[int]] = {"plain": [], "backend": [], "engine": []}
    for _ in range(rounds):
        times["plain"].append(plain.read())
        times["backend"].append(bare.read(peer.copies))
        times["engine"].append(read(store, peer.copies))
    size, base = blocks * nbytes, times["plain"][2:]
    print(f"{blocks:4d} x {nbytes >> 10:6d} KiB", end="")
    for what, all_taken in times.items():
        taken = all_taken[2:]
        middle = statistics.median(taken)
        print(
            f" | {what} {middle / 1e3:7.0f} us {size / middle:5.2f} GB/s (best "
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
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("way", choices=("tcp", "ucx"))
    way = arguments.parse_args().way
    print(platform.machine(), platform.python_version(), way)
    for blocks, nbytes, rounds in ((64, 1 << 20, 31), (1, 64 << 20, 31), (1, 1 << 20, 101),
                                   (1, 64 << 10, 201)):  # fmt: skip
        measure(way, blocks=blocks, nbytes=nbytes, rounds=rounds)


if __name__ == "__main__":
    sys.exit(main())
