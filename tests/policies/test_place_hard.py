"""Loads that nobody tuned for: never worse than the greedy planner or than the current plan.

Heavy tails, one hot expert, zeros, two kinds of experts, sudden shifts; equal and unequal devices.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hard_loads import KINDS, hard_load
from hypothesis import given, settings
from hypothesis import strategies as st

from hotset.policies.place import plan
from hotset.policies.place_greedy import greedy_plan
from hotset.policies.place_score import (
    balancedness,
    bound_hottest,
    even_shares,
    replica_counts,
)
from hotset.policies.shares import best_shares


def evenly(slots: Any, load: Any, *, devices: int) -> Any:
    """Balancedness by layer with even shares."""
    shares = even_shares(slots, replica_counts(slots, experts=load.shape[1]))
    return balancedness(slots, shares, load, speed=np.ones(devices))


@st.composite
def clusters(draw: st.DrawFn) -> dict[str, int]:
    """Sizes that the greedy planner takes as well: everything divides."""
    nodes = draw(st.sampled_from([1, 2, 4]))
    devices = nodes * draw(st.integers(1, 6))
    width = draw(st.integers(1, 8))
    experts = nodes * draw(st.integers(1, max(1, devices * width // nodes)))
    return {"nodes": nodes, "devices": devices, "slots": devices * width, "experts": experts}


@settings(max_examples=300)
@given(clusters(), st.sampled_from(KINDS), st.integers(0, 2**31))
def test_never_worse_than_the_greedy_planner_nor_better_than_the_bound(
    cluster: dict[str, int], kind: str, seed: int
) -> None:
    devices, slots, nodes = cluster["devices"], cluster["slots"], cluster["nodes"]
    load = hard_load(kind, np.random.default_rng(seed), layers=2, experts=cluster["experts"])
    found = plan(load, num_devices=devices, num_slots=slots, num_nodes=nodes)
    found.check_integrity()
    mine = evenly(found.physical_to_logical_map, load, devices=devices)
    for groups in {1, nodes}:
        rival = greedy_plan(
            load, num_slots=slots, num_devices=devices, num_nodes=nodes, groups=groups
        )
        legal = np.array(
            [
                all(len(set(row)) == len(row) for row in layer)  # the greedy one repeats experts
                for layer in rival.reshape(2, devices, -1)
            ]
        )
        theirs = evenly(rival, load, devices=devices)
        assert (mine >= theirs - 1e-3)[legal].all()
    if slots // devices <= cluster["experts"]:
        bound = bound_hottest(load, num_slots=slots, num_devices=devices)
        assert (mine <= bound + 1e-9).all()


@settings(max_examples=120)
@given(
    clusters(),
    st.sampled_from(KINDS),
    st.sampled_from(KINDS),
    st.sampled_from(["even", "free"]),
    st.integers(0, 2**31),
)
def test_a_sudden_shift_never_makes_a_layer_worse(
    cluster: dict[str, int], before: str, after: str, split: Any, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    devices, slots = cluster["devices"], cluster["slots"]
    size: dict[str, Any] = {
        "num_devices": devices,
        "num_slots": slots,
        "num_nodes": cluster["nodes"],
        "speed": rng.choice([0.5, 1.0, 2.0], devices) if seed % 2 else None,
        "spread_nodes": int(rng.integers(1, 3)),
        "split": split,
    }
    old = plan(hard_load(before, rng, layers=2, experts=cluster["experts"]), **size)
    load = hard_load(after, rng, layers=2, experts=cluster["experts"])
    new = plan(load, current=old, **size)
    new.check_integrity()
    scores = []
    for found in (old, new):
        where = found.physical_to_logical_map
        shares = even_shares(where, replica_counts(where, experts=load.shape[1]))
        if split == "free":
            shares = best_shares(where, load, num_devices=devices, speed=size["speed"])
        scores.append(balancedness(where, shares, load, speed=found.speed))
    assert (scores[1] >= scores[0] - 1e-6).all()


@settings(max_examples=60)
@given(st.sampled_from(KINDS), st.integers(0, 2**31), st.sampled_from(["even", "free"]))
def test_unequal_devices_keep_their_bytes_and_nodes(kind: str, seed: int, split: Any) -> None:
    rng = np.random.default_rng(seed)
    capacity = rng.integers(4, 9, 8).astype(float)
    size: dict[str, Any] = {
        "num_devices": 8, "num_slots": 64, "num_nodes": 4, "capacity": capacity,
        "speed": rng.choice([1.0, 3.0], 8), "spread_nodes": 2, "min_replicas": 2, "split": split,
    }  # fmt: skip
    old = plan(hard_load(kind, rng, layers=2, experts=12), **size)
    new = plan(hard_load("tail", rng, layers=2, experts=12), current=old, **size)
    for found in (old, new):
        found.check_integrity()
        slots = found.physical_to_logical_map
        assert ((slots >= 0).reshape(2, 8, 8).sum(axis=2) <= capacity).all()
        maps = found.logical_to_physical_map
        covers = [len(set((row[row >= 0] // 16).tolist())) for layer in maps for row in layer]
        assert min(covers) >= 2


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_a_thousand_devices(kind: str) -> None:
    load = hard_load(kind, np.random.default_rng(0), layers=2, experts=256)
    found = plan(load, num_devices=1000, num_slots=4000, num_nodes=100)
    found.check_integrity()
    mine = evenly(found.physical_to_logical_map, load, devices=1000)
    rival = greedy_plan(load, num_slots=4000, num_devices=1000)
    assert (mine >= evenly(rival, load, devices=1000) - 1e-9).all()
