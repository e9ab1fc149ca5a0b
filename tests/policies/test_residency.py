"""Residency of one device: budgets, pins, prefetch, and a better hit rate than LRU."""

from __future__ import annotations

import statistics
import time
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from routing_traces import markov_trace

from hotset.errors import ConfigError, InvalidTransition
from hotset.policies.config import ResidencyConfig
from hotset.policies.predictor import TransitionPredictor, Visit
from hotset.policies.residency import (
    LIVE_POLICIES,
    DeviceResidency,
    DeviceShape,
    ResidencyPolicy,
    make_policy,
)
from hotset.policies.types import Format, State

if TYPE_CHECKING:
    from numpy.typing import NDArray

NAMES = LIVE_POLICIES


def shape_of(slots: int, *, layers: int = 4, experts: int = 16) -> DeviceShape:
    return DeviceShape(
        layers=tuple(range(1, layers + 1)),
        num_experts=experts,
        full_nbytes=128,
        reduced_nbytes=64,
        capacity_bytes=slots * 128,
    )


class Score(NamedTuple):
    hit_ratio: float
    loads_per_layer: float
    routed_ns: list[int]


def drive(policy: ResidencyPolicy, trace: NDArray[np.int64], *, layers: tuple[int, ...]) -> Score:
    """Walk a trace [tokens, L, k] as a worker does, every fetch landing at once."""
    steps = trace.tolist()
    ones = [1] * trace.shape[2]
    hits = loads = 0
    spent: list[int] = []

    def fetch(layer: int, expert: int) -> bool:
        while (victim := policy.victim(128)) is not None:
            policy.dropped(victim.layer, victim.expert)
        if not policy.room(128):
            return False
        policy.in_flight(layer, expert)
        policy.landed(layer, expert)
        return True

    for step, by_layer in enumerate(steps):
        for layer, experts in zip(layers, by_layer, strict=True):
            start = time.perf_counter_ns()
            plan = policy.routed(layer, experts, ones, step=step)
            spent.append(time.perf_counter_ns() - start)
            hits += len(plan.resident)
            for expert in plan.resident:
                policy.pin(layer, expert)
            for expert in plan.missing:
                assert fetch(layer, expert)
                policy.pin(layer, expert)
            loads += len(plan.missing)
            loads += sum(fetch(ahead, expert) for ahead, expert in plan.prefetch)
            for expert in experts:
                policy.unpin(layer, expert)
    policy.validate()
    return Score(hits / trace.size, loads / (len(steps) * len(layers)), spent)


@pytest.mark.parametrize("seed", [3, 4])
def test_hotset_beats_lru_on_a_drifting_markov_trace(seed: int) -> None:
    trace = markov_trace(seed, tokens=400, layers=4, experts=16, k=3)
    shape = shape_of(16)
    lru = drive(make_policy("lru", shape), trace, layers=shape.layers)
    quiet = make_policy("hotset", shape, config=ResidencyConfig(prefetch_depth=0))
    aged = drive(quiet, trace, layers=shape.layers)
    hotset = drive(make_policy("hotset", shape), trace, layers=shape.layers)
    assert aged.hit_ratio > lru.hit_ratio
    assert hotset.hit_ratio > lru.hit_ratio + 0.05
    assert hotset.loads_per_layer < 1.4 * lru.loads_per_layer


def test_a_layer_step_is_cheap() -> None:
    trace = markov_trace(1, tokens=150, layers=16, experts=64, k=8)
    shape = shape_of(256, layers=16, experts=64)
    score = drive(make_policy("hotset", shape), trace, layers=shape.layers)
    # Measured at 21 us on a busy two-core machine; the bound only catches another order.
    assert statistics.median(score.routed_ns) < 200_000


@pytest.mark.parametrize("name", NAMES)
def test_plan_splits_needs_and_orders_misses_by_tokens(name: str) -> None:
    policy = make_policy(name, shape_of(4))
    policy.in_flight(1, 0)
    policy.landed(1, 0)
    policy.in_flight(1, 5)
    plan = policy.routed(1, [0, 5, 7, 9], [1, 1, 2, 30], step=0)
    assert plan.resident == [0]
    assert plan.arriving == [5]
    assert plan.missing == [9, 7]


@pytest.mark.parametrize("name", NAMES)
def test_victim_is_never_pinned_needed_or_in_flight(name: str) -> None:
    policy = make_policy(name, shape_of(4))
    for expert in range(3):
        policy.in_flight(2, expert)
        policy.landed(2, expert)
    policy.in_flight(2, 3)
    policy.pin(2, 0)
    assert policy.victim(128, needed=[(2, 1)]) == (2, 2, Format.BF16)
    policy.pin(2, 2)
    assert policy.victim(128, needed=[(2, 1)]) is None
    with pytest.raises(InvalidTransition, match="pinned"):
        policy.dropped(2, 0)
    with pytest.raises(InvalidTransition, match="drop the victim"):
        policy.in_flight(3, 3)
    policy.unpin(2, 2)
    policy.dropped(2, 2)
    assert policy.victim(128) is None  # there is room now
    policy.validate()


