"""A hot block to many stores: down a chain, down a tree, and read by all from its source.

`python -m tests.transport.bench_multicast` prints medians for each way, with the bytes that the
source sent, over links as fast as this machine and over links of 1 GB/s (emulated, each store's
link shared by its readers).
"""

from __future__ import annotations

import argparse
import platform
import statistics
import time
from dataclasses import dataclass
from typing import Any

from hotset.transport.base import LinkProfile
from hotset.transport.multicast import plan
from tests.transport.peer import PeerProcess

BLOCK = 12 << 20
READERS = 8
ROUNDS = 7
SLOW = LinkProfile(bandwidth_bytes_per_s=1_000_000_000, latency_ns=20_000, emulated=True)


@dataclass(frozen=True, slots=True)
class Result:
    """One way of spreading a block: ns until the last store has it, and who sent how much."""

    elapsed_ns: int
    sent: dict[str, int]


class Group:
    """A source with one block and stores that want it, each a process."""

    def __init__(
        self, *, readers: int = READERS, nbytes: int = BLOCK, backend: str = "shm", **more: Any
    ) -> None:
        shape: dict[str, Any] = {"incarnation": 1, "backend": backend, "nbytes": nbytes} | more
        self.source = PeerProcess(name="source", blocks=1, room=0, **shape)
        self.readers = {
            f"reader-{i}": PeerProcess(name=f"reader-{i}", blocks=0, room=2, **shape)
            for i in range(readers)
        }
        self.infos = {"source": self.source.info} | {n: p.info for n, p in self.readers.items()}
        self.block = self.source.copies[0]

    def spread(self, *, fanout: int) -> Result:
        """Send the block to all; `fanout` 0 lets each read it from the source."""
        names = list(self.readers)
        offsets = {"source": self.block.offset}
        begin = time.monotonic_ns()
        hops = plan("source", names, fanout=fanout or 1)
        for hop in hops:
            source, fallbacks = (hop.source, hop.fallbacks) if fanout else ("source", ())
            changes: dict[str, Any] = {"remote_offset": offsets[source]}
            if fanout:
                changes |= {"follow": True, "stream": True, "generation": None, "incarnation": None}
            infos = [self.infos[name] for name in (source, *fallbacks[-1:])]
            if fallbacks:
                changes["others"] = (self.block.replica(fallbacks[-1]),)
            offsets[hop.reader] = self.readers[hop.reader].call(
                "pull", (infos, self.block, changes)
            )
        sent: dict[str, int] = {}
        for reader in self.readers.values():
            reader.send("ended")
        for reader in self.readers.values():
            for status, checksum, peer, _, error in reader.answer():
                assert (status, checksum) == ("done", self.block.checksum), error
                sent[peer] = sent.get(peer, 0) + self.block.nbytes
        elapsed = time.monotonic_ns() - begin
        for reader in self.readers.values():
            reader.call("drop")
        return Result(elapsed, sent)

    def close(self) -> None:
        for process in (self.source, *self.readers.values()):
            process.close()


def main() -> None:
    """Measure and print."""
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--backend", default="shm")
    backend = arguments.parse_args().backend
    print(f"{platform.machine()} Python {platform.python_version()}, {READERS} readers, {backend}")
    for title, more in (("machine's own links", {}), ("1 GB/s a store (emulated)", {"link": SLOW})):
        group = Group(backend=backend, **more)
        ways = {"direct": 0, "chain": 1, "tree of 2": 2}
        times: dict[str, list[int]] = {way: [] for way in ways}
        sent = dict.fromkeys(ways, 0)
        for _ in range(ROUNDS + 1):
            for way, fanout in ways.items():
                result = group.spread(fanout=fanout)
                times[way].append(result.elapsed_ns)
                sent[way] = result.sent["source"]
        group.close()
        direct = statistics.median(times["direct"][1:])
        for way in ways:
            median = statistics.median(times[way][1:])
            print(
                f"{title:28s} {way:10s} {median / 1e6:8.1f} ms  {direct / median:5.2f} x direct"
                f"  source sends {sent[way] / BLOCK:.2f} blocks",
                flush=True,
            )


if __name__ == "__main__":
    main()
