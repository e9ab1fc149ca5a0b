"""Experts that follow each other come together; one step's overflow leaves and nothing is lost."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hotset.policies.affinity import crossing_tokens, follow
from hotset.policies.place import plan
from hotset.policies.spill import least_loaded_spill


def routed(seed: int, layers: int, experts: int) -> tuple[Any, Any]:
    """Load and co-routing in which each expert has a few favourite successors."""
    rng = np.random.default_rng(seed)
    counts = rng.lognormal(0, 0.5, (layers - 1, experts, experts))
    for layer in counts:
        for expert in range(experts):
            layer[expert, rng.permutation(experts)[:3]] *= 40
            layer[expert] *= 100 / layer[expert].sum() * (1 + expert % 3)
    load = np.concatenate([counts.sum(axis=2)[:1], counts.sum(axis=1)])
    return load, counts


@settings(max_examples=15)
@given(st.integers(0, 10_000))
def test_less_crosses_and_the_plan_stays_valid_and_balanced(seed: int) -> None:
    load, counts = routed(seed, 4, 32)
    first = plan(load, num_devices=8, num_slots=48, num_nodes=4)
    found = follow(first, counts, least_balancedness=0.97)
    found.placement.check_integrity()
    assert (found.placement.logical_replica_count == first.logical_replica_count).all()
    assert found.crossing_after_ratio < found.crossing_before_ratio
    assert found.saved_tokens == pytest.approx(
        crossing_tokens(first, counts) - crossing_tokens(found.placement, counts)
    )
    assert found.placement.balancedness >= min(0.97, first.balancedness) - 1e-9
    for row in found.placement.physical_to_logical_map.reshape(-1, 6):
        assert len(set(row)) == 6


def test_a_plan_is_arranged_from_nothing_and_only_measured_from_a_current_one() -> None:
    load, counts = routed(5, 4, 32)
    size: dict[str, Any] = {"num_devices": 8, "num_slots": 48, "num_nodes": 4}
    apart = plan(load, **size)
    together = plan(load, co_routing=counts, **size)
    together.check_integrity()
    assert apart.crossing is None
    assert together.crossing is not None
    assert together.crossing.saved_tokens > 0
    assert together.crossing.tokens == pytest.approx(crossing_tokens(together, counts))
    assert together.crossing.ratio == pytest.approx(together.crossing.tokens / counts.sum())
    assert together.balancedness >= apart.balancedness - 0.005
    later = plan(load, current=apart, co_routing=counts, **size)
    assert (later.physical_to_logical_map == apart.physical_to_logical_map).all()
    assert later.crossing is not None
    assert later.crossing.saved_tokens == 0
    with pytest.raises(ValueError, match="co_routing"):
        plan(load, co_routing=counts[:1], **size)


def test_co_routing_of_another_shape_is_refused() -> None:
    load, counts = routed(0, 3, 16)
    first = plan(load, num_devices=4, num_slots=20)
    with pytest.raises(ValueError, match="co_routing"):
        follow(first, counts[:1])
    with pytest.raises(ValueError, match="co_routing"):
        follow(first, -counts)


@settings(max_examples=100)
@given(st.integers(0, 2**31), st.sampled_from([1.0, 1.1, 1.5]), st.integers(1, 100))
def test_spills_conserve_tokens_and_never_overfill(seed: int, limit: float, least: int) -> None:
    rng = np.random.default_rng(seed)
    slots = np.concatenate([rng.permutation(16)[:5] for _ in range(6)])
    tokens = (rng.lognormal(3, 1.5, 30)).astype(int)
    found = least_loaded_spill(tokens, slots, num_devices=6, limit_ratio=limit, least_tokens=least)
    assert found.after.sum() == tokens.sum()
    assert found.after.max() <= max(found.before.max(), 0)
    assert found.borrowed == sum(spill.borrows for spill in found.spills)
    for spill in found.spills:
        assert spill.tokens >= (least if spill.borrows else 1)
        assert spill.source != spill.target
        assert spill.expert in slots.reshape(6, 5)[spill.source]
    ceiling = np.ceil(tokens.sum() / 6 * limit)
    grown = found.after > found.before
    assert (found.after[grown] <= ceiling).all()


def test_a_balanced_step_spills_nothing_and_a_hot_one_is_levelled() -> None:
    slots = np.arange(8)
    assert least_loaded_spill(np.full(8, 100), slots, num_devices=4).spills == ()
    hot = np.array([900, 50, 50, 50, 50, 50, 50, 50])
    found = least_loaded_spill(hot, slots, num_devices=4)
    assert found.after.max() <= np.ceil(hot.sum() / 4 * 1.1)
    assert found.borrowed >= 1


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"limit_ratio": 0.5}, "limit_ratio"),
        ({"least_tokens": 0}, "least_tokens"),
        ({"num_devices": 3}, "tokens"),
        ({"tokens": [-1, 0, 0, 0]}, "tokens"),
    ],
)
def test_spills_that_cannot_be_planned_are_refused_by_name(
    change: dict[str, Any], named: str
) -> None:
    arguments: dict[str, Any] = {
        "tokens": [1, 2, 3, 4], "slots": [0, 1, 2, 3], "num_devices": 2
    } | change  # fmt: skip
    with pytest.raises(ValueError, match=named):
        least_loaded_spill(arguments.pop("tokens"), arguments.pop("slots"), **arguments)
