"""The residency policies by name: what one device keeps, evicts and prefetches.

Decides which policy a name means; the policies decide the rest (`adaptive` ours, `rivals` those of
the literature). All speak the protocol of `plan`, in the worker and in replays.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from hotset.errors import ConfigError
from hotset.policies.adaptive import DeviceResidency
from hotset.policies.config import EAGER_LOAD_RATIO, FRUGAL_LOAD_RATIO, ResidencyConfig
from hotset.policies.device import DeviceShape, Resident
from hotset.policies.plan import LayerPlan, ResidencyPolicy
from hotset.policies.rivals.classic import (
    Belady,
    Future,
    Lfu,
    LoadOnDemand,
    Lru,
    Static,
    aged_lfu,
)
from hotset.policies.rivals.gated import Fate, Hobbit, HybriMoE, MixtralOffloading
from hotset.policies.rivals.traced import EdgeMoE, ExpertFlow, MoEInfinity

if TYPE_CHECKING:
    from collections.abc import Callable

    from hotset.policies.foresight import StagedPredictor

__all__ = [
    "LIVE_POLICIES",
    "OFFLINE_POLICIES",
    "POLICIES",
    "DeviceResidency",
    "DeviceShape",
    "Future",
    "LayerPlan",
    "ResidencyPolicy",
    "Resident",
    "make_policy",
]

_RIVALS: dict[str, Callable[[DeviceShape], ResidencyPolicy]] = {
    "load-on-demand": LoadOnDemand,
    "lru": Lru,
    "lru-pool": lambda shape: Lru(shape, pool=True),
    "lfu": Lfu,
    "lfu-aged": aged_lfu,
    "mixtral-offloading": MixtralOffloading,
    "moe-infinity": MoEInfinity,
    "fate": Fate,
    "hobbit": Hobbit,
    "edgemoe": EdgeMoE,
    "hybrimoe": HybriMoE,
    "expertflow": ExpertFlow,
}
_OFFLINE: dict[str, Callable[..., ResidencyPolicy]] = {"static": Static, "belady": Belady}
_RATIOS = {"hotset-frugal": FRUGAL_LOAD_RATIO, "hotset-eager": EAGER_LOAD_RATIO}

LIVE_POLICIES = ("hotset", *_RATIOS, *_RIVALS)
"""Policies that decide without knowing the future."""
OFFLINE_POLICIES = tuple(_OFFLINE)
"""Policies that need a `Future`: for replays only."""
POLICIES = (*LIVE_POLICIES, *OFFLINE_POLICIES)


def make_policy(
    name: str,
    shape: DeviceShape,
    *,
    config: ResidencyConfig | None = None,
    future: Future | None = None,
    predictor: StagedPredictor | None = None,
) -> ResidencyPolicy:
    """Build the policy called `name`. Raises ConfigError.

    Only `hotset*` reads `config` and `predictor`, which several devices may share.
    """
    if name == "hotset":
        return DeviceResidency(shape, config=config, predictor=predictor)
    if name in _RATIOS:
        ratio = _RATIOS[name]
        config = replace(
            config or ResidencyConfig(),
            load_ratio=ratio,
            dense_load_ratio=ratio,
            idle_load_ratio=ratio,
        )
        return DeviceResidency(shape, config=config, predictor=predictor)
    if name in _RIVALS:
        return _RIVALS[name](shape)
    if name in _OFFLINE:
        if future is None:
            raise ConfigError(
                f"policy {name} must know the future", remedy="use it with `hotset replay` only"
            )
        return _OFFLINE[name](shape, future=future)
    raise ConfigError(
        f"unknown residency policy {name!r}", remedy=f"choose one of {', '.join(POLICIES)}"
    )
