"""What the brain makes of time, pressure and load: what waits, what is cancelled, what rests."""

from __future__ import annotations

import numpy as np
import pytest
from cluster_model import FULL, REDUCED, SLOT, ClusterModel
from hypothesis import given
from hypothesis import strategies as st

from hotset.policies import score
from hotset.policies.config import PolicyConfig
from hotset.policies.halflife import LearntPopularity
from hotset.policies.linkmodel import LinkSpec
from hotset.policies.outlook import Outlook, Regime
from hotset.policies.types import (
    BlockId,
    CancelTransfer,
    ChangeFormat,
    Command,
    Concurrency,
    DropCopy,
    Format,
    LayerTimes,
    LinkUse,
    Pressure,
    Reason,
    RouterCounts,
    StartTransfer,
    StoreDraining,
    Tick,
    Tier,
    Veto,
)

SECOND = 1_000_000_000
CONFIG = PolicyConfig(tick_ns=10, min_dwell_ns=0, cool_down_ns=0, popularity_half_life_tokens=64)


def busy(model: ClusterModel, store: str, source: str, permille: int) -> None:
    use = LinkUse(
        source=source, span_ns=1000, busy_ns=permille, demand_ns=permille, nbytes=permille
    )
    model.send(Pressure(now_ns=model.now_ns, store=store, used_bytes=0, links=(use,)))


def tick(model: ClusterModel, *, later_ns: int = 1000) -> list[Command]:
    model.now_ns += later_ns
    return model.send(Tick(now_ns=model.now_ns))


def hot(model: ClusterModel, blocks: list[BlockId], *, tokens: int = 1000) -> None:
    counts = tuple((block, tokens) for block in blocks)
    model.send(RouterCounts(now_ns=model.now_ns, store="w0", counts=counts, tokens=8))


def two_tiers(config: PolicyConfig = CONFIG) -> ClusterModel:
    model = ClusterModel.of(config=config)
    for name, tier, slots in (("h0", Tier.HOST, 8), ("c0", Tier.CXL, 32), ("w0", Tier.HBM, 2)):
        model.join(name, tier, slots=slots)
        model.settle()
    return model


def test_background_work_waits_while_compute_needs_the_link() -> None:
    model = two_tiers()
    wanted = sorted(model.held("c0") - model.held("h0"))[:2]
    hot(model, wanted)
    busy(model, "w0", "h0", 900)
    assert not any(isinstance(c, StartTransfer | DropCopy) for c in tick(model))
    assert model.brain.pressed("h0")
    busy(model, "w0", "h0", 600)  # between the bounds: the pause goes on
    tick(model)
    assert model.brain.pressed("h0")
    busy(model, "w0", "h0", 100)
    for _ in range(4):  # victims are copied down first
        tick(model)
        model.settle()
    assert not model.brain.pressed("h0")
    assert set(wanted) <= model.held("h0")


def test_sources_that_compute_keeps_busy_come_last() -> None:
    model = ClusterModel.of(layers=1, experts=2, config=CONFIG)
    model.join("h0", Tier.HOST, slots=2)
    model.settle()
    model.join("c0", Tier.CXL, slots=2)
    model.settle()
    copies = [model.copy(block, store="c0") for block in sorted(model.held("h0"))]
    model.join("c0", Tier.CXL, slots=2, copies=copies)
    model.join("w9", Tier.HBM, slots=0)
    busy(model, "w9", "h0", 900)
    tick(model)
    (first, *_) = model.join("w0", Tier.HBM, slots=1)[1:]
    assert isinstance(first, StartTransfer)
    assert first.sources[0] == "c0"


def test_a_store_that_leaves_is_told_to_give_up_what_it_was_asked_for() -> None:
    model = ClusterModel.of(config=CONFIG)
    model.join("h0", Tier.HOST, slots=4)
    asked = [c.block for c in model.todo]
    commands = model.send(StoreDraining(now_ns=1, store="h0"))
    cancelled = [c for c in commands if isinstance(c, CancelTransfer)]
    assert [c.block for c in cancelled] == asked
    assert model.brain.pending() == 4, "a claim ends with the store's answer"
    model.settle()
    assert model.brain.pending() == 0
    assert any("give up" in line for line in model.brain.story(asked[0]))


