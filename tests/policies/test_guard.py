"""The guardrail refuses what it must, names the bound, and nothing else."""

from __future__ import annotations

import numpy as np
import pytest

from hotset.policies.allocate import Costs
from hotset.policies.drift import Budget, DriftMeter
from hotset.policies.guard import QUALITY, Guardrail
from hotset.policies.types import BlockId, Copy, Format, Reason


def copy_at(store: str) -> Copy:
    return Copy(
        block=BlockId(1, 2),
        format=Format.BF16,
        store=store,
        offset=0,
        nbytes=8,
        generation=1,
        checksum=0,
        incarnation=1,
    )


@pytest.mark.parametrize("form", list(Format))
@pytest.mark.parametrize("floor", list(Format))
def test_no_format_below_the_floor(form: Format, floor: Format) -> None:
    refusal = Guardrail(floor={1: floor}).check_demotion(BlockId(1, 2), form)
    assert (refusal is None) == (QUALITY[form] >= QUALITY[floor])
    if refusal is not None:
        assert refusal.reason is Reason.VETO_PRECISION
        assert floor.value in refusal.bound
        assert form.value in refusal.bound


def test_exact_mode_is_the_default() -> None:
    guard = Guardrail()
    assert guard.check_demotion(BlockId(0, 0), Format.INT8) is not None
    assert guard.check_demotion(BlockId(0, 0), Format.BF16Z) is None


def test_sensitivity_spends_the_budget_on_the_least_sensitive_layers() -> None:
    kl = {0: 0.05, 1: 0.0005, 2: 0.001, 3: 0.0004}
    guard = Guardrail.from_sensitivity(kl, budget_kl=0.001)
    cheap = [layer for layer in range(5) if guard.floor(layer) is Format.INT8]
    assert cheap == [1, 3]
    exact = Guardrail.from_sensitivity(kl, budget_kl=0)
    assert all(exact.floor(layer) is Format.BF16 for layer in range(5))


def test_last_copy_stays_unless_storage_has_it() -> None:
    block, copies = BlockId(1, 2), [copy_at("a"), copy_at("b")]
    assert Guardrail().check_drop(block, copies[:1], going=copies[0]) is None
    strict = Guardrail(storage_is_verified=False)
    assert strict.check_drop(block, copies, going=copies[0]) is None
    refusal = strict.check_drop(block, copies[:1], going=copies[0])
    assert refusal is not None
    assert refusal.reason is Reason.VETO_LAST_COPY


def test_budget_counts_to_the_byte() -> None:
    guard = Guardrail()
    assert guard.check_fit(10, used_bytes=90, capacity_bytes=100, store="a") is None
    refusal = guard.check_fit(11, used_bytes=90, capacity_bytes=100, store="a")
    assert refusal is not None
    assert refusal.reason is Reason.VETO_MEMORY
    assert "100" in refusal.bound


def drift_of(nats: float) -> DriftMeter:
    """Two layers of three experts; the first is a hundred times as sensitive."""
    damage = np.array([100.0, 1.0])[:, None, None] * np.array([0.0, 1e-7, 1e-6, 1e-5])
    return DriftMeter(
        Costs(
            formats=("bf16", "int8", "int4", "int2"),
            nbytes=np.array([1600, 800, 425, 225]),
            nats=np.broadcast_to(damage, (2, 3, 4)),
        ),
        layers=(0, 3),
        frequency=np.full((2, 3), 0.5),
        budget=Budget(nats=nats),
    )


def test_measured_drift_refuses_below_what_floors_allow() -> None:
    guard = Guardrail(default_floor=Format.INT2, drift=drift_of(0.002))
    assert guard.check_demotion(BlockId(3, 0), Format.INT2) is None
    refusal = guard.check_demotion(BlockId(0, 0), Format.INT2)
    assert refusal is not None
    assert refusal.reason is Reason.VETO_PRECISION
    assert "0.0" in refusal.bound
    assert "nats" in refusal.bound


def test_a_floor_set_by_hand_stands_above_measured_drift() -> None:
    guard = Guardrail(drift=drift_of(0.002), block_floor={BlockId(3, 1): Format.INT4})
    assert guard.check_demotion(BlockId(3, 1), Format.INT4) is None
    refused = guard.check_demotion(BlockId(3, 1), Format.INT2)
    assert refused is not None
    assert "block 3.1" in refused.bound
    assert guard.check_demotion(BlockId(3, 0), Format.INT8) is not None, "the default floor"


