"""How busy demand keeps a device's links, from what its layers saw; says when a prefetch pays.

Decides a bar: the least chance of use at which a prefetch is worth starting. Must not know clocks,
links or blocks: the caller measures layers and steps, live or simulated.

Two costs are measured, not assumed. `missed_ns` is what a demand fetch makes compute wait on
average, with all that its time on the link leaves out; that is what a prefetch saves. `start_ns` is
what each fetch, in time or not, adds to the compute of its own device (software that starts and
books it, on the same cores): the slope of a line through compute and fetches of layers. A
prefetch in vain costs that in any case. Only layers of decode steps are looked at: a prefill
fetches much and computes much, and neither is why of the other.

Invariants: same samples, same bar; nothing measured is negative. Threads may race, which loses a
sample and nothing else.
"""

from __future__ import annotations

from hotset.policies.choose import prefetch_bar
from hotset.policies.trial import PrefetchTrial

NEVER = 1e9  # no chance of use reaches this
_GAIN = 0.05
_SLOW_GAIN = 0.005
"""The line and the ratio of two sums need more samples than a mean does: layers differ more than
fetches cost, and where few blocks are missed the newest layers say nothing about a miss."""
_LINE_SAMPLES = 64
_CLIP = 8.0
"""A layer of this many times the mean was interrupted, and counts as no more than that."""


class LinkLoad:
    """Moving averages over layers, and the trial of prefetching."""

    def __init__(self) -> None:
        """Start as if idle."""
        self.layer_ns = 0.0
        self.stall_ns = 0.0
        self.fetches = 0.0
        self.trial = PrefetchTrial()
        self._line = _Line()
        self._waited = _Mean()
        self._missed = _Mean()

    @property
    def start_ns(self) -> int:
        """What a fetch adds to compute; 0 until enough layers were seen."""
        return int(self._line.slope)

    @property
    def missed_ns(self) -> int | None:
        """What a demand fetch makes compute wait; None until there was one."""
        return int(self._waited.value / self._missed.value) if self._missed.value > 0.0 else None

    def observe(
        self, *, layer_ns: int, stall_ns: int, fetches: int, started: int, tokens: int = 1
    ) -> None:
        """One layer took `layer_ns` for `tokens`, `stall_ns` of it waiting.

        It asked for `fetches` and started as many transfers as `started`, prefetches included.
        """
        if tokens != 1:
            return
        if self.layer_ns:
            layer_ns = min(layer_ns, int(_CLIP * self.layer_ns))
            stall_ns = min(stall_ns, layer_ns)
        self.layer_ns += _GAIN * (layer_ns - self.layer_ns)
        self.stall_ns += _GAIN * (stall_ns - self.stall_ns)
        self.fetches += _GAIN * (fetches - self.fetches)
        self._waited.observe(stall_ns)
        self._missed.observe(fetches)
        self._line.observe(started, value=layer_ns - stall_ns)

    def step(self, *, step_ns: int, tokens: int) -> None:
        """One forward pass has ended; only decode steps are alike enough to compare."""
        if tokens == 1:
            self.trial.observe(step_ns)

    def bar(self, *, fetch_ns: int) -> float:
        """Least chance of use at which a prefetch pays."""
        if not self.trial.on:
            return NEVER
        if self.layer_ns <= 0:
            return 0.0
        return prefetch_bar(
            fetch_ns=fetch_ns,
            ahead_ns=int(max(0.0, self.layer_ns - self.stall_ns)),
            busy_ratio=min(1.0, self.fetches * fetch_ns / self.layer_ns),
            start_ns=self.start_ns,
            missed_ns=self.missed_ns,
        )


class _Mean:
    """Of samples that fade slowly."""

    def __init__(self) -> None:
        self._samples = 0
        self.value = 0.0

    def observe(self, sample: float) -> None:
        self._samples += 1
        self.value += max(_SLOW_GAIN, 1.0 / self._samples) * (sample - self.value)


class _Line:
    """Slope of value over count, least squares over samples that fade."""

    def __init__(self) -> None:
        self._samples = 0
        self._count = self._value = self._spread = self._product = 0.0

    def observe(self, count: int, *, value: float) -> None:
        self._samples += 1
        gain = max(_SLOW_GAIN, 1.0 / self._samples)
        count_off, value_off = count - self._count, value - self._value
        self._count += gain * count_off
        self._value += gain * value_off
        self._spread += gain * ((1.0 - gain) * count_off * count_off - self._spread)
        self._product += gain * ((1.0 - gain) * count_off * value_off - self._product)

    @property
    def slope(self) -> float:
        if self._samples < _LINE_SAMPLES or self._spread <= 0.0:
            return 0.0
        return max(0.0, self._product / self._spread)
