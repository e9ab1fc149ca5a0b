"""The plan of formats keeps bytes, budget and floors; stand-ins spend what is left and no more."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hotset.policies.allocate import Costs
from hotset.policies.drift import Budget, DriftMeter
from hotset.policies.formatplan import STANDIN_RATIO, FormatPlan, plan_formats
from hotset.policies.guard import Guardrail
from hotset.policies.standin import StandInPurse
from hotset.policies.types import BlockId, Format
from hotset.policies.wire import packing_pays

FORMATS = ("bf16", "int8", "int4", "int2")
SLOTS = {Format.BF16: 12, Format.INT8: 6, Format.INT4: 4, Format.INT2: 2}
LAYERS, EXPERTS = (1, 3), 4


def costs(seed: int, *, scale: float = 1e-4) -> Costs:
    random = np.random.default_rng(seed)
    step = np.array([0.0, 0.01, 1.0, 30.0])
    nats = scale * step * random.lognormal(sigma=1.5, size=(len(LAYERS), EXPERTS, 1))
    return Costs(formats=FORMATS, nbytes=np.array([100, 51, 27, 15]), nats=nats)


def plan(found: Costs, *, nats: float, capacity: int, **floors: object) -> FormatPlan:
    return plan_formats(
        found, layers=LAYERS, slot_nbytes=SLOTS, capacity_bytes=capacity,
        budget=Budget(nats=nats), **floors,  # type: ignore[arg-type] # floors by name
    )  # fmt: skip


@given(seed=st.integers(0, 500), nats=st.floats(0, 0.02), capacity=st.integers(10, 120))
def test_a_plan_stays_inside_the_budget_and_saves_no_more_than_it_must(
    seed: int, nats: float, capacity: int
) -> None:
    found = costs(seed)
    made = plan(found, nats=nats, capacity=capacity)
    budget = Budget(nats=nats)
    assert made.nats * budget.gamma <= nats * budget.margin_ratio * (1 - STANDIN_RATIO) + 1e-12
    assert made.nbytes == sum(SLOTS[made.formats[code]] for code in made.codes.ravel())
    if capacity >= 12 * len(LAYERS) * EXPERTS or nats == 0:
        assert not made.by_block()
    # The guardrail accepts every step of it, in any order.
    drift = DriftMeter(
        found, layers=LAYERS, frequency=np.full((len(LAYERS), EXPERTS), 0.25), budget=budget
    )
    guard = Guardrail(default_floor=Format.INT2, drift=drift)
    blocks = list(made.by_block().items())
    for at in np.random.default_rng(seed).permutation(len(blocks)):
        block, form = blocks[at]
        assert guard.check_demotion(block, form) is None
        drift.set(block, form)


def test_floors_stand_above_the_budget() -> None:
    found = costs(1, scale=1e-9)
    free = plan(found, nats=0.01, capacity=1)
    assert set(free.by_block().values()) == {Format.INT2}
    held = plan(found, nats=0.01, capacity=1, floors={3: Format.BF16}, default_floor=Format.INT8)
    assert set(held.by_block()) == {BlockId(1, expert) for expert in range(EXPERTS)}
    assert set(held.by_block().values()) == {Format.INT8}


# --- stand-ins ------------------------------------------------------------------------------------


def purse(nats: float, *, damage: float = 1e-5) -> StandInPurse:
    table = Costs(
        formats=("bf16", "int4"),
        nbytes=np.array([100, 27]),
        nats=np.array([[[0.0, damage], [0.0, 100 * damage]]]),
    )
    return StandInPurse(
        DriftMeter(table, layers=(0,), frequency=np.array([[0.5, 0.5]]), budget=Budget(nats=nats))
    )


def test_a_cheap_use_is_allowed_and_a_dear_one_waits_for_the_full_copy() -> None:
    made = purse(0.002)
    made.see(0, [0.5, 0.5])
    assert not made.allow(BlockId(0, 0), Format.INT4, [0.5])  # nothing was earned yet
    made.earn(10)
    assert made.allow(BlockId(0, 0), Format.INT4, [0.1])
    assert not made.allow(BlockId(0, 1), Format.INT4, [0.9])
    assert (made.used, made.refused) == (1, 2)


def test_a_small_router_weight_costs_less_by_its_square() -> None:
    made = purse(0.002)
    made.see(0, [0.5])
    half = made.price(BlockId(0, 0), Format.INT4, [0.25])
    whole = made.price(BlockId(0, 0), Format.INT4, [0.5])
    assert half is not None
    assert whole == pytest.approx(4 * half)


@given(
    uses=st.lists(st.tuples(st.integers(0, 1), st.floats(0.01, 1.0), st.integers(0, 3))),
    nats=st.sampled_from([0.0, 1e-4, 0.002, 0.1]),
)
def test_stand_ins_never_spend_more_than_their_share(
    uses: list[tuple[int, float, int]], nats: float
) -> None:
    made = purse(nats)
    tokens = 0
    for expert, weight, begun in uses:
        made.earn(begun)
        tokens += begun
        made.see(0, [weight])
        allowed = made.allow(BlockId(0, expert), Format.INT4, [weight])
        assert not (allowed and nats == 0)
    assert made.spent_nats <= tokens * nats * STANDIN_RATIO


def test_what_was_not_measured_never_stands_in_and_lossless_always_does() -> None:
    made = purse(0.1)
    made.earn(1000)
    assert not made.allow(BlockId(0, 0), Format.INT2, [0.1])
    assert not made.allow(BlockId(7, 0), Format.INT4, [0.1])
    assert not made.allow(BlockId(0, 9), Format.INT4, [0.1])
    assert made.allow(BlockId(0, 9), Format.BF16Z, [0.1])


# --- the wire -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rate", "pays"), [(300_000_000, True), (1_000_000_000, True), (25_000_000_000, False)]
)
def test_packing_pays_on_links_that_are_slower_than_decoding(rate: int, pays: bool) -> None:  # noqa: FBT001 - a row of the table
    found = packing_pays(
        full_nbytes=12_000_000, packed_nbytes=9_000_000, decode_ns=2_200_000, link_bytes_per_s=rate
    )
    assert found is pays


def test_a_link_without_a_rate_is_refused() -> None:
    with pytest.raises(ValueError, match="link_bytes_per_s"):
        packing_pays(full_nbytes=2, packed_nbytes=1, decode_ns=1, link_bytes_per_s=0)
