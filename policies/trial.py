"""Does prefetching pay here? Decided by trying it, since no model knows the machine.

A wrong prefetch costs bandwidth, a right one may still slow compute that shares cores or memory
with the copying. So steps run in short windows with prefetching on and off in turns; the median
step time of each side decides, the better one stays for a while, then the trial is repeated. Must
not know clocks: the caller measures steps of one kind (decode of one token).

Invariants: same samples, same answers; a side needs `windows` whole windows before it can lose.
"""

from __future__ import annotations

import statistics

_KEEP_RATIO = 0.97  # a switch must gain 3 %: hysteresis against noise


class PrefetchTrial:
    """Alternates between on and off until one has proved better."""

    def __init__(self, *, window: int = 4, windows: int = 2, hold: int = 256) -> None:
        """`window` steps at a time, `windows` on each side, then `hold` steps of the better."""
        self._window = window
        self._windows = windows
        self._hold = hold
        self._samples: dict[bool, list[int]] = {True: [], False: []}
        self._left = window
        self._best = True
        self._settled = False
        self.on = True
        self.switched_off = 0
        """How often a trial ended with prefetching off."""

    def observe(self, step_ns: int) -> None:
        """One step of `step_ns` has ended under the present setting."""
        if not self._settled:
            self._samples[self.on].append(step_ns)
        self._left -= 1
        if self._left:
            return
        if self._settled:
            self._begin()
        elif all(len(s) >= self._windows * self._window for s in self._samples.values()):
            self._decide()
        else:
            self.on = not self.on
            self._left = self._window

    def _begin(self) -> None:
        self._settled = False
        self._samples = {True: [], False: []}
        self.on = self._best
        self._left = self._window

    def _decide(self) -> None:
        mine = statistics.median(self._samples[self._best])
        other = statistics.median(self._samples[not self._best])
        if other < mine * _KEEP_RATIO:
            self._best = not self._best
        self.on = self._best
        self.switched_off += not self._best
        self._settled = True
        self._left = self._hold
