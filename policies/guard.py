"""The guardrail: what no efficiency decision may do.

Decides only refusals. Must not know why something was wanted. Each check returns None (allowed)
or a `Refusal` that names the bound, so that a veto can always be explained.
The precision of a block is bounded twice: by floors, which a person sets for a layer or a block,
and by measured drift (`DriftMeter`), which calibration and live checks keep. Either may refuse.
The live check sits here too: `measured` takes pairs of steps that were computed twice, and after a
broken bound nothing is demoted (`veto_drift`) and the worst blocks are named for repair.
Invariants: no format below its floor, none that measured drift refuses, no drop of the last
verified copy, no store over its budget in any intermediate state.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from hotset.policies.drift_check import LiveCheck
from hotset.policies.types import LOSSLESS, BlockId, Copy, Format, Reason

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from numpy.typing import NDArray

    from hotset.policies.drift import DriftMeter
    from hotset.policies.drift_check import Tightening

QUALITY: Mapping[Format, int] = {
    Format.BF16: 100,
    Format.BF16Z: 100,
    Format.FP8: 80,
    Format.INT8: 80,
    Format.LOWRANK: 50,
    Format.NF4: 41,
    Format.INT4: 40,
    Format.INT3: 30,
    Format.INT2: 20,
}
"""How close a format is to the checkpoint's precision; `bf16z` is lossless, so it equals `bf16`."""

BUDGET_NATS = 0.002
"""Quality budget unless told otherwise: mean KL in nats a token."""
LOSSY = tuple(
    str(form)
    for form in (Format.FP8, Format.INT8, Format.NF4, Format.INT4, Format.INT3, Format.INT2)
)
"""Formats that calibration measures unless told otherwise."""


def is_lossless(form: Format | str) -> bool:
    """Tell whether a format keeps every bit; a name that hotset does not know does not."""
    return form in LOSSLESS


@dataclass(frozen=True, slots=True, kw_only=True)
class Refusal:
    """A refusal and the bound that it protects, in words."""

    reason: Reason
    bound: str


@dataclass(frozen=True, slots=True, kw_only=True)
class _Asked:
    """Blocks that somebody asks for again and again: their floors, and where the table has them.

    `places` counts the table's blocks row by row; one beyond the last is a block that it lacks.
    """

    blocks: tuple[BlockId, ...]
    floors: NDArray[np.int64]
    places: NDArray[np.int64]


