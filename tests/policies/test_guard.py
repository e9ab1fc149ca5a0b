"""The guardrail refuses what it must, names the bound, and nothing else."""

from __future__ import annotations

import pytest

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
