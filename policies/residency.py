"""What one device keeps, evicts and prefetches: runs inside the worker on the token path.

Decides by expected use per byte. Must not know addresses, links, clocks or other devices. Not
thread-safe: the worker calls it under its own lock. Budget: 20 us a layer-step.

The worker's protocol for each layer: `routed` -> pin what is resident -> for each missing expert
`victim` / `dropped` until there is `room`, then `in_flight`, fetch, `landed` (or `failed`), `pin`
-> compute -> `unpin`; prefetches likewise, without pins.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple, Protocol

import numpy as np

from hotset.errors import ConfigError
from hotset.policies.config import ResidencyConfig
from hotset.policies.device import DeviceShape, DeviceTable, Resident
from hotset.policies.predictor import TransitionPredictor, Visit

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence

    from numpy.typing import NDArray

    from hotset.policies.states import StoryLine
    from hotset.policies.types import Format, Reason, State


__all__ = [
    "DeviceResidency",
    "DeviceShape",
    "LayerPlan",
    "LoadOnDemandResidency",
    "LruResidency",
    "ResidencyPolicy",
    "Resident",
    "make_policy",
]

_RESCALE_AT = 1e12
_HALF = np.float32(0.5)
_NEVER = np.float32(1e-30)
"""Aged uses of a block that was never used: not 0, so that a rank is a number."""
_MOST_REQUESTS = 1024
"""Requests whose last layers are remembered; a worker forgets them when they end."""


class LayerPlan(NamedTuple):
    """What to do for one layer of one step."""

    resident: list[int]  # experts with a landed copy
    arriving: list[int]  # experts already on their way: wait for them
    missing: list[int]  # experts to fetch (or to dispatch to), most tokens first
    prefetch: list[tuple[int, int]]  # (layer, expert) to start now, likeliest first


class _RowViews(NamedTuple):
    """One layer's part of the arrays by flat index."""

    use: NDArray[np.float32]
    expect: NDArray[np.float32]
    rank: NDArray[np.float32]
    held: NDArray[np.float32]


class ResidencyPolicy(Protocol):
    """What the worker asks of a residency policy."""

    capacity_bytes: int
    used_bytes: int

    def routed(
        self,
        layer: int,
        experts: Sequence[int],
        counts: Sequence[int],
        *,
        step: int,
        request: int = 0,
    ) -> LayerPlan:
        """`experts` (distinct) of `layer` are needed now by `counts[i]` tokens each."""
        ...

    def victim(
        self, want_bytes: int, *, needed: Collection[tuple[int, int]] = ()
    ) -> Resident | None:
        """Return the copy to drop so that `want_bytes` may fit; None: nothing to drop."""
        ...

    def steer(self, least_chance: float) -> None:
        """From now on a prefetch must have at least this chance of use, 0..1."""
        ...

    def room(self, want_bytes: int) -> bool:
        """Whether the bytes fit without an eviction."""
        ...

    def pin(self, layer: int, expert: int) -> None:
        """Keep a landed copy until the matching `unpin`."""
        ...

    def unpin(self, layer: int, expert: int) -> None:
        """Give back one pin."""
        ...

    def in_flight(self, layer: int, expert: int, form: Format = ..., reason: Reason = ...) -> None:
        """Claim the bytes of a fetch that starts now."""
        ...

    def landed(self, layer: int, expert: int) -> None:
        """The fetch ended with a verified copy."""
        ...

    def failed(self, layer: int, expert: int, *, staged: bool = False) -> None:
        """The fetch ended without a copy and its slot is free again."""
        ...

    def dropped(
        self, layer: int, expert: int, *, staged: bool = False, reason: Reason = ...
    ) -> None:
        """The copy was freed."""
        ...

    def demoted(self, layer: int, expert: int, form: Format = ...) -> None:
        """The full copy was encoded here in a reduced format."""
        ...

    def staged(self, layer: int, expert: int, *, yes: bool) -> None:
        """Another store now has a copy, or no longer has one."""
        ...

    def state(self, layer: int, expert: int) -> State:
        """State of the block at this device."""
        ...

    def format(self, layer: int, expert: int) -> Format | None:
        """Format of the landed copy."""
        ...

    def story(self, layer: int, expert: int) -> tuple[StoryLine, ...]:
        """What happened to the block here, oldest first."""
        ...

    def residents(self) -> tuple[Resident, ...]:
        """All landed copies."""
        ...

    def nbytes(self, form: Format) -> int:
        """Bytes of a slot of this format."""
        ...

    def forget(self, request: int) -> None:
        """A request has ended."""
        ...

    def expected_use(self) -> NDArray[np.float64]:
        """Return the expected uses in the next pass over the model, [L, E]."""
        ...

    def validate(self) -> None:
        """Assert the invariants."""
        ...


