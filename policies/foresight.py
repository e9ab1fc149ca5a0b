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

from typing import TYPE_CHECKING

import numpy as np

from hotset.policies import foresight_kernels as kernels

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    Floats = NDArray[np.float32]

_HALF_LIVES = (4.0, 64.0)
"""Passes after which a use counts half, of the two popularities whose weights are learnt."""
_RARE = np.float32(0.02)
"""Smallest popularity that is told apart from never."""
_CENTRE = np.float32(2.0)
"""Moves the logarithm of usual popularities to about 0, so that weights and bias do not fight."""
_PRIOR_SELF = 1.0
"""Before anything is learnt: an expert that was used is likelier to be used again."""
_PRIOR_POPULARITY = 0.3


class Path:
    """One request's way through the layers: estimates made and experts seen, for two passes.

    `logits` has the rows from `rows` on, which are the next pass's first ones, once more behind the
    last, so that the rows in sight of a visit always lie together.
    """

    __slots__ = (
        "clean", "far", "logits", "now", "passes", "places", "row", "scale", "seen", "truth",
    )  # fmt: skip

    def __init__(self, *, rows: int, size: int, depth: int, base: Floats) -> None:
        """`base` [rows, size] are the first estimates."""
        self.row = -1
        self.clean = True
        self.passes = 0
        self.logits = np.concatenate([base.reshape(-1), base.reshape(-1)[: depth * size]])
        self.far = [self.logits[row * size : (row + 1) * size] for row in range(rows)]
        self.seen: list[Floats] = [np.zeros((rows, (depth + 1) * size), np.float32) for _ in "ab"]
        none = np.empty(0, dtype=np.intp)
        self.now: list[NDArray[np.intp]] = [none] * rows
        self.scale = [np.ones(rows, dtype=np.float32) for _ in "ab"]
        self.places: list[NDArray[np.intp]] = [none, none]
        self.truth = np.zeros((2, rows, size), dtype=np.float32)


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
        self.clock: Callable[[], int] | None = None
        """Times the stages for their account; None: nobody asks."""
        self.learn_ns = self.age_ns = 0
        self._rate = np.float32(rate)
        weights = np.zeros((rows, size, (depth + 1) * size), dtype=np.float32)
        diagonal = np.arange(size)
        weights[:, diagonal, diagonal] = _PRIOR_SELF
        self._kept = weights  # of stages that are off as well
        self._use(weights)
        self._bias = np.full((rows, size), -2.0, dtype=np.float32)
        self._share = np.full((len(_HALF_LIVES), rows, 1), _PRIOR_POPULARITY, dtype=np.float32)
        self._uses = np.zeros((len(_HALF_LIVES), rows, size), dtype=np.float32)
        fade = [2.0 ** (-1.0 / half) for half in _HALF_LIVES]
        self._fade = np.array(fade, dtype=np.float32)[:, None, None]
        self._rise = np.float32(1.0) - self._fade
        self._popular = np.log(self._uses + _RARE) + _CENTRE
        self._base: Floats = np.empty_like(self._bias)
        self._rebase()
        # n experts count 1 / sqrt(n) each.
        self.scales = [np.float32(1.0 / max(1, count) ** 0.5) for count in range(size + 1)]
        self._first_of_row = np.arange(rows, dtype=np.intp) * size

    def _use(self, weights: Floats) -> None:
        """Take these weights, and make room for what a visit computes."""
        self.weights = weights
        self.odds = np.empty(weights.shape[2], dtype=np.float32)

    def resize(self, depth: int) -> None:
        """Refine estimates on `depth` rows from now on; paths begun before are of no use."""
        width = (depth + 1) * self.size
        if self.weights is not self._kept:
            self._kept[:, :, : self.weights.shape[2]] = self.weights
        self.depth = depth
        whole = width == self._kept.shape[2]
        self._use(self._kept if whole else np.ascontiguousarray(self._kept[:, :, :width]))

    def begin(self) -> Path:
        """Start a request: its first estimates come from popularity alone."""
        return Path(rows=self.rows, size=self.size, depth=self.depth, base=self._base)

    @property
    def base(self) -> Floats:
        """First estimates, [L, E]."""
        return self._base

    def visit(self, path: Path, row: int, now: NDArray[np.intp]) -> Floats:
        """`path`'s request needs the distinct experts `now` at `row`; return odds p / (1 - p).

        Shape [(depth + 1) * E]: of the next visit of `row` itself, then of the rows after it.
        The array is reused by the next call.
        """
        scale = self.enter(path, row, now)
        kernels.visit(
            self.weights, self._base, path.logits, path.seen[1], self.odds, now, row,
            len(self.odds), scale,
        )  # fmt: skip
        return self.odds

    def enter(self, path: Path, row: int, now: NDArray[np.intp]) -> np.float32:
        """Note the visit without the arithmetic, which the caller does at once; return its scale.

        For a caller that has more to compute: see `foresight_kernels.foresee`.
        """
        if row != path.row + 1:
            self._turn(path, row)
        path.row = row
        path.now[row] = now
        scale = path.scale[1][row] = self.scales[len(now)]
        return scale

    def _turn(self, path: Path, row: int) -> None:
        """Start a pass, or go on behind a gap: what was seen before it is no cause of this."""
        path.clean = row == 0
        near = self.depth * self.size
        if path.row == self.rows - 1 and path.clean:
            # What was estimated for the rows beyond the last one is now about the first ones.
            path.logits[:near] = path.logits[self.rows * self.size :]
            return
        path.passes = 0
        path.logits[: self.rows * self.size] = self._base.reshape(-1)

    def finish_pass(self, path: Path, *, learn: bool) -> NDArray[np.intp]:
        """`path` has passed the last row: learn from the pass before, whose truth is now known.

        Returns the flat indices of the blocks that this pass has used.
        """
        counts = [len(visit) for visit in path.now]
        places = np.concatenate(path.now) + np.repeat(self._first_of_row, counts)
        path.places[1] = places
        truth = path.truth[1]
        truth[:] = 0.0
        truth.reshape(-1)[places] = 1.0
        if path.clean:
            path.passes += 1
            if path.passes > 1 and learn:
                began = self.clock() if self.clock else 0
                self._learn(path)
                learnt = self.clock() if self.clock else 0
                self._age(path)
                self.learn_ns = learnt - began
                self.age_ns = self.clock() - learnt if self.clock else 0
        path.seen.reverse()
        path.scale.reverse()
        path.places.reverse()
        path.truth[0] = truth
        return places

    def _learn(self, path: Path) -> None:
        kernels.learn(
            self.weights, self._bias, self._share, self._popular, path.seen[0], path.truth,
            path.places[0], path.scale[0], self._rate,
        )  # fmt: skip

    def _age(self, path: Path) -> None:
        """Let old uses fade, and make the first estimates anew."""
        truth = path.truth
        self._uses *= self._fade
        self._uses += self._rise * truth[1]
        np.add(self._uses, _RARE, out=self._popular)
        np.log(self._popular, out=self._popular)
        self._popular += _CENTRE
        self._rebase()

    def _rebase(self) -> None:
        np.add(self._bias, (self._share * self._popular).sum(axis=0), out=self._base)

    # --- accounts -------------------------------------------------------------------------------

    def recalls(self, path: Path) -> list[float]:
        """Recall in the pass that `path` has finished, by stage: ageing, previous step, ahead.

        Of the experts that were needed, the share among as many likeliest ones. Empty when the
        pass before is not known.
        """
        depth, rows, size = self.depth, self.rows, self.size
        if path.passes < 2:
            return []
        truth = path.truth[0][depth:]
        needed = float(truth.sum())
        likeliest = max(1, round(needed / len(truth)))
        if likeliest >= size:
            return [1.0] * (depth + 2)
        estimates = [self._base[depth:], path.seen[1][depth:, :size]]
        for ahead in range(depth, 0, -1):
            part = slice(ahead * size, (ahead + 1) * size)
            estimates.append(path.seen[0][depth - ahead : rows - ahead, part])
        return [
            float(
                np.take_along_axis(
                    truth, np.argpartition(-one, likeliest - 1, axis=1)[:, :likeliest], axis=1
                ).sum()
            )
            / needed
            for one in estimates
        ]

    def spent_ns(self, path: Path, *, clock: Callable[[], int]) -> list[int]:
        """Time of a pass by stage, in the order of `recalls`.

        A visit's arithmetic is done once more with and without its widest stage.
        """
        width, size = len(self.odds), self.size
        logits, stages = path.logits.copy(), path.seen[1].copy()
        odds, now = self.odds.copy(), path.now[0]
        scale = self.scales[len(now)]

        def visit(width: int) -> int:
            began = clock()
            kernels.visit(self.weights, self._base, logits, stages, odds, now, 0, width, scale)
            return clock() - began

        visit(width)  # warm
        stage_ns = self.rows * max(0, visit(width) - visit(width - size))
        stage_ns += self.learn_ns * size // width
        return [self.age_ns, *[stage_ns] * (self.depth + 1)]

    def chance(self) -> Floats:
        """Return the chance of use in a pass of which nothing else is known, [L, E]."""
        one = np.float32(1.0)
        chance: Floats = one / (one + np.exp(-self._base))
        return chance
