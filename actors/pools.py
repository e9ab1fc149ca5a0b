"""Ray shells of the memory pools: host DRAM and the CXL (remote) memory pool.

A pool is a process of its own, so that reading it is a transfer between processes. The CXL pool is
emulated: its bytes are in host memory and its link is paced by a profile; name, repr and every
trace say so.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import msgspec

from hotset.actors.assembly import Assembly, StoreSpec, peak_rss_bytes
from hotset.actors.pool import PoolCore
from hotset.policies.types import Tier

if TYPE_CHECKING:
    from hotset.actors.packing import Packer


class MemoryPool:
    """A store that only holds copies. Placed by the controller, read one-sidedly by workers."""

    def __init__(self, spec: bytes) -> None:
        """Start the store and join; returns when the pool is in the directory."""
        self._spec = msgspec.msgpack.decode(spec, type=StoreSpec)
        self._parts = Assembly(self._spec)
        self._core = PoolCore(
            store=self._parts.store,
            fetcher=self._parts.fetcher,
            directory=self._parts.directory,
            nbytes=self._spec.payload_nbytes(self._parts.catalog.block_nbytes),
            packer=self._packer,
            packs=self._spec.packs,
            by_profile=self._told,
        )
        self._parts.join(
            command=self._core.command,
            gauges=lambda: {"pending": self._core.pending},
            drained=lambda: None,
            packing=self._core.readers_gain,
        )

    def _packer(self) -> Packer:
        from hotset.actors.packing import Packer  # imports torch: only a pool that encodes does

        return Packer(self._parts.catalog.layout, link=self._spec.link if self._told else None)

    @property
    def _told(self) -> bool:
        """Whether it knows its link: readers of a host pool are near or far, as they alone see."""
        return self._spec.tier == Tier.CXL

    def __repr__(self) -> str:
        """What the Ray dashboard shows beside each log line."""
        slab = self._parts.slab
        tier = Tier(self._spec.tier).name.lower()
        emulated = " (emulated)" if self._spec.link and self._spec.link.emulated else ""
        return (
            f"{self._spec.name}[{tier}{emulated} {slab.used_bytes >> 20}/"
            f"{slab.capacity_bytes >> 20} MiB, {len(self._parts.store.copies())} blocks]"
        )

    def pid(self) -> int:
        """Process id, for tests and for peak memory."""
        return os.getpid()

    def pending(self) -> int:
        """Transfers that have not ended."""
        return self._core.pending

    def peak_rss_bytes(self) -> int:
        """Largest resident set so far."""
        return peak_rss_bytes()

    def check_integrity(self) -> bool:
        """Whether the slab's books are right; raises AssertionError with what is not."""
        self._parts.slab.check_integrity()
        return True

    def close(self) -> None:
        """Ship what is left; the process may end afterwards."""
        if self._parts.membership is not None:
            self._parts.membership.stop()
        self._parts.flush()


class HostPool(MemoryPool):
    """Host DRAM of a node (tier 2)."""


class CXLPool(MemoryPool):
    """CXL or remote memory (tier 3), emulated: host memory behind a paced link."""