def test_a_drain_with_a_deadline_saves_what_it_can() -> None:
    slow = LinkUse(source="h0", span_ns=SECOND, busy_ns=SECOND, demand_ns=0, nbytes=10_000)
    model = ClusterModel.of(config=CONFIG)
    model.join("h0", Tier.HOST, slots=32)
    model.settle()
    model.join("w0", Tier.HBM, slots=0)
    model.send(Pressure(now_ns=0, store="w0", used_bytes=0, links=(slow,)))
    hot(model, [BlockId(2, 5)])
    model.join("c0", Tier.CXL, slots=40)
    copies = [c for c in model.todo if c.store == "c0"]
    assert not copies
    late = model.send(StoreDraining(now_ns=2, store="h0", deadline_ns=2 + 2 * SECOND))
    vetoes = [c for c in late if isinstance(c, Veto)]
    started = [c for c in late if isinstance(c, StartTransfer)]
    assert vetoes
    assert started
    assert {veto.reason for veto in vetoes} == {Reason.VETO_LATE}
    assert BlockId(2, 5) in {c.block for c in started}, "the hottest goes first"
    assert {c.due_ns for c in started} == {2 + 2 * SECOND}
    assert len(vetoes) + len(started) == 32


def test_a_store_with_less_memory_than_the_sums_gives_up_background_first() -> None:
    model = two_tiers()
    wanted = sorted(model.held("c0") - model.held("h0"))[:3]
    hot(model, wanted)
    tick(model)
    model.settle()  # victims have been copied down
    tick(model)
    while any(isinstance(one, DropCopy) for one in model.todo):
        drop = next(one for one in model.todo if isinstance(one, DropCopy))
        model.todo.remove(drop)
        model.carry_out(drop)
    flying = [c for c in model.todo if isinstance(c, StartTransfer) and c.store == "h0"]
    assert flying
    model.send(Pressure(now_ns=model.now_ns, store="h0", used_bytes=9 * SLOT))
    commands = tick(model)
    cancelled = [c for c in commands if isinstance(c, CancelTransfer)]
    assert [c.reason for c in cancelled] == [Reason.PRESSURE]
    model.settle()
    assert model.brain.pending() == 0


def test_formats_change_in_place_by_use_and_sensitivity() -> None:
    config = PolicyConfig(
        tick_ns=10, min_dwell_ns=0, hbm_reduced_ratio=0.5, default_floor=Format.INT8,
        changes_per_tick=1, popularity_half_life_tokens=64,
    )  # fmt: skip
    model = ClusterModel.of(layers=1, experts=6, config=config)
    model.join("w0", Tier.HBM, slots=4)
    model.settle()
    reduced = [c.block for c in model.brain.directory() if c.format is Format.INT8]
    full = [c.block for c in model.brain.directory() if c.format is Format.BF16]
    assert reduced
    assert full
    hot(model, [reduced[0]], tokens=5000)
    hot(model, full[1:], tokens=100)
    commands = tick(model)
    changes = [c for c in commands if isinstance(c, ChangeFormat)]
    assert [(c.block, c.into) for c in changes] == [
        (full[0], Format.INT8), (reduced[0], Format.BF16),
    ]  # fmt: skip
    model.settle()
    forms = {c.block: c.format for c in model.brain.directory()}
    assert forms[reduced[0]] is Format.BF16
    assert forms[full[0]] is Format.INT8
    assert not any(isinstance(c, ChangeFormat) for c in tick(model))


def test_below_the_floor_no_format_changes() -> None:
    config = PolicyConfig(tick_ns=10, min_dwell_ns=0, hbm_reduced_ratio=0.5)
    model = ClusterModel.of(layers=1, experts=6, config=config)
    model.join("w0", Tier.HBM, slots=4)
    model.settle()
    hot(model, [BlockId(0, 0)])
    assert not any(isinstance(c, ChangeFormat) for c in tick(model))


