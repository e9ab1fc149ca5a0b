"""What a visit of a layer computes, in one call: compiled where numba is installed.

Decides nothing: arithmetic of `foresight` (estimates and learning) and of `adaptive` (values of
copies, candidates for a prefetch) on their arrays. Must not know what these mean to anybody else.

Each function has a twin in plain NumPy (`..._numpy`), which is used without numba: the same
operations on float32 in the same order, exponentials included, so that decisions are the same.
`tests/policies/test_foresight_kernels.py` holds them against each other. A visit's NumPy form takes
a dozen calls, most of whose time is not arithmetic.
"""

# ruff: noqa: PLR0913, PLR0917 - numba has no keyword-only arguments, and a call that hands over
# objects costs more than the loops

from __future__ import annotations

import math
from functools import cache
from typing import TYPE_CHECKING

import numpy as np

from hotset.policies.jit import COMPILED, compiled

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Floats = NDArray[np.float32]
    Ints = NDArray[np.int64]
    Bools = NDArray[np.bool_]

TOP = np.float32(15.0)
"""Largest log-odds: a certainty of 3e-7 off one, and no overflow."""
_BOTTOM = np.float32(-60.0)
_LOG2_E = np.float32(1.44269504)
_LN2_HIGH = np.float32(0.693359375)
_LN2_LOW = np.float32(-2.12194440e-4)
_C0, _C1 = np.float32(1.9875691500e-4), np.float32(1.3981999507e-3)
_C2, _C3 = np.float32(8.3334519073e-3), np.float32(4.1665795894e-2)
_C4, _C5 = np.float32(1.6666665459e-1), np.float32(5.0000001201e-1)
_ONE, _HALF = np.float32(1.0), np.float32(0.5)
_OFFSET = 96
_POWERS = (2.0 ** np.arange(-_OFFSET, 32)).astype(np.float32)
_FAR_SHARE = np.float32(1.0 / 24.0)
_POPULAR_SHARE = np.float32(1.0 / 240.0)


@compiled
def exp32(value: np.float32) -> np.float32:
    """Cephes' expf by Moshier, of a value between -60 and 15: the same bits in both forms."""
    value = min(max(value, _BOTTOM), TOP)
    power = math.floor(value * _LOG2_E + _HALF)
    whole = np.float32(power)
    rest = value - whole * _LN2_HIGH - whole * _LN2_LOW
    poly = ((((_C0 * rest + _C1) * rest + _C2) * rest + _C3) * rest + _C4) * rest + _C5
    found: np.float32 = (poly * rest * rest + rest + _ONE) * _POWERS[int(power) + _OFFSET]
    return found


def exp32_numpy(values: Floats) -> Floats:
    """As `exp32`, of an array."""
    clipped = np.minimum(np.maximum(values, _BOTTOM), TOP)
    whole = np.floor(clipped * _LOG2_E + _HALF)
    rest = clipped - whole * _LN2_HIGH - whole * _LN2_LOW
    poly = ((((_C0 * rest + _C1) * rest + _C2) * rest + _C3) * rest + _C4) * rest + _C5
    found: Floats = (poly * rest * rest + rest + _ONE) * _POWERS[whole.astype(np.intp) + _OFFSET]
    return found


@compiled
def _visit(
    weights: Floats, base: Floats, logits: Floats, stages: Floats, odds: Floats, now: Ints,
    row: int, width: int, scale: np.float32,
) -> None:  # fmt: skip
    """Refine the estimates in sight of a row by the experts used there; see `StagedPredictor`.

    `weights` [L, E, W], `base` [L, E], `logits` [(L + depth) * E], `stages` [L, W]; odds go to
    `odds` [W]. The first `width` columns are computed.
    """
    rows, size = base.shape
    first = row * size
    for place in range(size):
        logits[first + place] = base[row, place]
    for column in range(width):
        odds[column] = weights[row, now[0], column] if len(now) else np.float32(0.0)
    for at in range(1, len(now)):
        expert = now[at]
        for column in range(width):
            odds[column] += weights[row, expert, column]
    for column in range(width):
        logits[first + column] += odds[column] * scale
    if row * size < width - size:
        for place in range(size):
            logits[(rows + row) * size + place] = logits[first + place]
    for column in range(width):
        estimate = logits[first + column]
        stages[row, column] = estimate
        odds[column] = exp32(estimate)


