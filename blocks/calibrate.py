"""Calibration: from a model and text to a sensitivity table, inside a time budget.

Decides where samples are spent. Must not know how formats are chosen: `choose` is given, and so is
the clock. Three parts, on two halves of the text that share no window:

1. **Fit**: the first-order damage of every block in every format (`sensitivity_fisher`), until the
   sums are known to a few per cent and most experts were seen often enough.
2. **Groups**: the true KL of each layer in each format, on the other half, with error bars. The
   quotient of measured and estimated corrects the layer's damages; it is never below 1. After one
   round, samples go to the group whose error bar moves the chosen mix most.
3. **Mixes**: whole mixes that the corrected table chooses at several budgets. The quotient of their
   true KL and the sum of their damages is the optimism of the table; samples go to the mix that is
   known worst.

Invariants: each part does at least one batch, so a budget that is too short is overrun, not
ignored; estimates and checks never share a window; the same seed, text and clock give the same
table.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from hotset.blocks.sensitivity_fisher import PSEUDO_TOKENS, first_order, frequencies, smoothed
from hotset.blocks.sensitivity_stats import bootstrap
from hotset.blocks.sensitivity_table import (
    VERSION,
    GroupCheck,
    MixCheck,
    SensitivityTable,
    shorten,
)
from hotset.policies.types import BlockId

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch
    from numpy.typing import NDArray

    from hotset.blocks.sensitivity import KLMeter
    from hotset.blocks.sensitivity_fisher import Damage
    from hotset.blocks.sensitivity_stats import PairedKL

    Floats = NDArray[np.float64]
    Ints = NDArray[np.int64]
    Choose = Callable[[Floats, float], Ints]
    """(nats [L, E, F], most nats) -> codes [L, E]: 0 full precision, else 1 + a format's place."""