@pytest.mark.parametrize(
    "traffic", ["constant", "none", "no telemetry", "traffic ends", "telemetry ends"]
)
def test_nothing_moves_once_it_has_settled(traffic: str) -> None:
    model = two_tiers(PolicyConfig(hbm_reduced_ratio=0.25, default_floor=Format.INT8))
    rng = np.random.default_rng(1)
    counts = tuple((info.block, int(rng.integers(1, 500))) for info in model.brain.blocks)
    moved = 0
    for turn in range(60):
        model.now_ns += 2 * SECOND
        ended = turn >= 20
        if traffic != "none" and not (ended and traffic == "traffic ends"):
            model.send(RouterCounts(now_ns=model.now_ns, store="w0", counts=counts, tokens=500))
        if traffic == "constant" or (not ended and traffic.endswith("ends")):
            times = tuple((layer, 400_000) for layer in range(4))
            for event in (
                LayerTimes(now_ns=model.now_ns, store="w0", steps=500, times=times),
                Concurrency(now_ns=model.now_ns, store="w0", requests=1, steps=500, tokens=500),
            ):
                model.send(event)
            busy(model, "w0", "h0", 300)
        commands = model.send(Tick(now_ns=model.now_ns))
        model.settle()
        moved = sum(isinstance(c, StartTransfer | DropCopy | ChangeFormat) for c in commands)
        assert moved == 0 or turn < 40, commands
    assert moved == 0


def test_a_load_that_alternates_does_not_make_blocks_commute() -> None:
    """Two halves of the experts are hot in turns, faster than the dwell: hysteresis holds still."""
    model = two_tiers(PolicyConfig())
    blocks = [info.block for info in model.brain.blocks]
    moves = 0
    for turn in range(80):
        model.now_ns += 2 * SECOND
        half = blocks[::2] if turn % 2 else blocks[1::2]
        counts = tuple((block, 100) for block in half)
        model.send(RouterCounts(now_ns=model.now_ns, store="w0", counts=counts, tokens=100))
        commands = model.send(Tick(now_ns=model.now_ns))
        moves += sum(isinstance(c, DropCopy) for c in commands) if turn > 20 else 0
        model.settle()
    assert moves == 0


def load(tokens: int, *, steps: int = 10, now_ns: int = 1) -> Concurrency:
    return Concurrency(now_ns=now_ns, store="w0", requests=1, steps=steps, tokens=tokens)


def test_the_regime_follows_the_share_of_blocks_that_a_step_touches() -> None:
    outlook = Outlook(PolicyConfig())
    counts = np.full(128, 100, dtype=np.int64)  # 2 layers of 64, 8 used by a token and layer
    assert outlook.judge_regime(counts, now_ns=1) is Regime.UNKNOWN
    outlook.routed(16 * 50, tokens=50)
    for tokens, regime in (
        (10, Regime.SPARSE), (80, Regime.DENSE), (60, Regime.DENSE), (50, Regime.SPARSE),
        (60, Regime.SPARSE),
    ):  # fmt: skip
        outlook.observe(load(tokens))
        assert outlook.judge_regime(counts, now_ns=1) is regime, tokens
    later_ns = 1 + PolicyConfig().telemetry_ttl_ns + 1
    assert outlook.judge_regime(counts, now_ns=later_ns) is Regime.UNKNOWN


