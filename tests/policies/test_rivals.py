"""Rival policies: each keeps what its paper says it keeps."""

from __future__ import annotations

import numpy as np
import pytest

from hotset.errors import ConfigError
from hotset.policies.residency import DeviceShape, Future, make_policy
from hotset.policies.rivals.base import NextGates
from hotset.policies.rivals.gated import Fate


def shape_of(slots: int, *, layers: int = 2, experts: int = 8) -> DeviceShape:
    return DeviceShape(
        layers=tuple(range(layers)),
        num_experts=experts,
        full_nbytes=2,
        reduced_nbytes=1,
        capacity_bytes=2 * slots,
    )


def bring(policy: object, *blocks: tuple[int, int]) -> None:
    for layer, expert in blocks:
        policy.in_flight(layer, expert)  # type: ignore[attr-defined] # any policy
        policy.landed(layer, expert)  # type: ignore[attr-defined] # any policy


def victim_after(name: str, uses: list[tuple[int, list[int]]], *, layer: int) -> tuple[int, int]:
    """A full device of 2 layers x 2 slots with experts 0 and 1; who goes when `layer` misses?"""
    policy = make_policy(name, shape_of(4))
    bring(policy, (0, 0), (0, 1), (1, 0), (1, 1))
    for step, (row, experts) in enumerate(uses):
        policy.routed(row, experts, [1] * len(experts), step=step)
    policy.routed(layer, [5], [1], step=99)
    victim = policy.victim(2)
    assert victim is not None
    return victim.layer, victim.expert


@pytest.mark.parametrize(
    ("name", "uses", "layer", "goes"),
    [
        ("lru", [(0, [0]), (0, [1]), (1, [0, 1])], 0, (0, 0)),
        ("lru", [(0, [1]), (0, [0]), (1, [1]), (1, [0])], 1, (1, 1)),
        ("lru-pool", [(1, [0, 1]), (0, [1]), (0, [0])], 0, (1, 0)),
        ("lfu", [(0, [0]), (0, [0]), (0, [1]), (1, [0])], 0, (0, 1)),
        ("lfu-aged", [(0, [0])] * 2 + [(0, [1])] * 60 + [(1, [0])], 0, (0, 0)),
        ("hybrimoe", [(0, [0]), (0, [1]), (1, [0, 1])], 0, (1, 0)),  # half the score each
        ("edgemoe", [(0, [0]), (0, [0]), (0, [1]), (1, [0]), (1, [0]), (1, [1])], 0, (1, 1)),
    ],
)
def test_who_goes(
    name: str, uses: list[tuple[int, list[int]]], layer: int, goes: tuple[int, int]
) -> None:
    assert victim_after(name, uses, layer=layer) == goes


def test_a_layer_over_its_share_gives_first() -> None:
    policy = make_policy("lru", shape_of(4))
    bring(policy, (0, 0), (0, 1), (0, 2), (1, 0))
    policy.routed(1, [4], [1], step=0)
    victim = policy.victim(2)
    assert victim is not None
    assert victim.layer == 0
    for expert in range(3):
        policy.pin(0, expert)
    assert policy.victim(2) is None  # ask again when a pin has gone


def test_offline_policies_know_the_future_and_say_when_they_do_not() -> None:
    with pytest.raises(ConfigError, match="hotset replay"):
        make_policy("belady", shape_of(4))
    uses = np.zeros((2, 8), dtype=np.int64)
    uses[0, [3, 4]] = 9, 5
    future = Future(uses=uses, next_visit=[np.array([7, 3])])
    static = make_policy("static", shape_of(2), future=future)
    bring(static, (0, 3), (0, 4))
    static.routed(0, [6], [1], step=0)
    victim = static.victim(2)
    assert victim is not None
    assert victim.expert == 4
    belady = make_policy("belady", shape_of(2), future=future)
    bring(belady, (0, 3), (0, 4))
    belady.routed(0, [3, 4], [1, 1], step=0)
    victim = belady.victim(2)
    assert victim is not None
    assert victim.expert == 3


def test_what_was_fetched_ahead_stays_until_its_layer_has_passed() -> None:
    policy = make_policy("hobbit", shape_of(4))
    for step in range(80):
        policy.routed(0, [step % 2], [1], step=step)
        policy.routed(1, [4 + step % 2], [1], step=step)
    bring(policy, (0, 0), (0, 1), (1, 0))
    plan = policy.routed(0, [0], [1], step=80)
    assert plan.prefetch == [(1, 4)]
    bring(policy, (1, 4))
    victim = policy.victim(2)
    assert victim is not None
    assert (victim.layer, victim.expert) != (1, 4)
    policy.routed(1, [0], [1], step=80)
    assert policy.ranks()[1, 4] < 1.5  # type: ignore[attr-defined] # of every table


def test_next_gates_learn_what_follows() -> None:
    gates = NextGates(rows=3, num_experts=8, depth=2)
    for first in np.random.default_rng(5).integers(4, size=300).tolist():
        gates.see(0, experts=[first], request=0)
        gates.see(1, experts=[first + 1], request=0)
        gates.see(2, experts=[first + 2], request=0)
    odds = gates.see(0, experts=[2], request=0)
    assert odds[0].argmax() == 3
    assert odds[1].argmax() == 4
    assert odds[0, 3] > 1.0


def test_arc_gives_room_to_the_list_whose_names_come_back() -> None:
    policy = Fate(shape_of(4, layers=1, experts=16))
    bring(policy, *((0, expert) for expert in range(4)))
    for step, expert in enumerate((0, 1, 2, 3)):
        policy.routed(0, [expert], [1], step=step)
    victim = policy.victim(2)
    assert victim is not None
    assert victim.expert == 0  # all are recent, the oldest goes
    policy.dropped(0, 0)
    before = policy._aim
    policy.routed(0, [0], [1], step=9)  # it comes back: recency deserves more
    assert policy._aim > before
