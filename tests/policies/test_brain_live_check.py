"""The brain acts on the live check: repairs and vetoes with their bound, no false alarms."""

from __future__ import annotations

import numpy as np
import pytest
from cluster_model import ClusterModel, blocks_of

from hotset.policies.allocate import Costs
from hotset.policies.brain import ClusterBrain
from hotset.policies.config import PolicyConfig
from hotset.policies.drift import Budget, DriftMeter
from hotset.policies.guard import Guardrail
from hotset.policies.types import (
    BlockId,
    ChangeFormat,
    DriftMeasured,
    Format,
    PublishEpoch,
    Reason,
    StoreJoined,
    Tick,
    Tier,
    Veto,
)

LAYERS, EXPERTS = 2, 4
QUICK = PolicyConfig(min_dwell_ns=0, tick_ns=10, retry_ns=100)
HOT = [BlockId(0, index) for index in range(EXPERTS)]


def world(*, damage: float) -> ClusterModel:
    """A worker with layer 0 in int8, by a table that states `damage` for each block."""
    nats = np.full((LAYERS, EXPERTS, 2), damage)
    nats[..., 0] = 0
    costs = Costs(formats=("bf16", "int8"), nbytes=np.array([1024, 576]), nats=nats)
    drift = DriftMeter(
        costs,
        layers=range(LAYERS),
        frequency=np.full((LAYERS, EXPERTS), 0.5),
        budget=Budget(nats=0.002),
    )
    guard = Guardrail.from_drift(drift)
    model = ClusterModel(brain=ClusterBrain(blocks_of(LAYERS, EXPERTS), config=QUICK, guard=guard))
    copies = [model.copy(block, store="w0", form=Format.INT8) for block in HOT]
    model.join("w0", Tier.HBM, slots=2.75, copies=copies)  # room to mend one at a time
    model.settle()
    assert drift.codes[0].all(), "the meter knows what the worker computes in"
    return model


def pairs(model: ClusterModel, *, kl: float, since_ns: int | None = None) -> DriftMeasured:
    model.now_ns += 5
    return DriftMeasured(
        now_ns=model.now_ns,
        store="w0",
        since_ns=model.now_ns if since_ns is None else since_ns,
        kl=(kl,) * 64,
        flips=(False,) * 64,
        spent_ns=1,
    )


def lossy(model: ClusterModel) -> set[BlockId]:
    return {copy.block for copy in model.brain.directory() if copy.format is Format.INT8}


def test_what_breaks_the_budget_is_repaired_at_once_and_the_refusals_name_the_bound() -> None:
    model = world(damage=0.0)
    commands = model.send(pairs(model, kl=0.1))
    vetoes = [one for one in commands if isinstance(one, Veto)]
    changes = [one for one in commands if isinstance(one, ChangeFormat)]
    assert {one.block for one in vetoes} == {one.block for one in changes} <= set(HOT)
    assert vetoes
    assert all(one.reason is Reason.VETO_DRIFT for one in vetoes)
    assert all("mean KL" in one.bound and "budget" in one.bound for one in vetoes)
    assert all(one.into is Format.BF16 and one.reason is Reason.VETO_DRIFT for one in changes)
    story = "\n".join(model.brain.story(changes[0].block))
    assert "veto_drift" in story
    model.settle()
    assert not lossy(model) & {one.block for one in changes}
    assert model.brain.guard.repairing == ()
    refused = model.brain.guard.check_demotion(HOT[0], Format.INT8)
    assert refused is not None
    assert refused.reason is Reason.VETO_DRIFT


def test_nothing_is_demoted_while_frozen() -> None:
    model = world(damage=0.0)
    model.send(pairs(model, kl=0.1))
    model.settle()
    again = model.copy(BlockId(1, 0), store="w0", form=Format.INT8)
    info = model.brain.stores()[0]
    commands = model.send(StoreJoined(now_ns=model.now_ns, store=info, copies=(again,)))
    assert any(isinstance(one, Veto) and one.reason is Reason.VETO_DRIFT for one in commands)


def test_a_repair_that_failed_is_asked_for_again() -> None:
    model = world(damage=0.0)
    model.send(pairs(model, kl=0.1))
    asked = [one for one in model.todo if isinstance(one, ChangeFormat)]
    model.todo.clear()
    for one in asked:
        model.carry_out(one, works=False)
    assert lossy(model) >= {one.block for one in asked}
    model.now_ns += 1000
    model.send(Tick(now_ns=model.now_ns))
    model.settle()
    assert not lossy(model) & {one.block for one in asked}


def test_drift_inside_the_budget_changes_nothing() -> None:
    model = world(damage=1e-5)
    before = model.brain.directory()
    for _ in range(20):
        commands = model.send(pairs(model, kl=1e-4))
        assert not any(isinstance(one, Veto | ChangeFormat | PublishEpoch) for one in commands)
    assert model.brain.directory() == before


def test_requests_that_began_before_the_repairs_were_done_are_not_counted() -> None:
    model = world(damage=0.0)
    before_ns = model.now_ns
    assert model.send(pairs(model, kl=0.1))
    model.settle()
    gamma = model.brain.guard.drift.gamma if model.brain.guard.drift else 0
    assert not model.send(pairs(model, kl=0.1, since_ns=before_ns))
    assert model.brain.guard.left_out == 64
    assert model.brain.guard.drift is not None
    assert model.brain.guard.drift.gamma == pytest.approx(gamma)
