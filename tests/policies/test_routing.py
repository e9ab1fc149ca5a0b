"""Routing analysis: known answers for extreme traces, and the hit curve against a real LRU."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from routing_traces import markov_trace, sequences

from hotset.policies.routing import RoutingAnalysis, analyze_routing

if TYPE_CHECKING:
    from numpy.typing import NDArray


def analyze(experts: NDArray[np.int64], *, num_experts: int, length: int = 64) -> RoutingAnalysis:
    seq = sequences(len(experts), length=length)
    return analyze_routing(experts, seq, num_experts=num_experts)


def test_always_the_same_experts() -> None:
    found = analyze(np.tile(np.arange(4), (256, 3, 1)), num_experts=32)
    assert found.repeat_ratio == 1.0
    assert found.srp == pytest.approx({4: 1.0, 16: 1.0, 64: 1.0})
    assert found.sch[64][4] == pytest.approx(1.0)
    assert found.entropy_ratio == pytest.approx(2 / 5)
    assert found.skew_ratio == pytest.approx(8.0)
    assert found.best_slots == 4
    assert found.verdict.startswith("Offloading suits this model: 4 of 32 experts a layer")


def test_uniform_routing_does_not_suit() -> None:
    rng = np.random.default_rng(0)
    experts = np.array([[rng.permutation(32)[:4] for _ in range(2)] for _ in range(1500)])
    found = analyze(experts, num_experts=32)
    assert found.entropy_ratio > 0.99
    assert found.repeat_ratio == pytest.approx(1 / 8, abs=0.02)
    assert abs(found.excess_ratio) < 0.05
    assert found.verdict.startswith("Offloading does not suit this model")


def test_segments_stay_within_sequences() -> None:
    experts = np.zeros((64, 1, 1), dtype=np.int64)
    experts[32:] = 1
    found = analyze_routing(experts, sequences(64, length=32), num_experts=2)
    assert found.srp[4] == pytest.approx(1.0)
    assert found.srp[64] == 0.0  # no sequence is that long
    assert found.repeat_ratio == 1.0


@given(st.integers(0, 1000))
@settings(max_examples=8)
def test_ratios_are_ratios_and_larger_caches_hit_more(seed: int) -> None:
    found = analyze(markov_trace(seed, tokens=100, layers=3, experts=16, k=3), num_experts=16)
    curve = np.array(found.lru_hit_ratio)
    assert len(curve) == 17
    assert (np.diff(curve) >= 0).all()
    assert curve[0] == 0.0
    assert curve[-1] <= 1.0
    for shares in found.sch.values():
        values = list(shares.values())
        assert values == sorted(values)
        assert max(values) <= 1.0 + 1e-9
    assert all(0.0 <= value <= 1.0 for value in found.srp.values())
    assert 0 <= found.best_slots <= 16


def test_the_hit_curve_is_that_of_lru() -> None:
    trace = markov_trace(3, tokens=200, layers=1, experts=16, k=3)
    curve = analyze(trace, num_experts=16).lru_hit_ratio
    for slots in (4, 8, 12):
        recent: list[int] = []
        hits = 0
        for chosen in trace[:, 0].tolist():
            hits += sum(expert in recent for expert in chosen)
            recent = [*chosen, *(expert for expert in recent if expert not in chosen)][:slots]
        assert curve[slots] == pytest.approx(hits / trace.size)
