"""The cost of tracing is measured with real actors, and whatever the collector does is counted."""

from __future__ import annotations

import json

import numpy as np
import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from hotset.cluster.bench_trace import append_ns
from hotset.cluster.bench_trace_tokens import Change, change
from hotset.cluster.cli import main

pytest.importorskip("opentelemetry.exporter.otlp.proto.grpc", reason="needs the extra otlp")


def test_a_row_costs_microseconds() -> None:
    assert 0 < append_ns(rows=2_000, rounds=3) < 50_000


@given(st.lists(st.floats(0.5, 2.0), min_size=1, max_size=30), st.floats(0.1, 10.0))
def test_a_change_is_that_of_pairs(others: list[float], factor: float) -> None:
    """Whatever slows both of a pair alike cancels; swapping the sides inverts the interval."""
    exact = change([factor * one for one in others], others)
    assert (exact.low, exact.ratio, exact.high) == pytest.approx((factor - 1,) * 3)
    noisy = change(others, [1.0] * len(others))
    assert noisy.low <= noisy.ratio <= noisy.high
    turned = change([1.0] * len(others), others)
    assert (1 + turned.high) * (1 + noisy.low) == pytest.approx(1)


def test_ninety_five_of_a_hundred_intervals_hold_the_truth() -> None:
    """Noise with rare slow rounds, as a shared machine has."""
    rng = np.random.default_rng(7)
    held = 0
    for _ in range(400):
        noise = rng.normal(0, 0.03, (2, 20)) + (rng.random((2, 20)) < 0.1) * 0.3
        others, mine = np.exp(noise)
        found = change((0.98 * mine).tolist(), others.tolist())
        held += found.low <= -0.02 <= found.high
    assert 0.92 <= held / 400 <= 0.99


@pytest.mark.parametrize(
    ("low", "high", "verdict"),
    [(-0.029, 0.1, "kept"), (-0.2, -0.03, "missed"), (-0.05, 0.05, "open: more rounds decide")],
)
def test_a_verdict_needs_the_whole_interval(low: float, high: float, verdict: str) -> None:
    assert Change(ratio=(low + high) / 2, low=low, high=high).verdict == verdict


@pytest.mark.ray
@pytest.mark.slow
def test_no_collector_holds_anything_up_and_every_span_is_counted() -> None:
    options = ["bench", "trace", "--rounds", "2", "--tokens", "8", "--seconds", "1", "--json"]
    ran = CliRunner().invoke(main, options, catch_exceptions=False)
    cost = json.loads(ran.stdout)
    assert [one["way"] for one in cost["tokens"]] == ["on", "off", "sent", "frozen"]
    assert all(one["tokens_per_s"] > 0 for one in cost["tokens"])
    assert cost["spans_per_token"] > 0
    actors = {one["collector"]: one for one in cost["actors"]}
    assert all(one["written"] == one["rows"] for one in actors.values())
    for kind in ("http/protobuf", "grpc"):
        assert (actors[kind]["exported"], actors[kind]["dropped"]) == (actors[kind]["rows"], 0)
    for kind in ("frozen", "closed"):
        one = actors[kind]
        assert one["exported"] + one["dropped"] == one["rows"]
        assert one["lag_ms_worst"] < 2_000, "a call to the collector would take ten seconds"
    assert actors["closed"]["dropped"] > 0
