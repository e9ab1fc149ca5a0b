"""Popularity whose half-life is learnt: three memories, and the one that has predicted best counts.

Decides how fast the brain forgets, nothing else. Must not know time or stores. Each memory ages
with a half-life of its own (a ladder around the one configured); every so many tokens each is
judged by how well its shares predicted the tokens that came since (Brier score, aged), as experts
are weighed in prediction with expert advice (Cesa-Bianchi and Lugosi 2006), here by following the
leader with hysteresis. A steady load makes the long memory win, a shifting one the short.

Integers throughout, so that a replay is exact on every machine. Invariant: the leader changes only
after another memory was better by a margin in `_WINS` judgements running.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from hotset.policies.popularity import ONE, Popularity

if TYPE_CHECKING:
    from numpy.typing import NDArray

_LADDER = (0.125, 1.0, 8.0)
"""Half-lives, in those that are configured."""
_SHORTEST = 8
_WINS = 4
_MARGIN = 128
"""One part in this many by which a memory must be better."""
_FADE = 8
"""One part in this many of the aged loss is forgotten at a judgement."""
_BITS = 30
"""Shares are compared in units of 2 ** -30, so that a sum of squares stays below 2 ** 60."""


class LearntPopularity:
    """As `Popularity`, over several half-lives."""

    def __init__(self, size: int, *, half_life_tokens: int) -> None:
        """Start with no knowledge, believing in the half-life that is given."""
        lives = [max(_SHORTEST, int(half_life_tokens * part)) for part in _LADDER]
        self._memories = [Popularity(size, half_life_tokens=life) for life in lives]
        self._lives = lives
        self._losses = [0] * len(lives)
        self._leader = 1
        self._rival = 1
        self._wins = 0
        self._fresh: NDArray[np.int64] = np.zeros(size, dtype=np.int64)
        self._tokens = 0
        self._judge_tokens = max(1, half_life_tokens // 8)

    @property
    def half_life_tokens(self) -> int:
        """The half-life that is believed in now."""
        return self._lives[self._leader]

    @property
    def counts(self) -> NDArray[np.int64]:
        """Aged tokens by block, int64 [blocks] in units of 1 / 1024 token."""
        return self._memories[self._leader].counts + self._fresh * ONE

    @property
    def known(self) -> bool:
        """Whether anything has been counted yet."""
        return bool(self._fresh.any()) or self._memories[self._leader].known

    def add(self, index: NDArray[np.intp], *, tokens: NDArray[np.int64], passed: int) -> None:
        """Count `tokens` for the blocks at `index`; memories age by the `passed` tokens."""
        np.add.at(self._fresh, index, np.clip(tokens, 0, 1 << 35))
        np.minimum(self._fresh, 1 << 35, out=self._fresh)
        self._tokens += max(0, passed)
        if self._tokens >= self._judge_tokens:
            self._judge()
            self._remember()

    def _judge(self) -> None:
        truth = _shares(self._fresh)
        if truth is None:
            return
        fresh = []
        for memory in self._memories:
            guess = _shares(memory.counts)
            if guess is None:
                return  # nothing was known, so nothing was predicted
            fresh.append(int(np.square(guess - truth).sum()) >> _BITS)
        pairs = zip(self._losses, fresh, strict=True)
        self._losses = [old - old // _FADE + new for old, new in pairs]
        best = min(range(len(fresh)), key=lambda at: (self._losses[at], at))
        better = self._losses[best] * (_MARGIN + 1) < self._losses[self._leader] * _MARGIN
        if not better or best != self._rival:
            self._wins = 0
        self._rival = best
        self._wins += better
        if self._wins >= _WINS:
            self._leader, self._wins = best, 0

    def _remember(self) -> None:
        where = np.flatnonzero(self._fresh)
        for memory in self._memories:
            memory.add(where, tokens=self._fresh[where], passed=self._tokens)
        self._fresh[:] = 0
        self._tokens = 0


def _shares(counts: NDArray[np.int64]) -> NDArray[np.int64] | None:
    """Return each block's share in units of 2 ** -30; None when there is nothing to share."""
    top = int(counts.max(initial=0))
    if not top:
        return None
    small = counts >> max(0, top.bit_length() - _BITS)
    shares: NDArray[np.int64] = (small << _BITS) // max(1, int(small.sum()))
    return shares