@pytest.mark.parametrize("nats", [0.0, 0.0001, 0.002, 0.1])
def test_floors_that_follow_from_drift(nats: float) -> None:
    drift = drift_of(nats)
    guard = Guardrail.from_drift(drift)
    for layer in (0, 3):
        assert drift.check_layer(layer, guard.floor(layer)) is None
        below = [form for form in ("int8", "int4", "int2") if QUALITY[Format(form)]
                 < QUALITY[guard.floor(layer)]]  # fmt: skip
        assert all(drift.check_layer(layer, form) is not None for form in below)
    assert QUALITY[guard.floor(0)] >= QUALITY[guard.floor(3)]
    assert (guard.check_demotion(BlockId(3, 0), Format.INT8) is None) == (nats > 0)
    assert guard.check_demotion(BlockId(9, 0), Format.INT8) is not None, "not measured"
    assert guard.check_demotion(BlockId(0, 0), Format.BF16Z) is None


def test_int2_of_a_sensitive_layer_is_refused_as_a_whole() -> None:
    refusal = drift_of(0.002).check_layer(0, Format.INT2)
    assert refusal is not None
    assert "layer 0 in int2" in refusal


@pytest.mark.parametrize("nats", [0.0, 1e-5, 0.0001, 0.002])
@pytest.mark.parametrize("form", [Format.BF16, Format.BF16Z, Format.INT8, Format.INT2, Format.NF4])
def test_asking_for_all_blocks_at_once_gives_what_asking_for_each_gives(
    nats: float, form: Format
) -> None:
    drift = drift_of(nats)
    guard = Guardrail(default_floor=Format.INT2, drift=drift)
    for block in (BlockId(3, 0), BlockId(3, 1)):
        if guard.check_demotion(block, Format.INT4) is None:
            guard.resident(block, [Format.INT4], now_ns=0)
    blocks = tuple(BlockId(layer, expert) for layer in (0, 3, 7) for expert in range(4))
    each = [guard.check_demotion(block, form) is None for block in blocks]
    assert guard.may_compute(blocks, form).tolist() == each


# --- the live check, as the brain asks it -------------------------------------------------------

MUCH = ([0.1] * 32, [True] * 32)
CALM = ([1e-5] * 64, [False] * 64)


def zeros() -> tuple[Guardrail, tuple[BlockId, ...]]:
    """A guardrail that believes a table of zeros, with everything demoted."""
    drift = drift_of(0.002)
    costs = Costs(
        formats=drift.costs.formats, nbytes=drift.costs.nbytes, nats=np.zeros_like(drift.costs.nats)
    )
    guard = Guardrail.from_drift(
        DriftMeter(costs, layers=(0, 3), frequency=np.full((2, 3), 0.5), budget=drift.budget)
    )
    assert guard.drift is not None
    blocks = guard.drift.blocks()
    for block in blocks:
        assert guard.check_demotion(block, Format.INT2) is None
        guard.resident(block, [Format.BF16, Format.INT2], now_ns=1)
    return guard, blocks


def test_a_broken_bound_freezes_demotions_tightens_floors_and_names_repairs() -> None:
    guard, blocks = zeros()
    assert guard.floor(0) is Format.INT2
    found = guard.measured(*MUCH, since_ns=5)
    assert found is not None
    assert found.repairs == guard.repairing
    assert set(found.repairs) <= set(blocks)
    assert found.repairs
    refusal = guard.check_demotion(blocks[0], Format.INT8)
    assert refusal is not None
    assert refusal.reason is Reason.VETO_DRIFT
    assert "nats" in refusal.bound
    assert guard.check_demotion(blocks[0], Format.BF16Z) is None
    assert not guard.may_compute(blocks, Format.INT8).any()
    assert QUALITY[guard.floor(0)] > QUALITY[Format.INT2]


def test_pairs_about_the_mix_before_the_repairs_are_left_out() -> None:
    guard, _ = zeros()
    assert guard.measured(*MUCH, since_ns=5) is not None
    assert guard.measured(*MUCH, since_ns=6) is None, "repairs are still to be done"
    for block in guard.repairing:
        guard.resident(block, [Format.INT2], now_ns=7)
    assert guard.repairing, "a report from before the repair changes nothing"
    for block in guard.repairing:
        guard.resident(block, [Format.BF16], now_ns=9)
    assert not guard.repairing
    assert guard.measured(*MUCH, since_ns=8) is None, "that request began before they were done"
    assert guard.left_out == 64
    for _ in range(2):
        assert guard.measured(*CALM, since_ns=10) is None
    assert guard.check is not None
    assert not guard.check.frozen, "two calm checks thaw"


def test_drift_inside_the_budget_raises_nothing() -> None:
    guard = Guardrail.from_drift(drift_of(0.002))
    guard.resident(BlockId(3, 0), [Format.INT2], now_ns=0)
    for at in range(20):
        assert guard.measured(*CALM, since_ns=at) is None
    assert guard.repairing == ()
    assert guard.due() == ()
    assert guard.check_demotion(BlockId(3, 1), Format.INT2) is None


def test_without_a_table_there_is_nothing_to_check() -> None:
    guard = Guardrail(default_floor=Format.INT8)
    assert guard.measured(*MUCH, since_ns=1) is None
    guard.resident(BlockId(0, 0), [Format.INT8], now_ns=0)
    assert guard.due() == ()