class LruResidency(DeviceTable):
    """Evicts what was used longest ago; prefetches nothing. The baseline of every comparison."""

    def __init__(self, shape: DeviceShape) -> None:
        """Start empty."""
        super().__init__(shape)
        self._used_at = [0.0] * (len(shape.layers) * shape.num_experts)
        self._now = 0.0

    def routed(
        self,
        layer: int,
        experts: Sequence[int],
        counts: Sequence[int],
        *,
        step: int,
        request: int = 0,  # noqa: ARG002 - the protocol's; only predictors tell requests apart
    ) -> LayerPlan:
        """See `ResidencyPolicy`."""
        self._step = step
        base = self._base[layer]
        plan = _sort_needs(self, base, experts=experts, counts=counts)
        self._note_use(base, experts=experts, missing=plan.missing)
        return plan

    def _note_use(self, base: int, *, experts: Sequence[int], missing: Sequence[int]) -> None:
        del missing
        for expert in experts:
            self._now += 1.0
            self._used_at[base + expert] = self._now
            self._refresh(base + expert)

    def _value(self, flat: int) -> float:
        return self._used_at[flat] or 0.5

    def steer(self, least_chance: float) -> None:
        """Nothing is prefetched."""

    def forget(self, request: int) -> None:
        """Nothing is kept by request."""

    def expected_use(self) -> NDArray[np.float64]:
        """Recency as a stand-in: 1 for what was used in the last pass, falling with age."""
        shape = (len(self.layers), self.num_experts)
        age = self._now - np.array(self._used_at).reshape(shape)
        return np.where(age < self._now, 1.0 / (1.0 + age / (self.num_experts * 1.0)), 0.0)


class LoadOnDemandResidency(LruResidency):
    """Loads what is needed and keeps it only until its slot is wanted: first in, first out."""

    def _note_use(self, base: int, *, experts: Sequence[int], missing: Sequence[int]) -> None:
        del experts
        for expert in missing:
            self._now += 1.0
            self._used_at[base + expert] = self._now


