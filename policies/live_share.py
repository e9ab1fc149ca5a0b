"""How much of a worker's time the live check may take, and when it has to wait.

Decides whether a recomputation may begin, whether one that runs has to pause, and whether a step's
distribution is worth keeping for it. Must not know clocks, models or threads: times are given.

A recomputation begins once all before it are paid for: what was spent is at most `ratio` of the
time that steps took. So one that costs more than its share is followed by a longer wait, and the
share holds in the long run whatever a recomputation costs. The first may begin at once, since a
wrong table has to be noticed soon.

Under load the check waits, `patience_ns` at most: a guardrail that load can blind is none.

Invariants: spent <= ratio x served + one recomputation; never more than `most_kept` distributions.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class ShareBounds:
    """Bounds of the live check at one worker.

    `ratio` is its share of the time that steps take. `least` pairs make a recomputation worth its
    price, fewer only when the request has ended. Load is more than `busy_requests` at once, or a
    block that waits in line for a slot.
    """

    ratio: float = 0.02
    least: int = 16
    most_kept: int = 256
    most_context: int = 4096
    busy_requests: int = 4
    patience_ns: int = 30_000_000_000

    def __post_init__(self) -> None:
        """Refuse values that mean nothing, with the field's name."""
        if not 0 < self.ratio <= 1:
            raise ValueError(f"ratio must be in (0, 1], not {self.ratio}")
        if not 1 <= self.least <= self.most_kept:
            raise ValueError(
                f"least must be from 1 to most_kept ({self.most_kept}), not {self.least}"
            )
        if self.most_context < 1 or self.busy_requests < 1 or self.patience_ns < 0:
            raise ValueError("most_context, busy_requests must be positive, patience_ns not less")


class LiveShare:
    """The account of one worker: time served, time spent on checking."""

    def __init__(self, bounds: ShareBounds | None = None) -> None:
        """Start with nothing served and nothing spent."""
        self.bounds = bounds or ShareBounds()
        self.served_ns = 0
        self.spent_ns = 0
        self._loaded_since_ns: int | None = None

    @property
    def ratio(self) -> float:
        """Share that checking took so far."""
        return self.spent_ns / self.served_ns if self.served_ns else 0.0

    def served(self, step_ns: int) -> None:
        """Take in the time of one step of a request."""
        self.served_ns += max(0, step_ns)

    def spent(self, check_ns: int) -> None:
        """Take in what a recomputation cost, its waits left out."""
        self.spent_ns += max(0, check_ns)

    def may_begin(self) -> bool:
        """Say whether all recomputations so far are paid for."""
        return self.spent_ns <= self.bounds.ratio * self.served_ns

    def must_wait(self, *, requests: int, waiting: bool, now_ns: int) -> bool:
        """Say whether load makes the check wait: `waiting` when a block stands in line."""
        if requests <= self.bounds.busy_requests and not waiting:
            self._loaded_since_ns = None
            return False
        if self._loaded_since_ns is None:
            self._loaded_since_ns = now_ns
        return now_ns - self._loaded_since_ns < self.bounds.patience_ns

    def keeps(self, *, kept: int, position: int) -> bool:
        """Say whether the distribution after `position` tokens is kept, with `kept` there now."""
        return kept < self.bounds.most_kept and position <= self.bounds.most_context