_FIT_PART, _GROUP_PART = 0.4, 0.75  # of the time, from the start
_LADDER = (0.125, 0.25, 0.5, 1.0)  # of the budget: sums of damage that the mixes are chosen for
_FIT_ERROR = 0.03
_SEEN_PART = 0.9  # of the blocks that the text uses at all
_GROUP_ERROR, _MIX_ERROR = 0.03, 0.05


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What to measure and for how long."""

    formats: tuple[str, ...]
    budget_nats: float
    time_ns: int
    seed: int = 0


class Calibration:
    """One run. `fit` and `check` are windows [W, T] of token ids, `text` names them."""

    def __init__(  # noqa: PLR0913 - a run's parts, by name
        self,
        meter: KLMeter,
        *,
        fit: torch.Tensor,
        check: torch.Tensor,
        text: str,
        settings: Settings,
        choose: Choose,
        clock: Callable[[], int] = time.monotonic_ns,
        say: Callable[[str], None] = lambda _text: None,
    ) -> None:
        """Raises ValueError for text that is too short."""
        if fit.shape[0] < 2 or check.shape[0] < 2:
            raise ValueError("fit and check need two windows each; give more text")
        self._meter, self._settings, self._choose = meter, settings, choose
        self._fit = list(meter.batches(fit))
        self._check = list(meter.batches(check))
        self._text, self._clock, self._say = text, clock, say
        self._start = clock()
        layers, forms = meter.catalog.layers, settings.formats
        self._groups: dict[tuple[int, int], _Seen] = {
            (row, code): _Seen() for row in range(len(layers)) for code in range(len(forms))
        }

    def run(self) -> SensitivityTable:
        """Measure all three parts."""
        catalog, settings = self._meter.catalog, self._settings
        found = self._first_order()
        sums, counts = found.nats.sum(axis=0), found.counts.sum(axis=0)
        plain = sums / found.tokens
        blended = smoothed(sums, counts, tokens=found.tokens, top_k=catalog.top_k)
        correction = self._check_groups(plain, blended)
        blended = shorten(blended * correction[:, None, :])
        mixes, optimism, upper = self._check_mixes(plain * correction[:, None, :], blended)
        use = shorten(frequencies(counts, tokens=found.tokens, top_k=catalog.top_k))
        return SensitivityTable(
            version=VERSION,
            checkpoint=catalog.digest,
            text=self._text,
            tokens=found.tokens,
            layers=catalog.layers,
            num_experts=catalog.num_experts,
            formats=settings.formats,
            nbytes=tuple(self._meter.nbytes(form) for form in settings.formats),
            full_nbytes=catalog.block_nbytes,
            nats=blended.tolist(),
            frequency=use.tolist(),
            groups=tuple(self._group_rows(plain)),
            mixes=mixes,
            optimism=optimism,
            optimism_upper=upper,
        )

    def _first_order(self) -> Damage:
        found: Damage | None = None
        for number, batch in enumerate(self._fit):
            part = first_order(
                self._meter, batch, formats=self._settings.formats,
                seed=self._settings.seed + number,
            )  # fmt: skip
            found = part if found is None else found.join(part)
            if self._late(_FIT_PART) or _well_known(found):
                break
        assert found is not None  # noqa: S101 - there are two windows at least
        self._say(f"first-order damages from {found.tokens} tokens")
        return found

    def _check_groups(self, plain: Floats, blended: Floats) -> Floats:
        """Measure layers by format; gives the correction [L, F]."""
        chosen = self._choose(blended, self._settings.budget_nats)
        weight = _chosen_nats(plain, chosen)  # [L, F]: what the mix takes from each group
        order = sorted(self._groups, key=lambda key: (-weight[key], key))
        for key in order:
            self._measure_group(key)
            if self._late(_GROUP_PART):
                break
        while not self._late(_GROUP_PART):
            total = float((weight * self._correction(plain)).sum())
            doubt = {
                key: weight[key] * seen.error() / max(float(plain[key[0], :, key[1]].sum()), 1e-30)
                for key, seen in self._groups.items()
                if seen.batches < len(self._check)
            }
            if not doubt or np.sqrt(sum(x * x for x in doubt.values())) <= _GROUP_ERROR * total:
                break
            self._measure_group(max(sorted(doubt), key=lambda key: doubt[key]))
        measured = [seen for seen in self._groups.values() if seen.batches]
        self._say(
            f"true KL of {len(measured)} of {len(self._groups)} groups, "
            f"{sum(seen.batches for seen in measured)} passes"
        )
        return self._correction(plain)

    def _check_mixes(
        self, plain: Floats, blended: Floats
    ) -> tuple[tuple[MixCheck, ...], float, float]:
        """Measure whole mixes; gives the rows, the optimism and its upper bound."""
        mixes: list[tuple[float, Ints, _Seen]] = []
        for part in _LADDER:
            budget = part * self._settings.budget_nats
            codes = self._choose(blended, budget)
            if codes.any() and not any((codes == other).all() for _, other, _ in mixes):
                mixes.append((budget, codes, _Seen()))
        for _, codes, seen in mixes:
            self._add(seen, self.mix_of(codes))
        while not self._late(1.0):
            open_mixes = [m for m in mixes if m[2].batches < len(self._check)]
            if not open_mixes:
                break
            _, codes, seen = max(open_mixes, key=lambda mix: mix[2].relative_error())
            if seen.relative_error() <= _MIX_ERROR:
                break
            self._add(seen, self.mix_of(codes))
        rows = tuple(self._mix_row(budget, codes, seen, plain) for budget, codes, seen in mixes)
        ratios = [row.mean / max(row.estimate, 1e-30) for row in rows]
        uppers = [row.upper / max(row.estimate, 1e-30) for row in rows]
        self._say(f"true KL of {len(rows)} whole mixes")
        return rows, max(ratios, default=1.0), max(uppers, default=1.0)

    def mix_of(self, codes: Ints) -> dict[BlockId, str]:
        """Name the formats of codes [L, E]; full precision is left out."""
        layers, forms = self._meter.catalog.layers, self._settings.formats
        return {
            BlockId(layers[row], expert): forms[codes[row, expert] - 1]
            for row, expert in np.argwhere(codes > 0).tolist()
        }

    def _measure_group(self, key: tuple[int, int]) -> None:
        row, code = key
        layer = self._meter.catalog.layers[row]
        mix = self._meter.uniform(self._settings.formats[code], layers=(layer,))
        self._add(self._groups[key], mix)

    def _add(self, seen: _Seen, mix: dict[BlockId, str]) -> None:
        seen.add(self._meter.measure(mix, self._check[seen.batches]))

    def _correction(self, plain: Floats) -> Floats:
        """Measured over estimated for each group, at least 1; the format's worst where unknown."""
        found = np.ones((plain.shape[0], plain.shape[2]))
        for (row, code), seen in self._groups.items():
            if seen.batches:
                ratio = seen.mean() / max(float(plain[row, :, code].sum()), 1e-30)
                found[row, code] = max(1.0, ratio)
        for (row, code), seen in self._groups.items():
            if not seen.batches:
                found[row, code] = found[:, code].max()
        return found

    def _group_rows(self, plain: Floats) -> list[GroupCheck]:
        rows = []
        for (row, code), seen in sorted(self._groups.items()):
            if not seen.batches:
                continue
            spread = bootstrap(seen.by_window, seed=self._settings.seed)
            rows.append(
                GroupCheck(
                    layer=self._meter.catalog.layers[row],
                    format=self._settings.formats[code],
                    estimate=float(plain[row, :, code].sum()),
                    mean=spread.mean, lower=spread.lower, upper=spread.upper,
                    tokens=seen.tokens,
                )
            )  # fmt: skip
        return rows

    def _mix_row(self, budget: float, codes: Ints, seen: _Seen, plain: Floats) -> MixCheck:
        assert seen.pairs is not None  # noqa: S101 - every mix was measured once
        found = seen.pairs.summary(seed=self._settings.seed)
        sizes = (self._meter.catalog.block_nbytes, *map(self._meter.nbytes, self._settings.formats))
        ratio = float(np.array(sizes)[codes].mean()) / self._meter.catalog.block_nbytes
        return MixCheck(
            budget=budget,
            bits_per_weight=ratio * self._meter.full_bits,
            estimate=float(_chosen_nats(plain, codes).sum()),
            mean=found.mean, lower=found.lower, upper=found.upper, p99=found.p99,
            flip_ratio=found.flip_ratio, tokens=found.tokens,
        )  # fmt: skip

    def _late(self, part: float) -> bool:
        return self._clock() - self._start >= part * self._settings.time_ns