class DeviceResidency(DeviceTable):
    """Aged popularity, with prefetch from layer-to-layer transitions.

    The value of a copy is its aged number of uses by byte: every layer comes once a pass, so
    what counts is the chance of use in the next pass, not the distance to it. The weight of a
    use grows instead of all counts fading, so a use touches one number. A candidate for prefetch
    is an absent block of a layer ahead; its chance mixes the predictor's with its own popularity
    (either alone fetches too much), and must beat the cheapest victim's by `prefetch_gain`. The
    predictor is silent while most experts of a layer are touched (`dense_ratio`).
    """

    _rank_dtype = np.float32  # half the bytes to search for a victim

    def __init__(
        self,
        shape: DeviceShape,
        *,
        config: ResidencyConfig | None = None,
        predictor: TransitionPredictor | None = None,
    ) -> None:
        """`predictor` None builds one from `config`."""
        super().__init__(shape)
        self.config = config or ResidencyConfig()
        rows, size = len(shape.layers), shape.num_experts
        self.predictor = predictor or TransitionPredictor(
            rows=rows,
            num_experts=size,
            depth=max(1, self.config.prefetch_depth),
            half_life_steps=self.config.transition_half_life_steps,
        )
        self._rows = rows
        self._use = np.full(rows * size, _NEVER, dtype=np.float32)
        self._expect = self._use.copy()
        """Uses, raised to what is predicted for a layer until that layer has passed."""
        arrays = (self._use, self._expect, self._rank, self._held)
        # Views by row: slicing anew on each step costs more than the arithmetic.
        self._views = [
            _RowViews(*(values[row * size : (row + 1) * size] for values in arrays))
            for row in range(rows)
        ]
        self._weight = 1.0
        self._growth = 2.0 ** (1.0 / (self.config.half_life_steps * rows))
        self._fade = 1.0 - 2.0 ** (-1.0 / self.config.half_life_steps)
        self._touched_ratio = 0.0
        self._paths: dict[int, list[Visit]] = {}
        self._least_chance = self.config.prefetch_min_probability

    def steer(self, least_chance: float) -> None:
        """See `ResidencyPolicy`; the configured minimum stays the lower bound."""
        self._least_chance = max(least_chance, self.config.prefetch_min_probability)

    @property
    def predicting(self) -> bool:
        """Whether prediction has something to choose in the present regime."""
        return self.config.prefetch_depth > 0 and self._touched_ratio <= self.config.dense_ratio

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
        now = np.array(experts, dtype=np.intp)
        plan = _sort_needs(self, base, experts=experts, counts=counts)
        row = base // self.num_experts
        self._note_use(row, now=now)
        # Prefill and large batches at once, decode only when it has lasted.
        ratio = len(experts) / self.num_experts
        self._touched_ratio = max(ratio, 0.9 * self._touched_ratio + 0.1 * ratio)
        if not self.predicting:
            self._paths.pop(request, None)
            return plan
        self._learn(row, now=now, request=request)
        for distance in range(1, self.config.prefetch_depth + 1):
            self._propose(row, now=now, distance=distance, into=plan.prefetch)
        return plan

    def _note_use(self, row: int, *, now: NDArray[np.intp]) -> None:
        self._weight *= self._growth
        if self._weight > _RESCALE_AT:
            for values in (self._use, self._expect, self._rank):
                np.maximum(values / np.float32(self._weight), _NEVER, out=values)
            self._weight = 1.0
        use, expect, rank, held = self._views[row]
        use[now] += np.float32(self._weight)
        expect[:] = use
        np.multiply(use, held, out=rank)

    def _learn(self, row: int, *, now: NDArray[np.intp], request: int) -> None:
        path = self._paths.get(request)
        if path is None:
            if len(self._paths) >= _MOST_REQUESTS:
                del self._paths[next(iter(self._paths))]
            path = self._paths[request] = []
        depth = self.predictor.depth
        if path and (path[-1].row + 1) % self._rows != row:
            path.clear()  # a layer was left out: what follows is no transition
        path.append(Visit(row, now))
        if len(path) >= self._rows + depth:
            self.predictor.observe(path)
            del path[:-depth]

    def _propose(
        self, row: int, *, now: NDArray[np.intp], distance: int, into: list[tuple[int, int]]
    ) -> None:
        config = self.config
        target = (row + distance) % self._rows
        base = target * self.num_experts
        use, expect, rank, held = self._views[target]
        uses_each = self._weight / self._fade  # aged uses of a block that every pass needs
        chance = self.predictor.predict(row, distance=distance, experts=now, scale=0.5 * uses_each)
        chance += use * _HALF
        bar = self._least_chance * uses_each
        if self.used_bytes + self.full_nbytes > self.capacity_bytes:
            bar = max(bar, float(self._rank.min()) * config.prefetch_gain)
        # What is expected next must not be the next victim, be it here or on its way.
        np.maximum(use, chance, out=expect)
        np.multiply(expect, held, out=rank)
        likely = (chance >= bar).nonzero()[0]
        if not likely.size:
            return
        landed, coming = self._format, self._coming
        absent = [
            expert
            for expert in likely.tolist()
            if landed[base + expert] is None and coming[base + expert] is None
        ]
        if len(absent) > 1:
            absent.sort(key=chance.item, reverse=True)
        layer = self.layers[target]
        into.extend((layer, expert) for expert in absent[: config.prefetch_per_layer])

    def _value(self, flat: int) -> float:
        return float(self._expect[flat])

    def forget(self, request: int) -> None:
        """Free what was kept for a request that has ended."""
        self._paths.pop(request, None)

    def expected_use(self) -> NDArray[np.float64]:
        """Return the aged share of passes that used each block, [L, E] in 0..1."""
        use: NDArray[np.float64] = self._use.astype(np.float64) * (self._fade / self._weight)
        return use.reshape(self._rows, self.num_experts)


def _sort_needs(
    table: DeviceTable, base: int, *, experts: Sequence[int], counts: Sequence[int]
) -> LayerPlan:
    """Split the needed experts by what is here; those to fetch come by tokens, most first."""
    landed, coming = table._format, table._coming  # noqa: SLF001 - same books, hot path
    resident: list[int] = []
    arriving: list[int] = []
    missing: list[int] = []
    for expert in experts:
        flat = base + expert
        if landed[flat] is not None:
            resident.append(expert)
        elif coming[flat] is not None:
            arriving.append(expert)
        else:
            missing.append(expert)
    if len(missing) > 1 and max(counts) > min(counts):
        tokens = dict(zip(experts, counts, strict=True))
        missing.sort(key=lambda expert: -tokens[expert])
    return LayerPlan(resident, arriving, missing, [])


def make_policy(
    name: str, shape: DeviceShape, *, config: ResidencyConfig | None = None
) -> ResidencyPolicy:
    """Build the policy called `hotset`, `lru` or `load-on-demand`. Raises ConfigError."""
    match name:
        case "hotset":
            return DeviceResidency(shape, config=config)
        case "lru":
            return LruResidency(shape)
        case "load-on-demand":
            return LoadOnDemandResidency(shape)
    raise ConfigError(
        f"unknown residency policy {name!r}", remedy="choose one of hotset, lru, load-on-demand"
    )
