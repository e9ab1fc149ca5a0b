"""Accounts of predictors: what a stage costs and saves, and when it is switched off."""

from __future__ import annotations

from itertools import count, pairwise

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from routing_traces import markov_trace

from hotset.policies.adaptive import DeviceResidency
from hotset.policies.charge import Sample, StageCharges, gauges_of, said_of
from hotset.policies.device import DeviceShape

LAYERS, EXPERTS, K = 6, 16, 2


def sample(*recalls: float, spent_ns: int = 1000, missed_ns: int = 100_000) -> Sample:
    return Sample(
        recalls=recalls, spent_ns=[spent_ns] * len(recalls), loads=2.0, missed_ns=missed_ns
    )


def test_a_stage_that_adds_nothing_is_switched_off_farthest_first() -> None:
    charges = StageCharges(depth=2, switch=True)
    for _ in range(100):
        recalls = (0.2, 0.4, 0.4, 0.7)[: 2 + charges.on] if charges.on == 2 else (0.2, 0.4, 0.7)
        charges.observe(sample(*recalls))
    assert charges.on == 1
    named = {one.name: one for one in charges.accounts()}
    assert not named["2 ahead"].on
    assert not named["2 ahead"].pays
    assert named["1 ahead"].on
    assert named["1 ahead"].saved_ns > named["1 ahead"].spent_ns


def test_what_was_switched_off_is_tried_again_later_each_time() -> None:
    charges = StageCharges(depth=1, switch=True)
    seen = [charges.observe(sample(*(0.2, 0.4, 0.4)[: 2 + charges.on])) for _ in range(3000)]
    edges = np.flatnonzero(np.diff(seen))
    off = edges[1::2] - edges[::2][: len(edges[1::2])]
    assert len(off) >= 2
    assert all(later > earlier for earlier, later in pairwise(off))


def test_without_leave_to_switch_all_stay() -> None:
    charges = StageCharges(depth=2, switch=False)
    for _ in range(200):
        charges.observe(sample(0.2, 0.2, 0.2, 0.2))
    assert charges.on == 2
    assert all(one.on for one in charges.accounts())
    assert not charges.accounts()[-1].pays


@given(recalls=st.lists(st.floats(0, 1), min_size=5, max_size=5), spent=st.integers(0, 10**6))
def test_accounts_are_never_negative_and_save_no_more_than_all_misses(
    recalls: list[float], spent: int
) -> None:
    charges = StageCharges(depth=3, switch=False)
    for _ in range(5):
        charges.observe(sample(*recalls, spent_ns=spent))
    accounts = charges.accounts()
    assert all(one.spent_ns >= 0 and one.saved_ns >= 0 for one in accounts)
    assert sum(one.saved_ns for one in accounts) <= 2 * 100_000 + 5


def walk(policy: DeviceResidency, *, tokens: int, first: int = 0) -> None:
    trace = markov_trace(3, tokens=first + tokens, layers=LAYERS, experts=EXPERTS, k=K)
    for step, token in enumerate(trace[first:].tolist()):
        for row, experts in enumerate(token):
            plan = policy.routed(row, experts, [1] * K, step=step)
            wanted = [(row, expert) for expert in plan.missing]
            for layer, expert in (*wanted, *plan.prefetch):
                while not policy.room(2):
                    victim = policy.victim(2)
                    assert victim is not None
                    policy.dropped(victim.layer, victim.expert)
                policy.in_flight(layer, expert)
                policy.landed(layer, expert)
    policy.validate()


def device() -> DeviceResidency:
    return DeviceResidency(
        DeviceShape(
            layers=tuple(range(LAYERS)), num_experts=EXPERTS, full_nbytes=2, reduced_nbytes=1,
            capacity_bytes=2 * 30,
        )
    )  # fmt: skip


def test_a_device_switches_off_stages_that_a_slow_clock_makes_dear() -> None:
    policy = device()
    ticks = count(step=1_000_000)  # each look at the clock takes a millisecond
    policy.charge_predictors(lambda: next(ticks), switch=True)
    policy.steer(0.0, missed_ns=1)
    walk(policy, tokens=1200)
    assert policy.predictor.depth < 3
    assert any(not one.on for one in policy.charges())


def test_a_device_keeps_stages_that_cost_nothing() -> None:
    policy = device()
    policy.charge_predictors(lambda: 0, switch=True)
    policy.steer(0.0, missed_ns=1_000_000)
    walk(policy, tokens=600)
    assert policy.predictor.depth == 3
    named = {one.name: one.saved_ns for one in policy.charges()}
    assert named["1 ahead"] + named["2 ahead"] + named["3 ahead"] > 0


def test_a_narrowed_predictor_learns_on_and_remembers_what_is_off() -> None:
    policy = device()
    walk(policy, tokens=200)
    predictor = policy.predictor
    before = predictor._kept.copy()
    predictor.resize(1)
    predictor.resize(3)
    assert np.array_equal(predictor._kept, before)
    assert predictor.begin().seen[0].shape == (policy._rows, (3 + 1) * EXPERTS)


def test_accounts_travel_as_gauges() -> None:
    charges = StageCharges(depth=1, switch=True)
    for _ in range(60):
        charges.observe(sample(*(0.2, 0.4, 0.4)[: 2 + charges.on], spent_ns=2000))
    said = said_of({"requests": 1.0, **gauges_of(charges.accounts(), prefetching=False)})
    assert said.startswith("prefetching OFF")
    assert "1 ahead OFF costs 2 us a pass, saves 0 us" in said
    assert said_of({"requests": 1.0}) == ""


def test_what_a_fetch_gains_and_displaces_are_aged_shares_of_passes() -> None:
    policy = device()
    assert policy.use_chances(0, 0) == (0.0, 0.0), "room is free, nothing is known"
    walk(policy, tokens=100)
    expected = policy.expected_use()
    for layer in range(LAYERS):
        for expert in range(EXPERTS):
            chances = policy.use_chances(layer, expert)
            assert abs(chances.reuse - expected[layer, expert]) < 1e-6
            assert 0.0 <= chances.victim <= float(expected.max())
