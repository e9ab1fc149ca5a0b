"""How popular each block is: aged counts of routed tokens, in integers.

Decides nothing. Must not know time: ageing follows tokens, so an idle cluster forgets nothing.
Integer arithmetic makes replay exact on every machine. Invariant: counts are never negative and
stay below 2**46, so that ageing cannot overflow.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

_STEPS = 8
"""Ageing steps in one half-life."""
_FADE = 60_097
"""2 ** (-1 / 8) in units of 2 ** -16."""
ONE = 1 << 10
"""One token; the fraction keeps rare experts apart while they fade."""
_MOST = 1 << 46


class Popularity:
    """Aged tokens by block, `counts` int64 [blocks] in units of 1 / 1024 token."""

    def __init__(self, size: int, *, half_life_tokens: int) -> None:
        """Start with no knowledge: all zero."""
        self.counts: NDArray[np.int64] = np.zeros(size, dtype=np.int64)
        self._step_tokens = max(1, half_life_tokens // _STEPS)
        self._tokens = 0

    def add(self, index: NDArray[np.intp], *, tokens: NDArray[np.int64], passed: int) -> None:
        """Count `tokens` for the blocks at `index`, then age by the `passed` tokens."""
        np.add.at(self.counts, index, np.clip(tokens, 0, 1 << 35) * ONE)
        np.minimum(self.counts, _MOST, out=self.counts)
        self._tokens += max(0, passed)
        steps, self._tokens = divmod(self._tokens, self._step_tokens)
        whole, rest = divmod(steps, _STEPS)
        self.counts >>= min(whole, 62)
        for _ in range(rest):
            self.counts = (self.counts * _FADE) >> 16

    @property
    def known(self) -> bool:
        """Whether anything has been counted yet."""
        return bool(self.counts.any())
