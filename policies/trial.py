"""Does prefetching pay here? Decided by trying it, since no model knows the machine.

A wrong prefetch costs bandwidth, a right one may still slow compute that shares cores or memory
with the copying. So now and then steps run with prefetching on and off in turns, in pairs of short
windows, the order of each pair the reverse of the one before (a request's steps get faster or
slower as it goes on). What prefetches may be started is priced already, so being without them has
to prove better, in each trial anew. Steps are noisy: it must win nearly all pairs, and the median
of all steps by a margin; once it cannot any more, the trial ends. Must not know clocks: the caller
measures steps of one kind (decode of one token).

Invariants: same samples, same answers; prefetching is off in trials, and after those only in which
being without it has won `least` pairs.
"""

from __future__ import annotations

import statistics

_KEEP_RATIO = 0.97  # a switch must gain 3 %: against noise


class PrefetchTrial:
    """Alternates between on and off until one has proved better."""

    def __init__(
        self, *, window: int = 4, pairs: int = 8, least: int = 7, first: int = 64, hold: int = 512
    ) -> None:
        """`first` steps with prefetching; then trials, each followed by `hold` steps of the better.

        A trial has at most `pairs` pairs of windows of `window` steps; being without has to win
        `least` of them. By chance alone it wins 7 of 8 in one of 28 trials.
        """
        self._window = window
        self._pairs = pairs
        self._least = least
        self._hold = hold
        self._samples: dict[bool, list[int]] = {True: [], False: []}
        self._left = first
        self._settled = True
        self._won = self._lost = 0
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
        self._left = self._window
        if self._settled:
            self._begin()
        elif len(self._samples[True]) != len(self._samples[False]):
            self.on = not self.on
        else:
            self._judge()

    def _begin(self) -> None:
        self._settled = False
        self._samples = {True: [], False: []}
        self._won = self._lost = 0
        self.on = True

    def _judge(self) -> None:
        """A pair has ended; the next one begins with the side that ended it."""
        with_, without = (
            statistics.median(self._samples[side][-self._window :]) for side in (True, False)
        )
        if without < with_:
            self._won += 1
        else:
            self._lost += 1
        if self._won >= self._least or self._lost > self._pairs - self._least:
            self._decide()

    def _decide(self) -> None:
        with_, without = (statistics.median(self._samples[side]) for side in (True, False))
        self.on = not (self._won >= self._least and without < with_ * _KEEP_RATIO)
        self.switched_off += not self.on
        self._settled = True
        self._left = self._hold