class Guardrail:
    """The precision floor by layer, the last-copy rule and the budgets."""

    def __init__(
        self,
        *,
        floor: Mapping[int, Format] | None = None,
        default_floor: Format = Format.BF16,
        block_floor: Mapping[BlockId, Format] | None = None,
        drift: DriftMeter | None = None,
        storage_is_verified: bool = True,
    ) -> None:
        """`floor[layer]` is the cheapest format allowed there, `default_floor` elsewhere.

        `block_floor` wins over both for its blocks. `drift` has to allow a format as well; with it
        comes a live check.
        """
        self._floor = dict(floor or {})
        self._block_floor = dict(block_floor or {})
        self._drift = drift
        self.check = None if drift is None else LiveCheck(drift)
        self._default = default_floor
        self._storage_is_verified = storage_is_verified
        self._floor_follows = False  # floors are those of the drift meter, not a person's
        self._asked: _Asked | None = None
        self._repairing: dict[BlockId, None] = {}
        self._repaired_ns = 0
        self._pairs = 0
        self.left_out = 0
        """Pairs that were measured and are about an older mix."""

    @classmethod
    def from_sensitivity(
        cls, kl_by_layer: Mapping[int, float], *, budget_kl: float, cheap: Format = Format.INT8
    ) -> Guardrail:
        """Allow `cheap` in the least sensitive layers whose summed divergence fits `budget_kl`.

        `kl_by_layer[layer]` is the divergence in nats (KL of the next-token distribution) when
        that layer alone is stored in `cheap`. Layers that were not measured stay at full
        precision. A budget of 0 is exact mode.
        """
        floor: dict[int, Format] = {}
        spent = 0.0
        for layer in sorted(kl_by_layer, key=lambda layer: (kl_by_layer[layer], layer)):
            spent += max(kl_by_layer[layer], 0.0)
            if budget_kl <= 0 or spent > budget_kl:
                break
            floor[layer] = cheap
        return cls(floor=floor)

    @classmethod
    def from_drift(cls, drift: DriftMeter, *, storage_is_verified: bool = True) -> Guardrail:
        """Bound every block by measured drift alone, and show each layer's floor as it follows.

        `floor(layer)` is the cheapest format in which the whole layer would stay inside its share;
        single experts may go below it as far as the drift allows.
        """
        made = cls(floor=drift.floors(), drift=drift, storage_is_verified=storage_is_verified)
        made._floor_follows = True
        cheapest = min(QUALITY, key=lambda form: QUALITY[form])
        made._block_floor = dict.fromkeys(drift.blocks(), cheapest)
        return made

    def floor(self, layer: int) -> Format:
        """Return the cheapest format that `layer` may use."""
        return self._floor.get(layer, self._default)

    def _own_floor(self, block: BlockId) -> Format:
        return self._block_floor.get(block, self.floor(block.layer))

    def check_floor(self, block: BlockId, form: Format) -> Refusal | None:
        """Say whether `form` is at or above the floor that a person has set for `block`."""
        floor = self._own_floor(block)
        if QUALITY[form] < QUALITY[floor]:
            whose = f"block {block}" if block in self._block_floor else f"layer {block.layer}"
            return Refusal(
                reason=Reason.VETO_PRECISION,
                bound=f"{whose} has the precision floor {floor.value}, {form.value} is below it",
            )
        return None

    def check_demotion(self, block: BlockId, form: Format) -> Refusal | None:
        """Say whether `block` may be computed with in `form`."""
        refusal = self.check_floor(block, form)
        if refusal is not None or is_lossless(form):
            return refusal
        if self.check is not None and self.check.frozen:
            return Refusal(
                reason=Reason.VETO_DRIFT, bound=f"demotions are frozen: {self.check.said}"
            )
        bound = None if self._drift is None else self._drift.check(block, form)
        return None if bound is None else Refusal(reason=Reason.VETO_PRECISION, bound=bound)

    def may_compute(self, blocks: tuple[BlockId, ...], form: Format) -> NDArray[np.bool_]:
        """Tell for each of `blocks`, [B], whether `check_demotion` lets it compute in `form`."""
        if self._asked is None or self._asked.blocks is not blocks:
            self._asked = self._look_up(blocks)
        found: NDArray[np.bool_] = self._asked.floors <= QUALITY[form]
        if self._drift is None or is_lossless(form):
            return found
        if self.check is not None and self.check.frozen:
            return np.zeros(len(blocks), dtype=bool)
        allowed = np.append(self._drift.allowed(form).ravel(), False)
        found &= allowed[self._asked.places]
        return found

    def _look_up(self, blocks: tuple[BlockId, ...]) -> _Asked:
        layers = () if self._drift is None else self._drift.layers
        experts = 0 if self._drift is None else self._drift.costs.nats.shape[1]
        first = {layer: row * experts for row, layer in enumerate(layers)}
        last = len(layers) * experts
        return _Asked(
            blocks=blocks,
            floors=np.array([QUALITY[self._own_floor(block)] for block in blocks], dtype=np.int64),
            places=np.array(
                [
                    first[block.layer] + block.index
                    if block.layer in first and block.index < experts
                    else last
                    for block in blocks
                ],
                dtype=np.int64,
            ),
        )

    # --- drift and the live check ---------------------------------------------------------------

    @property
    def drift(self) -> DriftMeter | None:
        """What the resident formats cost by the table; None without one."""
        return self._drift

    def observe(self, counts: Mapping[BlockId, int], *, tokens: int) -> None:
        """Take in tokens routed to each block: drift follows what is served."""
        if self._drift is not None:
            self._drift.observe(counts, tokens=tokens)

    def resident(self, block: BlockId, forms: Iterable[Format], *, now_ns: int) -> None:
        """Take in which formats devices compute `block` in from now on; the cheapest counts."""
        worst = min(forms, key=lambda form: QUALITY[form], default=Format.BF16)
        if self._drift is None or not self._drift.knows(block, worst):
            return
        if not is_lossless(worst):
            if block not in self._repairing:  # else it was recorded as repaired, and is about to be
                self._drift.set(block, worst)
            return
        self._drift.set(block, worst)
        if block in self._repairing:
            del self._repairing[block]
            if not self._repairing:
                self._repaired_ns = now_ns

    @property
    def repairing(self) -> tuple[BlockId, ...]:
        """Blocks that have to go back to full precision and have not yet, worst first."""
        return tuple(self._repairing)

    def due(self) -> tuple[BlockId, ...]:
        """Blocks that drift alone, as the text has shifted, sends back to full precision now."""
        found = () if self._drift is None else self._drift.repairs()
        self._repair(found)
        return found

    def measured(
        self, kl: Sequence[float], flips: Sequence[bool], *, since_ns: int
    ) -> Tightening | None:
        """Take in pairs of a request that began at `since_ns`; say what a broken bound led to.

        Pairs of requests that began before the last repairs were done are about the mix before
        them and are left out.
        """
        if self.check is None or self._drift is None:
            return None
        if self._repairing or since_ns < self._repaired_ns:
            self.left_out += len(kl)
            return None
        self._pairs += len(kl)
        self.check.add(kl, flips)
        found = self.check.step(self._pairs)
        if found is not None:
            if self._floor_follows:
                self._floor, self._asked = self._drift.floors(), None
            self._repair(found.repairs)
        return found

    def figures(self) -> dict[str, float]:
        """Nats a token: the `budget`, what the `table` says, what the live check `measured`.

        Empty without a table; `measured` and its 95 % bound `upper` only once there are pairs.
        """
        if self._drift is None or self.check is None:
            return {}
        found = {"budget": self._drift.budget.nats, "table": self._drift.nats}
        verdict = self.check.verdict()
        if verdict.enough:
            found |= {"measured": verdict.mean, "upper": verdict.upper}
        return found

    def describe(self) -> str:
        """The same in words, and whether demotions are frozen; empty without a table."""
        if self._drift is None or self.check is None:
            return ""
        verdict = self.check.verdict()
        said = [f"drift {self._drift.nats:.2g} of {self._drift.budget.nats:.2g} nats by the table"]
        if verdict.pairs:
            said.append(
                f"live check {verdict.mean:.2g} (up to {verdict.upper:.2g}) over {verdict.pairs} "
                f"tokens, {verdict.flip_ratio:.1%} of top choices changed"
            )
        if self._repairing:
            said.append(f"{len(self._repairing)} blocks to repair")
        if self.check.frozen:
            said.append(f"demotions FROZEN by the live check: {self.check.said}")
        return "; ".join(said)

    def _repair(self, blocks: Iterable[BlockId]) -> None:
        if self._drift is not None:
            self._drift.repair(blocks := tuple(blocks))
            self._repairing |= dict.fromkeys(blocks)

    # --- copies and bytes -----------------------------------------------------------------------

    def check_drop(
        self, block: BlockId, copies: Iterable[Copy], *, going: Copy | None = None
    ) -> Refusal | None:
        """Say whether `going` may be dropped, given all `copies` of the block (it included)."""
        if self._storage_is_verified:
            return None
        left = sum(
            1 for copy in copies if going is None or (copy.store, copy.format) != _key(going)
        )
        if left > 0:
            return None
        return Refusal(
            reason=Reason.VETO_LAST_COPY,
            bound=f"block {block} would have no verified copy left, and storage holds none",
        )

    def check_fit(
        self, nbytes: int, *, used_bytes: int, capacity_bytes: int, store: str
    ) -> Refusal | None:
        """Say whether `nbytes` more fit (`used_bytes` includes what is on its way)."""
        if used_bytes + nbytes <= capacity_bytes:
            return None
        return Refusal(
            reason=Reason.VETO_MEMORY,
            bound=f"{store} holds {used_bytes} of {capacity_bytes} bytes, {nbytes} more do not fit",
        )


def _key(copy: Copy) -> tuple[str, Format]:
    return copy.store, copy.format
