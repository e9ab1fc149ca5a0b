"""The live check: steps that were computed twice say whether the drift estimate can be believed.

Decides which steps to compute again at full precision, and what follows from the pairs: freeze
demotions, repair the worst blocks first, raise gamma. Must not know models, clocks or where copies
are; it is given, for each token of a sampled step, the KL in nats and whether the top choice
changed.

A bound is broken when the evidence says so at 95 %: the upper bound of mean KL over the budget, or
more tokens over 20 budgets than 1 %, or more changed choices than the flip bound, than chance
would show (exact binomial). Changed choices grow as the root of KL, hence the default flip bound.

Pairs count from the last change of formats, since older ones are about another mix. Checking again
and again raises the chance of a false alarm; that is the safe side, and costs efficiency alone.

Invariants: frozen after a broken bound, until `calm_checks` checks in a row are well inside;
exact mode breaks on the first KL over 0; nothing is decided on fewer than `few` pairs unless the
lower bound is already over the budget.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence

    from hotset.policies.drift import DriftMeter
    from hotset.policies.types import BlockId

_Z95 = 1.645
_TAIL_BUDGETS = 20.0
_TAIL_SHARE = 0.01
_DOUBT = 0.05
_CALM_RATIO = 0.8  # of the budget: an upper bound below it counts as calm


@dataclass(frozen=True, slots=True, kw_only=True)
class LiveBounds:
    """When to sample and when to believe it.

    The first `dense_steps` steps after a change are all sampled, then one in `sparse_every`.
    `flip_ratio` of None means 2 * sqrt(budget in nats).
    """

    dense_steps: int = 64
    sparse_every: int = 32
    few: int = 64
    sure: int = 16
    window: int = 2048
    calm_checks: int = 2
    flip_ratio: float | None = None

    def __post_init__(self) -> None:
        """Refuse values that mean nothing, with the field's name."""
        if not 2 <= self.sure <= self.few <= self.window:
            raise ValueError(
                f"sure, few, window must ascend from 2, not {self.sure}, {self.few}, {self.window}"
            )
        if self.dense_steps < 0 or self.sparse_every < 1 or self.calm_checks < 1:
            raise ValueError("dense_steps, sparse_every and calm_checks must be positive")


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """What the pairs say. `broken` names each broken bound in words; empty means inside.

    `enough` is False while there are too few pairs to say anything.
    """

    pairs: int
    mean: float
    lower: float
    upper: float
    p99: float
    flip_ratio: float
    enough: bool
    broken: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Tightening:
    """What a broken bound led to: blocks to put back, worst first, and gamma before and after."""

    verdict: Verdict
    repairs: tuple[BlockId, ...]
    gamma_before: float
    gamma: float


