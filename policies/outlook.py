"""What the brain knows of time: layer times, pressure, concurrency, and what follows from them.

Decides the regime and who is pressed; must not know placement. A report that is older than its
time to live counts for nothing, so that missing telemetry means "unknown" and never "idle": with
nothing known every answer is neutral.

Regimes: `sparse`, where a step touches few experts of a layer, so locality pays; `dense`, where it
touches nearly all of them (large batches), so which one is hot says little, and bandwidth,
precision and dispatch are what helps.

Invariants: ratios are in thousandths and lie in 0..1000; regime and pressure have hysteresis, so
that noise around a bound changes nothing.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from statistics import median_high as median
from typing import TYPE_CHECKING

import numpy as np

from hotset.policies.linkmodel import LinkSpec
from hotset.policies.types import Concurrency, LayerTimes, Pressure, Tier

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from hotset.policies.config import PolicyConfig

_PERMILLE = 1000
_RATES = 5
"""Reports of a link that are remembered."""
_LEAST_BUSY_NS = 1_000_000
"""Less than this on a link says nothing about its bandwidth."""

GUESSES: dict[Tier, LinkSpec] = {
    Tier.HBM: LinkSpec(bandwidth_bytes_per_s=20_000_000_000, latency_ns=20_000),
    Tier.COMPRESSED: LinkSpec(bandwidth_bytes_per_s=20_000_000_000, latency_ns=20_000),
    Tier.HOST: LinkSpec(bandwidth_bytes_per_s=20_000_000_000, latency_ns=20_000),
    Tier.CXL: LinkSpec(bandwidth_bytes_per_s=10_000_000_000, latency_ns=20_000),
    Tier.STORAGE: LinkSpec(bandwidth_bytes_per_s=2_000_000_000, latency_ns=100_000),
}
"""What reading from a tier costs until somebody has measured it; only the order matters much."""


class Regime(StrEnum):
    """What a step asks of the cluster."""

    UNKNOWN = "unknown"
    SPARSE = "sparse"
    DENSE = "dense"


@dataclass(slots=True)
class _Said:
    """The newest report of each kind of one store."""

    times: LayerTimes | None = None
    load: Concurrency | None = None
    load_before_ns: int = 0
    pressure: Pressure | None = None
    rates: dict[str, tuple[int, ...]] = field(default_factory=dict)  # the newest, by source


class Outlook:
    """Reports of all stores, and what they mean together."""

    def __init__(self, config: PolicyConfig) -> None:
        """Nothing is known."""
        self._config = config
        self._said: dict[str, _Said] = {}
        self._pressed: dict[str, bool] = {}
        self._uses_per_token = 0
        self.regime = Regime.UNKNOWN

    # --- what others tell -----------------------------------------------------------------------

    def observe(self, event: LayerTimes | Pressure | Concurrency) -> None:
        """Take in a report; an older one than the last is left out."""
        said = self._said.setdefault(event.store, _Said())
        match event:
            case LayerTimes():
                if event.steps > 0 and (said.times is None or said.times.now_ns <= event.now_ns):
                    said.times = event
            case Concurrency():
                before = said.load
                if before is None or before.now_ns <= event.now_ns:
                    said.load_before_ns = before.now_ns if before is not None else 0
                    said.load = event
            case Pressure():
                if said.pressure is None or said.pressure.now_ns <= event.now_ns:
                    said.pressure = event
                    for link in event.links:
                        if link.busy_ns >= _LEAST_BUSY_NS and link.nbytes > 0:
                            rate = max(1, link.nbytes * 1_000_000_000 // link.busy_ns)
                            known = said.rates.get(link.source, ())
                            said.rates[link.source] = (*known[1 - _RATES :], rate)

    def routed(self, uses: int, *, tokens: int) -> None:
        """Blocks used by so many tokens, all layers together: how many a token uses."""
        if tokens > 0 and uses > 0:
            fresh = uses * _PERMILLE // tokens
            old = self._uses_per_token or fresh
            self._uses_per_token = old + (fresh - old) // 4

    @property
    def uses_per_token(self) -> int:
        """Blocks that a token uses, all layers together, in thousandths; 0: unknown."""
        return self._uses_per_token

    def forget(self, store: str) -> None:
        """The store is gone."""
        self._said.pop(store, None)
        self._pressed.pop(store, None)

    # --- what follows ---------------------------------------------------------------------------

    def step_ns(self, now_ns: int) -> int:
        """Time of a forward pass without stalls, the mean over workers; 0: nobody has said."""
        found = [
            sum(ns for _, ns in said.times.times)
            for said in self._said.values()
            if said.times is not None and self._fresh(said.times.now_ns, now_ns)
        ]
        return sum(found) // len(found) if found else 0

    def hide_ns(self, now_ns: int) -> int:
        """Compute of one layer: what a transfer can hide behind; 0: nobody has said."""
        layers = max((len(s.times.times) for s in self._said.values() if s.times), default=0)
        return self.step_ns(now_ns) // layers if layers else 0

    def experts_permille(self, now_ns: int) -> int:
        """Part of a forward pass that experts take, in thousandths; 0: nobody has measured it."""
        found = [
            said.times
            for said in self._said.values()
            if said.times is not None and self._fresh(said.times.now_ns, now_ns)
        ]
        total = sum(ns for times in found for _, ns in times.times)
        return min(_PERMILLE, sum(t.experts_ns for t in found) * _PERMILLE // total) if total else 0

    def steps_per_s(self, now_ns: int) -> int:
        """Forward passes of a worker in a second, in thousandths, the mean over those that work."""
        rates = []
        for said in self._said.values():
            load = said.load
            if load is None or not self._fresh(load.now_ns, now_ns) or not said.load_before_ns:
                continue
            span_ns = load.now_ns - said.load_before_ns
            if span_ns > 0 and load.steps > 0:
                rates.append(load.steps * _PERMILLE * 1_000_000_000 // span_ns)
        return sum(rates) // len(rates) if rates else 0

    def tokens_per_s(self, now_ns: int) -> int:
        """Tokens that all workers compute in a second; 0: none, or nobody has said."""
        total = 0
        for said in self._said.values():
            load = said.load
            if load is None or not self._fresh(load.now_ns, now_ns) or not said.load_before_ns:
                continue
            span_ns = load.now_ns - said.load_before_ns
            if span_ns > 0:
                total += load.tokens * 1_000_000_000 // span_ns
        return total

    def tokens_per_step(self, now_ns: int) -> int:
        """Tokens in a forward pass, in thousandths, the mean over workers; 0: unknown."""
        loads = [
            said.load
            for said in self._said.values()
            if said.load is not None
            and said.load.steps > 0
            and self._fresh(said.load.now_ns, now_ns)
        ]
        steps = sum(load.steps for load in loads)
        return sum(load.tokens for load in loads) * _PERMILLE // steps if steps else 0

    def judge_regime(self, counts: NDArray[np.int64], *, now_ns: int) -> Regime:
        """Return the regime by the share of all blocks that a step touches.

        A step of T tokens that use k blocks each touches a block of share p with the chance
        1 - exp(-T k p).
        """
        tokens = self.tokens_per_step(now_ns)
        total = int(counts.sum())
        if not tokens or not total or not self._uses_per_token:
            self.regime = Regime.UNKNOWN
            return self.regime
        expected = tokens / _PERMILLE * self._uses_per_token / _PERMILLE
        touched = int(_PERMILLE * (1.0 - np.exp(counts * (-expected / total))).mean())
        bound = self._config.dense_leave if self.regime is Regime.DENSE else self._config.dense_at
        self.regime = Regime.DENSE if touched >= bound else Regime.SPARSE
        return self.regime

    def judge_pressure(self, stores: list[str], *, now_ns: int) -> None:
        """Compare each store's links with the bounds, with hysteresis.

        A store is pressed when demand keeps its own reads busy, or when all reads of it together
        keep it busy as a source.
        """
        busy: dict[str, int] = dict.fromkeys(stores, 0)
        for reader, said in self._said.items():
            report = said.pressure
            if report is None or not self._fresh(report.now_ns, now_ns):
                continue
            for link in report.links:
                if link.span_ns <= 0:
                    continue
                demand = link.demand_ns * _PERMILLE // link.span_ns
                if reader in busy:
                    busy[reader] += demand
                if link.source in busy and link.source != reader:
                    busy[link.source] += link.busy_ns * _PERMILLE // link.span_ns
        for store, permille in busy.items():
            was = self._pressed.get(store, False)
            bound = self._config.resume_at if was else self._config.pause_at
            self._pressed[store] = permille > bound

    def pressed(self, store: str) -> bool:
        """Whether background work to or from this store waits."""
        return self._pressed.get(store, False)

    def used_bytes(self, store: str, *, now_ns: int) -> int:
        """Bytes that occupy the store by its own report; 0: it has not said."""
        said = self._said.get(store)
        report = said.pressure if said is not None else None
        return report.used_bytes if report and self._fresh(report.now_ns, now_ns) else 0

    def measured(self, source: str) -> bool:
        """Whether somebody has measured what reading from this store costs."""
        return any(source in said.rates for said in self._said.values())

    def link(self, source: str, tier: Tier) -> LinkSpec:
        """What reading from this store costs: the slowest that readers have measured.

        Each reader counts with the median of its last reports, so that a pause of its process does
        not pass for a slow link.
        """
        rates = [
            int(median(said.rates[source])) for said in self._said.values() if source in said.rates
        ]
        if not rates:
            return GUESSES[tier]
        return LinkSpec(bandwidth_bytes_per_s=min(rates), latency_ns=0)

    def _fresh(self, at_ns: int, now_ns: int) -> bool:
        return now_ns - at_ns <= self._config.telemetry_ttl_ns
