"""Stand-ins: when tokens may use a cheap copy because the full one is still on its way.

Decides by what the use would cost in nats and by what the quality budget has left for such uses.
Must not know why the full copy is missing, nor clocks. The idea is that of HOBBIT (Tang et al.
2024): experts with small router weights bear low precision. Here the price is measured: calibration
gives a block's damage for each token of text; divided by how often the block is used that is the
damage of one use. An expert's output enters with its router weight w and the divergence is
quadratic in the error, so a use costs w^2 / mean(w^2) of the mean use.

Each token of text earns the share of the budget that plans leave (`STANDIN_RATIO`), and a use
spends. What is saved up is capped, so that a long quiet time does not pay for a burst.

Invariants: what is spent never exceeds what was earned, so the mean over all tokens stays under the
share; with a budget of 0 nothing is ever allowed; a block or format that was not measured never is.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from hotset.policies.formatplan import STANDIN_RATIO
from hotset.policies.types import LOSSLESS, BlockId, Format

if TYPE_CHECKING:
    from collections.abc import Sequence

    from hotset.policies.drift import DriftMeter

_SAVED_TOKENS = 256
"""Most tokens whose earnings are kept."""
_FADE = 0.01
"""Weight of the newest token in the mean of w^2."""


class StandInPurse:
    """What stand-ins have earned and spent at one worker. Not thread-safe."""

    def __init__(self, drift: DriftMeter) -> None:
        """Damage, frequencies, gamma and budget are those of the meter, as calibrated."""
        self._damage = drift.gamma * drift.costs.nats
        self._frequency = drift.frequency
        self._rows = {layer: row for row, layer in enumerate(drift.layers)}
        self._code = {name: code for code, name in enumerate(drift.costs.formats)}
        self._earns = drift.budget.nats * drift.budget.margin_ratio * STANDIN_RATIO
        self._left = 0.0
        self._square: dict[int, float] = {}
        self.spent_nats = 0.0
        self.used = 0
        self.refused = 0

    def earn(self, tokens: int) -> None:
        """Tokens of text were begun."""
        self._left = min(self._left + self._earns * tokens, self._earns * _SAVED_TOKENS)

    def price(self, block: BlockId, form: Format, weights: Sequence[float]) -> float | None:
        """Nats that computing tokens with these router weights would cost; None: not measured."""
        row, code = self._rows.get(block.layer), self._code.get(str(form))
        if row is None or code is None or block.index >= self._damage.shape[1]:
            return None
        use = float(self._damage[row, block.index, code] / self._frequency[row, block.index])
        mean = self._square.get(block.layer, 0.0)
        squares = sum(weight * weight for weight in weights)
        # Until weights were seen, every use counts as a mean one.
        return use * (squares / mean if mean > 0 else len(weights))

    def see(self, layer: int, weights: Sequence[float]) -> None:
        """Take in router weights of a layer, so that a mean use is known."""
        if not weights:
            return
        now = sum(weight * weight for weight in weights) / len(weights)
        old = self._square.get(layer)
        self._square[layer] = now if old is None else old + _FADE * (now - old)

    def allow(self, block: BlockId, form: Format, weights: Sequence[float]) -> bool:
        """Spend for this use if it can be afforded; False: wait for the full copy."""
        if form in LOSSLESS:
            return True
        cost = self.price(block, form, weights) if self._earns > 0 else None
        if cost is None or cost > self._left:
            self.refused += 1
            return False
        self._left -= cost
        self.spent_nats += cost
        self.used += 1
        return True
