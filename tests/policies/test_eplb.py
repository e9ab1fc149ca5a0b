"""The drop-in forms return what the ecosystem expects, and balance better."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from hotset.policies.eplb import EplbPolicy, rebalance_experts
from hotset.policies.place import plan
from hotset.policies.place_score import bound_hierarchical
from hotset.policies.place_worth import LinkModel, worth_it

torch = pytest.importorskip("torch")


def weights(seed: int, layers: int = 4, experts: int = 64) -> Any:
    return torch.from_numpy(np.random.default_rng(seed).lognormal(0, 1, (layers, experts)))


@pytest.mark.parametrize("groups", [0, 1, 3, 8])
def test_tensors_in_tensors_out_with_the_shapes_of_deepseek(groups: int) -> None:
    maps = rebalance_experts(weights(0).float(), 96, groups, 4, 16)
    physical, logical, count = maps
    assert physical.dtype == logical.dtype == count.dtype == torch.int64
    assert physical.shape == (4, 96)
    assert count.shape == (4, 64)
    assert logical.shape == (4, 64, int(count.max()))
    for layer in range(4):
        assert (torch.bincount(physical[layer], minlength=64) == count[layer]).all()
        for expert in range(64):
            slots = logical[layer, expert][: int(count[layer, expert])]
            assert (physical[layer, slots] == expert).all()
            assert (logical[layer, expert][int(count[layer, expert]) :] == -1).all()


def test_arrays_in_arrays_out() -> None:
    maps = rebalance_experts(weights(1).numpy(), 96, 1, 1, 16)
    assert all(isinstance(one, np.ndarray) for one in maps)


def test_the_soft_hierarchy_beats_the_bound_of_the_hard_one() -> None:
    load = weights(2, layers=8, experts=128)
    physical = rebalance_experts(load, 160, 8, 4, 16).physical_to_logical_map.numpy()
    count = np.stack([np.bincount(row, minlength=128) for row in physical])
    unit = np.take_along_axis(load.numpy() / count, physical, axis=1)
    by_device = unit.reshape(8, 16, -1).sum(axis=2)
    found = (by_device.mean(axis=1) / by_device.max(axis=1)).mean()
    assert found > bound_hierarchical(load.numpy(), groups=8, num_nodes=4).mean()
    assert found > 0.97


def test_the_policy_keeps_what_is_there() -> None:
    load = weights(3, layers=6, experts=128)
    first = EplbPolicy.rebalance_experts(load, 160, 1, 2, 16)
    shifted = load * weights(4, layers=6, experts=128) ** 0.05
    second = EplbPolicy.rebalance_experts(shifted, 160, 1, 2, 16, first)
    assert first.shape == second.shape == (6, 160)
    assert (first != second).float().mean() < 0.1
    resized = EplbPolicy.rebalance_experts(load, 176, 1, 2, 16, first)
    assert resized.shape == (6, 176)


def test_a_plan_pays_when_its_saving_outlasts_its_move() -> None:
    load = weights(5).numpy()
    size = {"num_devices": 8, "num_slots": 80, "num_nodes": 2}
    first = plan(load, **size)
    shifted = load * np.random.default_rng(6).lognormal(0, 0.4, load.shape)
    after = plan(shifted, current=first, sizes=40_000_000, **size)
    links = LinkModel(device_bytes_per_s=25e9, node_bytes_per_s=100e9, start_ns=10_000)
    long = worth_it(after, first, step_time_ns=30_000_000, link_model=links)
    assert long.pays
    assert long.break_even_steps is not None
    saved = long.saved_ns_per_step
    assert (long.break_even_steps - 1) * saved <= long.move_ns <= long.break_even_steps * saved
    short = worth_it(
        after, first, step_time_ns=30_000_000, link_model=links,
        horizon_steps=max(1, long.break_even_steps - 1),
    )  # fmt: skip
    assert not short.pays
    still = worth_it(first, first, step_time_ns=1_000, link_model=links)
    assert (still.pays, still.move_ns, still.saved_ns_per_step) == (False, 0, 0)
    with pytest.raises(ValueError, match="step_time_ns"):
        worth_it(after, first, step_time_ns=0, link_model=links)
