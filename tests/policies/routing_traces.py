"""Seeded synthetic routing: local, skewed and with structure between layers, like recorded one."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray


def markov_trace(seed: int, *, tokens: int, layers: int, experts: int, k: int) -> NDArray[np.int64]:
    """Topics drift slowly; the expert of a layer mostly follows from the one before."""
    rng = np.random.default_rng(seed)
    follows = rng.permuted(np.tile(np.arange(experts), (layers, 1)), axis=1)
    likes = rng.dirichlet(np.full(experts, 0.15), size=8)
    trace = np.empty((tokens, layers, k), dtype=np.int64)
    topic = 0
    for token in range(tokens):
        if rng.random() < 0.02:
            topic = int(rng.integers(8))
        before = rng.choice(
            experts, size=k, replace=False, p=(likes[topic] + 0.002) / (1 + 0.002 * experts)
        )
        for layer in range(layers):
            now = follows[layer][before]
            noise = rng.random(k) < 0.2
            fresh = rng.choice(experts, size=k, replace=False)
            now = np.where(noise & ~np.isin(fresh, now), fresh, now)
            trace[token, layer] = now
            before = now
    return trace


def sequences(tokens: int, *, length: int) -> NDArray[np.int64]:
    """Sequence of each token: `length` tokens each."""
    return np.arange(tokens) // length