def test_a_reduced_copy_is_upgraded_in_place_and_kept_when_that_fails() -> None:
    policy = make_policy("hotset", shape_of(2))
    policy.in_flight(1, 0, Format.INT8)
    policy.landed(1, 0)
    assert policy.state(1, 0) is State.REDUCED
    assert policy.used_bytes == 64
    policy.in_flight(1, 0)
    assert policy.used_bytes == 64 + 128
    policy.failed(1, 0)
    assert policy.state(1, 0) is State.REDUCED
    policy.in_flight(1, 0)
    policy.landed(1, 0)
    assert policy.state(1, 0) is State.FULL
    assert policy.used_bytes == 128
    policy.demoted(1, 0)
    assert policy.format(1, 0) is Format.INT8
    policy.validate()
    assert [line.event for line in policy.story(1, 0)][-2:] == ["landed_full", "demoted"]


def cycle(policy: DeviceResidency, *, steps: int, first: int = 0) -> None:
    """Steps in which layer 2 needs expert 3 after 0 and expert 4 after 1."""
    for step in range(first, first + steps):
        policy.routed(1, [step % 2], [1], step=step)
        policy.routed(2, [3 + step % 2], [1], step=step)


def test_what_is_expected_next_is_kept_and_fetched() -> None:
    policy = DeviceResidency(shape_of(8, layers=2))
    for expert in (3, 4):
        policy.in_flight(2, expert)
        policy.landed(2, expert)
    cycle(policy, steps=60)
    policy.routed(1, [0], [1], step=60)
    ahead = policy.ranks()[1]
    assert ahead[3] > 3 * ahead[4], "layer 1 has chosen expert 0, which expert 3 follows"
    policy.dropped(2, 3)
    policy.routed(2, [4], [1], step=60)
    plan = policy.routed(1, [0], [1], step=61)
    assert plan.prefetch[0] == (2, 3)


def test_a_chance_of_one_forbids_prefetching() -> None:
    policy = DeviceResidency(shape_of(8, layers=2))
    cycle(policy, steps=60)
    assert policy.routed(1, [0], [1], step=60).prefetch
    policy.routed(2, [3], [1], step=60)
    policy.steer(1e9)
    assert policy.routed(1, [0], [1], step=61).prefetch == []
    policy.routed(2, [3], [1], step=61)
    policy.steer(0.0, most=0)
    assert policy.routed(1, [0], [1], step=62).prefetch == []


def test_a_full_device_keeps_what_is_likelier_than_the_candidate() -> None:
    policy = DeviceResidency(shape_of(8, layers=2))
    for layer in (1, 2):
        for expert in range(4):
            policy.in_flight(layer, expert)
            policy.landed(layer, expert)
    for step in range(60):
        for layer in (1, 2):
            policy.routed(layer, [0, 1, 2, 3], [1] * 4, step=step)
    assert policy.routed(1, [0, 1, 2, 3], [1] * 4, step=60).prefetch == []


def test_the_regime_and_the_link_set_the_budget() -> None:
    policy = DeviceResidency(shape_of(24))
    ratios = []
    for experts in (3, 12, 3):
        for step in range(30):
            for layer in (1, 2, 3, 4):
                policy.routed(layer, list(range(experts)), [1] * experts, step=step)
        ratios.append((policy.dense, policy.budget.ratio))
    config = policy.config
    sparse = (False, config.load_ratio)
    assert ratios == [sparse, (True, config.dense_load_ratio), sparse]
    policy.steer(0.0, most=2)
    assert policy.budget.ratio == config.idle_load_ratio


def test_one_prefill_is_no_regime() -> None:
    policy = DeviceResidency(shape_of(24))
    for step in range(30):
        for layer in (1, 2, 3, 4):
            policy.routed(layer, [0, 1], [1, 1], step=step)
    learnt = policy.predictor.chance().copy()
    for _ in range(2):
        for layer in (1, 2, 3, 4):
            policy.routed(layer, list(range(16)), [9] * 16, step=30)
    assert not policy.dense
    assert (policy.predictor.chance() == learnt).all()


def test_expected_use_is_a_ratio_that_follows_use() -> None:
    policy = DeviceResidency(shape_of(4))
    for step in range(200):
        for layer in (1, 2, 3, 4):
            policy.routed(layer, [step % 2, 5], [1, 1], step=step)
    use = policy.expected_use()
    assert use.shape == (4, 16)
    assert use[:, 5] == pytest.approx(1.0, abs=0.08)  # ageing goes on within a pass
    assert use[:, 0] == pytest.approx(0.5, abs=0.1)
    assert use[:, 9] == pytest.approx(0.0, abs=1e-6)


