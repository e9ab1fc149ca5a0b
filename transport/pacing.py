"""Makes a link look slower than it is: decides how long a finished read is held back.

Real bytes always move first, at full speed; pacing only delays the news of their arrival, so a
paced link has the bandwidth and latency of its profile (a CXL pool on a machine that has none).
Pure arithmetic on times that the caller passes: no clock, no sleep. It paces one reader's end of a
link; several readers of one pool each get the whole profile.

Invariant: over any busy interval, bytes completed <= bandwidth x (interval + one transfer).
"""

from __future__ import annotations

import threading

from hotset.errors import ConfigError


class Pacer:
    """A link of `bytes_per_s` with `latency_ns`; both are stretched by `time_scale`."""

    def __init__(self, bytes_per_s: int, latency_ns: int, time_scale: float = 1.0) -> None:
        """Start with an idle link. Raises ConfigError for a rate that is not positive."""
        if bytes_per_s <= 0 or latency_ns < 0 or time_scale <= 0:
            raise ConfigError(
                f"a link of {bytes_per_s} bytes/s, {latency_ns} ns, scale {time_scale}",
                remedy="give a positive bandwidth and time scale and a latency of 0 or more",
            )
        self._ns_per_byte = 1e9 * time_scale / bytes_per_s
        self._latency_ns = int(latency_ns * time_scale)
        self._free_at_ns = 0
        self._lock = threading.Lock()

    def delay_ns(self, nbytes: int, now_ns: int, *, started_ns: int | None = None) -> int:
        """Ns from `now_ns` until a read of `nbytes` that has really ended may end.

        `started_ns` is when the read was posted (`now_ns` when absent). Transfers occupy the link
        one after the other; latency does not occupy it.
        """
        with self._lock:
            begin = max(now_ns if started_ns is None else started_ns, self._free_at_ns)
            self._free_at_ns = begin + int(nbytes * self._ns_per_byte)
            return max(0, self._free_at_ns + self._latency_ns - now_ns)
