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
