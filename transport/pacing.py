"""Makes a link look as slow as its profile: decides when a chunk may be posted, and be told.

Real bytes always move, as fast as the machine can. A token bucket holds the next chunk back until
the link is free, and the news of each chunk until the link would have delivered it; so a paced link
has the bandwidth and latency of its profile (a CXL pool on a machine that has none). All readers of
a source on this host share one bucket through its `PacePage`. Pure arithmetic on CLOCK_MONOTONIC
times that the caller passes: no clock, no sleep.

How a reader uses it: when `wait_ns` is 0, `reserve`, post, and end the chunk when its bytes are
there and the time that `reserve` gave has come.

Invariants: over any interval, bytes told <= bandwidth x (interval + max(BURST_NS, jitter)) + one
chunk; a chunk that is posted late because its reader woke up late costs the link nothing up to
BURST_NS; a reader that obeys `wait_ns` adds at most one chunk to the link's backlog, so an imminent
chunk waits for the one that occupies the link and for no other. Latency and jitter do not occupy
the link.
"""

from __future__ import annotations

import math
import random
import threading
from typing import TYPE_CHECKING, Final

from hotset.errors import ConfigError
from hotset.transport.pacepage import (
    CHUNKS,
    CLAMPED,
    FIELDS,
    FREE_AT_NS,
    LONGEST_NS,
    NBYTES,
    URGENT_UNTIL_NS,
    PacePage,
)

if TYPE_CHECKING:
    from collections.abc import MutableSequence

    from hotset.transport.base import LinkProfile

BURST_NS: Final = 5_000_000
URGENT_NS: Final = 1_000_000  # how long the link is kept for an imminent chunk that waits for it
MAX_AHEAD_CHUNKS: Final = 16  # readers that reserve in the same microseconds; more is not believed


class Pacer:
    """One reader's view of a source's link. Thread-safe."""

    def __init__(
        self,
        profile: LinkProfile,
        *,
        time_scale: float = 1.0,
        page: PacePage | None = None,
        seed: int = 0,
    ) -> None:
        """Start with an idle link, or with the link as `page` has it.

        `time_scale` stretches all times of the profile. Raises ConfigError for a link that cannot
        be.
        """
        _check(profile, time_scale)
        self.page = page
        self._ns_per_byte = 1e9 * time_scale / profile.bandwidth_bytes_per_s
        self._latency_ns = int(profile.latency_ns * time_scale)
        self._jitter_ns = int(profile.jitter_ns * time_scale)
        self._random = random.Random(seed).random
        self._lock: PacePage | threading.Lock = threading.Lock() if page is None else page
        self._fields: MutableSequence[int] | memoryview[int] = (
            [0] * FIELDS if page is None else page.fields
        )

    def wait_ns(self, now_ns: int, *, imminent: bool = False) -> int:
        """Ns until the next chunk may be posted; 0: now.

        An imminent chunk that has to wait gets the link next: other readers of the source let it
        pass.
        """
        fields = self._fields
        free_at = fields[FREE_AT_NS]
        if imminent:
            if free_at > now_ns:
                fields[URGENT_UNTIL_NS] = free_at + URGENT_NS
            until = free_at
        else:
            until = max(free_at, fields[URGENT_UNTIL_NS])
        if until <= now_ns:
            return 0
        return min(until - now_ns, MAX_AHEAD_CHUNKS * fields[LONGEST_NS] + URGENT_NS)

    def reserve(self, nbytes: int, *, now_ns: int, queued_ns: int, imminent: bool = False) -> int:
        """Occupy the link with a chunk that is posted now and could have been since `queued_ns`.

        Returns the monotonic time at which its end may be told; it may be past.
        """
        occupied_ns = math.ceil(nbytes * self._ns_per_byte)
        fields = self._fields
        with self._lock:
            longest = fields[LONGEST_NS]
            if occupied_ns > longest:
                longest = fields[LONGEST_NS] = occupied_ns
            free_at = fields[FREE_AT_NS]
            if free_at > now_ns + MAX_AHEAD_CHUNKS * longest:
                fields[CLAMPED] += 1
                free_at = now_ns + longest
            end = max(free_at, min(queued_ns, now_ns), now_ns - BURST_NS) + occupied_ns
            fields[FREE_AT_NS] = end
            fields[CHUNKS] += 1
            fields[NBYTES] += nbytes
            if imminent:
                fields[URGENT_UNTIL_NS] = 0
        if self._jitter_ns:
            end += int(self._random() * (self._jitter_ns + 1))
        return end + self._latency_ns


def _check(profile: LinkProfile, time_scale: float) -> None:
    lowest = min(profile.latency_ns, profile.jitter_ns)
    if profile.bandwidth_bytes_per_s <= 0 or lowest < 0 or time_scale <= 0:
        raise ConfigError(
            f"a link of {profile.bandwidth_bytes_per_s} bytes/s, {profile.latency_ns} ns, "
            f"jitter {profile.jitter_ns} ns, scale {time_scale}",
            remedy="give a positive bandwidth and time scale, latency and jitter of 0 or more",
        )
