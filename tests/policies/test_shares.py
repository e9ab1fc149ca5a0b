"""Shares are those of the linear program; the batch form hands out every token."""

from __future__ import annotations

import importlib.util
from itertools import combinations
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hotset.policies.place import plan
from hotset.policies.place_score import balancedness, device_times
from hotset.policies.shares import best_shares, split_batch


def case(seed: int) -> tuple[Any, Any, Any]:
    """Slots, load and speed of a small layer with spare replicas."""
    rng = np.random.default_rng(seed)
    devices, width = int(rng.integers(2, 6)), int(rng.integers(1, 4))
    experts = int(rng.integers(2, devices * width + 1))
    load = rng.lognormal(0, 1.5, (1, experts))
    found = plan(load, num_devices=devices, num_slots=devices * width)
    shifted = load * rng.lognormal(0, 0.7, load.shape) * (rng.random(load.shape) < 0.9)
    return found.physical_to_logical_map, shifted, rng.choice([1.0, 3.0], devices)


def least_limit(slots: Any, load: Any, speed: Any) -> float:
    """Time of the slowest device by max-flow min-cut: the most burdened set of devices."""
    hosts = slots.reshape(len(speed), -1)
    worst = 0.0
    for size in range(1, len(speed) + 1):
        for chosen in combinations(range(len(speed)), size):
            outside = set(np.delete(hosts, chosen, axis=0).ravel()) - {-1}
            stuck = sum(load[e] for e in range(len(load)) if e not in outside)
            worst = max(worst, stuck / speed[list(chosen)].sum())
    return worst * speed.sum() / max(load.sum(), 1e-300)


@settings(max_examples=150)
@given(st.integers(0, 2**31))
def test_shares_reach_the_bound_of_the_cut(seed: int) -> None:
    slots, load, speed = case(seed)
    shares = best_shares(slots, load, num_devices=len(speed), speed=speed)
    sums = np.bincount(slots[slots >= 0], weights=shares[slots >= 0], minlength=load.shape[1])
    assert np.allclose(sums, 1.0)
    assert (shares >= 0).all()
    slowest = device_times(slots, shares, load, speed=speed).max()
    if load.sum() > 0:
        assert slowest == pytest.approx(least_limit(slots[0], load[0], speed), rel=1e-3)


@pytest.mark.skipif(importlib.util.find_spec("scipy") is None, reason="scipy is not installed")
@pytest.mark.parametrize("seed", range(5))
def test_shares_are_those_of_the_linear_program(seed: int) -> None:
    from scipy.optimize import linprog

    rng = np.random.default_rng(seed)
    load = rng.lognormal(0, 1, (1, 64))
    slots = plan(load, num_devices=16, num_slots=96).physical_to_logical_map
    shifted = load * rng.lognormal(0, 0.3, load.shape)
    width, cells = 6, slots.shape[1]
    weights = shifted[0][slots[0]]
    sums = np.zeros((64, cells + 1))
    sums[slots[0], np.arange(cells)] = 1
    limits = np.zeros((16, cells + 1))
    limits[np.arange(cells) // width, np.arange(cells)] = weights
    limits[:, -1] = -1
    goal = np.zeros(cells + 1)
    goal[-1] = 1
    solved = linprog(goal, A_ub=limits, b_ub=np.zeros(16), A_eq=sums, b_eq=np.ones(64))
    shares = best_shares(slots, shifted, num_devices=16)
    slowest = (shares[0] * weights).reshape(16, width).sum(axis=1).max()
    assert slowest == pytest.approx(solved.fun, rel=1e-3)


@settings(max_examples=80)
@given(st.integers(0, 2**31))
def test_a_batch_is_handed_out_whole_and_nearly_as_well(seed: int) -> None:
    rng = np.random.default_rng(seed)
    load = rng.lognormal(0, 1, (1, 24))
    found = plan(load, num_devices=6, num_slots=36)
    counts = rng.multinomial(int(rng.integers(0, 3000)), rng.dirichlet(np.ones(24)))
    tokens = split_batch(counts, found.logical_to_physical_map[0], num_slots=36, num_devices=6)
    slots = found.physical_to_logical_map
    assert (np.bincount(slots[0], weights=tokens, minlength=24) == counts).all()
    assert (tokens >= 0).all()
    if counts.sum() >= 1000:
        best = device_times(
            slots, best_shares(slots, counts[None], num_devices=6), counts[None].astype(float),
            speed=np.ones(6),
        ).max()  # fmt: skip
        mean = counts.sum() / 6
        assert tokens.reshape(6, 6).sum(axis=1).max() / mean <= best * 1.02 + 3 / mean


def test_shares_alone_recover_half_of_what_drift_cost_and_few_moves_the_rest() -> None:
    rng = np.random.default_rng(4)
    load = rng.lognormal(0, 1, (8, 256))
    size = {"num_devices": 32, "num_slots": 288, "num_nodes": 4}
    first = plan(load, **size)
    shifted = load * rng.lognormal(0, 0.05, load.shape)
    slots = first.physical_to_logical_map
    before = balancedness(slots, first.shares, shifted, speed=first.speed).mean()
    levelled = best_shares(first, shifted, num_devices=32)
    after = balancedness(slots, levelled, shifted, speed=first.speed).mean()
    assert after - before >= 0.5 * (1 - before)
    moved = plan(shifted, current=first, split="free", target=0.995, **size)
    moved.check_integrity()
    assert moved.balancedness >= 0.995
    assert moved.moved_ratio <= 0.02


def test_what_cannot_be_split_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match="num_devices"):
        best_shares([[0, 1, 0]], [[1.0, 1.0]], num_devices=2)
    with pytest.raises(ValueError, match="speed"):
        best_shares([[0, 1]], [[1.0, 1.0]], num_devices=2, speed=[1.0, 0.0])
    with pytest.raises(ValueError, match="load"):
        best_shares([[0, 1]], [[1.0, -1.0]], num_devices=2)
    with pytest.raises(ValueError, match=r"current|slots"):
        best_shares([[0, 5]], [[1.0, 1.0]], num_devices=2)
