"""Paired divergences and what can be said of them: mean, error bars, tail, flips.

Decides how uncertainty is stated: a bootstrap over text windows (Efron), since tokens of a window
share their text and are not independent. Must not know models.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Floats = NDArray[np.float64]
    Flags = NDArray[np.bool_]

RESAMPLES = 1000
_LOW, _HIGH = 5.0, 95.0  # per cent, one-sided each


@dataclass(frozen=True, slots=True, kw_only=True)
class Spread:
    """A mean with its standard error and one-sided 95 % bounds."""

    mean: float
    stderr: float
    lower: float
    upper: float


@dataclass(frozen=True, slots=True, kw_only=True)
class KLSummary:
    """Divergence of a mix from full precision over some text; nats a token."""

    mean: float
    stderr: float
    lower: float
    upper: float
    p99: float
    flip_ratio: float
    tokens: int
    windows: int


@dataclass(frozen=True, slots=True, kw_only=True)
class PairedKL:
    """Divergence `kl` [W, T] in nats and changed top-1 choices `flips` [W, T] of every token."""

    kl: Floats
    flips: Flags

    @property
    def by_window(self) -> Floats:
        """Mean of each window [W]."""
        means: Floats = self.kl.mean(axis=1)
        return means

    def join(self, other: PairedKL) -> PairedKL:
        """Both texts together."""
        return PairedKL(
            kl=np.concatenate([self.kl, other.kl]), flips=np.concatenate([self.flips, other.flips])
        )

    def summary(self, *, seed: int = 0) -> KLSummary:
        """Mean with error bars by bootstrap over windows, p99 over tokens, flips."""
        spread = bootstrap(self.by_window, seed=seed)
        return KLSummary(
            mean=spread.mean,
            stderr=spread.stderr,
            lower=spread.lower,
            upper=spread.upper,
            p99=float(np.percentile(self.kl, 99)),
            flip_ratio=float(self.flips.mean()),
            tokens=int(self.kl.size),
            windows=int(self.kl.shape[0]),
        )


def bootstrap(values: Any, *, seed: int = 0, resamples: int = RESAMPLES) -> Spread:
    """Spread of the mean of `values` [W] when windows are drawn again with replacement.

    Raises ValueError without values. One value has no spread: its bounds are infinite.
    """
    sample = np.asarray(values, dtype=np.float64).ravel()
    if sample.size == 0:
        raise ValueError("values is empty; measure at least one window")
    mean = float(sample.mean())
    if sample.size == 1:
        return Spread(mean=mean, stderr=np.inf, lower=-np.inf, upper=np.inf)
    random = np.random.default_rng(seed)
    drawn = sample[random.integers(sample.size, size=(resamples, sample.size))].mean(axis=1)
    low, high = np.percentile(drawn, [_LOW, _HIGH])
    return Spread(mean=mean, stderr=float(drawn.std()), lower=float(low), upper=float(high))


def rank_correlation(one: Any, other: Any) -> float:
    """Spearman's rank correlation of two lists of one length; ties share their mean rank."""
    first, second = (np.asarray(values, dtype=np.float64).ravel() for values in (one, other))
    if first.size != second.size or first.size < 2:
        raise ValueError(f"one and other must be of one length, not {first.size}, {second.size}")
    ranks = [_ranks(values) for values in (first, second)]
    spread = [values.std() for values in ranks]
    if min(spread) == 0:
        return 0.0
    away = [values - values.mean() for values in ranks]
    return float((away[0] * away[1]).mean() / (spread[0] * spread[1]))


def _ranks(values: Floats) -> Floats:
    _, places, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    ranks: Floats = (last - (counts - 1) / 2)[places]
    return ranks
