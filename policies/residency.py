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
from hotset.policies.predictor import TransitionPredictor

if TYPE_CHECKING:
    from hotset.policies.types import Format, Reason, State
    from collections.abc import Collection, Sequence

    from numpy.typing import NDArray

    from hotset.policies.states import StoryLine


class LayerPlan(NamedTuple):
    """What to do for one layer of one step."""

    resident: list[int]  # experts with a landed copy
    arriving: list[int]  # experts already on their way: wait for them
    missing: list[int]  # experts to fetch (or to dispatch to), most tokens first
    prefetch: list[tuple[int, int]]  # (layer, expert) to start now, likeliest first


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
        return self._used_at[flat]

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
    """Aged popularity with prefetch from layer-to-layer transitions.

    The value of a copy is its expected use in the next pass (aged uses, half-life
    `half_life_steps`) by byte. A candidate for prefetch is an absent block of a layer ahead whose
    predicted chance beats the cheapest victim's by `prefetch_gain`. The predictor is silent
    while nearly all experts of a layer are touched (`dense_ratio`).
    """

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
        self.predictor = predictor or TransitionPredictor(
            rows=len(shape.layers),
            num_experts=shape.num_experts,
            depth=max(1, self.config.prefetch_depth),
            half_life_steps=self.config.transition_half_life_steps,
        )
        self._use = [0.0] * (len(shape.layers) * shape.num_experts)
        self._weight = 1.0
        self._growth = 2.0 ** (1.0 / (self.config.half_life_steps * len(shape.layers)))
        self._touched_ratio = 0.0
        self._last: dict[int, tuple[int, NDArray[np.intp]]] = {}

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
        use = self._use
        self._weight *= self._growth
        for expert in experts:
            use[base + expert] += self._weight
            self._refresh(base + expert)
        ratio = len(experts) / self.num_experts
        self._touched_ratio += 0.1 * (ratio - self._touched_ratio)
        return _sort_needs(self, base, experts=experts, counts=counts)

    def _value(self, flat: int) -> float:
        return self._use[flat]

    def forget(self, request: int) -> None:
        """Free what was kept for a request that has ended."""
        self._last.pop(request, None)

    def expected_use(self) -> NDArray[np.float64]:
        """Aged share of passes that used each block, [L, E] in 0..1."""
        shape = (len(self.layers), self.num_experts)
        fade = 1.0 - 2.0 ** (-1.0 / self.config.half_life_steps)
        return np.array(self._use).reshape(shape) * (fade / self._weight)


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
    if len(missing) > 1:
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