def _visit_numpy(
    weights: Floats, base: Floats, logits: Floats, stages: Floats, odds: Floats, now: Ints,
    row: int, width: int, scale: np.float32,
) -> None:  # fmt: skip
    rows, size = base.shape
    first = row * size
    logits[first : first + size] = base[row]
    estimate = logits[first : first + width]
    estimate += np.add.reduce(weights[row, now, :width], axis=0) * scale
    if row * size < width - size:
        logits[(rows + row) * size : (rows + row + 1) * size] = estimate[:size]
    stages[row, :width] = estimate
    odds[:width] = exp32_numpy(estimate)


visit = _visit if COMPILED else _visit_numpy


@compiled
def _revalue(
    odds: Floats, others: Floats, far: Floats, value: Floats, held: Floats, rank: Floats,
    row: int, size: int, far_weight: np.float32,
) -> None:  # fmt: skip
    """Give every copy of the rows in sight its new value; see `adaptive`.

    `others` [E] or empty: far odds of other requests, weighted. The other arrays are by flat index.
    """
    total = len(far)
    first = row * size
    for place in range(size):
        own = odds[place] * far_weight
        odds[place] = own
        far[first + place] = own + others[place] if len(others) else own
    end = first + len(odds)
    for flat in range(first, min(end, total)):
        worth = far[flat] + odds[flat - first]
        value[flat] = worth
        rank[flat] = worth * held[flat]
    for flat in range(end - total):
        worth = far[flat] + odds[flat + total - first]
        value[flat] = worth
        rank[flat] = worth * held[flat]


def _revalue_numpy(
    odds: Floats, others: Floats, far: Floats, value: Floats, held: Floats, rank: Floats,
    row: int, size: int, far_weight: np.float32,
) -> None:  # fmt: skip
    first = row * size
    own = odds[:size]
    own *= far_weight
    far[first : first + size] = own + others if len(others) else own
    flat = np.arange(first, first + len(odds)) % len(far)
    value[flat] = far[flat] + odds
    rank[flat] = value[flat] * held[flat]


@compiled
def _candidates(
    odds: Floats, absent: Bools, found: Ints, row: int, size: int, ahead: int, most: int,
    bar: np.float32,
) -> int:  # fmt: skip
    """Write the absent blocks whose odds beat the bar to `found`, likeliest first; say how many.

    Of the next `ahead` rows; no row is looked at once `most` were found, and no more are written.
    """
    count = 0
    total = len(absent)
    for distance in range(1, ahead + 1):
        if count >= most:
            break
        for column in range(distance * size, (distance + 1) * size):
            chance = odds[column]
            if not (chance > bar and absent[(row * size + column) % total]):
                continue
            at = count
            if count < most:
                count += 1
            else:
                at = most - 1
                if odds[found[at]] >= chance:
                    continue
            while at > 0 and odds[found[at - 1]] < chance:
                found[at] = found[at - 1]
                at -= 1
            found[at] = column
    for at in range(count):
        found[at] = (row * size + found[at]) % total
    return count


def _candidates_numpy(
    odds: Floats, absent: Bools, found: Ints, row: int, size: int, ahead: int, most: int,
    bar: np.float32,
) -> int:  # fmt: skip
    columns = np.empty(0, dtype=np.int64)
    for distance in range(1, ahead + 1):
        if len(columns) >= most:
            break
        first = (row + distance) * size % len(absent)
        mask = odds[distance * size : (distance + 1) * size] > bar
        here = (mask & absent[first : first + size]).nonzero()[0]
        columns = np.concatenate([columns, here + distance * size])
    best = columns[np.argsort(-odds[columns], kind="stable")[:most]]
    found[: len(best)] = (row * size + best) % len(absent)
    return len(best)


@compiled
def _foresee(
    weights: Floats, base: Floats, logits: Floats, stages: Floats, odds: Floats, now: Ints,
    others: Floats, far: Floats, value: Floats, held: Floats, rank: Floats, absent: Bools,
    found: Ints, row: int, scale: np.float32, far_weight: np.float32, ahead: int, most: int,
    bar: np.float32,
) -> int:  # fmt: skip
    """`visit`, `revalue` and `candidates` in one call."""
    size = base.shape[1]
    _visit(weights, base, logits, stages, odds, now, row, len(odds), scale)
    _revalue(odds, others, far, value, held, rank, row, size, far_weight)
    return _candidates(odds, absent, found, row, size, ahead, most, bar)


