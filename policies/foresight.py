"""How likely each expert of the layers ahead is needed, learnt online in stages.

Decides nothing: it estimates odds. Must not know what is resident, nor what a fetch costs.

A logistic model in stages. When a request passes row r, the first estimate for r's next visit
(one pass later) is made from ageing popularity and from the experts just used at r. Each of the
`depth` rows before that visit then refines it with the experts used there. So there is one
calibrated estimate for every distance, and the nearer the visit, the sharper it is. The sources
are the predictors of the literature, weighed by what they prove worth instead of picked: previous
step (MoE-Infinity, Mixtral-offloading), ageing popularity (LFU with ageing; two half-lives whose
weights are learnt), transitions between layers (EdgeMoE, ExpertFlow), several layers ahead.

Learning is stochastic gradient descent on the log-loss of every stage with a normalised step (as
in the normalised LMS filter of Nagumo and Noda, 1967): n active experts count 1 / sqrt(n) each, so
top-1 and top-8 models, and single requests and batches, learn at one rate. It runs once a pass
over all rows, which costs a tenth of learning layer by layer, and only on passes of the usual
size: a prefill says little about the decode steps that follow.

Rows are positions in the tuple of MoE layers, cyclic: after the last comes the next token's first.
Invariants: odds are positive and finite; same visits, same answers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Floats = NDArray[np.float32]

_HALF_LIVES = (4.0, 64.0)
"""Passes after which a use counts half, of the two popularities whose weights are learnt."""
_RARE = np.float32(0.02)
"""Smallest popularity that is told apart from never."""
_CENTRE = np.float32(2.0)
"""Moves the logarithm of usual popularities to about 0, so that weights and bias do not fight."""
_TOP = np.float32(15.0)
"""Largest log-odds: a certainty of 3e-7 off one, and no overflow."""
_PRIOR_SELF = 1.0
"""Before anything is learnt: an expert that was used is likelier to be used again."""
_PRIOR_POPULARITY = 0.3


class Span(NamedTuple):
    """Rows that lie together: `lo:hi` of arrays by flat index, `at` the place in `odds`."""

    lo: int
    hi: int
    at: int
    views: tuple[slice, slice]  # lo:hi and at:at + hi - lo, made once


class Path:
    """One request's way through the layers: estimates made and experts seen, for two passes."""

    __slots__ = ("clean", "logits", "now", "passes", "row", "scale", "seen")

    def __init__(self, *, rows: int, width: int, base: Floats) -> None:
        """`width` is the number of estimates made at a visit."""
        self.row = -1
        self.clean = False
        self.passes = 0
        self.logits = base.reshape(-1).copy()
        self.seen: list[Floats] = [np.zeros((rows, width), np.float32) for _ in range(2)]
        none = np.empty(0, dtype=np.intp)
        self.now: list[list[NDArray[np.intp]]] = [[none] * rows for _ in range(2)]
        self.scale: list[list[float]] = [[1.0] * rows for _ in range(2)]


