"""Which experts the layers ahead will use, learnt from transitions between layers.

Decides nothing: it estimates probabilities. Must not know what is resident. Layers are cyclic:
the layer after the last one is the first one of the next token.

Counts age by a growing increment instead of a decaying table, so learning touches only the
entries seen: k x k for each distance, and ageing costs nothing until the increment is large.
Invariant: probabilities lie in 0..1.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

_RESCALE_AT = 1e12
_NEVER = np.float32(1e-6)


class Visit(NamedTuple):
    """The distinct experts that one request needed at one row."""

    row: int
    experts: NDArray[np.intp]


class TransitionPredictor:
    """Aged counts of expert a at row r followed by expert b at row r + d, for d = 1..depth.

    `counts[d - 1, r]` is [E, E] float32; memory is depth x L x E x E x 4 bytes (16 MB for
    64 x 256 experts at depth 1). A row is a position in the tuple of MoE layers.
    """

    def __init__(
        self, *, rows: int, num_experts: int, depth: int = 1, half_life_steps: float = 4096.0
    ) -> None:
        """`half_life_steps` counts passes over the model."""
        self.depth = depth
        self._rows = rows
        self._size = num_experts
        self._counts = np.zeros((depth, rows, num_experts, num_experts), dtype=np.float32)
        self._seen = np.full((depth, rows, num_experts), _NEVER, dtype=np.float32)
        self._weight = 1.0
        self._growth = 2.0 ** (1.0 / (half_life_steps * rows))
        # Views by distance and row: indexing the whole array costs more than the arithmetic.
        self._table = [[self._counts[d, r] for r in range(rows)] for d in range(depth)]
        self._all_cells = [self._counts[d].reshape(-1) for d in range(depth)]
        self._all_times = [self._seen[d].reshape(-1) for d in range(depth)]
        self._times = [[self._seen[d, r] for r in range(rows)] for d in range(depth)]

    def observe(self, path: Sequence[Visit]) -> None:
        """Learn from consecutive visits of one request: one pass at most, after `depth` old ones.

        The first `depth` visits only lead to later ones: their own causes were learnt before.
        Learning a whole pass in one go costs a tenth of learning layer by layer.
        """
        size = len(path[0].experts) if path else 0
        even = all(len(visit.experts) == size for visit in path)
        if len(path) <= self.depth:
            return
        for distance in range(1, self.depth + 1):
            pairs = list(
                zip(path[self.depth - distance : -distance], path[self.depth :], strict=True)
            )
            # With unequal sizes there is no rectangle to index, so learn pair by pair.
            for batch in [pairs] if even else [[pair] for pair in pairs]:
                self._learn(batch, distance=distance)
        self._weight *= self._growth ** (len(path) - self.depth)
        if self._weight > _RESCALE_AT:
            self._counts /= self._weight
            np.maximum(self._seen / self._weight, _NEVER, out=self._seen)
            self._weight = 1.0

    def _learn(self, pairs: Sequence[tuple[Visit, Visit]], *, distance: int) -> None:
        rows = np.array([before.row for before, _ in pairs], dtype=np.intp)[:, None]
        source = np.array([before.experts for before, _ in pairs]) + rows * self._size
        now = np.array([after.experts for _, after in pairs])
        cells = (source * self._size)[:, :, None] + now[:, None, :]
        self._all_cells[distance - 1][cells] += self._weight
        self._all_times[distance - 1][source] += self._weight

    def predict(
        self, row: int, *, distance: int, experts: NDArray[np.intp], scale: float = 1.0
    ) -> NDArray[np.float32]:
        """Return `scale` times the expected use [E] at row + distance, given `experts` at `row`.

        The mean over the experts of P(b | a): summed over b it is about k.
        """
        weights = (scale / len(experts)) / self._times[distance - 1][row].take(experts)
        guess: NDArray[np.float32] = np.dot(
            weights, self._table[distance - 1][row].take(experts, axis=0)
        )
        return guess

    def top(
        self, row: int, *, distance: int, experts: Sequence[int], limit: int
    ) -> list[tuple[int, float]]:
        """Return the `limit` likeliest experts at row + distance with their probabilities."""
        guess = self.predict(row, distance=distance, experts=np.asarray(experts, dtype=np.intp))
        best = np.argsort(-guess, kind="stable")[:limit]
        return [(int(index), float(guess[index])) for index in best]
