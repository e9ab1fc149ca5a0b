"""Policies compared live: figures from the traces, rounds held against each other."""

from __future__ import annotations

import pytest

from hotset.cluster.bench_policies import Policies, Side, run_bench
from hotset.cluster.bench_policies_command import render
from hotset.errors import ConfigError
from tests.cluster.conftest import DEMO


def quiet(_text: str) -> None:
    """Say nothing."""


def side(policy: str, *stall_ns: int, text: int = 1) -> Side:
    count = len(stall_ns)
    return Side(
        policy=policy, stall_ns=list(stall_ns), step_ns=[10_000_000] * count,
        waits=[1.0] * count, demands=[2.0] * count, prefetches=[0.5] * count,
        dispatches=[0.0] * count, text=[[text]],
    )  # fmt: skip


def test_the_first_policy_is_held_against_the_others_round_by_round() -> None:
    sides = (
        side("hotset", 1_000_000, 2_000_000, 600_000),
        side("lru", 2_000_000, 1_000_000, 900_000),
    )
    found = Policies(
        model="demo", tokens=8, rounds=3, sides=sides, machine="here", emulated=("hbm",)
    )
    text = render(found)
    assert "hotset / lru: stall 1.00, less in 2 of 3 rounds" in text
    assert "over all rounds: 0.92 of the stall under lru" in text
    assert "the same tokens under all policies" in text
    other = Policies(
        model="demo", tokens=8, rounds=1, sides=(side("a", 1), side("b", 2, text=2)),
        machine="here", emulated=(),
    )  # fmt: skip
    assert "TOKENS DIFFER" in render(other)


def test_a_policy_named_twice_is_refused() -> None:
    with pytest.raises(ConfigError, match="twice"):
        run_bench(["lru", "lru"], model=DEMO, tokens=8, rounds=1, say=quiet)


@pytest.mark.ray
@pytest.mark.nixl
@pytest.mark.slow
def test_policies_are_served_in_turns_and_give_the_same_tokens() -> None:
    found = run_bench(
        ["hotset", "lru"], model=DEMO, tokens=12, rounds=2, options={"workers": 1}, say=quiet
    )
    assert found.same_tokens
    for one in found.sides:
        assert len(one.stall_ns) == len(one.step_ns) == 2
        assert len(one.text) == 3  # with the one to warm up
        assert all(0 <= stall < step for stall, step in zip(one.stall_ns, one.step_ns, strict=True))
        assert sum(one.demands) > 0
    assert found.sides[1].prefetches == [0.0, 0.0]
