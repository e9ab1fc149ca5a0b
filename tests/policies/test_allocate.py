"""Formats under bytes and budget: never over, near the LP relaxation, floors kept."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from hotset.policies.allocate import Costs, allocate, caps, described, relaxed_nats

RELAXED = settings(max_examples=60)
NAMES = ("bf16", "int8", "int4", "int2")
NBYTES = np.array([1600, 800, 425, 225], dtype=np.int64)


def table(nats: np.ndarray) -> Costs:
    """Costs whose first format is free."""
    full = np.concatenate([np.zeros((*nats.shape[:2], 1)), nats], axis=2)
    return Costs(formats=NAMES, nbytes=NBYTES, nats=full)


damages = hnp.arrays(
    np.float64,
    st.tuples(st.integers(1, 4), st.integers(1, 5), st.just(3)),
    elements=st.floats(0, 1, allow_subnormal=False).map(lambda x: round(x, 6)),
)


def growing(*, layers: int, experts: int, seed: int = 0) -> Costs:
    """Damages that grow as formats get cheaper, as measured ones do."""
    random = np.random.default_rng(seed)
    scale = random.lognormal(sigma=1.5, size=(layers, experts, 1))
    return table(scale * np.array([1e-6, 1e-4, 1e-2]) * random.uniform(0.5, 1.5, (1, 1, 3)))


@RELAXED
@given(damages, st.floats(0, 3))
def test_the_budget_is_never_exceeded(nats: np.ndarray, budget: float) -> None:
    found = allocate(table(nats), nats_at_most=budget)
    assert found.nats <= budget + 1e-9
    assert found == found.__class__(
        codes=found.codes, nbytes=found.nbytes, nats=described(table(nats), found.codes).nats
    )


@RELAXED
@given(damages, st.floats(0.15, 1.0))
def test_bytes_are_never_exceeded_and_damage_is_near_the_relaxation(
    nats: np.ndarray, part: float
) -> None:
    costs = table(nats)
    room = part * NBYTES[0] * nats.shape[0] * nats.shape[1]
    found = allocate(costs, bytes_at_most=room)
    bound = relaxed_nats(costs, bytes_at_most=room)
    assert found.nbytes <= room
    assert bound - 1e-9 <= found.nats <= bound + nats.max(initial=0.0) + 1e-9


@RELAXED
@given(damages, st.integers(0, 2**32 - 1), st.floats(0, 3))
def test_floors_and_caps_hold(nats: np.ndarray, seed: int, budget: float) -> None:
    costs = table(nats)
    allowed = np.random.default_rng(seed).random(costs.nats.shape) < 0.5
    found = allocate(
        costs, nats_at_most=budget, allowed=allowed, layer_cap_nats=0.7, expert_cap_nats=0.3
    )
    chosen = np.take_along_axis(costs.nats, found.codes[..., None], axis=2)[..., 0]
    assert (chosen <= 0.3).all()
    assert (chosen.sum(axis=1) <= 0.7 + 1e-9).all()
    permitted = np.take_along_axis(allowed, found.codes[..., None], axis=2)[..., 0]
    assert (permitted | (found.codes == 0)).all()


@RELAXED
@given(damages, st.floats(0.15, 1.0))
def test_the_relaxation_is_that_of_a_solver(nats: np.ndarray, part: float) -> None:
    optimize = pytest.importorskip("scipy.optimize", reason="scipy solves the LP to compare with")
    costs = table(nats)
    blocks, forms = nats.shape[0] * nats.shape[1], len(NAMES)
    room = part * NBYTES[0] * blocks
    choose_one = np.kron(np.eye(blocks), np.ones(forms))
    solved = optimize.linprog(
        costs.nats.ravel(),
        A_ub=np.tile(NBYTES, blocks)[None, :] / NBYTES[0],
        b_ub=[room / NBYTES[0]],
        A_eq=choose_one,
        b_eq=np.ones(blocks),
        bounds=(0, 1),
    )
    assert solved.status == 0
    assert relaxed_nats(costs, bytes_at_most=room) == pytest.approx(solved.fun, abs=1e-6)


@pytest.mark.parametrize("seed", range(5))
def test_greedy_under_a_budget_is_near_the_best_of_all(seed: int) -> None:
    costs = growing(layers=2, experts=3, seed=seed)
    budget = float(costs.nats[..., 2].sum())
    every = (
        described(costs, np.array(codes).reshape(2, 3))
        for codes in itertools.product(range(len(NAMES)), repeat=6)
    )
    best = min(one.nbytes for one in every if one.nats <= budget)
    found = allocate(costs, nats_at_most=budget)
    assert found.nats <= budget
    assert found.nbytes <= best + (NBYTES[0] - NBYTES[-1])


def test_a_larger_budget_never_needs_more_bytes_on_many_blocks() -> None:
    costs = growing(layers=8, experts=32)
    budgets = np.geomspace(1e-5, 1.0, 20)
    sizes = [allocate(costs, nats_at_most=budget).nbytes for budget in budgets]
    assert all(later <= earlier for earlier, later in itertools.pairwise(sizes))
    assert sizes[0] > sizes[-1]


@pytest.mark.parametrize("scale", [1.0, 0.0])
def test_exact_mode_demotes_nothing_whatever_the_table_says(scale: float) -> None:
    costs = table(growing(layers=3, experts=4).nats[..., 1:] * scale)
    assert not allocate(costs, nats_at_most=0.0).codes.any()


def test_lossless_smaller_format_is_free() -> None:
    nats = np.zeros((1, 2, 2))
    costs = Costs(formats=("bf16", "bf16z"), nbytes=np.array([100, 70]), nats=nats)
    found = allocate(costs, nats_at_most=0.0)
    assert found.codes.tolist() == [[1, 1]]
    assert found.nbytes == 140


def test_of_two_formats_of_one_size_the_better_is_taken() -> None:
    nats = np.array([[[0.0, 2e-4, 1e-4], [0.0, 1e-4, 2e-4]]])
    costs = Costs(formats=("bf16", "int4", "nf4"), nbytes=np.array([400, 100, 100]), nats=nats)
    assert allocate(costs, bytes_at_most=200).codes.tolist() == [[2, 1]]


def test_caps_follow_the_budget() -> None:
    layer, expert = caps(0.002, gamma=2.0)
    assert layer == pytest.approx(0.0005)
    assert expert == pytest.approx(0.0001)


@pytest.mark.parametrize(
    ("given_", "named"),
    [
        ({}, "bytes_at_most"),
        ({"bytes_at_most": 1.0}, "bytes_at_most"),
        ({"bytes_at_most": 3000.0, "nats_at_most": 0.0}, "budget"),
    ],
)
def test_what_cannot_be_is_refused_by_name(given_: dict[str, float], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        allocate(growing(layers=2, experts=2), **given_)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"nats": np.ones((1, 1, 4))}, "first format"),
        ({"nats": np.full((1, 1, 4), np.nan)}, "finite"),
        ({"nats": np.zeros((1, 4))}, "nats"),
        ({"nbytes": np.array([1, 2, 3])}, "nbytes"),
    ],
)
def test_tables_that_do_not_fit_are_refused(change: dict[str, np.ndarray], named: str) -> None:
    whole = {"formats": NAMES, "nbytes": NBYTES, "nats": np.zeros((1, 1, 4))}
    with pytest.raises(ValueError, match=named):
        Costs(**{**whole, **change})
