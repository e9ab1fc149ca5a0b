"""The compiled arithmetic of foresight against its NumPy twin, bit by bit."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hotset.policies import foresight_kernels as kernels
from hotset.policies.residency import DeviceShape, make_policy

if TYPE_CHECKING:
    from numpy.typing import NDArray

needs_numba = pytest.mark.skipif(not kernels.COMPILED, reason="numba is not installed")


@given(st.lists(st.floats(-80, 20, width=32), min_size=1, max_size=50))
def test_the_exponential_is_exact_to_three_ulp_and_the_same_in_both_forms(
    values: list[float],
) -> None:
    array = np.array(values, dtype=np.float32)
    found = kernels.exp32_numpy(array)
    truth = np.exp(np.clip(array.astype(np.float64), -60, 15))
    assert (np.abs(found - truth) <= 3 * np.spacing(truth.astype(np.float32))).all()
    assert [kernels.exp32(value) for value in array] == found.tolist()


def arrays(seed: int, *, rows: int, size: int, depth: int) -> dict[str, Any]:
    random = np.random.default_rng(seed)

    def floats(*shape: int) -> NDArray[np.float32]:
        return random.normal(0, 2, shape).astype(np.float32)

    width = (depth + 1) * size
    held = np.where(random.random(rows * size) < 0.5, np.inf, 1.0).astype(np.float32)
    return {
        "weights": floats(rows, size, width), "base": floats(rows, size),
        "logits": floats((rows + depth) * size), "stages": floats(rows, width),
        "odds": np.zeros(width, np.float32),
        "others": np.abs(floats(size)) if seed % 2 else np.empty(0, np.float32),
        "far": np.abs(floats(rows * size)), "value": floats(rows * size), "held": held,
        "rank": floats(rows * size), "absent": random.random(rows * size) < 0.6,
        "found": np.zeros(rows * size, np.int64),
    }  # fmt: skip


@needs_numba
@given(seed=st.integers(0, 2**20), rows=st.integers(2, 7), size=st.integers(1, 9), data=st.data())
def test_a_visit_is_the_same_in_both_forms(
    seed: int, rows: int, size: int, data: st.DataObject
) -> None:
    depth = data.draw(st.integers(0, rows - 1))
    row, ahead = data.draw(st.integers(0, rows - 1)), data.draw(st.integers(0, depth))
    chosen = data.draw(st.lists(st.integers(0, size - 1), unique=True))
    now = np.array(chosen, dtype=np.int64)
    scale, weight, bar = np.float32(0.7), np.float32(1 / 60), np.float32(0.5)
    forms = []
    for call in (kernels._foresee, kernels._foresee_numpy):
        one = arrays(seed, rows=rows, size=size, depth=depth)
        args = (one["weights"], one["base"], one["logits"], one["stages"], one["odds"], now)
        rest = (one[key] for key in ("others", "far", "value", "held", "rank", "absent", "found"))
        count = call(*args, *rest, row, scale, weight, ahead, 3, bar)
        assert count <= 3
        forms.append((count, one))
    (count, one), (other_count, other) = forms
    assert count == other_count
    for key, array in one.items():
        assert array.tobytes() == other[key].tobytes(), key


@settings(max_examples=60)
@given(seed=st.integers(0, 2**20), acts=st.lists(st.sampled_from("rfffvpud"), max_size=80))
def test_the_victim_is_the_evictable_copy_of_the_lowest_rank(seed: int, acts: list[str]) -> None:
    shape = DeviceShape(
        layers=(2, 5, 6), num_experts=16, full_nbytes=2, reduced_nbytes=1, capacity_bytes=50
    )
    policy, random, visits = make_policy("hotset", shape), np.random.default_rng(seed), 0
    pinned: list[tuple[int, int]] = []
    for act in acts:
        free = [one[:2] for one in policy.residents() if one[:2] not in pinned]
        some = free[int(random.integers(len(free)))] if free else None
        block = shape.layers[int(random.integers(3))], int(random.integers(16))
        if act == "r":
            chosen = random.choice(16, 3, replace=False).tolist()
            policy.routed(shape.layers[visits % 3], chosen, [1, 1, 1], step=visits // 3)
            visits += 1
        elif act == "p" and some:
            pinned.append(some)
            policy.pin(*some)
        elif act == "u" and pinned:
            policy.unpin(*pinned.pop())
        elif act == "d" and some:
            policy.demoted(*some)
        elif act == "f" and policy.format(*block) is None and policy.room(2):
            policy.in_flight(*block)
            policy.landed(*block)
        found = policy.victim(51)
        assert found == lowest_copy(policy, shape)
        if act == "v" and found:
            policy.dropped(*found[:2])


def lowest_copy(policy: Any, shape: DeviceShape) -> Any:
    ranks = policy.ranks()
    row, expert = divmod(int(ranks.argmin()), shape.num_experts)
    if ranks[row, expert] == np.inf:
        return None
    return (shape.layers[row], expert, policy.format(shape.layers[row], expert))


@needs_numba
@given(seed=st.integers(0, 2**20), rows=st.integers(2, 6), size=st.integers(2, 9))
def test_learning_is_the_same_in_both_forms(seed: int, rows: int, size: int) -> None:
    depth = seed % rows
    forms = []
    for call in (kernels._learn, kernels._learn_numpy):
        random = np.random.default_rng(seed)
        one = arrays(seed, rows=rows, size=size, depth=depth)
        truth = (random.random((2, rows, size)) < 0.4).astype(np.float32)
        places = np.flatnonzero(truth[0].reshape(-1)).astype(np.int64)
        bias, share = one["base"], random.random((2, rows, 1)).astype(np.float32)
        popular = random.normal(0, 1, (2, rows, size)).astype(np.float32)
        steps = random.random(rows).astype(np.float32)
        call(
            one["weights"], bias, share, popular, one["stages"], truth, places, steps,
            np.float32(0.24),
        )  # fmt: skip
        forms.append((one["weights"], bias, share))
    for mine, theirs in zip(*forms, strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=2e-7)


@needs_numba
def test_a_policy_decides_the_same_without_numba(monkeypatch: pytest.MonkeyPatch) -> None:
    def decisions() -> list[Any]:
        shape = DeviceShape(
            layers=tuple(range(6)), num_experts=16, full_nbytes=1, reduced_nbytes=1,
            capacity_bytes=30,
        )  # fmt: skip
        policy, random, found = make_policy("hotset", shape), np.random.default_rng(3), []
        favourites = random.random((6, 16)) ** 4
        for step in range(150):
            for layer in range(6):
                odds = favourites[layer] + 0.05
                chosen = random.choice(16, 2, replace=False, p=odds / odds.sum()).tolist()
                plan = policy.routed(layer, chosen, [1, 1], step=step, request=step // 50)
                found.append(plan)
                for block in [(layer, expert) for expert in plan.missing] + plan.prefetch:
                    while not policy.room(1):
                        victim = policy.victim(1)
                        assert victim is not None
                        found.append(victim)
                        policy.dropped(victim.layer, victim.expert)
                    policy.in_flight(*block)
                    policy.landed(*block)
        return found

    compiled = decisions()
    for name in ("visit", "learn"):
        monkeypatch.setattr(kernels, name, getattr(kernels, f"_{name}_numpy"))
    monkeypatch.setattr("hotset.policies.adaptive.foresee", kernels._foresee_numpy)
    assert decisions() == compiled
    assert sum(len(plan.prefetch) for plan in compiled if hasattr(plan, "prefetch")) > 20
