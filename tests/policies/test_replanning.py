"""Plans for the workers' replicas: what they gain, what they cost, and when nothing happens."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest
from cluster_model import SLOT, ClusterModel
from hypothesis import given
from hypothesis import strategies as st

from hotset.policies.config import PolicyConfig
from hotset.policies.origins import Origins
from hotset.policies.replicas import balancedness, fill_slots, holders_of, loads, split_tokens
from hotset.policies.types import (
    BlockId,
    Concurrency,
    CopyDropped,
    LayerTimes,
    LinkUse,
    PlanDecision,
    Pressure,
    PublishEpoch,
    Reason,
    Replan,
    RouterCounts,
    StartTransfer,
    Tick,
    Tier,
)

if TYPE_CHECKING:
    from hotset.policies.types import Command

SECOND = 1_000_000_000
LAYERS, EXPERTS = 2, 12
WORKERS = ("w0", "w1", "w2")


def cluster(config: PolicyConfig | None = None, *, slots: int = 10) -> ClusterModel:
    """Three workers that hold 8 of 24 blocks each, and what they were filled with; and a pool."""
    model = ClusterModel.of(layers=LAYERS, experts=EXPERTS, config=config)
    model.join("h0", Tier.HOST, slots=LAYERS * EXPERTS)
    model.settle()
    for at, name in enumerate(WORKERS):
        mine = [
            BlockId(layer, expert)
            for layer in range(LAYERS)
            for expert in range(at * 4, at * 4 + 4)
        ]  # fmt: skip
        model.join(name, Tier.HBM, slots=slots, node=f"n{at}",
                   copies=[model.copy(block, store=name) for block in mine])  # fmt: skip
        model.settle()
    return model


def skewed(*, hot: int = 0, ratio: int = 20) -> dict[BlockId, int]:
    return {
        BlockId(layer, expert): 10 * ratio if expert == hot else 10
        for layer in range(LAYERS)
        for expert in range(EXPERTS)
    }


def serve(
    model: ClusterModel, load: dict[BlockId, int], *, seconds: int = 10, timed: bool = True,
    bytes_per_s: int = 10**9, step_ns: int = 10_000_000,
) -> None:  # fmt: skip
    """Every worker's requests use the same experts, and each reports once a second."""
    counts = tuple(load.items())
    tokens = sum(load.values()) // (2 * LAYERS)
    for _ in range(seconds):
        model.now_ns += SECOND
        for name in WORKERS:
            now_ns = model.now_ns
            model.send(RouterCounts(now_ns=now_ns, store=name, counts=counts, tokens=tokens))
            if not timed:
                continue
            steps = SECOND // step_ns
            model.send(
                Concurrency(now_ns=now_ns, store=name, requests=1, steps=steps, tokens=tokens)
            )
            each = step_ns // LAYERS
            model.send(
                LayerTimes(
                    now_ns=now_ns, store=name, steps=steps, times=((0, each), (1, each)),
                    experts_ns=step_ns // 2,
                )
            )  # fmt: skip
            use = LinkUse(
                source="h0", span_ns=SECOND, busy_ns=10_000_000, demand_ns=0,
                nbytes=bytes_per_s // 100,
            )  # fmt: skip
            model.send(Pressure(now_ns=now_ns, store=name, used_bytes=0, links=(use,)))


def replan(model: ClusterModel) -> list[Command]:
    return model.send(Replan(now_ns=model.now_ns))


def decisions(commands: list[Command]) -> list[PlanDecision]:
    return [one for one in commands if isinstance(one, PlanDecision)]


def test_a_skewed_load_gets_replicas_that_level_it() -> None:
    model = cluster()
    serve(model, skewed())
    commands = replan(model)
    (told,) = decisions(commands)
    assert told.reason is Reason.REBALANCE
    assert told.after_ppm > told.before_ppm + 100_000
    asked = [one for one in commands if isinstance(one, StartTransfer)]
    assert len(asked) == told.moves > 0
    assert {one.reason for one in asked} == {Reason.REPLICATE}
    assert {one.sources[0] for one in asked} == {"h0"}
    assert told.nbytes == told.moves * SLOT
    assert 0 < told.move_ns < told.saved_ns_per_step * told.horizon_steps
    (epoch,) = [one for one in commands if isinstance(one, PublishEpoch)]
    assert epoch.epoch == told.epoch == model.brain.plan_epoch
    model.settle()
    for command in asked:
        assert command.block in model.brain.keeps(command.store)
    hot = BlockId(0, 0)
    parts = {one.store: one.permille for one in model.brain.shares() if one.block == hot}
    assert set(parts) == {one.store for one in model.brain.copies(hot)} - {"h0"}
    assert abs(sum(parts.values()) - 1000) <= len(parts)


def test_a_plan_that_costs_more_than_it_saves_is_refused_and_told_of() -> None:
    model = cluster()
    serve(model, skewed(), bytes_per_s=100, step_ns=100_000_000)  # a kilobyte takes ten seconds
    commands = replan(model)
    told = decisions(commands)
    assert told[0].reason is Reason.VETO_COST
    assert told[0].moves > 0
    assert told[0].move_ns > told[0].saved_ns_per_step * told[0].horizon_steps
    assert not [one for one in commands if isinstance(one, StartTransfer)]
    assert not model.brain.keeps("w1")


