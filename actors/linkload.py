"""How busy demand keeps a worker's links, from what its layers saw; says when a prefetch pays."""

from __future__ import annotations

from hotset.policies.choose import prefetch_bar
from hotset.policies.trial import PrefetchTrial

NEVER = 1e9  # no chance of use reaches this


class LinkLoad:
    """How busy demand keeps the link, from what the layers saw.

    Moving averages over layers; threads may race, which loses a sample and nothing else.
    """

    _GAIN = 0.05

    def __init__(self) -> None:
        """Start as if idle."""
        self.layer_ns = 0.0
        self.stall_ns = 0.0
        self.fetches = 0.0
        self.trial = PrefetchTrial()

    def observe(self, *, layer_ns: int, stall_ns: int, fetches: int) -> None:
        """One layer of one step took `layer_ns`, `stall_ns` of it waiting, for some fetches."""
        self.layer_ns += self._GAIN * (layer_ns - self.layer_ns)
        self.stall_ns += self._GAIN * (stall_ns - self.stall_ns)
        self.fetches += self._GAIN * (fetches - self.fetches)

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
        )