class _Seen:
    """Pairs of one mix so far."""

    def __init__(self) -> None:
        self.pairs: PairedKL | None = None
        self.batches = 0

    @property
    def by_window(self) -> Floats:
        assert self.pairs is not None  # noqa: S101 - asked after the first batch only
        return self.pairs.by_window

    @property
    def tokens(self) -> int:
        return 0 if self.pairs is None else int(self.pairs.kl.size)

    def add(self, pairs: PairedKL) -> None:
        """Take in one more batch."""
        self.pairs = pairs if self.pairs is None else self.pairs.join(pairs)
        self.batches += 1

    def mean(self) -> float:
        """Mean KL so far."""
        return float(self.by_window.mean())

    def error(self) -> float:
        """Standard error of the mean over windows; infinite when it cannot be known."""
        if self.pairs is None or self.by_window.size < 2:
            return np.inf
        return float(self.by_window.std(ddof=1) / np.sqrt(self.by_window.size))

    def relative_error(self) -> float:
        """The same as a share of the mean."""
        return self.error() / max(self.mean(), 1e-30) if self.batches else np.inf


def _well_known(found: Damage) -> bool:
    """Tell whether more text would change little: sums are known, experts were seen."""
    by_window = found.nats.sum(axis=2)  # [W, L, F]
    windows = by_window.shape[0]
    if windows < 8:
        return False
    error = by_window.std(axis=0, ddof=1) / np.sqrt(windows)
    known = (error <= _FIT_ERROR * by_window.mean(axis=0)).all()
    seen = found.counts.sum(axis=0)
    return bool(known and (seen[seen > 0] >= 4 * PSEUDO_TOKENS).mean() >= _SEEN_PART)


def _chosen_nats(nats: Floats, codes: Ints) -> Floats:
    """Damage that `codes` [L, E] take from each layer and format, [L, F]."""
    hot = codes[..., None] == np.arange(1, nats.shape[2] + 1)
    found: Floats = (nats * hot).sum(axis=1)
    return found