class LiveCheck:
    """Collects pairs about one mix and acts on a `DriftMeter`."""

    def __init__(self, drift: DriftMeter, *, bounds: LiveBounds | None = None) -> None:
        """The budget is the meter's."""
        self.bounds = bounds or LiveBounds()
        self.frozen = False
        self.said = ""
        """Why demotions are frozen, or were last: the bounds that were broken."""
        self._drift = drift
        self._kl: list[float] = []
        self._flips: list[bool] = []
        self._changed_at = 0
        self._calm = 0
        self._fresh = 0

    def wants(self, step: int) -> bool:
        """Say whether `step` (a running number) is to be computed at full precision as well."""
        since = step - self._changed_at
        return since < self.bounds.dense_steps or since % self.bounds.sparse_every == 0

    def changed(self, step: int) -> None:
        """Note that the mix changed at `step`: older pairs say nothing about it."""
        self._changed_at = step
        self._kl.clear()
        self._flips.clear()
        self._fresh = 0

    def add(self, kl: Sequence[float], flips: Sequence[bool]) -> None:
        """Take in pairs, one entry a token. ValueError for lengths that differ or bad values."""
        if len(kl) != len(flips):
            raise ValueError(f"kl has {len(kl)} entries, flips {len(flips)}; give one each a token")
        if not all(math.isfinite(value) and value >= 0 for value in kl):
            raise ValueError("kl must be finite and not negative; compare the same tokens")
        self._kl += [float(value) for value in kl]
        self._flips += [bool(value) for value in flips]
        self._fresh += len(kl)
        del self._kl[: -self.bounds.window], self._flips[: -self.bounds.window]

    def verdict(self) -> Verdict:
        """Judge the pairs so far; changes nothing."""
        count, budget = len(self._kl), self._drift.budget.nats
        if not count:
            return Verdict(
                pairs=0, mean=0.0, lower=0.0, upper=math.inf, p99=0.0, flip_ratio=0.0,
                enough=False, broken=(),
            )  # fmt: skip
        values = np.array(self._kl)
        mean, flips = float(values.mean()), sum(self._flips)
        error = float(values.std(ddof=1)) / math.sqrt(count) if count > 1 else math.inf
        lower, upper = max(0.0, mean - _Z95 * error), mean + _Z95 * error
        sure = count >= self.bounds.sure and lower > budget
        exact = budget <= 0 and mean > 0
        enough = count >= self.bounds.few or sure or exact
        found = Verdict(
            pairs=count, mean=mean, lower=lower, upper=upper,
            p99=float(np.percentile(values, 99)), flip_ratio=flips / count,
            enough=enough, broken=(),
        )  # fmt: skip
        if not enough:
            return found
        tail = int((values > _TAIL_BUDGETS * budget).sum())
        return Verdict(
            pairs=count, mean=mean, lower=lower, upper=upper, p99=found.p99,
            flip_ratio=found.flip_ratio, enough=True,
            broken=tuple(self._broken(found, tail=tail, flips=flips)),
        )  # fmt: skip

    def step(self, step: int) -> Tightening | None:
        """Judge after `step`; on a broken bound freeze, teach the meter and name the repairs.

        The caller puts the repairs back, and the meter has them recorded already.
        """
        found = self.verdict()
        if not found.enough:
            return None
        if not found.broken:
            self._settle(found)
            return None
        self.frozen, self._calm, self.said = True, 0, "; ".join(found.broken)
        before = self._drift.gamma
        self._drift.learn(found.upper if math.isfinite(found.upper) else found.mean)
        repairs = self._drift.repairs()
        self._drift.repair(repairs)
        self.changed(step + 1)
        return Tightening(
            verdict=found, repairs=repairs, gamma_before=before, gamma=self._drift.gamma
        )

    def _settle(self, found: Verdict) -> None:
        """Count a calm check once its pairs are fresh; thaw after enough of them."""
        if not self.frozen or self._fresh < self.bounds.few:
            return
        self._fresh = 0
        calm = found.upper <= _CALM_RATIO * self._drift.budget.nats
        self._calm = self._calm + 1 if calm else 0
        self.frozen = self._calm < self.bounds.calm_checks

    def _broken(self, found: Verdict, *, tail: int, flips: int) -> list[str]:
        budget, words = self._drift.budget.nats, []
        if found.upper > budget:
            words.append(
                f"mean KL is up to {found.upper:.2g} nats (95 %), the budget is {budget:.2g}"
            )
        if exceeds(tail, found.pairs, share=_TAIL_SHARE):
            words.append(
                f"{tail} of {found.pairs} tokens are over {_TAIL_BUDGETS * budget:.2g} nats, "
                f"at most {_TAIL_SHARE:.0%} may be (p99 {found.p99:.2g})"
            )
        most = self.bounds.flip_ratio
        most = 2 * math.sqrt(budget) if most is None else most
        if exceeds(flips, found.pairs, share=most):
            words.append(f"{flips} of {found.pairs} top choices changed, the bound is {most:.2%}")
        return words


def exceeds(found: int, count: int, *, share: float) -> bool:
    """Tell whether `found` of `count` is more than a chance of `share` would show, at 95 %."""
    if found <= share * count:
        return False
    if share <= 0:
        return found > 0
    # P(X >= found) = 1 - P(X < found), X binomial; terms by their ratio, in logarithms
    log_term, below = count * math.log1p(-share), 0.0
    for hits in range(found):
        below += math.exp(log_term)
        log_term += math.log((count - hits) / (hits + 1)) + math.log(share) - math.log1p(-share)
    return 1.0 - below < _DOUBT