class StagedPredictor:
    """Odds of use at the next visit of the row just passed and of the `depth` rows after it.

    Weights are float32 [L, E, (depth + 1) * E]: 4 MB for 16 x 64 experts at depth 3, 178 MB for
    58 x 256 at depth 2.
    """

    def __init__(self, *, rows: int, num_experts: int, depth: int = 3, rate: float = 0.24) -> None:
        """`rate` is the step of learning; a step of 1 would make the last pass certain."""
        self.depth = depth = min(depth, rows - 1)
        self.rows = rows
        self.size = size = num_experts
        self._rate = rate
        width = (depth + 1) * size
        self._weights = np.zeros((rows, size, width), dtype=np.float32)
        diagonal = np.arange(size)
        self._weights[:, diagonal, diagonal] = _PRIOR_SELF
        self._flat = self._weights.reshape(rows * size, width)
        self._of_row = [self._weights[row] for row in range(rows)]
        self._bias = np.full((rows, size), -2.0, dtype=np.float32)
        self._share = np.full((len(_HALF_LIVES), rows, 1), _PRIOR_POPULARITY, dtype=np.float32)
        self._uses = np.zeros((len(_HALF_LIVES), rows, size), dtype=np.float32)
        fade = [2.0 ** (-1.0 / half) for half in _HALF_LIVES]
        self._fade = np.array(fade, dtype=np.float32)[:, None, None]
        self._popular = np.log(self._uses + _RARE) + _CENTRE
        self._base: Floats = np.empty_like(self._bias)
        self._base_of: list[Floats] = []
        self._rebase()
        self.spans = [self._spans(row) for row in range(rows)]
        self._odds = np.empty(width, dtype=np.float32)
        self._truth = np.zeros((2, rows, size), dtype=np.float32)
        self._ids = np.arange(rows, dtype=np.intp) * size

    def _spans(self, row: int) -> tuple[Span, ...]:
        size, rows = self.size, self.rows
        here = min(self.depth + 1, rows - row)
        cuts = [(row * size, (row + here) * size, 0)]
        if here <= self.depth:
            cuts.append((0, (self.depth + 1 - here) * size, here * size))
        return tuple(
            Span(lo, hi, at, (slice(lo, hi), slice(at, at + hi - lo))) for lo, hi, at in cuts
        )

    def begin(self) -> Path:
        """Start a request: its first estimates come from popularity alone."""
        width = (self.depth + 1) * self.size
        return Path(rows=self.rows, width=width, base=self._base)

    def visit(self, path: Path, row: int, now: NDArray[np.intp]) -> Floats:
        """`path`'s request needs the distinct experts `now` at `row`; return odds p / (1 - p).

        Shape [(depth + 1) * E]: of the next visit of `row` itself, then of the rows after it.
        The array is reused by the next call.
        """
        if row != (path.row + 1) % self.rows:
            path.clean = False
            path.passes = 0
        if row == 0:
            path.clean = True
        path.row = row
        count = len(now)
        scale = 1.0 / count**0.5 if count else 1.0
        told = self._of_row[row].take(now, axis=0).sum(axis=0)
        told *= np.float32(scale)
        logits, odds = path.logits, self._odds
        size = self.size
        logits[row * size : (row + 1) * size] = self._base_of[row]
        for span in self.spans[row]:
            there, here = span.views
            estimate = logits[there]
            estimate += told[here]
            odds[here] = estimate
        path.seen[1][row] = odds
        path.now[1][row] = now
        path.scale[1][row] = scale
        np.minimum(odds, _TOP, out=odds)
        return np.exp(odds, out=odds)

    def finish_pass(self, path: Path, *, learn: bool) -> None:
        """`path` has just passed the last row; learn from the pass before, whose truth is known."""
        if path.clean:
            path.passes += 1
            if path.passes >= 2 and learn:
                self._learn(path)
        path.seen.reverse()
        path.now.reverse()
        path.scale.reverse()

    def _learn(self, path: Path) -> None:
        rows, size, depth = self.rows, self.size, self.depth
        truth = self._truth
        truth[:] = 0.0
        places = [
            np.concatenate(visits) + np.repeat(self._ids, [len(visit) for visit in visits])
            for visits in path.now
        ]
        for one, at in zip(truth, places, strict=True):
            one.reshape(-1)[at] = 1.0
        seen = path.seen[0]
        missed = 1.0 / (1.0 + np.exp(-np.clip(seen, -_TOP, _TOP)))
        np.negative(missed, out=missed)
        missed[:, :size] += truth[1]
        # Row r is followed by r + 1, r + 2, ...: windows of one array in memory.
        if depth:
            follow = np.lib.stride_tricks.sliding_window_view(truth.reshape(-1), depth * size)
            missed[:, size:] += follow[size : (rows + 1) * size : size]
        far = missed[:, :size]
        self._bias += np.float32(self._rate / 24.0) * far
        gain = (self._popular * far).sum(axis=2, keepdims=True)
        self._share += np.float32(self._rate / 240.0) * gain
        counts = [len(visit) for visit in path.now[0]]
        step = np.array(path.scale[0], dtype=np.float32)[:, None] * np.float32(self._rate)
        self._flat[places[0]] += np.repeat(missed * step, counts, axis=0)
        self._uses *= self._fade
        self._uses += (1.0 - self._fade) * truth[1]
        np.log(self._uses + _RARE, out=self._popular)
        self._popular += _CENTRE
        self._rebase()

    def _rebase(self) -> None:
        np.add(self._bias, (self._share * self._popular).sum(axis=0), out=self._base)
        if not self._base_of:
            self._base_of = [self._base[row] for row in range(self.rows)]

    def chance(self) -> Floats:
        """Return the chance of use in a pass of which nothing else is known, [L, E]."""
        one = np.float32(1.0)
        chance: Floats = one / (one + np.exp(-self._base))
        return chance
