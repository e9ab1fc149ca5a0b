"""How well an emulated link keeps to its profile: `python -m tests.transport.bench_pacing`.

For each rate: bandwidth over the profile's, and how much longer an imminent block takes behind
background traffic than alone, in pieces of the link. Medians of five, between two processes.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import threading
import time
from typing import Any

from hotset.transport.base import LinkProfile, Priority
from hotset.transport.link import WINDOW_MIN_BYTES, WINDOW_NS
from tests.transport.peer import BACKENDS, PeerProcess, Store, build

NBYTES = 4 << 20
LATENCY_NS = 20_000
RATES = (100, 300, 1_000, 2_000, 3_000, 4_000, 5_000, 6_000)  # MB/s
ROUNDS = 5


def submit(store: Store, copies: Any, *, priority: Priority) -> Any:
    items = []
    for copy in copies:
        slot = store.slab.allocate(copy.nbytes)
        assert slot is not None
        items.append(copy.item(slot))
    end = time.monotonic_ns() + 60_000_000_000
    return store.engine.read("source", items, deadline_ns=end, priority=priority)


def finish(store: Store, ticket: Any) -> int:
    """Wait, free what landed; the read's life in ns."""
    outcome = ticket.wait()
    for result in outcome.items:
        assert result.status.value == "done", result.error
        store.slab.unpin(result.dest)
        store.slab.retire(result.dest)
    return int(outcome.ended_ns - outcome.started_ns)


def measure(backend: str, rate: int) -> tuple[float, float]:
    """Bandwidth over the profile's; extra wait of an imminent block in pieces."""
    blocks = 32 if rate >= 10**9 else 6
    profile = LinkProfile(bandwidth_bytes_per_s=rate, latency_ns=LATENCY_NS, emulated=True)
    shape: dict[str, Any] = {"incarnation": 1, "nbytes": NBYTES}
    source = PeerProcess(
        name="source", backend=backend, blocks=blocks, room=0, link=profile, **shape
    )
    sink = build(name="sink", backend=BACKENDS[backend](), blocks=0, room=blocks + 1, **shape)
    sink.engine.connect(source.info)
    finish(sink, submit(sink, source.copies, priority=Priority.STAGING))
    bandwidth, waits = [], []
    for _ in range(ROUNDS):
        life = finish(sink, submit(sink, source.copies, priority=Priority.STAGING))
        bandwidth.append(blocks * NBYTES * 10**9 / (life - LATENCY_NS) / rate)
        alone = finish(sink, submit(sink, source.copies[:1], priority=Priority.IMMINENT))
        background = submit(sink, source.copies, priority=Priority.BACKGROUND)
        threading.Event().wait(0.005)  # until it is under way
        assert not background.done
        behind = finish(sink, submit(sink, source.copies[:1], priority=Priority.IMMINENT))
        finish(sink, background)
        piece_ns = max(WINDOW_NS // 2, WINDOW_MIN_BYTES // 2 * 10**9 // rate)
        waits.append((behind - alone) / piece_ns)
    assert sink.engine.close()
    source.close()
    return statistics.median(bandwidth), statistics.median(waits)


def main() -> None:
    """Measure and print."""
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--backends", default="shm,nixl")
    print(f"{platform.machine()} Python {platform.python_version()}")
    for backend in arguments.parse_args().backends.split(","):
        for rate in RATES:
            bandwidth, waits = measure(backend, rate * 10**6)
            print(
                f"{backend:5s} {rate:6d} MB/s: {bandwidth:6.3f} of the profile;"
                f" an imminent block waits {waits:5.2f} pieces",
                flush=True,
            )


if __name__ == "__main__":
    main()