def test_values_stay_finite_whatever_the_certainty() -> None:
    policy = DeviceResidency(shape_of(4), config=ResidencyConfig(learning_rate=4.0))
    for expert in (5, 6):
        policy.in_flight(1, expert)
        policy.landed(1, expert)
    for step in range(300):
        for layer in (1, 2, 3, 4):
            policy.routed(layer, [step % 16], [1], step=step)
        assert np.isfinite(policy.ranks()[0][[5, 6]]).all()
        assert (policy.ranks()[0][[5, 6]] > 0).all()
    policy.validate()


def test_errors_name_the_remedy() -> None:
    with pytest.raises(ConfigError, match="choose one of hotset, "):
        make_policy("best", shape_of(4))
    with pytest.raises(ConfigError, match="raise the ratio"):
        shape_of(0)


class Walk(RuleBasedStateMachine):
    """A worker that fetches, pins and fails at random; every step is followed by `validate`."""

    name = "hotset"

    def __init__(self) -> None:
        super().__init__()
        self.policy = make_policy(self.name, shape_of(5, layers=2, experts=6))
        self.flying: set[tuple[int, int]] = set()
        self.pinned: list[tuple[int, int]] = []
        self.step = 0

    @rule(layer=st.sampled_from([1, 2]), experts=st.sets(st.integers(0, 5), min_size=1))
    def route(self, layer: int, experts: set[int]) -> None:
        self.step += 1
        needs = sorted(experts)
        plan = self.policy.routed(layer, needs, [1] * len(needs), step=self.step)
        assert sorted([*plan.resident, *plan.arriving, *plan.missing]) == needs

    @rule(
        layer=st.sampled_from([1, 2]),
        expert=st.integers(0, 5),
        form=st.sampled_from([Format.BF16, Format.INT8]),
    )
    def fetch(self, layer: int, expert: int, form: Format) -> None:
        state = self.policy.state(layer, expert)
        if state is State.REDUCED and (layer, expert) in self.pinned:
            return
        want = self.policy.nbytes(form)
        while (victim := self.policy.victim(want, needed=[(layer, expert)])) is not None:
            assert (victim.layer, victim.expert) not in self.pinned
            self.policy.dropped(victim.layer, victim.expert)
        if self.policy.room(want) and state in {State.STORED, State.REDUCED}:
            self.policy.in_flight(layer, expert, form)
            self.flying.add((layer, expert))

    @precondition(lambda self: self.flying)
    @rule(data=st.data(), works=st.booleans())
    def end(self, data: st.DataObject, *, works: bool) -> None:
        layer, expert = data.draw(st.sampled_from(sorted(self.flying)))
        self.flying.discard((layer, expert))
        if works:
            self.policy.landed(layer, expert)
        else:
            self.policy.failed(layer, expert)

    @rule(layer=st.sampled_from([1, 2]), expert=st.integers(0, 5))
    def pin(self, layer: int, expert: int) -> None:
        if self.policy.format(layer, expert) is not None:
            self.policy.pin(layer, expert)
            self.pinned.append((layer, expert))

    @precondition(lambda self: self.pinned)
    @rule(data=st.data())
    def unpin(self, data: st.DataObject) -> None:
        at = data.draw(st.sampled_from(range(len(self.pinned))))
        self.policy.unpin(*self.pinned.pop(at))

    @invariant()
    def books_match(self) -> None:
        self.policy.validate()


@pytest.mark.parametrize("name", NAMES)
def test_random_walks_keep_the_books(name: str) -> None:
    machine = type("NamedWalk", (Walk,), {"name": name})
    thorough = name in {"hotset", "lru", "fate"}
    steps = settings(max_examples=25 if thorough else 6, stateful_step_count=40)
    run_state_machine_as_test(machine, settings=steps)


@given(st.lists(st.integers(0, 15), min_size=1, max_size=8, unique=True))
@settings(max_examples=20)
def test_transitions_are_probabilities(experts: list[int]) -> None:
    predictor = TransitionPredictor(rows=4, num_experts=16)
    visits = [
        Visit(row, np.array([step % 7, 9 + row], dtype=np.intp))
        for step in range(20)
        for row in range(4)
    ]
    for start in range(0, 76, 4):
        predictor.observe(visits[start : start + 5])
    guess = predictor.predict(1, distance=1, experts=np.array(experts, dtype=np.intp))
    assert float(guess.min()) >= 0.0
    assert float(guess.max()) <= 1.0 + 1e-5
    assert len(predictor.top(1, distance=1, experts=experts, limit=3)) == 3
