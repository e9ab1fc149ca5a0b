"""Tokens or weights, the order of sources, and the estimate of a link."""

from __future__ import annotations

import random

import pytest

from hotset.policies.choose import LinkCost, Move, move_tokens_or_weights, order_sources
from hotset.policies.types import BlockId, Copy, Format


def copy_at(store: str, nbytes: int = 100) -> Copy:
    return Copy(
        block=BlockId(0, 0),
        format=Format.BF16,
        store=store,
        offset=0,
        nbytes=nbytes,
        generation=1,
        checksum=0,
        incarnation=1,
    )


@pytest.mark.parametrize(
    ("rows", "dispatch_ns", "fetch_ns", "reuse", "victim", "move"),
    [
        (1, 500_000, 3_000_000, 0.0, 0.0, Move.TOKENS),  # a lone row goes to the expert
        (1, 500_000, 200_000, 0.0, 0.0, Move.WEIGHTS),  # a small block is fetched
        (1, 500_000, 3_000_000, 0.9, 0.0, Move.WEIGHTS),  # it will be needed again
        (1, 500_000, 3_000_000, 0.9, 0.8, Move.TOKENS),  # so will what it would displace
        (1, None, 3_000_000, 0.0, 0.9, Move.WEIGHTS),  # nobody has it
        (400, 500_000, 3_000_000, 0.0, 0.0, Move.WEIGHTS),  # many rows cost more than weights
        (1, 500, 10_500, 0.0, 0.0, Move.TOKENS),  # a tie moves fewer bytes
    ],
)
def test_cheaper_way_wins(  # noqa: PLR0917 - a table
    rows: int, dispatch_ns: int | None, fetch_ns: int, reuse: float, victim: float, move: Move
) -> None:
    choice = move_tokens_or_weights(
        rows,
        dispatch_ns=dispatch_ns,
        fetch_ns=fetch_ns,
        row_ns=10_000,
        reuse_probability=reuse,
        victim_probability=victim,
    )
    assert choice.move is move


def test_sources_come_cheapest_first_and_unknown_last() -> None:
    copies = [copy_at("new"), copy_at("cxl"), copy_at("b"), copy_at("a"), copy_at("host")]
    cost = {"host": 10, "a": 20, "b": 20, "cxl": 90}
    names = [copy.store for copy in order_sources(copies, cost)]
    assert names == ["host", "a", "b", "cxl", "new"]


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_link_cost_finds_latency_and_bandwidth(seed: int) -> None:
    rng = random.Random(seed)
    link = LinkCost(latency_ns=10_000, bytes_per_s=1e9)
    for _ in range(3000):
        nbytes = rng.choice([4_096, 65_536, 1 << 20, 8 << 20])
        truth = 200_000 + nbytes / 5.0  # 200 us and 5 GB/s
        link.observe(nbytes, elapsed_ns=int(truth * rng.uniform(0.9, 1.1)))
    for nbytes in (65_536, 1 << 20, 8 << 20):
        truth = 200_000 + nbytes / 5.0
        assert 0.8 * truth < link.estimate_ns(nbytes) < 1.25 * truth
    assert 3.5e9 < link.bytes_per_s < 7e9


def test_reads_that_waited_for_the_connection_are_forgotten_as_soon_as_one_did_not() -> None:
    link = LinkCost(latency_ns=100_000, bytes_per_s=2e9)
    link.observe(73_792, elapsed_ns=20_000_000)
    assert link.estimate_ns(73_792) < 500_000  # one read says little
    for _ in range(14):  # a first fill: all of it waits for one connection
        link.observe(73_792, elapsed_ns=30_000_000)
    for _ in range(2):
        link.observe(73_792, elapsed_ns=60_000)
    assert link.estimate_ns(73_792) < 400_000
    for _ in range(3):
        link.observe(73_792, elapsed_ns=60_000)
    assert 55_000 < link.estimate_ns(73_792) < 90_000


def test_one_hiccup_moves_the_estimate_little_and_a_slow_link_is_noticed() -> None:
    link = LinkCost(latency_ns=100_000, bytes_per_s=5e9)
    for _ in range(50):
        link.observe(1 << 20, elapsed_ns=310_000)
    before = link.estimate_ns(1 << 20)
    link.observe(1 << 20, elapsed_ns=5_000_000_000)
    assert link.estimate_ns(1 << 20) < 1.3 * before
    for _ in range(60):
        link.observe(1 << 20, elapsed_ns=3_100_000)
    assert link.estimate_ns(1 << 20) > 2_500_000
