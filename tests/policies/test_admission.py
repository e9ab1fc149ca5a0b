"""What the brain asks of links: windows that are kept, refusals with a bound, bookings that end."""

from __future__ import annotations

import pytest
from cluster_model import SLOT, ClusterModel
from hypothesis import given
from hypothesis import strategies as st

from hotset.policies.brain import ClusterBrain
from hotset.policies.config import PolicyConfig
from hotset.policies.linkmodel import LinkSpec
from hotset.policies.schedule import Service
from hotset.policies.types import (
    BlockId,
    BlockInfo,
    Concurrency,
    DropCopy,
    Format,
    LinkUse,
    Pressure,
    Reason,
    RouterCounts,
    StartTransfer,
    StoreInfo,
    StoreJoined,
    Tick,
    Tier,
    TransferFailed,
    Veto,
)
from hotset.policies.windows import Key, Read, Windows, sooner

SECOND = 1_000_000_000
QUICK = PolicyConfig(
    tick_ns=10, min_dwell_ns=0, cool_down_ns=0, popularity_half_life_tokens=64, retry_ns=100
)
SPEC = LinkSpec(bandwidth_bytes_per_s=SECOND, latency_ns=0)  # a byte takes 1 ns


def measured(model: ClusterModel, source: str, *, bytes_per_s: int) -> None:
    """A reader tells how fast it has read from a store."""
    use = LinkUse(source=source, span_ns=SECOND, busy_ns=SECOND // 10, demand_ns=0,
                  nbytes=bytes_per_s // 10)  # fmt: skip
    model.send(Pressure(now_ns=model.now_ns, store="w9", used_bytes=0, links=(use,)))


def pool_and_reader(config: PolicyConfig | None = None) -> ClusterModel:
    model = ClusterModel.of(layers=4, experts=8, config=config)
    model.join("h0", Tier.HOST, slots=32)
    model.settle()
    model.join("w9", Tier.HBM, slots=0)
    return model


def parts(commands: list[object]) -> tuple[list[StartTransfer], list[Veto]]:
    return (
        [one for one in commands if isinstance(one, StartTransfer)],
        [one for one in commands if isinstance(one, Veto)],
    )


def test_a_first_fill_asks_for_what_lands_in_time_hottest_first() -> None:
    model = pool_and_reader(PolicyConfig(fill_ns=10 * SECOND))
    hottest = BlockId(2, 5)
    model.send(RouterCounts(now_ns=0, store="w9", counts=((hottest, 100),), tokens=1))
    measured(model, "h0", bytes_per_s=SLOT)  # one block a second
    asked, refused = parts(model.join("w0", Tier.HBM, slots=20))
    assert asked[0].block == hottest
    assert 5 <= len(asked) <= 7, "three quarters of ten seconds, less a margin"
    assert len(asked) + len(refused) == 20
    assert {one.reason for one in refused} == {Reason.VETO_LATE}
    assert all("ns" in one.bound for one in refused)
    assert {one.due_ns for one in asked} == {model.now_ns + 10 * SECOND}


def test_links_that_nobody_has_measured_refuse_nothing() -> None:
    model = pool_and_reader(PolicyConfig(fill_ns=1))
    asked, refused = parts(model.join("w0", Tier.HBM, slots=20))
    assert len(asked) == 20
    assert not refused


def test_bookings_of_one_fill_are_seen_by_the_next() -> None:
    model = pool_and_reader(PolicyConfig(fill_ns=10 * SECOND))
    measured(model, "h0", bytes_per_s=2 * SLOT)
    first, _ = parts(model.join("w0", Tier.HBM, slots=10))
    second, refused = parts(model.join("w1", Tier.HBM, slots=10))
    assert len(first) == 10
    assert 0 < len(second) < 10
    assert refused
    for command in [*first, *second]:
        model.todo.remove(command)
        model.send(
            TransferFailed(
                now_ns=model.now_ns, store=command.store, block=command.block,
                format=command.format, reason=Reason.STALE,
            )
        )  # fmt: skip
    assert not list(model.brain._windows), "a booking ends with its transfer"
    third, refused = parts(model.join("w2", Tier.HBM, slots=10))
    assert len(third) == 10
    assert not refused


def swap_model() -> ClusterModel:
    """Host memory is full; some hot block is in CXL alone, one cold copy may leave."""
    model = ClusterModel.of(layers=1, experts=4, config=QUICK)
    model.join("h0", Tier.HOST, slots=2)
    model.settle()
    model.join("c0", Tier.CXL, slots=8)
    model.settle()
    model.join("w9", Tier.HBM, slots=0)
    for block in sorted(model.held("h0")):  # both tiers have it: nothing to spill
        copies = [copy for copy in model.brain.directory() if copy.store == "c0"]
        model.join("c0", Tier.CXL, slots=8, copies=[*copies, model.copy(block, store="c0")])
        model.settle()
    return model


def test_a_swap_whose_newcomer_would_be_late_leaves_the_victim_alone() -> None:
    model = swap_model()
    hot = min(model.held("c0") - model.held("h0"))
    before = model.held("h0")
    model.send(RouterCounts(now_ns=model.now_ns, store="w9", counts=((hot, 500),), tokens=8))
    measured(model, "c0", bytes_per_s=10)  # a kilobyte takes 100 s, a move must land within 60
    model.now_ns += 1000
    commands = model.send(Tick(now_ns=model.now_ns))
    asked, refused = parts(commands)
    assert not asked
    assert not [one for one in commands if isinstance(one, DropCopy)]
    assert {(one.reason, one.block) for one in refused} == {(Reason.VETO_LATE, hot)}
    model.settle()
    assert model.held("h0") == before
    measured(model, "c0", bytes_per_s=10**6)
    for _ in range(8):
        measured(model, "c0", bytes_per_s=10**6)
    model.now_ns += 1000
    model.send(Tick(now_ns=model.now_ns))
    model.settle()
    assert hot in model.held("h0")


def test_a_copy_that_is_used_as_often_is_not_displaced() -> None:
    """Bytes make a small block worth more by byte; its next use decides all the same."""
    small, large = BlockId(0, 1), BlockId(0, 0)
    brain = ClusterBrain(
        [
            BlockInfo(block=large, nbytes=16_000, reduced_nbytes=8000),
            BlockInfo(block=small, nbytes=1000, reduced_nbytes=500),
        ],
        config=QUICK,
    )
    model = ClusterModel(brain=brain)
    info = StoreInfo(name="h0", tier=Tier.HOST, node="n", incarnation=1, capacity_bytes=16_064)
    big = model.copy(large, store="h0")
    model.incarnations["h0"] = 1
    model.send(StoreJoined(now_ns=0, store=info, copies=(big,)))
    model.join("c0", Tier.CXL, slots=40)
    model.settle()
    model.join("w9", Tier.HBM, slots=0)
    for at_ns in (0, SECOND):
        model.now_ns = at_ns
        model.send(
            RouterCounts(
                now_ns=at_ns, store="w9", counts=((large, 100), (small, 90)), tokens=8
            )
        )  # fmt: skip
        model.send(Concurrency(now_ns=at_ns, store="w9", requests=1, steps=8, tokens=8))
    model.now_ns += 1000
    commands = model.send(Tick(now_ns=model.now_ns))
    assert not [one for one in commands if isinstance(one, DropCopy)]


def test_sooner_names_both_uses() -> None:
    assert sooner(10, victim_use_ns=11) is None
    for victim_use_ns in (5, 10):
        refused = sooner(10, victim_use_ns=victim_use_ns)
        assert refused is not None
        assert refused.reason is Reason.VETO_SOONER
        assert f"every {victim_use_ns} ns" in refused.bound


def read(nbytes: int, *, due_ns: int = 0, service: Service = Service.STAGING) -> Read:
    return Read(source="h0", spec=SPEC, service=service, nbytes=nbytes, due_ns=due_ns)


def test_background_is_booked_behind_staging_and_stands_still_under_pressure() -> None:
    windows = Windows()
    background = read(100, due_ns=1000, service=Service.BACKGROUND)
    assert windows.admit(Key("a", 0, Format.BF16), read(400), now_ns=0, judged=True) is None
    late = windows.admit(Key("b", 0, Format.BF16), background, now_ns=0, judged=True)
    assert late is not None, "half of the link is kept, 400 ns of it are booked"
    key = Key("b", 1, Format.BF16)
    assert windows.admit(key, read(100, service=Service.BACKGROUND), now_ns=0, judged=True) is None
    windows.pause({"h0"}, now_ns=0)
    windows.pause({"h0"}, now_ns=10_000)
    link = windows._links["h0"]
    assert len(link) == 1, "staging has landed by the model, background has not begun"
    windows.pause((), now_ns=10_000)
    windows.pause((), now_ns=10_200)
    assert len(link) == 0
    windows.end(key)
    windows.end(key)
    assert key not in windows


KEYS = st.builds(
    Key, st.sampled_from(["a", "b"]), st.integers(0, 3), st.just(Format.BF16)
)  # fmt: skip
STEPS = st.lists(
    st.tuples(KEYS, st.integers(1, 500), st.integers(0, 3000), st.booleans(), st.integers(0, 300)),
    max_size=30,
)


@given(STEPS)
def test_what_is_admitted_with_a_deadline_lands_in_time(
    steps: list[tuple[Key, int, int, bool, int]],
) -> None:
    windows, now_ns = Windows(), 0
    due: dict[Key, int] = {}
    for key, nbytes, left_ns, end, later_ns in steps:
        now_ns += later_ns
        if end:
            windows.end(key)
            due.pop(key, None)
            continue
        due_ns = now_ns + left_ns if left_ns else 0
        if windows.admit(key, read(nbytes, due_ns=due_ns), now_ns=now_ns, judged=True) is None:
            due[key] = due_ns
            assert key in windows
    assert set(windows) == set(due)
    windows.pause((), now_ns=now_ns + 1_000_000)
    assert not len(windows._links["h0"]) if windows._links else not due


@pytest.mark.parametrize("blocks", [1500])
def test_a_long_fill_is_admitted_in_linear_time(blocks: int) -> None:
    windows = Windows()
    for flat in range(blocks):
        key = Key("w0", flat, Format.BF16)
        windows.admit(key, read(10, due_ns=blocks * 30), now_ns=0, judged=True)
    link = windows._links["h0"]
    assert len(link) == blocks
    assert len(link._left) == 1, "deadlines, not transfers, are what a question walks over"
