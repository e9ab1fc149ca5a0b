"""How many loads are allowed: a share of what plain LRU would load on the same requests.

Decides a bar of odds for prefetches, nothing else. A prefetch that nobody uses costs bytes that
others could have used, so loads are kept at `ratio` times those of LRU. LRU is not run but
shadowed: a list of names by recency for some of the rows (at least eight, where there are as
many), with the slots that a row would get if LRU split the device evenly. Must not know links or
clocks.

Invariants: the bar lies between its bounds; LRU's loads are estimated, so the ratio holds on
average and not at each step.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

_SAMPLED_ROWS = 8
_GAIN = 0.002
"""Growth of the bar's logarithm for each load too many."""
_LOWEST, _HIGHEST = 0.02, 50.0
"""Bounds of the bar, in odds."""
_MEMORY = 0.02
"""Weight of the newest sample in the estimate of LRU's loads."""


class LoadBudget:
    """A bar of odds that keeps loads at `ratio` times those of a shadowed LRU."""

    def __init__(self, *, rows: int, slots: int, ratio: float) -> None:
        """`slots` are those of the whole device."""
        self.ratio = ratio
        self.bar = 0.25
        self._slots = max(1, -(-slots // rows))  # rounded up: rather too few loads than too many
        every = max(1, rows // _SAMPLED_ROWS)
        self._recent: list[dict[int, None] | None] = [
            {} if row % every == every // 2 else None for row in range(rows)
        ]
        self._lru_loads = 0.0

    def routed(self, row: int, experts: Sequence[int]) -> None:
        """Let the shadowed LRU serve these experts, the resident ones first."""
        recent = self._recent[row]
        if recent is None:
            return
        absent: list[int] = []
        for expert in experts:
            if recent.pop(expert, absent) is None:
                recent[expert] = None
            else:
                absent.append(expert)
        if absent:
            for expert in absent:
                recent[expert] = None
            for _ in range(len(recent) - self._slots):
                del recent[next(iter(recent))]
        self._lru_loads += _MEMORY * (len(absent) - self._lru_loads)

    def loaded(self, count: int) -> None:
        """`count` loads were started for one layer of one step: move the bar."""
        bar = self.bar * (1.0 + _GAIN * (count - self.ratio * self._lru_loads))
        if bar < _LOWEST:
            bar = _LOWEST
        elif bar > _HIGHEST:
            bar = _HIGHEST
        self.bar = bar
