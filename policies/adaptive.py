"""The `hotset` policy of one device: keep, evict and prefetch by the odds of the next use.

Decides by `StagedPredictor`'s estimates alone. Must not know addresses, links, clocks or other
devices: `steer` tells it what the link bears. Not thread-safe.

With the far odds f (of the next visit as seen one pass before) and, for a row that comes within
`depth` visits, the near odds e, the value of a copy is

    f                  while its row is far,
    f (1 + e) + e      when its row is near.

f (1 + e) = f / (1 - p) is one over the expected number of passes to the next use when the coming
visit uses the block with chance p and each later pass with odds f: evicting the smallest is
evicting what is needed last (Belady 1966, on expectations). The term e keeps what was fetched for
the coming visit until that has passed: in the short time that it blocks a slot, it is worth more.

A block is prefetched when its near odds beat the bar (from the load budget and the link) and the
cheapest victim's value. Where nearly all experts are needed each time the odds of all are high,
so little passes the victim's bar, and what is left is the best eviction.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from hotset.policies.config import ResidencyConfig
from hotset.policies.device import DeviceShape, DeviceTable
from hotset.policies.foresight import Path, StagedPredictor
from hotset.policies.loadbudget import LoadBudget
from hotset.policies.plan import LayerPlan, sort_needs
from hotset.policies.types import Format, Reason

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

_MOST_REQUESTS = 64
"""Requests whose path is remembered; a worker forgets them when they end."""
_USUAL_RATIO = 2.0
"""A visit of more than this many times the usual number of experts is a prefill."""
_USE_FADE = 0.08
"""Weight of the newest pass in `expected_use`, a half-life of about eight passes."""


class DeviceResidency(DeviceTable):
    """Staged prediction for eviction and prefetch, under a budget of loads."""

    _rank_dtype = np.float32  # half the bytes to search for a victim

    def __init__(self, shape: DeviceShape, *, config: ResidencyConfig | None = None) -> None:
        """Start empty and ignorant."""
        super().__init__(shape)
        self.config = config = config or ResidencyConfig()
        rows, size = len(shape.layers), shape.num_experts
        self.predictor = StagedPredictor(
            rows=rows, num_experts=size, depth=config.prefetch_depth, rate=config.learning_rate
        )
        self.budget = LoadBudget(
            rows=rows,
            slots=shape.capacity_bytes // shape.full_nbytes,
            ratio=config.load_ratio,
        )
        self._rows = rows
        self._far = np.repeat(np.float32(0.1), rows * size)
        self._value_of = self._far.copy()
        self._absent = np.ones(rows * size, dtype=np.bool_)
        self._odds_of = np.zeros((rows, size), dtype=np.float32)
        self._recent_use = np.zeros((rows, size), dtype=np.float32)
        self._slices = [slice(row * size, (row + 1) * size) for row in range(rows)]
        self._paths: dict[int, Path] = {}
        self._usual = 0.0
        self._most = config.prefetch_per_layer
        self._ahead = 1
        self._least_odds = 0.0
        self.steer(0.0)

    # --- what others tell -------------------------------------------------------------------

    def steer(self, least_chance: float, *, most: int | None = None, ahead: int = 1) -> None:
        """See `ResidencyPolicy`; a chance of 1 and above forbids prefetching."""
        chance = max(least_chance, self.config.prefetch_min_probability)
        self._least_odds = chance / (1.0 - chance) if chance < 1.0 else float("inf")
        per_layer = self.config.prefetch_per_layer
        self._most = per_layer if most is None else min(most, per_layer)
        self._ahead = max(1, min(ahead, self.predictor.depth))
        self.budget.ratio = self.config.load_ratio if most is None else self.config.idle_load_ratio

    def forget(self, request: int) -> None:
        """Free what was kept for a request that has ended."""
        self._paths.pop(request, None)

    # --- the decision -----------------------------------------------------------------------

    def routed(
        self,
        layer: int,
        experts: Sequence[int],
        counts: Sequence[int],
        *,
        step: int,
        request: int = 0,
    ) -> LayerPlan:
        """See `ResidencyPolicy`."""
        self._step = step
        base = self._base[layer]
        row = base // self.num_experts
        plan = sort_needs(self, base, experts=experts, counts=counts)
        self.budget.routed(row, experts)
        now = np.array(experts, dtype=np.intp)
        odds = self._foresee(row, now=now, request=request)
        if self._most and self.predictor.depth:
            self._propose(row, odds=odds, into=plan.prefetch)
        self.budget.loaded(len(plan.missing) + len(plan.prefetch))
        return plan

    def _foresee(self, row: int, *, now: NDArray[np.intp], request: int) -> NDArray[np.float32]:
        """Learn from the visit and give every copy of the rows in sight its new value."""
        path = self._paths.get(request)
        if path is None:
            if len(self._paths) >= _MOST_REQUESTS:
                del self._paths[next(iter(self._paths))]
            path = self._paths[request] = self.predictor.begin()
        odds = self.predictor.visit(path, row, now)
        size = self.num_experts
        far, value, rank, held = self._far, self._value_of, self._rank, self._held
        here = self._slices[row]
        far[here] = odds[:size] if len(self._paths) == 1 else self._joint(row)
        first = True
        for span in self.predictor.spans[row]:
            there, at = span.views
            near = odds[at]
            worth = near + np.float32(1.0)
            worth *= far[there]
            worth += near
            if first:
                worth[:size] = far[here]
                first = False
            value[there] = worth
            np.multiply(worth, held[there], out=rank[there])
        self._note_pass(path, row=row, count=len(now))
        return odds

    def _joint(self, row: int) -> NDArray[np.float32]:
        """Odds that any of several requests needs an expert of the row: about their sum."""
        here = self._slices[row]
        logs = [np.minimum(path.logits[here], np.float32(15.0)) for path in self._paths.values()]
        joint: NDArray[np.float32] = np.exp(np.array(logs)).sum(axis=0)
        return joint

    def _note_pass(self, path: Path, *, row: int, count: int) -> None:
        usual = self._usual
        if row == self._rows - 1:
            self.predictor.finish_pass(path, learn=count <= _USUAL_RATIO * usual)
            recent = self._recent_use
            recent *= np.float32(1.0 - _USE_FADE)
            places = np.concatenate(
                [visit + first * self.num_experts for first, visit in enumerate(path.now[0])]
            )
            recent.reshape(-1)[places] += np.float32(_USE_FADE)
        # Up slowly, down at once: one prefill must not pass for the usual.
        self._usual = count if count < usual or not usual else usual + 0.02 * (count - usual)

    def _propose(self, row: int, *, odds: NDArray[np.float32], into: list[tuple[int, int]]) -> None:
        """Append what is worth fetching for the rows ahead, likeliest first."""
        size = self.num_experts
        bar = max(self._least_odds, self.budget.bar)
        if self.used_bytes + self.full_nbytes > self.capacity_bytes:
            bar = max(bar, float(self._rank.min()))
        found: list[tuple[float, int]] = []
        for distance in range(1, self._ahead + 1):
            target = (row + distance) % self._rows
            near = odds[distance * size : (distance + 1) * size]
            likely = near > bar
            likely &= self._absent[self._slices[target]]
            places = likely.nonzero()[0]
            if places.size:
                first = target * size
                chances = near[places].tolist()
                found += [
                    (-chance, first + place)
                    for chance, place in zip(chances, places.tolist(), strict=True)
                ]
            if distance == 1 and len(found) >= self._most:
                break
        if len(found) > 1:
            found.sort()
        layers = self.layers
        into += [(layers[flat // size], flat % size) for _, flat in found[: self._most]]

    # --- the books --------------------------------------------------------------------------

    def in_flight(
        self, layer: int, expert: int, form: Format = Format.BF16, reason: Reason = Reason.DEMAND
    ) -> None:
        """See `DeviceTable`."""
        super().in_flight(layer, expert, form, reason)
        self._absent[self._base[layer] + expert] = False

    def failed(self, layer: int, expert: int, *, staged: bool = False) -> None:
        """See `DeviceTable`."""
        super().failed(layer, expert, staged=staged)
        flat = self._base[layer] + expert
        self._absent[flat] = self._format[flat] is None

    def dropped(
        self, layer: int, expert: int, *, staged: bool = False, reason: Reason = Reason.EVICT
    ) -> None:
        """See `DeviceTable`."""
        super().dropped(layer, expert, staged=staged, reason=reason)
        self._absent[self._base[layer] + expert] = True

    def _value(self, flat: int) -> float:
        return float(self._value_of[flat])

    def expected_use(self) -> NDArray[np.float64]:
        """Return the aged share of passes that used each block, [L, E] in 0..1."""
        return self._recent_use.astype(np.float64)