@pytest.mark.parametrize("traffic", ["constant", "none", "no telemetry"])
def test_nothing_is_asked_once_the_load_is_constant(traffic: str) -> None:
    model = cluster()
    if traffic == "constant":
        serve(model, skewed())
    late: list[Command] = []
    for turn in range(12):
        if traffic != "none":
            serve(model, skewed(), timed=traffic == "constant")
        else:
            model.now_ns += 10 * SECOND
        found = [*replan(model), *model.send(Tick(now_ns=model.now_ns))]
        model.settle()
        if turn >= 4 or traffic != "constant":
            late += [one for one in found if isinstance(one, StartTransfer | PublishEpoch)]
    assert not late


def test_noise_in_a_constant_load_changes_nothing() -> None:
    model = cluster()
    rng = np.random.default_rng(4)
    epochs = set()
    for turn in range(30):
        noisy = {block: int(rng.poisson(count)) for block, count in skewed().items()}
        serve(model, noisy)
        replan(model)
        model.settle()
        if turn > 5:
            epochs.add(model.brain.plan_epoch)
    assert len(epochs) <= 2, "at most one more plan, where noise has opened a gap"


def test_when_the_hot_expert_changes_the_old_copies_are_let_go() -> None:
    model = cluster(PolicyConfig(popularity_half_life_tokens=64))
    serve(model, skewed(hot=0))
    replan(model)
    model.settle()
    before = model.brain.keeps("w1") + model.brain.keeps("w2")
    assert 0 in {block.index for block in before}
    for _ in range(4):
        serve(model, {block: n for block, n in skewed(hot=5).items() if block.index > 3})
        replan(model)
        model.settle()
    kept = {name: {block.index for block in model.brain.keeps(name)} for name in WORKERS}
    assert 5 in kept["w0"] | kept["w2"]
    assert not {0, 1, 2, 3} & (kept["w1"] | kept["w2"])


def test_what_a_worker_gives_up_is_not_asked_back_at_once() -> None:
    model = cluster()
    serve(model, skewed())
    replan(model)
    model.settle()
    store, block = next(
        (name, block) for name in ("w1", "w2") for block in model.brain.keeps(name)
    )  # fmt: skip
    model.send(
        CopyDropped(
            now_ns=model.now_ns, store=store, block=block,
            format=model.copy(block, store=store).format, reason=Reason.EVICT,
            incarnation=model.incarnations[store],
        )
    )  # fmt: skip
    assert block not in model.brain.keeps(store)
    serve(model, skewed(), seconds=1)
    again = [one for one in replan(model) if isinstance(one, StartTransfer)]
    assert (store, block) not in {(one.store, one.block) for one in again}


def test_a_plan_waits_for_the_copies_of_the_one_before() -> None:
    model = cluster()
    serve(model, skewed())
    assert decisions(replan(model))
    serve(model, skewed())
    assert not replan(model), "copies are still on their way"
    while model.todo:
        command = model.todo.pop()
        assert isinstance(command, StartTransfer)
        model.carry_out(command, works=False)
    assert not any(model.brain.keeps(name) for name in WORKERS), "a promise ends with its transfer"


def test_with_one_worker_there_is_nothing_to_plan() -> None:
    model = cluster()
    model.lose("w1")
    model.lose("w2")
    model.send(
        RouterCounts(now_ns=model.now_ns, store="w0", counts=tuple(skewed().items()), tokens=50)
    )
    assert not replan(model)


HELD = st.integers(0, 2**32 - 1)


@given(HELD)
def test_slots_and_splits_describe_what_is_held(seed: int) -> None:
    rng = np.random.default_rng(seed)
    devices, layers, experts = (int(rng.integers(2, hi)) for hi in (5, 4, 9))
    held = rng.random((devices, layers, experts)) < rng.random()
    slots = fill_slots(held, spare=int(rng.integers(0, 3)))
    found = holders_of(slots, held.shape)
    assert (found >= held).all()
    assert (found.sum(axis=0) == np.maximum(held.sum(axis=0), 1)).all()
    origin = rng.integers(0, 50, held.shape).astype(float)
    load = np.where(held.any(axis=0), origin.sum(axis=0), 0.0)
    split = split_tokens(held, origin, load=load)
    assert (split >= 0).all()
    assert np.allclose(split.sum(axis=0), held.any(axis=0))
    there = loads(held, origin, split)
    assert np.allclose(there.sum(axis=0), load), "every token is computed once"
    assert (there[~held] == 0).all()
    assert 0 < balancedness(there) <= 1.0 + 1e-12


def test_workers_age_together() -> None:
    origins = Origins(3, half_life_tokens=80)
    where = np.array([0, 2])
    origins.add("a", where, tokens=np.array([8, 4]), passed=0)
    origins.add("b", where, tokens=np.array([8, 4]), passed=0)
    origins.fold()
    assert origins.of(("a", "b")).tolist() == [[8192, 0, 4096]] * 2
    origins.add("b", where, tokens=np.array([8, 4]), passed=80)
    assert origins.fresh_tokens == 80
    origins.fold()
    idle, busy = origins.of(("a", "b"))
    assert idle.tolist() == [4096, 0, 2048]
    assert busy.tolist() == [4096 + 8192, 0, 2048 + 4096]
    origins.forget("a")
    assert not origins.of(("a",)).any()
