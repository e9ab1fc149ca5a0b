"""Loads that nobody tuned the planner for."""

from __future__ import annotations

from typing import Any

import numpy as np

KINDS = ("tail", "hot", "zeros", "bimodal", "steps", "equal", "nothing")


def hard_load(kind: str, rng: Any, *, layers: int, experts: int) -> Any:
    """One of the kinds, [L, E]."""
    shape = (layers, experts)
    if kind == "tail":
        return rng.pareto(0.5, shape)
    if kind == "hot":
        load = rng.random(shape) * 1e-3
        load[np.arange(layers), rng.integers(experts, size=layers)] = 1.0
        return load
    if kind == "zeros":
        return rng.lognormal(0, 1, shape) * (rng.random(shape) < 0.2)
    if kind == "bimodal":
        return np.where(rng.random(shape) < 0.1, 50.0, 1.0) * rng.lognormal(0, 0.05, shape)
    if kind == "steps":
        return 2.0 ** -rng.integers(0, 12, shape)
    return np.ones(shape) if kind == "equal" else np.zeros(shape)
