"""Online drift: what the resident formats cost now, and which demotion would cost too much.

Decides refusals and repairs by D = gamma * sum(frequency now / frequency at calibration * d) over
the demoted blocks (design, section 9). Must not know clocks, where copies are, or how d was
measured. Frequencies are decayed sums over tokens; a block that is seldom seen is drawn towards
its frequency at calibration, so that a few tokens move nothing.

Hysteresis, so that formats do not flap: a demotion may fill the budget to `margin_ratio` only,
repairs start above the whole budget and go down to the margin, and a repaired block stays at full
precision for `dwell_tokens`.

Invariants: with a budget of 0 no lossy format is ever allowed, whatever the table says; `check`
allows nothing that would put D over the budget or an expert or a layer over its cap; gamma never
falls.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from hotset.policies.allocate import EXPERT_CAP_RATIO, LAYER_CAP_RATIO
from hotset.policies.guard import BUDGET_NATS, is_lossless
from hotset.policies.types import BlockId, Format

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from numpy.typing import NDArray

    from hotset.policies.allocate import Costs, Floats, Ints

    Flags = NDArray[np.bool_]

GAMMA_GROWTH = 4.0
"""Most by which gamma grows over its first value; what is left is laid on the blocks (`blame`)."""
_FULL_BITS = 16.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Budget:
    """The quality budget end to end and how it is kept.

    `nats` of mean KL for each token, 0 is exact mode. `gamma` is the distrust in the table: by how
    much sums of estimates are taken to be optimistic. The caps are shares of `nats`.
    """

    nats: float = BUDGET_NATS
    gamma: float = 3.0
    margin_ratio: float = 0.9
    layer_cap_ratio: float = LAYER_CAP_RATIO
    expert_cap_ratio: float = EXPERT_CAP_RATIO
    dwell_tokens: int = 4096
    half_life_tokens: int = 8192
    pseudo_tokens: float = 512.0

    def __post_init__(self) -> None:
        """Refuse values that mean nothing, with the field's name."""
        if not (np.isfinite(self.nats) and self.nats >= 0):
            raise ValueError(f"nats must be finite and at least 0, not {self.nats}")
        if not self.gamma >= 1:
            raise ValueError(f"gamma must be at least 1, not {self.gamma}")
        if not 0 < self.margin_ratio <= 1:
            raise ValueError(f"margin_ratio must be in (0, 1], not {self.margin_ratio}")
        if self.half_life_tokens < 1 or self.pseudo_tokens <= 0:
            raise ValueError("half_life_tokens and pseudo_tokens must be positive")