def _foresee_numpy(
    weights: Floats, base: Floats, logits: Floats, stages: Floats, odds: Floats, now: Ints,
    others: Floats, far: Floats, value: Floats, held: Floats, rank: Floats, absent: Bools,
    found: Ints, row: int, scale: np.float32, far_weight: np.float32, ahead: int, most: int,
    bar: np.float32,
) -> int:  # fmt: skip
    size = base.shape[1]
    _visit_numpy(weights, base, logits, stages, odds, now, row, len(odds), scale)
    _revalue_numpy(odds, others, far, value, held, rank, row, size, far_weight)
    return _candidates_numpy(odds, absent, found, row, size, ahead, most, bar)


foresee = _foresee if COMPILED else _foresee_numpy


@compiled
def _learn(
    weights: Floats, bias: Floats, share: Floats, popular: Floats, seen: Floats, truth: Floats,
    places: Ints, scale: Floats, rate: np.float32,
) -> None:  # fmt: skip
    """One step down the log-loss of every stage of every row; see `StagedPredictor`.

    `seen` [L, W] are the estimates made in the pass before, `truth` [2, L, E] that pass and this
    one, `places` the flat indices of the experts then used, by row, `scale` [L].
    """
    rows, size = bias.shape
    width = seen.shape[1]
    follow = truth.reshape(-1)
    wrong = np.empty(width, np.float32)
    at = 0
    for row in range(rows):
        for column in range(width):
            hit = truth[1, row, column] if column < size else follow[row * size + column]
            wrong[column] = hit + -_ONE / (exp32(min(-seen[row, column], TOP)) + _ONE)
        for place in range(size):
            bias[row, place] += rate * _FAR_SHARE * wrong[place]
        for kind in range(len(share)):
            gain = 0.0
            for place in range(size):
                gain += popular[kind, row, place] * wrong[place]
            share[kind, row, 0] += rate * _POPULAR_SHARE * np.float32(gain)
        step = scale[row] * rate
        for column in range(width):
            wrong[column] *= step
        while at < len(places) and places[at] < (row + 1) * size:
            expert = places[at] - row * size
            for column in range(width):
                weights[row, expert, column] += wrong[column]
            at += 1


def _learn_numpy(
    weights: Floats, bias: Floats, share: Floats, popular: Floats, seen: Floats, truth: Floats,
    places: Ints, scale: Floats, rate: np.float32,
) -> None:  # fmt: skip
    rows, size = bias.shape
    width = seen.shape[1]
    wrong = -_ONE / (exp32_numpy(np.minimum(-seen, TOP)) + _ONE)
    wrong[:, :size] += truth[1]
    if width > size:
        # Row r is followed by r + 1, r + 2, ...: windows of one array in memory.
        follow = np.lib.stride_tricks.sliding_window_view(truth.reshape(-1), width - size)
        wrong[:, size:] += follow[size : (rows + 1) * size : size]
    bias += rate * _FAR_SHARE * wrong[:, :size]
    gain = (popular * wrong[:, :size]).sum(axis=2, keepdims=True, dtype=np.float64)
    share += rate * _POPULAR_SHARE * gain.astype(np.float32)
    wrong *= (scale * rate)[:, None]
    weights.reshape(rows * size, width)[places] += wrong.take(places // size, axis=0)


learn = _learn if COMPILED else _learn_numpy


@cache
def warm() -> None:
    """Compile or load everything, once, so that no request waits for it."""
    rows, size, width = 2, 2, 4
    weights = np.zeros((rows, size, width), dtype=np.float32)
    table = np.zeros((rows, size), dtype=np.float32)
    logits = np.zeros((rows + 1) * size, dtype=np.float32)
    seen = np.zeros((rows, width), dtype=np.float32)
    odds = np.zeros(width, dtype=np.float32)
    flat = np.zeros(rows * size, dtype=np.float32)
    absent, found = np.zeros(rows * size, dtype=np.bool_), np.zeros(rows * size, dtype=np.int64)
    now, scale = np.zeros(1, dtype=np.int64), np.float32(1.0)
    visit(weights, table, logits, seen, odds, now, 0, width, scale)
    foresee(
        weights, table, logits, seen, odds, now, odds[:0], flat, flat, flat, flat, absent, found, 0,
        scale, scale, 1, 1, scale,
    )  # fmt: skip
    share, popular = np.zeros((2, rows, 1), np.float32), np.zeros((2, rows, size), np.float32)
    truth = np.zeros((2, rows, size), dtype=np.float32)
    learn(weights, table, share, popular, seen, truth, now, np.ones(rows, np.float32), scale)
