"""The `hotset` policy of one device: keep, evict and prefetch by the odds of the next use.

Decides by `StagedPredictor`'s estimates alone. Must not know addresses, links, clocks or other
devices: `steer` tells it what the link bears. Not thread-safe.

With the far odds f (of the next visit as seen one pass before) and, for a row that comes within
`depth` visits, the near odds e, the value of a copy is

    2 w f        while its row is far,
    w f + e      when its row is near; w is small (`_FAR_WEIGHT`).

Odds of p = f / (1 + f) are one over the expected number of passes that bring no use, so evicting
the smallest f is evicting what is needed last (Belady 1966, on expectations). The term e keeps
what the coming visit is likely to need until that has passed. It outweighs f, because it blocks a
slot for a fraction of a pass only: hits per slot and time are what counts. (Far, f counts twice
because the row just passed is the first in sight, with the odds of its next visit for e.)

A block is prefetched when its near odds beat the bar (from the load budget and the link) and the
cheapest victim's value. Where most experts of a layer are needed each time (`dense`), locality has
little left to choose; what helps is to stream the next layer's in time, so more loads are allowed.
"""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np

from hotset.policies.charge import Sample, StageCharges
from hotset.policies.config import ResidencyConfig
from hotset.policies.device import DeviceShape, DeviceTable, Resident
from hotset.policies.foresight import Path, StagedPredictor
from hotset.policies.foresight_kernels import exp32_numpy, foresee, warm
from hotset.policies.loadbudget import LoadBudget
from hotset.policies.plan import LayerPlan, UseChances, sort_needs
from hotset.policies.types import Format, Reason

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Sequence

    from numpy.typing import NDArray

    from hotset.policies.charge import Charge

_NOTHING = float("inf")
_NOTHING32 = np.float32(np.inf)
_FAR_WEIGHT = np.float32(1.0 / 60.0)
"""Odds of use a pass from now, against odds of use within a few layers: a pass is 16 to 60 layers
long. A thirtieth of it gives the same figures; three times as much costs 8 % at batch 8."""
_MOST_REQUESTS = 64
"""Requests whose path is remembered; a worker forgets them when they end."""
_USUAL_RATIO = 2.0
"""A visit of more than this many times the usual number of experts is a prefill."""
_ACCOUNT_EVERY = 8
"""One pass in so many is looked at for the predictors' accounts."""
_USE_FADE = 0.08
"""Weight of the newest pass in `expected_use`, a half-life of about eight passes."""


@lru_cache(maxsize=4)
def _names(layers: tuple[int, ...], size: int) -> tuple[tuple[tuple[int, int], Resident], ...]:
    """Each flat index as a block and as its full copy: devices of one shape share them."""
    return tuple(
        ((layer, expert), Resident(layer, expert, Format.BF16))
        for layer in layers
        for expert in range(size)
    )


