"""Replays: what is counted, what the link costs, and that hotset beats what it should."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from routing_traces import markov_trace, sequences

from hotset.dashboards.routertrace import read_trace
from hotset.errors import ConfigError
from hotset.policies.linkmodel import LINKS, Link, LinkSpec, link_named
from hotset.policies.replay import (
    SLOT_BYTES,
    Replay,
    ReplayScore,
    Steps,
    Timing,
    future_of,
    line_up,
)
from hotset.policies.residency import OFFLINE_POLICIES, POLICIES, DeviceShape, make_policy

EXPERTS = 16
PREFETCH_FREE = ("load-on-demand", "lru", "lru-pool", "lfu", "lfu-aged", "static", "belady")
SPEC = LinkSpec(bandwidth_bytes_per_s=1 << 30, latency_ns=100)


def shape_of(slots: int, *, layers: int = 4, experts: int = EXPERTS) -> DeviceShape:
    return DeviceShape(
        layers=tuple(range(layers)),
        num_experts=experts,
        full_nbytes=SLOT_BYTES,
        reduced_nbytes=SLOT_BYTES // 2,
        capacity_bytes=slots * SLOT_BYTES,
    )


def lined_up(seed: int, *, tokens: int = 120, batch: int = 1, k: int = 3) -> Steps:
    trace = markov_trace(seed, tokens=tokens, layers=4, experts=EXPERTS, k=k)
    return line_up(trace, sequences(tokens, length=30), batch=batch)


def play(name: str, steps: Steps, *, slots: int = 16, timing: Timing | None = None) -> ReplayScore:
    future = future_of(steps, num_experts=EXPERTS) if name in OFFLINE_POLICIES else None
    policy = make_policy(name, shape_of(slots), future=future)
    return Replay(policy, steps, num_experts=EXPERTS, timing=timing).run()


# --- lanes ----------------------------------------------------------------------------------


def test_sequences_run_side_by_side_and_their_needs_are_united() -> None:
    experts = np.array([[[0, 1]], [[2, 3]], [[1, 2]], [[4, 5]], [[6, 7]]])
    steps = line_up(experts, np.array([0, 0, 1, 1, 2]), batch=2)
    assert steps.steps == 3
    assert [sorted(visit.experts) for visit in steps.visits] == [[0, 1, 2], [2, 3, 4, 5], [6, 7]]
    first = dict(zip(steps.visits[0].experts, steps.visits[0].counts, strict=True))
    assert first == {0: 1, 1: 2, 2: 1}
    assert steps.tokens == 5


@given(st.integers(1, 9), st.integers(1, 40))
@settings(max_examples=20)
def test_no_token_is_lost_whatever_the_batch(batch: int, tokens: int) -> None:
    trace = markov_trace(1, tokens=tokens, layers=2, experts=EXPERTS, k=2)
    steps = line_up(trace, sequences(tokens, length=7), batch=batch)
    assert sum(sum(visit.counts) for visit in steps.visits) == trace.size
    assert len(steps.visits) == steps.steps * steps.rows
    assert len(steps.requests) == steps.steps


# --- counting -------------------------------------------------------------------------------


@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize("name", POLICIES)
def test_what_is_needed_was_here_was_late_or_was_asked_for(name: str, batch: int) -> None:
    steps = lined_up(5, batch=batch)
    timing = Timing(link=SPEC, expert_bytes=1 << 16, layer_ns=50_000)
    for score in (play(name, steps), play(name, steps, timing=timing)):
        assert score.needs == score.hits + score.late + score.demand
        assert score.needs == sum(len(visit.experts) for visit in steps.visits)
        assert 0 <= score.prefetch_used <= score.prefetched
        assert score.tokens == 120
    assert score.total_ns == score.stall_ns + score.visits * timing.layer_ns


@pytest.mark.parametrize("name", POLICIES)
def test_replays_are_deterministic(name: str) -> None:
    timing = Timing(link=SPEC, expert_bytes=1 << 16, layer_ns=50_000)
    one, two = (play(name, lined_up(6, tokens=60), timing=timing) for _ in range(2))
    assert one == two


@given(st.integers(0, 1000), st.sampled_from([3, 8, 20]), st.sampled_from([1, 3]))
@settings(max_examples=6)
def test_nobody_without_prefetch_misses_less_than_belady(seed: int, slots: int, batch: int) -> None:
    steps = lined_up(seed, tokens=40, batch=batch)
    least = play("belady", steps, slots=slots).demand
    for name in PREFETCH_FREE:
        score = play(name, steps, slots=slots)
        assert score.prefetched == 0
        assert score.demand >= least


def test_lru_over_a_pool_is_lru() -> None:
    steps = lined_up(7)
    recent: list[tuple[int, int]] = []
    misses = 0
    for row, experts, _ in steps.visits:
        names = [(row, expert) for expert in experts]
        here = [name for name in names if name in recent]
        missing = [name for name in names if name not in recent]
        misses += len(missing)
        for name in [*here, *missing]:
            if name in recent:
                recent.remove(name)
            recent.append(name)
            del recent[:-16]
    assert play("lru-pool", steps).demand == misses


def test_a_device_smaller_than_a_layers_needs_streams_them() -> None:
    steps = lined_up(8, batch=4)
    timing = Timing(link=SPEC, expert_bytes=1 << 16, layer_ns=50_000)
    for name in POLICIES:
        score = play(name, steps, slots=2, timing=timing)
        assert score.needs == score.hits + score.late + score.demand, name


@pytest.mark.parametrize(
    ("layers", "experts", "k", "slots"),
    [(1, 8, 2, 3), (1, 8, 8, 4), (2, 8, 1, 2), (3, 4, 4, 12), (2, 300, 6, 50)],
)
def test_models_of_any_shape_are_replayed(layers: int, experts: int, k: int, slots: int) -> None:
    trace = markov_trace(1, tokens=26, layers=layers, experts=experts, k=k)
    steps = line_up(trace, sequences(26, length=13), batch=1)
    shape = shape_of(slots, layers=layers, experts=experts)
    for name in POLICIES:
        policy = make_policy(name, shape, future=future_of(steps, num_experts=experts))
        timing = Timing(link=SPEC, expert_bytes=1 << 16, layer_ns=50_000)
        score = Replay(policy, steps, num_experts=experts, timing=timing).run()
        assert score.needs == score.hits + score.late + score.demand, name


# --- the link -------------------------------------------------------------------------------


def link(*, chunks: int = 4) -> Link:
    """A block takes 100 + 4 x 976,563 ns or so; the exact time is `block_ns`."""
    return Link(SPEC, block_bytes=chunks << 20)


def test_a_demand_goes_ahead_of_prefetches_but_not_of_the_chunk_on_the_wire() -> None:
    wire = link()
    for key in (1, 2):
        wire.prefetch(key)
    assert wire.next_landing(wire.chunk_ns // 2) is None
    assert wire.finish_chunk() is None
    assert wire.now_ns == wire.chunk_ns
    wire.demand(9)
    assert wire.next_landing() == (9, wire.chunk_ns + wire.block_ns)
    assert wire.next_landing() == (1, 2 * wire.block_ns)
    assert wire.next_landing() == (2, 3 * wire.block_ns)
    assert wire.next_landing() is None


def test_a_prefetch_that_is_needed_keeps_what_it_has_sent() -> None:
    wire = link()
    wire.prefetch(1)
    assert wire.next_landing(wire.block_ns // 2) is None
    wire.demand(1)
    assert wire.next_landing() == (1, wire.block_ns)


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 3_000_000)), max_size=30))
def test_a_link_is_never_idle_with_work_and_never_early(calls: list[tuple[bool, int]]) -> None:
    wire = link(chunks=2)
    landed = []
    for key, (urgent, wait_ns) in enumerate(calls):
        (wire.demand if urgent else wire.prefetch)(key)
        until = wire.now_ns + wait_ns
        while (landing := wire.next_landing(until)) is not None:
            landed.append(landing)
    while (landing := wire.next_landing()) is not None:
        landed.append(landing)
    assert sorted(one.key for one in landed) == list(range(len(calls)))
    assert wire.busy_ns == len(calls) * wire.block_ns
    assert [one.at_ns for one in landed] == sorted(one.at_ns for one in landed)


def test_without_prefetch_stall_is_demand_times_the_transfer() -> None:
    steps = lined_up(9)
    timing = Timing(link=SPEC, expert_bytes=1 << 20, layer_ns=10)
    score = play("lru", steps, timing=timing)
    assert score.stall_ns == score.demand * SPEC.transfer_ns(1 << 20)


def test_link_profiles_have_names() -> None:
    assert link_named("pcie5").transfer_ns(12 << 20) == pytest.approx(234_000, rel=0.01)
    with pytest.raises(ConfigError, match=f"choose one of {', '.join(LINKS)}"):
        link_named("usb")


# --- what hotset must reach -----------------------------------------------------------------


@pytest.mark.parametrize(("seed", "slots"), [(11, 12), (12, 24), (13, 24)])
def test_hotset_closes_the_gap_to_belady_within_its_budget(seed: int, slots: int) -> None:
    steps = lined_up(seed, tokens=800)
    lru, belady, ours = (play(name, steps, slots=slots) for name in ("lru", "belady", "hotset"))
    closed = (lru.demand - ours.demand) / (lru.demand - belady.demand)
    assert closed > 0.9
    assert ours.loads_per_layer_step < 1.35 * lru.loads_per_layer_step


@pytest.mark.parametrize("batch", [1, 6])
def test_hotset_stalls_least(batch: int) -> None:
    steps = lined_up(14, tokens=900, batch=batch)
    timing = Timing(link=LINKS["pcie5"], expert_bytes=12 << 20, layer_ns=400_000)
    ours = play("hotset", steps, timing=timing).stall_ns
    for name in ("load-on-demand", "lru", "lfu-aged", "moe-infinity", "fate", "hobbit"):
        assert ours < play(name, steps, timing=timing).stall_ns, name


def test_the_named_settings_differ_in_loads() -> None:
    steps = lined_up(15, tokens=600)
    frugal, eager = play("hotset-frugal", steps), play("hotset-eager", steps)
    assert eager.demand < frugal.demand
    assert eager.prefetched > frugal.prefetched


TRACES = ("olmoe_1b_7b_decode", "deepseek_v2_lite_esft")


@pytest.mark.slow
@pytest.mark.parametrize("resident", [0.1, 0.25, 0.5])
@pytest.mark.parametrize("name", TRACES)
def test_recorded_decode(name: str, resident: float) -> None:
    folder = os.environ.get("HOTSET_DATA")
    if folder is None:
        pytest.skip("HOTSET_DATA is not set: no recorded routing")
    path = Path(folder) / "router" / f"{name}.npz"
    if not path.exists():
        pytest.skip(f"HOTSET_DATA has no router/{name}.npz")
    trace = read_trace(path).head(6000)
    steps = line_up(trace.experts, trace.seq, batch=1)
    shape = replace(
        shape_of(1, layers=trace.layers, experts=trace.num_experts),
        capacity_bytes=SLOT_BYTES * int(resident * trace.layers * trace.num_experts),
    )
    scores = {}
    for policy in ("lru", "belady", "hotset"):
        future = future_of(steps, num_experts=trace.num_experts)
        replay = Replay(
            make_policy(policy, shape, future=future), steps, num_experts=trace.num_experts
        )
        scores[policy] = replay.run()
    lru, belady, ours = scores["lru"], scores["belady"], scores["hotset"]
    assert lru.demand - ours.demand >= lru.demand - belady.demand
    assert ours.loads_per_layer_step <= 1.3 * lru.loads_per_layer_step