def test_in_the_dense_regime_popularity_displaces_nothing() -> None:
    model = two_tiers()
    favourites = set(sorted(model.held("c0") - model.held("h0"))[:2])
    counts = tuple((i.block, 300 if i.block in favourites else 50) for i in model.brain.blocks)
    uses = sum(count for _, count in counts)  # 8 by a token: top 2 of 8 in 4 layers
    model.send(RouterCounts(now_ns=0, store="w0", counts=counts, tokens=uses // 8))
    model.send(load(80 * 10, steps=10, now_ns=model.now_ns))
    commands = tick(model)
    assert model.brain.regime is Regime.DENSE
    assert not any(isinstance(c, DropCopy) for c in commands)
    model.settle()
    model.send(load(10, steps=10, now_ns=model.now_ns))
    spilled = tick(model)
    assert {c.reason for c in spilled if isinstance(c, StartTransfer)} == {Reason.SPILL}
    model.settle()
    assert any(isinstance(c, DropCopy) for c in tick(model))
    assert model.brain.regime is Regime.SPARSE


def test_rates_and_horizons() -> None:
    outlook = Outlook(PolicyConfig())
    assert outlook.tokens_per_s(1) == outlook.step_ns(1) == outlook.hide_ns(1) == 0
    outlook.observe(load(5, now_ns=SECOND))
    assert outlook.tokens_per_s(SECOND) == 0, "one report says nothing about a rate"
    outlook.observe(load(30, now_ns=2 * SECOND))
    assert outlook.tokens_per_s(2 * SECOND) == 30
    outlook.observe(LayerTimes(now_ns=2 * SECOND, store="w0", steps=3, times=((0, 10), (1, 30))))
    assert (outlook.step_ns(2 * SECOND), outlook.hide_ns(2 * SECOND)) == (40, 20)
    outlook.forget("w0")
    assert outlook.tokens_per_s(2 * SECOND) == 0
    rates = score.Rates(tokens_per_s=30, uses_per_token=2000, hide_ns=0)
    horizon = score.reuse_horizon_ns(np.array([1, 2, 0]), rates=rates)
    assert horizon.tolist() == [SECOND // 20, SECOND // 40, score.NEVER_NS]


NEAR = LinkSpec(bandwidth_bytes_per_s=10**9, latency_ns=0)
FAR = LinkSpec(bandwidth_bytes_per_s=10**8, latency_ns=1000)


def test_a_move_pays_when_the_stall_it_avoids_is_longer() -> None:
    nbytes = np.array([1000, 1000, 1000])
    saved = score.saved_ns(nbytes, near=NEAR, far=FAR, hide_ns=0)
    assert saved.tolist() == [11_000 - 1000] * 3
    move_ns = score.exposed_ns(nbytes, link=FAR, hide_ns=0, decode_ns=0)
    asked = {"saved": saved, "move_ns": move_ns, "payback_ns": SECOND}
    counts = np.array([97, 2, 1])
    some = score.pays(
        counts, rates=score.Rates(tokens_per_s=50, uses_per_token=1000, hide_ns=0), **asked
    )
    assert some.tolist() == [True, False, False], (
        "11,000 ns against 10,000 for each of 48, 1 and .5"
    )
    unknown = score.Rates(tokens_per_s=0, uses_per_token=0, hide_ns=0)
    assert score.pays(counts, rates=unknown, **asked).all()
    hidden = score.saved_ns(nbytes, near=NEAR, far=FAR, hide_ns=20_000)
    assert not hidden.any(), "what hides behind compute saves nothing"


@given(st.lists(st.integers(1, 1 << 30), min_size=1, max_size=20), st.integers(0, 10**6))
def test_weights_are_positive_and_one_for_equal_blocks(sizes: list[int], hide_ns: int) -> None:
    nbytes = np.array(sizes, dtype=np.int64)
    saved = score.saved_ns(nbytes, near=NEAR, far=FAR, hide_ns=hide_ns)
    weight = score.weights(saved, nbytes)
    assert (weight >= 1).all()
    equal = score.weights(saved[:1].repeat(3), nbytes[:1].repeat(3))
    assert equal.tolist() == [1024] * 3
    counts = np.arange(len(nbytes), dtype=np.int64)
    worth = score.worth(counts, weight)
    assert ((worth > 0) == (counts > 0)).all()


def test_sensitive_layers_weigh_more_and_unmeasured_ones_most() -> None:
    blocks = ClusterModel.of(layers=3, experts=1).brain.blocks
    assert score.sensitivities(blocks, {}).tolist() == [1024] * 3
    weights = score.sensitivities(blocks, {0: 0.004, 1: 0.001})
    assert weights[0] == weights[2] > weights[1]


def feed(popularity: LearntPopularity, *, turns: int, change_every: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    size = len(popularity.counts)
    shares = rng.dirichlet(np.full(size, 0.3))
    for turn in range(turns):
        if change_every and turn % change_every == 0:
            shares = rng.dirichlet(np.full(size, 0.3))
        counts = rng.multinomial(800, shares)
        popularity.add(np.arange(size, dtype=np.intp), tokens=counts, passed=100)


@pytest.mark.parametrize("seed", range(3))
def test_the_half_life_is_learnt(seed: int) -> None:
    steady = LearntPopularity(64, half_life_tokens=1000)
    feed(steady, turns=400, change_every=0, seed=seed)
    assert steady.half_life_tokens == 8000
    restless = LearntPopularity(64, half_life_tokens=1000)
    feed(restless, turns=400, change_every=5, seed=seed)
    assert restless.half_life_tokens == 125


def test_counts_are_seen_at_once_and_keep_their_sum_until_they_age() -> None:
    popularity = LearntPopularity(4, half_life_tokens=1 << 20)
    assert not popularity.known
    popularity.add(np.array([1, 1, 3]), tokens=np.array([5, 6, 7]), passed=1)
    assert popularity.counts.tolist() == [0, 11 << 10, 0, 7 << 10]
    assert popularity.known
    assert FULL > REDUCED
