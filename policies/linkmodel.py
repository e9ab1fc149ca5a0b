"""A link and the time that blocks take on it, in whole nanoseconds: no clock, no randomness.

Decides the order of transfers: one at a time; a demand goes ahead of every queued prefetch but
waits for the chunk that is on the wire, after which the interrupted prefetch goes on where it
was. Must not know policies or what a block is for.

Invariants: time never goes back; a transfer's time on the wire is latency + bytes / bandwidth;
the same calls give the same times.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from typing import NamedTuple

from hotset.errors import ConfigError

CHUNK_BYTES = 1 << 20
"""What a demand may have to wait for when a prefetch is on the wire."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LinkSpec:
    """Bandwidth and latency of the link that blocks arrive on."""

    bandwidth_bytes_per_s: int
    latency_ns: int

    def transfer_ns(self, nbytes: int) -> int:
        """Time of one transfer on an idle link, rounded up."""
        return self.latency_ns + -(-nbytes * 1_000_000_000 // self.bandwidth_bytes_per_s)


LINKS: dict[str, LinkSpec] = {
    "pcie5": LinkSpec(bandwidth_bytes_per_s=55_000_000_000, latency_ns=5_000),
    "pcie4": LinkSpec(bandwidth_bytes_per_s=25_000_000_000, latency_ns=5_000),
    "cxl2x8": LinkSpec(bandwidth_bytes_per_s=25_000_000_000, latency_ns=600),
    "nvme": LinkSpec(bandwidth_bytes_per_s=7_000_000_000, latency_ns=80_000),
    "roce400": LinkSpec(bandwidth_bytes_per_s=45_000_000_000, latency_ns=3_000),
}
"""What such links deliver in practice, one direction, large transfers."""


def link_named(name: str) -> LinkSpec:
    """Return the profile. Raises ConfigError that lists the names."""
    found = LINKS.get(name)
    if found is None:
        raise ConfigError(
            f"link profile {name!r} is unknown", remedy=f"choose one of {', '.join(LINKS)}"
        )
    return found


class Landing(NamedTuple):
    """A block that has arrived."""

    key: int
    at_ns: int


class Link:
    """Transfers of blocks of one size; `key` names a block."""

    def __init__(self, spec: LinkSpec, *, block_bytes: int) -> None:
        """Start idle at time 0."""
        self.block_ns = spec.transfer_ns(block_bytes)
        chunks = max(1, -(-block_bytes // CHUNK_BYTES))
        self.chunk_ns = max(1, -(-self.block_ns // chunks))
        self.now_ns = 0
        self.busy_ns = 0
        self._demands: OrderedDict[int, int] = OrderedDict()  # key -> ns still to go
        self._prefetches: OrderedDict[int, int] = OrderedDict()

    def demand(self, key: int) -> None:
        """Queue a block that compute waits for; a prefetch of it is moved to the demands."""
        rest = self._prefetches.pop(key, self.block_ns)
        self._demands[key] = rest

    def prefetch(self, key: int) -> None:
        """Queue a block that nobody waits for yet."""
        self._prefetches[key] = self.block_ns

    @property
    def demands(self) -> int:
        """Blocks on their way or queued that compute waits for."""
        return len(self._demands)

    @property
    def transfers(self) -> int:
        """Blocks on their way or queued."""
        return len(self._demands) + len(self._prefetches)

    @property
    def queued_ns(self) -> int:
        """Time until the link is idle if nothing is added."""
        return sum(self._demands.values()) + sum(self._prefetches.values())

    def next_landing(self, until_ns: int | None = None) -> Landing | None:
        """Run until a block lands, at most until `until_ns`; None when none does."""
        while self._demands or self._prefetches:
            if until_ns is not None and self.now_ns >= until_ns:
                return None
            queue = self._demands or self._prefetches
            key, rest = next(iter(queue.items()))
            spell = rest
            if until_ns is not None and self.now_ns + rest > until_ns:
                spell = until_ns - self.now_ns
            self.now_ns += spell
            self.busy_ns += spell
            if spell == rest:
                del queue[key]
                return Landing(key, self.now_ns)
            queue[key] = rest - spell
        if until_ns is not None:
            self.now_ns = max(self.now_ns, until_ns)
        return None

    def finish_chunk(self) -> Landing | None:
        """Before a demand is queued: let the prefetch on the wire end the chunk it has begun."""
        if self._demands or not self._prefetches:
            return None
        rest = next(iter(self._prefetches.values()))
        into_chunk = (self.block_ns - rest) % self.chunk_ns
        if not into_chunk:
            return None
        return self.next_landing(self.now_ns + self.chunk_ns - into_chunk)
