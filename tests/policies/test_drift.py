"""Online drift: exact mode, caps, a shift of the text, hysteresis, a table that is wrong."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hotset.policies.allocate import Costs, allocate
from hotset.policies.drift import GAMMA_GROWTH, Budget, DriftMeter
from hotset.policies.types import BlockId, Format

RELAXED = settings(max_examples=60)
NAMES = ("bf16", "int8", "int4", "int2")
NBYTES = np.array([1600, 800, 425, 225], dtype=np.int64)
LAYERS, EXPERTS, TOP_K = (1, 2, 5), 8, 2
BLOCKS = [BlockId(layer, expert) for layer in LAYERS for expert in range(EXPERTS)]


def meter(*, scale: float = 1.0, seed: int = 0, **budget: float) -> DriftMeter:
    random = np.random.default_rng(seed)
    nats = random.lognormal(size=(len(LAYERS), EXPERTS, 1)) * np.array([0, 1e-7, 1e-5, 1e-3])
    frequency = random.dirichlet(np.ones(EXPERTS) * 4, size=len(LAYERS)) * TOP_K
    return DriftMeter(
        Costs(formats=NAMES, nbytes=NBYTES, nats=nats * scale),
        layers=LAYERS,
        frequency=frequency,
        budget=Budget(**budget),  # type: ignore[arg-type] # a mix of int and float
    )


def fill(drift: DriftMeter) -> None:
    """Demote greedily, asking before each demotion, until every further one is refused."""
    for form in (Format.INT8, Format.INT4, Format.INT2):
        for block in BLOCKS:
            if drift.check(block, form) is None:
                drift.set(block, form)


@RELAXED
@given(st.integers(0, 1000), st.floats(0.0001, 0.01), st.floats(1, 5))
def test_asking_first_never_exceeds_the_budget(seed: int, nats: float, gamma: float) -> None:
    drift = meter(seed=seed, nats=nats, gamma=gamma)
    fill(drift)
    assert drift.nats <= nats
    assert drift.repairs() == ()


@pytest.mark.parametrize("form", [Format.INT8, Format.INT2, Format.LOWRANK])
def test_exact_mode_refuses_whatever_the_table_says(form: Format) -> None:
    drift = meter(scale=0.0, nats=0.0)
    refusal = drift.check(BLOCKS[0], form)
    assert refusal is not None
    assert "exact" in refusal


def test_lossless_formats_are_always_allowed() -> None:
    drift = meter(nats=0.0)
    assert drift.check(BLOCKS[0], Format.BF16Z) is None
    drift.set(BLOCKS[0], Format.BF16Z)
    assert drift.nats == 0.0


@pytest.mark.parametrize(
    ("block", "form", "word"),
    [
        (BlockId(9, 0), Format.INT4, "not measured"),
        (BlockId(1, 0), Format.NF4, "not measured"),
    ],
)
def test_what_was_not_measured_is_refused(block: BlockId, form: Format, word: str) -> None:
    refusal = meter().check(block, form)
    assert refusal is not None
    assert word in refusal


def test_an_expert_and_a_layer_have_caps() -> None:
    drift = meter(scale=10.0)
    refusal = drift.check(BLOCKS[0], Format.INT2)
    assert refusal is not None
    assert "expert 1.0" in refusal or "layer 1" in refusal or "mix" in refusal


def test_use_that_shifts_to_demoted_experts_raises_drift_and_is_repaired() -> None:
    drift = meter(scale=2.0)
    fill(drift)
    before, demoted = drift.nats, [b for b in BLOCKS if drift.codes[LAYERS.index(b.layer), b.index]]
    hot = min(demoted, key=lambda b: drift.ratio[LAYERS.index(b.layer), b.index])
    drift.observe({hot: 20_000}, tokens=10_000)
    assert drift.ratio[LAYERS.index(hot.layer), hot.index] > 1
    cold = [r for r in drift.ratio.ravel() if r < 1]
    assert len(cold) == len(BLOCKS) - 1
    while repairs := drift.repairs():
        drift.repair(repairs)
    assert drift.nats <= max(before, drift.budget.nats)


def test_a_shift_over_the_budget_is_repaired_worst_first() -> None:
    drift = meter(scale=1.0)
    fill(drift)
    codes = drift.codes
    worst = BLOCKS[int(np.argmax(drift.costs.nats[..., 3]))]
    heavy = {b: 40_000 for b in BLOCKS if codes[LAYERS.index(b.layer), b.index]}
    drift.observe(heavy, tokens=10_000)
    assert drift.nats > drift.budget.nats
    repairs = drift.repairs()
    assert repairs
    each = [_damage(drift, b) for b in repairs]
    assert each == sorted(each, reverse=True)
    drift.repair(repairs)
    assert drift.nats <= drift.budget.nats * drift.budget.margin_ratio + 1e-12
    assert drift.check(repairs[0], Format.INT8) is not None, "held for the dwell"
    drift.observe({worst: 1}, tokens=drift.budget.dwell_tokens)
    refusal = drift.check(repairs[0], Format.INT8)
    assert refusal is None or "repaired" not in refusal


def _damage(drift: DriftMeter, block: BlockId) -> float:
    row = LAYERS.index(block.layer)
    code = drift.codes[row, block.index]
    return float(drift.costs.nats[row, block.index, code] * drift.ratio[row, block.index])


def test_a_few_tokens_move_little() -> None:
    drift = meter()
    fill(drift)
    before = drift.nats
    drift.observe({BLOCKS[0]: 2}, tokens=1)
    assert drift.nats == pytest.approx(before, rel=0.05)


@RELAXED
@given(st.integers(0, 200), st.floats(1e-4, 1.0), st.sampled_from([0.0, 0.01, 1.0]))
def test_learning_makes_drift_at_least_what_was_measured(
    seed: int, measured: float, scale: float
) -> None:
    drift = meter(seed=seed, scale=scale)
    for block in BLOCKS[::2]:
        drift.set(block, Format.INT4)
    gamma = drift.gamma
    drift.learn(measured)
    assert drift.nats >= measured * (1 - 1e-9)
    assert gamma <= drift.gamma <= drift.budget.gamma * GAMMA_GROWTH


def test_a_table_of_zeros_learns_to_refuse() -> None:
    drift = meter(scale=0.0)
    fill(drift)
    assert (drift.codes == NAMES.index("int2")).all(), "zeros allow everything"
    drift.learn(0.3)
    drift.repair(drift.repairs())
    assert drift.nats <= drift.budget.nats
    drift.observe({}, tokens=drift.budget.dwell_tokens)
    assert drift.check(BLOCKS[0], Format.INT2) is not None


def test_learning_less_than_is_known_changes_nothing() -> None:
    drift = meter()
    fill(drift)
    gamma, nats = drift.gamma, drift.nats
    drift.learn(nats / 2)
    assert (drift.gamma, drift.nats) == (gamma, nats)


def test_an_allocation_under_the_budget_is_accepted_block_by_block() -> None:
    drift = meter(scale=0.1)
    share = drift.budget.nats * drift.budget.margin_ratio / drift.gamma
    found = allocate(
        drift.costs,
        nats_at_most=share,
        layer_cap_nats=share * drift.budget.layer_cap_ratio,
        expert_cap_nats=share * drift.budget.expert_cap_ratio,
    )
    assert found.codes.any()
    for block in BLOCKS:
        form = NAMES[found.codes[LAYERS.index(block.layer), block.index]]
        assert drift.check(block, form) is None
        drift.set(block, form)


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ({"nats": -1.0}, "nats"),
        ({"nats": float("nan")}, "nats"),
        ({"gamma": 0.5}, "gamma"),
        ({"margin_ratio": 0.0}, "margin_ratio"),
        ({"half_life_tokens": 0}, "half_life_tokens"),
    ],
)
def test_budgets_that_mean_nothing_are_refused(wrong: dict[str, float], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        Budget(**wrong)  # type: ignore[arg-type] # wrong on purpose