class DriftMeter:
    """The damage of what is resident, and the refusals that follow from it."""

    def __init__(
        self, costs: Costs, *, layers: Iterable[int], frequency: Any, budget: Budget | None = None
    ) -> None:
        """`layers` names the rows of `costs`; `frequency` [L, E] is that at calibration.

        Everything starts at full precision. Raises ValueError that names the argument.
        """
        self.costs = costs
        self.budget = budget or Budget()
        self.gamma = self.budget.gamma
        self.layers = tuple(layers)
        self._row = {layer: row for row, layer in enumerate(self.layers)}
        self._expected = np.asarray(frequency, dtype=np.float64)
        if len(self._row) != costs.nats.shape[0]:
            raise ValueError(f"layers must name {costs.nats.shape[0]} rows, not {len(self._row)}")
        if self._expected.shape != costs.nats.shape[:2] or not (self._expected > 0).all():
            raise ValueError("frequency must be [L, E] and positive; smooth it as calibration does")
        self._experts = costs.nats.shape[1]
        self._code = {name: code for code, name in enumerate(costs.formats)}
        self._lossy = np.array([not is_lossless(name) for name in costs.formats])
        self._nats = costs.nats.copy()
        self._codes = np.zeros(costs.nats.shape[:2], dtype=np.int64)
        self._counts = np.zeros(costs.nats.shape[:2])
        self._tokens = 0.0
        self._clock = 0
        self._held_until = np.zeros(costs.nats.shape[:2], dtype=np.int64)

    @property
    def codes(self) -> Ints:
        """Format of each block as the meter knows it, [L, E] indices into `costs.formats`."""
        return self._codes.copy()

    @property
    def frequency(self) -> Floats:
        """Share of tokens that each block got at calibration, [L, E]."""
        return self._expected.copy()

    @property
    def ratio(self) -> Floats:
        """Frequency now over frequency at calibration, [L, E]."""
        prior = self.budget.pseudo_tokens
        now = (self._counts + prior * self._expected) / (self._tokens + prior)
        found: Floats = now / self._expected
        return found

    @property
    def nats(self) -> float:
        """D: nats for each token, gamma included."""
        return self.gamma * float(self._damage(self._codes).sum())

    def observe(self, counts: Mapping[BlockId, int], *, tokens: int) -> None:
        """Take in tokens routed to each block while `tokens` tokens of text were computed."""
        if tokens < 0:
            raise ValueError(f"tokens must not be negative, not {tokens}")
        keep = 0.5 ** (tokens / self.budget.half_life_tokens)
        self._counts *= keep
        self._tokens = self._tokens * keep + tokens
        self._clock += tokens
        for block, count in counts.items():
            row = self._row.get(block.layer)
            if row is not None and block.index < self._experts:
                self._counts[row, block.index] += count

    def set(self, block: BlockId, form: Format | str) -> None:
        """Record that `block` now computes in `form`. ValueError for what the table lacks."""
        self._codes[self._place(block)] = self._known(form)

    def check(self, block: BlockId, form: Format | str) -> str | None:
        """Say why `block` may not compute in `form`: the bound that is protected, or None."""
        if is_lossless(form):
            return None
        if self.budget.nats <= 0:
            return f"the quality budget is 0 (exact mode), {form} loses precision"
        if not self.knows(block, form):
            return f"block {block} in {form} was not measured; calibrate with that format"
        row, expert = self._place(block)
        if self._clock < self._held_until[row, expert]:
            return f"block {block} was repaired less than {self.budget.dwell_tokens} tokens ago"
        wanted = self._codes.copy()
        wanted[row, expert] = self._known(form)
        return self._over(wanted, row=row, expert=expert)

    def allowed(self, form: Format | str) -> Flags:
        """Tell for every block at once, [L, E], whether `check` lets it compute in `form`."""
        shape = self._codes.shape
        if is_lossless(form):
            return np.ones(shape, dtype=bool)
        if self.budget.nats <= 0 or str(form) not in self._code:
            return np.zeros(shape, dtype=bool)
        budget, now = self.budget, self.gamma * self._damage(self._codes)
        wanted = self.gamma * self._nats[..., self._code[str(form)]] * self.ratio
        more = wanted - now
        found: Flags = (
            (self._clock >= self._held_until)
            & (now.sum() + more <= budget.nats * budget.margin_ratio)
            & (now.sum(axis=1, keepdims=True) + more <= budget.nats * budget.layer_cap_ratio)
            & (wanted <= budget.nats * budget.expert_cap_ratio)
        )
        return found

    def knows(self, block: BlockId, form: Format | str) -> bool:
        """Tell whether the table says what `block` in `form` costs; lossless formats cost none."""
        named = is_lossless(form) or str(form) in self._code
        return named and block.layer in self._row and block.index < self._experts

    def check_layer(self, layer: int, form: Format | str) -> str | None:
        """Say why all experts of `layer` together may not be in `form`, nothing else demoted."""
        if is_lossless(form):
            return None
        if layer not in self._row or str(form) not in self._code:
            return f"layer {layer} in {form} was not measured; calibrate with that format"
        row, code = self._row[layer], self._code[str(form)]
        cost = self.gamma * float((self._nats[row, :, code] * self.ratio[row]).sum())
        most = self.budget.nats * self.budget.layer_cap_ratio
        if self.budget.nats > 0 and cost <= most:
            return None
        return f"layer {layer} in {form} would cost {cost:.2g} nats, the bound is {most:.2g}"

    def floors(self) -> dict[int, Format]:
        """The cheapest format of each layer that `check_layer` allows for the whole layer."""
        order = np.argsort(self.costs.nbytes, kind="stable")
        names = [Format(self.costs.formats[code]) for code in order]
        return {
            layer: next((n for n in names if self.check_layer(layer, n) is None), Format.BF16)
            for layer in self.layers
        }

    def blocks(self) -> tuple[BlockId, ...]:
        """Every block of the table."""
        return tuple(BlockId(layer, e) for layer in self.layers for e in range(self._experts))

    def repairs(self) -> tuple[BlockId, ...]:
        """Blocks to put back to full precision, worst first, until D is within the margin.

        Empty while D is within the budget.
        """
        if self.nats <= self.budget.nats:
            return ()
        damage = self.gamma * self._damage(self._codes)
        left, goal = float(damage.sum()), self.budget.nats * self.budget.margin_ratio
        found: list[BlockId] = []
        for flat in np.argsort(-damage, axis=None, kind="stable"):
            row, expert = divmod(int(flat), damage.shape[1])
            if left <= goal or damage[row, expert] <= 0:
                break
            left -= float(damage[row, expert])
            found.append(BlockId(self.layers[row], expert))
        return tuple(found)

    def repair(self, blocks: Iterable[BlockId]) -> None:
        """Record that `blocks` are at full precision again, and hold them there for the dwell."""
        for block in blocks:
            place = self._place(block)
            self._codes[place] = 0
            self._held_until[place] = self._clock + self.budget.dwell_tokens

    def learn(self, measured_nats: float) -> None:
        """Take in that what is resident costs `measured_nats`: D never says less afterwards.

        Gamma grows first, at most `GAMMA_GROWTH` times. What it cannot explain - a table of zeros,
        say - is laid on the demoted blocks (and on what others would add) by what is known of any
        format: the squared error grows fourfold with each bit less, and a block counts as often as
        it is used.
        """
        if measured_nats <= self.nats:
            return
        most = self.budget.gamma * GAMMA_GROWTH
        plain = float(self._damage(self._codes).sum())
        self.gamma = max(self.gamma, min(most, measured_nats / plain if plain > 0 else self.gamma))
        missing = measured_nats - self.nats
        if missing > 0:
            self._blame(missing / self.gamma)

    def _blame(self, missing: float) -> None:
        """Spread `missing` nats over what is demoted, and as much over what is not yet."""
        bits = _FULL_BITS * self.costs.nbytes / self.costs.nbytes[0]
        prior = self._expected[..., None] * np.where(self._lossy, 4.0 ** (_FULL_BITS - bits), 0.0)
        here = np.take_along_axis(prior, self._codes[..., None], axis=2)[..., 0] * self.ratio
        total = float(here.sum())
        if total > 0:  # else nothing is demoted, and the formats are not to blame
            self._nats += prior * (missing / total)

    def _damage(self, codes: Ints) -> Floats:
        chosen = np.take_along_axis(self._nats, codes[..., None], axis=2)[..., 0]
        found: Floats = chosen * self.ratio
        return found

    def _over(self, codes: Ints, *, row: int, expert: int) -> str | None:
        """The first bound that `codes` would break, after a change of one block."""
        damage, budget = self.gamma * self._damage(codes), self.budget
        bounds = (
            ("the mix", float(damage.sum()), budget.nats * budget.margin_ratio),
            (f"layer {self.layers[row]}", float(damage[row].sum()),
             budget.nats * budget.layer_cap_ratio),
            (f"expert {self.layers[row]}.{expert}", float(damage[row, expert]),
             budget.nats * budget.expert_cap_ratio),
        )  # fmt: skip
        for what, nats, most in bounds:
            if nats > most:
                return f"{what} would cost {nats:.2g} nats, the bound is {most:.2g}"
        return None

    def _place(self, block: BlockId) -> tuple[int, int]:
        row = self._row.get(block.layer)
        if row is None or block.index >= self._experts:
            raise ValueError(f"block {block} is not in the table; calibrate this checkpoint")
        return row, block.index

    def _known(self, form: Format | str) -> int:
        code = self._code.get(str(form))
        if code is None and is_lossless(form):
            return 0
        if code is None:
            raise ValueError(f"format {form} is not among {self.costs.formats}; calibrate with it")
        return code
