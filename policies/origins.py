"""Which worker's requests ask for which block: aged tokens by worker, beside total popularity.

Decides nothing. Must not know time, copies or plans. All workers age by the same count, the tokens
that all of them together computed, so that an idle worker's load fades against a busy one's.

Invariants: counts are never negative; the same calls give the same counts (integers only); tokens
that have not been folded in are not seen.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from hotset.policies.popularity import Popularity

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

_MOST = 1 << 35
_NONE = np.zeros(0, dtype=np.intp)


class Origins:
    """Aged tokens [blocks] of each worker's own requests, in units of 1 / 1024 token."""

    def __init__(self, size: int, *, half_life_tokens: int) -> None:
        """Start with no knowledge."""
        self._size = size
        self._half_life = half_life_tokens
        self._aged: dict[str, Popularity] = {}
        self._fresh: dict[str, NDArray[np.int64]] = {}
        self._passed = 0

    @property
    def fresh_tokens(self) -> int:
        """Tokens computed since the last `fold`."""
        return self._passed

    def add(
        self, store: str, index: NDArray[np.intp], *, tokens: NDArray[np.int64], passed: int
    ) -> None:
        """Count `tokens` for the blocks at `index`, of requests of `store`."""
        fresh = self._fresh.get(store)
        if fresh is None:
            fresh = self._fresh[store] = np.zeros(self._size, dtype=np.int64)
        np.add.at(fresh, index, np.clip(tokens, 0, _MOST))
        np.minimum(fresh, _MOST, out=fresh)
        self._passed += max(0, passed)

    def fold(self) -> None:
        """Age by the tokens since the last call, then take in what was counted, at full weight."""
        for store in sorted({*self._aged, *self._fresh}):
            memory = self._aged.get(store)
            if memory is None:
                memory = Popularity(self._size, half_life_tokens=self._half_life)
                self._aged[store] = memory
            memory.add(_NONE, tokens=_NONE, passed=self._passed)
            fresh = self._fresh.get(store)
            if fresh is not None:
                where = np.flatnonzero(fresh)
                memory.add(where, tokens=fresh[where], passed=0)
        self._fresh.clear()
        self._passed = 0

    def of(self, stores: Sequence[str]) -> NDArray[np.int64]:
        """Return aged tokens [stores, blocks]; zero for a store that has counted nothing."""
        none = np.zeros(self._size, dtype=np.int64)
        rows = [self._aged[name].counts if name in self._aged else none for name in stores]
        return np.stack(rows) if rows else np.zeros((0, self._size), dtype=np.int64)

    def forget(self, store: str) -> None:
        """The store is gone."""
        self._aged.pop(store, None)
        self._fresh.pop(store, None)
