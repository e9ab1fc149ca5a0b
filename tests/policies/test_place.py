"""Any valid input gives a valid plan; what cannot be planned is refused by name."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hotset.policies.place import plan
from hotset.policies.place_score import balancedness, even_shares, replica_counts
from hotset.policies.place_types import Placement, PlanReason
from hotset.policies.shares import best_shares


def lognormal(seed: int, *shape: int, sigma: float = 1.0) -> Any:
    return np.random.default_rng(seed).lognormal(0, sigma, shape)


def zipf(seed: int, layers: int, experts: int, *, exponent: float) -> Any:
    rng = np.random.default_rng(seed)
    weights = np.arange(1, experts + 1.0) ** -exponent
    return np.stack([rng.permutation(weights) for _ in range(layers)])


def drifted(load: Any, seed: int, *, sigma: float = 0.05) -> Any:
    return load * np.random.default_rng(seed).lognormal(0, sigma, load.shape)


def duplicates(placement: Placement) -> int:
    """Copies beyond the first of an expert on a device."""
    width = placement.physical_to_logical_map.shape[1] // placement.num_devices
    by_device = placement.physical_to_logical_map.reshape(-1, width)
    found = 0
    for row in by_device:
        used = row[row >= 0]
        found += len(used) - len(np.unique(used))
    return found


def by_layer(placement: Placement, load: Any, *, split: str) -> Any:
    """Balancedness of each layer under a load, with the shares that the split would choose."""
    slots = placement.physical_to_logical_map
    shares = even_shares(slots, replica_counts(slots, experts=load.shape[1]))
    if split == "free":
        shares = best_shares(slots, load, num_devices=placement.num_devices, speed=placement.speed)
    return balancedness(slots, shares, load, speed=placement.speed)


@st.composite
def problems(draw: st.DrawFn) -> dict[str, Any]:
    """Clusters and loads of all kinds: skewed, zero, few experts, unequal devices."""
    nodes = draw(st.integers(1, 3))
    devices = nodes * draw(st.integers(1, 4))
    width = draw(st.integers(1, 6))
    experts = draw(st.integers(1, devices * width))
    layers, windows = draw(st.integers(1, 3)), draw(st.integers(1, 2))
    seed = draw(st.integers(0, 2**31))
    load = lognormal(seed, windows, layers, experts, sigma=draw(st.sampled_from([0.1, 1.0, 3.0])))
    load[np.random.default_rng(seed).random(load.shape) < draw(st.sampled_from([0, 0.3, 1]))] = 0
    found: dict[str, Any] = {
        "load": load if windows > 1 else load[0],
        "num_devices": devices,
        "num_slots": devices * width,
        "num_nodes": nodes,
        "spread_nodes": draw(st.integers(1, 3)),
        "risk": draw(st.sampled_from([0.0, 0.5, 1.0])),
        "split": draw(st.sampled_from(["even", "free"])),
    }
    if draw(st.booleans()):
        found["speed"] = np.random.default_rng(seed).choice([0.5, 1.0, 2.0], devices)
    return found


@settings(max_examples=120)
@given(problems(), st.integers(0, 2**31))
def test_any_problem_gets_a_valid_plan_and_a_valid_next_one(
    problem: dict[str, Any], seed: int
) -> None:
    load = problem.pop("load")
    first = plan(load, **problem)
    first.check_integrity()
    width = problem["num_slots"] // problem["num_devices"]
    if width <= load.shape[-1]:
        assert duplicates(first) == 0
    shifted = drifted(load, seed, sigma=0.5)
    second = plan(shifted, current=first, **problem)
    second.check_integrity()
    assert second.moves <= first.physical_to_logical_map.size
    assert second.cross_node_moves <= second.moves
    if width <= load.shape[-1]:
        assert duplicates(second) == 0
    if problem["risk"] == 0:
        mean = shifted if shifted.ndim == 2 else shifted.mean(axis=0)
        before, after = (by_layer(found, mean, split=problem["split"]) for found in (first, second))
        assert (after >= before - 1e-6).all()


@settings(max_examples=60)
@given(st.integers(0, 2**31), st.integers(2, 4), st.integers(2, 5))
def test_any_rubble_is_repaired(seed: int, devices: int, width: int) -> None:
    rng = np.random.default_rng(seed)
    experts = int(rng.integers(2, devices * width + 1))
    rubble = rng.integers(-1, experts, (2, devices * width))
    found = plan(
        lognormal(seed, 2, experts), num_devices=devices, num_slots=devices * width, current=rubble
    )
    found.check_integrity()
    if width <= experts:
        assert duplicates(found) == 0


@settings(max_examples=60)
@given(st.integers(0, 2**31))
def test_capacity_in_bytes_is_kept(seed: int) -> None:
    rng = np.random.default_rng(seed)
    sizes = rng.choice([1.0, 2.0], (2, 12))
    capacity = rng.choice([6.0, 8.0, 10.0], 4)
    load = lognormal(seed, 2, 12)
    kwargs = {"num_devices": 4, "num_slots": 32, "sizes": sizes, "capacity": capacity}
    if capacity.sum() < sizes.sum(axis=1).max() + 8:
        return  # too tight to be sure of a packing
    first = plan(load, **kwargs)
    for found in (first, plan(drifted(load, seed), current=first, **kwargs)):
        found.check_integrity()
        slots = found.physical_to_logical_map
        nbytes = np.where(slots >= 0, np.take_along_axis(sizes, np.maximum(slots, 0), axis=1), 0)
        assert (nbytes.reshape(2, 4, 8).sum(axis=2) <= capacity).all()


def test_a_dead_device_holds_nothing_and_its_experts_live_on() -> None:
    load = lognormal(1, 3, 16)
    first = plan(load, num_devices=4, num_slots=24)
    rest = first.physical_to_logical_map.copy()
    rest[:, :6] = -1
    found = plan(load, num_devices=4, num_slots=24, current=rest, capacity=[0, 6, 6, 6])
    found.check_integrity()
    assert (found.physical_to_logical_map[:, :6] == -1).all()


def test_replicas_cover_nodes_and_everyone_has_two() -> None:
    load = zipf(2, 3, 24, exponent=1.2)
    found = plan(load, num_devices=12, num_slots=72, num_nodes=3, spread_nodes=2, min_replicas=2)
    assert found.logical_replica_count.min() >= 2
    where = found.logical_to_physical_map // (72 // 3)
    flat = found.logical_to_physical_map.reshape(-1, where.shape[2])
    for rows, maps in zip(where.reshape(flat.shape), flat, strict=True):
        assert len(set(rows[maps >= 0])) >= 2


def test_fast_devices_get_more_load() -> None:
    speed = np.array([1.0, 1.0, 3.0, 3.0])
    found = plan(lognormal(3, 4, 32), num_devices=4, num_slots=40, speed=speed)
    assert found.balancedness > 0.99


@pytest.mark.parametrize(
    ("load", "floor"),
    [
        (lognormal(0, 6, 256), 0.999),
        (zipf(0, 3, 256, exponent=1.0), 0.999),
        (zipf(0, 3, 256, exponent=1.2), 0.999),
    ],
    ids=["lognormal", "zipf-1.0", "zipf-1.2"],
)
def test_fresh_plans_are_nearly_perfect_and_small_drift_moves_little(
    load: Any, floor: float
) -> None:
    size = {"num_devices": 32, "num_slots": 288, "num_nodes": 4}
    first = plan(load, **size)
    assert first.balancedness >= floor
    second = plan(drifted(load, 1), current=first, **size)
    assert second.balancedness >= 0.973
    assert second.moved_ratio <= 0.03


def test_target_and_budget_end_the_search() -> None:
    load = lognormal(5, 8, 64)
    size = {"num_devices": 8, "num_slots": 80, "num_nodes": 2}
    first = plan(load, **size)
    shifted = drifted(load, 6, sigma=0.3)
    to_target = plan(shifted, current=first, target=0.98, **size)
    assert to_target.balancedness >= 0.98
    for budget in (0, 5, 20):
        kept = plan(shifted, current=first, byte_budget=budget, cross_node_price=0, **size)
        assert kept.moved_bytes <= budget
        assert kept.balancedness >= kept.current_balancedness
    assert kept.moves > 0


def test_a_price_on_bytes_between_nodes_keeps_them_inside() -> None:
    load = lognormal(7, 8, 128)
    size = {"num_devices": 16, "num_slots": 160, "num_nodes": 4}
    first = plan(load, **size)
    shifted = drifted(load, 8, sigma=0.2)
    free = plan(shifted, current=first, target=0.97, cross_node_price=0, **size)
    dear = plan(shifted, current=first, target=0.97, cross_node_price=2, **size)
    assert dear.cross_node_moves < free.cross_node_moves
    assert dear.balancedness >= 0.97


def test_groups_mostly_stay_on_their_node() -> None:
    load = lognormal(9, 4, 64)
    found = plan(load, num_devices=16, num_slots=96, num_nodes=4, groups=8)
    home = found.physical_to_logical_map // 8
    most = 0
    for layer in home:
        for group in range(8):
            nodes = np.repeat(np.arange(4), 24)[layer == group]
            most += np.bincount(nodes, minlength=4).max()
    assert most / home.size > 0.8
    assert found.balancedness > 0.97


def test_risk_prefers_the_worst_window() -> None:
    load = np.stack([lognormal(10, 6, 48), lognormal(11, 6, 48)])
    size = {"num_devices": 8, "num_slots": 64}
    mean, safe = plan(load, **size), plan(load, risk=1.0, **size)
    assert safe.worst_balancedness >= mean.worst_balancedness - 1e-12


def test_reasons_say_what_happened() -> None:
    load = lognormal(12, 3, 16)
    size = {"num_devices": 4, "num_slots": 20}
    first = plan(load, **size)
    assert set(first.reasons) == {PlanReason.FRESH}
    same = plan(load, current=first, **size)
    assert set(same.reasons) == {PlanReason.UNCHANGED}
    assert same.moves == 0
    broken = first.physical_to_logical_map.copy()
    broken[0, :5] = -1
    assert plan(load, current=broken, **size).reasons[0] is PlanReason.REPAIRED


@pytest.mark.parametrize("dtype", ["int32", "uint8", "float32", "float64", "int64"])
def test_numbers_of_any_type(dtype: str) -> None:
    load = (lognormal(13, 2, 8) * 10).astype(dtype)
    plan(load, num_devices=2, num_slots=10).check_integrity()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "int32"])
def test_torch_tensors(dtype: str) -> None:
    torch = pytest.importorskip("torch")
    load = torch.rand(2, 8).mul(50).to(getattr(torch, dtype))
    found = plan(load, num_devices=2, num_slots=10)
    found.check_integrity()
    again = plan(
        load, num_devices=2, num_slots=10, current=torch.as_tensor(found.physical_to_logical_map)
    )
    assert again.moves == 0


GOOD: dict[str, Any] = {"load": [[1.0, 2.0, 3.0, 4.0]], "num_devices": 2, "num_slots": 6}


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"load": [[1.0, np.nan, 1, 1]]}, "load"),
        ({"load": [[1.0, np.inf, 1, 1]]}, "load"),
        ({"load": [[1.0, -1, 1, 1]]}, "load"),
        ({"load": np.zeros((0, 4))}, "load"),
        ({"load": np.zeros(4)}, "load"),
        ({"load": [["a", "b"]]}, "load"),
        ({"load": [[1.0, 2], [1.0]]}, "load"),
        ({"num_devices": 0}, "num_devices"),
        ({"num_devices": 1.5}, "num_devices"),
        ({"num_slots": 7}, "num_slots"),
        ({"num_slots": 2}, "num_slots"),
        ({"num_nodes": 3}, "num_nodes"),
        ({"groups": 3}, "groups"),
        ({"groups": 0}, "groups"),
        ({"sizes": -1}, "sizes"),
        ({"sizes": [1, 2]}, "sizes"),
        ({"capacity": [1, 2]}, "capacity"),
        ({"capacity": [1]}, "capacity"),
        ({"capacity": [np.nan, 3]}, "capacity"),
        ({"speed": [0, 1]}, "speed"),
        ({"speed": [1, 1, 1]}, "speed"),
        ({"spread_nodes": 0}, "spread_nodes"),
        ({"min_replicas": 2}, "min_replicas"),
        ({"target": 1.5}, "target"),
        ({"byte_budget": -1}, "byte_budget"),
        ({"move_price": -1}, "move_price"),
        ({"cross_node_price": np.nan}, "cross_node_price"),
        ({"risk": 2}, "risk"),
        ({"split": "odd"}, "split"),
        ({"current": [[0, 1]]}, "current"),
        ({"current": [[0, 1, 2, 3, 4, 0]]}, "current"),
        ({"current": [[0, 1, 2, 3, 0.5, 0]]}, "current"),
    ],
)
def test_what_cannot_be_planned_is_refused_by_name(change: dict[str, Any], named: str) -> None:
    arguments = GOOD | change
    with pytest.raises(ValueError, match=named):
        plan(arguments.pop("load"), **arguments)