class DeviceResidency(DeviceTable):
    """Staged prediction for eviction and prefetch, under a budget of loads."""

    _rank_dtype = np.float32  # half the bytes to search for a victim

    def __init__(
        self,
        shape: DeviceShape,
        *,
        config: ResidencyConfig | None = None,
        predictor: StagedPredictor | None = None,
    ) -> None:
        """Start empty; without a `predictor` of others (of this shape and depth) also ignorant."""
        super().__init__(shape)
        warm()
        self.config = config = config or ResidencyConfig()
        rows, size = len(shape.layers), shape.num_experts
        self.predictor = predictor or StagedPredictor(
            rows=rows, num_experts=size, depth=config.prefetch_depth, rate=config.learning_rate
        )
        self.budget = LoadBudget(
            rows=rows,
            slots=shape.capacity_bytes // shape.full_nbytes,
            ratio=config.load_ratio,
        )
        self._rows = rows
        self._far = np.repeat(np.float32(0.1) * _FAR_WEIGHT, rows * size)
        self._value_of = self._far.copy()
        self._absent = np.ones(rows * size, dtype=np.bool_)
        self._recent_use = np.zeros(rows * size, dtype=np.float32)
        self._found = np.empty(rows * size, dtype=np.int64)
        self._names = _names(shape.layers, size)
        self._cheapest = self._rank.argmin
        self._alone = np.empty(0, dtype=np.float32)
        self._paths: dict[int, Path] = {}
        self._usual = 0.0
        self._floor = 0.0
        self._most = config.prefetch_per_layer
        self._ahead = 1
        self._least_odds = 0.0
        self._link_is_measured = False
        self._missed_ns = 0
        self._charges: StageCharges | None = None
        self._resize = -1  # stages ahead from the next pass on
        self._passes = 0
        self._loads = 0.0  # of a pass: of this one, and the usual
        self._usual_loads = 0.0
        self.steer(0.0)

    # --- what others tell -------------------------------------------------------------------

    def charge_predictors(self, clock: Callable[[], int], *, switch: bool) -> None:
        """Keep accounts of the predictor's stages; `switch`: turn off what does not pay.

        Not for devices that share a predictor. With `switch` decisions depend on the clock.
        """
        self._charges = StageCharges(depth=self.predictor.depth, switch=switch)
        self.predictor.clock = clock

    def charges(self) -> tuple[Charge, ...]:
        """Return what each predictor costs and saves; empty when nobody keeps accounts."""
        return self._charges.accounts() if self._charges is not None else ()

    def steer(
        self,
        least_chance: float,
        *,
        most: int | None = None,
        ahead: int = 1,
        missed_ns: int | None = None,
    ) -> None:
        """See `ResidencyPolicy`; a chance of 1 and above forbids prefetching."""
        self._missed_ns = missed_ns or 0
        chance = max(least_chance, self.config.prefetch_min_probability)
        self._least_odds = chance / (1.0 - chance) if chance < 1.0 else float("inf")
        per_layer = self.config.prefetch_per_layer
        self._most = per_layer if most is None else min(most, per_layer)
        self._ahead = max(1, min(ahead, self.predictor.depth))
        self._link_is_measured = most is not None
        self._set_load_ratio()

    def _set_load_ratio(self) -> None:
        """By the link's idle time if that is known, else by the regime."""
        config = self.config
        if self._link_is_measured:
            self.budget.ratio = config.idle_load_ratio
        elif self.dense:
            self.budget.ratio = config.dense_load_ratio
        else:
            self.budget.ratio = config.load_ratio

    @property
    def dense(self) -> bool:
        """Whether a large share of each layer's experts is needed at each visit."""
        return self._usual > self.config.dense_ratio * self.num_experts

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
        self._foresee(row, experts, request=request, into=plan.prefetch)
        loads = len(plan.missing) + len(plan.prefetch)
        self.budget.loaded(loads)
        self._loads += loads
        return plan

    def _foresee(
        self, row: int, experts: Sequence[int], *, request: int, into: list[tuple[int, int]]
    ) -> None:
        """Learn from the visit, give every copy of the rows in sight its new value, and propose."""
        if row == 0 and self._resize >= 0:
            self.predictor.resize(self._resize)
            self._resize = -1
            self._paths.clear()
            self._ahead = min(self._ahead, max(1, self.predictor.depth))
        path = self._paths.get(request)
        if path is None:
            if len(self._paths) >= _MOST_REQUESTS:
                del self._paths[next(iter(self._paths))]
            path = self._paths[request] = self.predictor.begin()
        predictor = self.predictor
        now = np.array(experts, dtype=np.int64)
        scale = predictor.enter(path, row, now)
        proposes = self._most and predictor.depth and self._least_odds < _NOTHING
        count = foresee(
            predictor.weights, predictor.base, path.logits, path.seen[1], predictor.odds, now,
            self._alone if len(self._paths) == 1 else self._of_others(path, row),
            self._far, self._value_of, self._held, self._rank, self._absent,
            self._found, row, scale, _FAR_WEIGHT, self._ahead if proposes else 0, self._most,
            self._prefetch_bar() if proposes else _NOTHING32,
        )  # fmt: skip
        if count:
            names = self._names
            into.extend([names[flat][0] for flat in self._found[:count].tolist()])
        used = len(now)
        if row == self._rows - 1:
            self._end_pass(path, learn=used <= _USUAL_RATIO * self._usual)
        # Up slowly, down at once: one prefill must not pass for the usual.
        usual = self._usual
        self._usual = used if used < usual or not usual else usual + 0.02 * (used - usual)

    def _of_others(self, mine: Path, row: int) -> NDArray[np.float32]:
        """Odds that any of the other requests needs an expert of the row: about their sum."""
        logs = [path.far[row] for path in self._paths.values() if path is not mine]
        joint: NDArray[np.float32] = exp32_numpy(np.array(logs)).sum(axis=0) * _FAR_WEIGHT
        return joint

    def _prefetch_bar(self) -> np.float32:
        """Odds that a prefetch must beat."""
        bar = max(self._least_odds, self.budget.bar)
        if self._floor > bar and self.used_bytes + self.full_nbytes > self.capacity_bytes:
            bar = self._floor
        return np.float32(bar)

    def _end_pass(self, path: Path, *, learn: bool) -> None:
        used = self.predictor.finish_pass(path, learn=learn)
        recent = self._recent_use
        recent *= np.float32(1.0 - _USE_FADE)
        recent[used] += np.float32(_USE_FADE)
        self._set_load_ratio()
        self._passes += 1
        self._usual_loads += _USE_FADE * (self._loads - self._usual_loads)
        self._loads = 0.0
        if self._charges is not None and self._passes % _ACCOUNT_EVERY == 0:
            self._account(self._charges, path)

    def _account(self, charges: StageCharges, path: Path) -> None:
        """Hold what the stages of the predictor saved in this pass against what they cost."""
        predictor = self.predictor
        recalls = predictor.recalls(path)
        if not recalls or not self._missed_ns or predictor.clock is None:
            return
        depth = charges.observe(
            Sample(
                recalls=recalls,
                spent_ns=predictor.spent_ns(path, clock=predictor.clock),
                loads=self._usual_loads,
                missed_ns=self._missed_ns,
            )
        )
        if depth != predictor.depth:
            self._resize = depth

    def victim(
        self, want_bytes: int, *, needed: Collection[tuple[int, int]] = ()
    ) -> Resident | None:
        """See `ResidencyPolicy`; the last victim's value is what a prefetch has to beat."""
        if needed:
            return super().victim(want_bytes, needed=needed)
        if self.used_bytes + want_bytes <= self.capacity_bytes:
            return None
        flat = self._cheapest()
        value = self._rank.item(flat)
        form = self._format[flat]
        if form is None or value == _NOTHING:
            return None
        self._floor = value
        full = self._names[flat][1]
        return full if form is full.format else full._replace(format=form)

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
        return self._recent_use.astype(np.float64).reshape(self._rows, self.num_experts)

    def use_chances(self, layer: int, expert: int) -> UseChances:
        """See `ResidencyPolicy`: aged shares of passes, of the block and of the next victim."""
        recent, victim = self._recent_use, 0.0
        if self.used_bytes + self.full_nbytes > self.capacity_bytes:
            flat = int(self._rank.argmin())
            victim = recent.item(flat) if self._rank.item(flat) < _NOTHING else 1.0
        return UseChances(recent.item(self._base[layer] + expert), victim)
