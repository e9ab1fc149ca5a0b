"""Which experts the layers ahead will use, learnt from transitions between layers.

Decides nothing: it estimates probabilities. Must not know what is resident. Layers are cyclic:
the layer after the last one is the first one of the next token.

Counts age by a growing increment instead of a decaying table, so learning touches only the
entries seen: k x k for each distance, and ageing costs nothing until the increment is large.
Invariant: probabilities lie in 0..1.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

_RESCALE_AT = np.float32(1e12)


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
        self._counts = np.zeros((depth, rows, num_experts * num_experts), dtype=np.float32)
        self._seen = np.full((depth, rows, num_experts), 1e-6, dtype=np.float32)
        self._weight = 1.0
        self._growth = 2.0 ** (1.0 / (half_life_steps * rows))

    def observe(
        self, row: int, *, distance: int, before: NDArray[np.intp], now: NDArray[np.intp]
    ) -> None:
        """Learn that `before` at row - distance was followed by `now` at `row`."""
        source = (row - distance) % self._rows
        cells = (before[:, None] * self._size + now).ravel()
        self._counts[distance - 1, source][cells] += self._weight
        self._seen[distance - 1, source][before] += self._weight
        if distance == 1:
            self._weight *= self._growth
            if self._weight > _RESCALE_AT:
                self._counts /= self._weight
                self._seen = np.maximum(self._seen / self._weight, np.float32(1e-6))
                self._weight = 1.0

    def predict(self, row: int, *, distance: int, experts: NDArray[np.intp]) -> NDArray[np.float32]:
        """Return the expected use [E] at row + distance, given `experts` at `row`.

        The mean over the experts of P(b | a): summed over b it is about k.
        """
        table = self._counts[distance - 1, row].reshape(self._size, self._size)
        weights = 1.0 / (self._seen[distance - 1, row][experts] * len(experts))
        guess: NDArray[np.float32] = weights @ table[experts]
        return guess

    def top(
        self, row: int, *, distance: int, experts: Sequence[int], limit: int
    ) -> list[tuple[int, float]]:
        """Return the `limit` likeliest experts at row + distance with their probabilities."""
        guess = self.predict(row, distance=distance, experts=np.asarray(experts, dtype=np.intp))
        best = np.argsort(-guess, kind="stable")[:limit]
        return [(int(index), float(guess[index])) for index in best]
