"""The live check: noise is not an alarm, a wrong table is one, and alarms tighten."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hotset.policies.allocate import Costs, allocate
from hotset.policies.drift import Budget, DriftMeter
from hotset.policies.drift_check import LiveBounds, LiveCheck, exceeds
from hotset.policies.types import BlockId

RELAXED = settings(max_examples=60)
NAMES = ("bf16", "int8", "int4", "int2")
NBYTES = np.array([1600, 800, 425, 225], dtype=np.int64)
LAYERS, EXPERTS = (0, 1, 2, 3), 8
TRUTH = np.array([0, 1e-7, 1.5e-5, 1e-3])
STEPS = 200


def world(seed: int) -> np.ndarray:
    """True damages [L, E, F] of a made-up model; the first layer is the sensitive one."""
    random = np.random.default_rng(seed)
    spread = random.lognormal(sigma=0.7, size=(len(LAYERS), EXPERTS, 1))
    spread[0] *= 10
    return spread * TRUTH


def meter(nats: np.ndarray, *, budget: float = 0.002) -> DriftMeter:
    return DriftMeter(
        Costs(formats=NAMES, nbytes=NBYTES, nats=nats),
        layers=LAYERS,
        frequency=np.full((len(LAYERS), EXPERTS), 0.25),
        budget=Budget(nats=budget),
    )


def allocated(drift: DriftMeter) -> None:
    """Put the meter at the mix that its table allows."""
    share = drift.budget.nats * drift.budget.margin_ratio / drift.gamma
    codes = allocate(drift.costs, nats_at_most=share).codes
    for row, layer in enumerate(LAYERS):
        for expert in range(EXPERTS):
            drift.set(BlockId(layer, expert), NAMES[codes[row, expert]])


def true_kl(drift: DriftMeter, truth: np.ndarray) -> float:
    return float(np.take_along_axis(truth, drift.codes[..., None], axis=2).sum())


def serve(check: LiveCheck, drift: DriftMeter, truth: np.ndarray, *, seed: int, steps: int) -> list:
    """Serve one token a step; gives (step, tightening) for each alarm."""
    random, alarms = np.random.default_rng(seed), []
    for step in range(steps):
        if not check.wants(step):
            continue
        mean = true_kl(drift, truth)
        kl = mean * random.lognormal(mean=-0.5, sigma=1.0)  # heavy tail, mean as given
        check.add([kl], [bool(random.random() < min(0.5, np.sqrt(mean)))])
        if (found := check.step(step)) is not None:
            alarms.append((step, found))
    return alarms


@pytest.mark.parametrize("seed", range(5))
def test_a_table_of_zeros_is_noticed_and_tightened_within_200_steps(seed: int) -> None:
    truth = world(seed)
    drift = meter(np.zeros_like(truth))
    allocated(drift)
    assert true_kl(drift, truth) > drift.budget.nats, "the wrong table does harm"
    check = LiveCheck(drift)
    alarms = serve(check, drift, truth, seed=seed, steps=STEPS)
    assert alarms
    assert alarms[0][0] < STEPS
    assert check.frozen
    assert alarms[0][1].repairs
    assert alarms[0][1].verdict.broken
    assert true_kl(drift, truth) <= drift.budget.nats


@pytest.mark.parametrize("seed", range(10))
def test_a_true_table_raises_no_alarm(seed: int) -> None:
    truth = world(seed)
    drift = meter(truth)
    allocated(drift)
    assert drift.codes.any()
    check = LiveCheck(drift)
    assert serve(check, drift, truth, seed=seed, steps=2000) == []
    assert not check.frozen


@pytest.mark.parametrize("factor", [5, 20])
def test_a_table_that_is_too_hopeful_raises_gamma(factor: int) -> None:
    truth = world(3)
    drift = meter(truth / factor)
    allocated(drift)
    check = LiveCheck(drift)
    alarms = serve(check, drift, truth, seed=3, steps=STEPS)
    if factor == 5:
        assert true_kl(drift, truth) <= 2 * drift.budget.nats  # gamma of 3 covers most of it
    assert all(found.gamma >= found.gamma_before for _, found in alarms)
    if factor == 20:
        assert drift.gamma > drift.budget.gamma
        assert true_kl(drift, truth) <= drift.budget.nats


def test_calm_pairs_thaw_and_thawing_needs_several_checks() -> None:
    drift = meter(world(0))
    check = LiveCheck(drift)
    check.add([1.0] * 64, [True] * 64)
    assert check.step(63) is not None
    assert check.frozen
    calm = [1e-4] * 64
    check.add(calm, [False] * 64)
    assert check.step(127) is None
    assert check.frozen, "one calm check is not enough"
    check.add(calm[:32], [False] * 32)
    assert check.step(159) is None
    assert check.frozen, "the same pairs count once"
    check.add(calm, [False] * 64)
    assert check.step(191) is None
    assert not check.frozen


def test_a_heavy_tail_is_an_alarm_although_the_mean_is_inside() -> None:
    check = LiveCheck(meter(world(0)))
    check.add(([0.0] * 97 + [0.045] * 3) * 4, [False] * 400)
    found = check.verdict()
    assert found.upper < 0.002
    assert len(found.broken) == 1
    assert "p99" in found.broken[0]


def test_flips_are_an_alarm_although_the_mean_is_inside() -> None:
    check = LiveCheck(meter(world(0)))
    check.add([1e-4] * 200, [True] * 40 + [False] * 160)
    assert any("top choices" in words for words in check.verdict().broken)


def test_exact_mode_breaks_on_the_first_difference() -> None:
    check = LiveCheck(meter(world(0), budget=0.0))
    check.add([0.0] * 100, [False] * 100)
    assert check.verdict().broken == ()
    check.changed(100)
    check.add([1e-9], [False])
    assert check.verdict().broken


def test_dense_after_a_change_then_sparse() -> None:
    check = LiveCheck(meter(world(0)), bounds=LiveBounds(dense_steps=4, sparse_every=8))
    assert [step for step in range(24) if check.wants(step)] == [0, 1, 2, 3, 8, 16]
    check.changed(10)
    assert [step for step in range(10, 24) if check.wants(step)] == [10, 11, 12, 13, 18]


def test_too_few_pairs_say_nothing() -> None:
    check = LiveCheck(meter(world(0)))
    assert check.step(0) is None
    check.add([0.001] * 20, [False] * 20)
    assert not check.verdict().enough
    assert check.step(20) is None


@RELAXED
@given(st.integers(1, 400), st.floats(0.001, 0.5))
def test_exceeds_is_rare_by_chance(count: int, share: float) -> None:
    from math import comb

    def tail(found: int) -> float:
        terms = (
            comb(count, k) * share**k * (1 - share) ** (count - k) for k in range(found, count + 1)
        )
        return sum(terms)

    for found in {0, int(count * share), int(count * share) + 1, min(count, 2 * found_of(count))}:
        expected = found > share * count and tail(found) < 0.05
        if abs(tail(found) - 0.05) > 1e-6:
            assert exceeds(found, count, share=share) == expected


def found_of(count: int) -> int:
    return count // 8


@pytest.mark.parametrize(
    ("kl", "flips", "named"),
    [([0.1], [], "flips"), ([float("nan")], [False], "kl"), ([-0.1], [False], "kl")],
)
def test_pairs_that_cannot_be_are_refused(kl: list[float], flips: list[bool], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        LiveCheck(meter(world(0))).add(kl, flips)


def test_bounds_that_mean_nothing_are_refused() -> None:
    with pytest.raises(ValueError, match="few"):
        LiveBounds(few=1)
