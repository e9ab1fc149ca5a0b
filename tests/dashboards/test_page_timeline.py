"""The page's data model against brute force: cells, stories, loads, moments."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hotset.dashboards.page.load import load_at, traffic
from hotset.dashboards.page.progress import FLIGHT_NS, SILENT_NS, TOKEN_NS, Ages, alarms
from hotset.dashboards.page.run import Run, guess_spec
from hotset.dashboards.page.timeline import ASKED, FORMATS, Timeline
from hotset.policies.types import (
    FORMAT_CODES,
    BlockId,
    Command,
    Concurrency,
    DropCopy,
    Event,
    Format,
    PublishEpoch,
    Reason,
    StartTransfer,
    StoreLost,
    Tick,
    Tier,
    TransferFailed,
    Veto,
)
from tests.dashboards.recorded import (
    NBYTES,
    SECOND_NS,
    START_NS,
    dropped,
    joined,
    landed,
    small_run,
    spec_of,
)

if TYPE_CHECKING:
    from pathlib import Path

STORES = ("hbm-a", "hbm-b", "pool")
LAYERS, EXPERTS = (0, 3), 3
BIT = {form: 1 << (FORMAT_CODES[form] - 1) for form in FORMATS}

blocks = st.builds(BlockId, st.sampled_from(LAYERS), st.integers(0, EXPERTS - 1))
forms = st.sampled_from([Format.BF16, Format.INT8, Format.INT2])
steps = st.lists(
    st.tuples(
        st.sampled_from(["land", "drop", "fail", "ask", "lose", "join"]),
        st.sampled_from(STORES), blocks, forms, st.integers(0, 2),
    ),
    max_size=60,
)  # fmt: skip


def start(store: str, block: BlockId, form: Format = Format.BF16) -> StartTransfer:
    return StartTransfer(
        epoch=1, store=store, block=block, format=form, sources=("pool", "storage"),
        cause="because", reason=Reason.STAGE,
    )  # fmt: skip


def fresh() -> Timeline:
    timeline = Timeline(layers=LAYERS, experts=EXPERTS)
    for name in STORES:
        tier = Tier.HBM if name.startswith("hbm") else Tier.HOST
        timeline.feed(joined(name, tier, at_ns=START_NS))
    return timeline


def brute(
    cells: dict[tuple[str, BlockId], int], what: str, store: str, block: BlockId, form: Format
) -> None:
    """What one step does, said once more and differently."""
    key = (store, block)
    old = cells.get(key, 0)
    if what in {"lose", "join"}:
        for other in [other for other in cells if other[0] == store]:
            del cells[other]
    elif what == "land":
        cells[key] = (old | BIT[form]) - (old & ASKED)
    elif what == "drop":
        cells[key] = old - (old & BIT[form])
    elif what == "fail":
        cells[key] = old - (old & ASKED)
    else:
        cells[key] = old | ASKED


@given(steps=steps, stride=st.integers(1, 7))
@settings(max_examples=60)
def test_cells_at_any_moment_are_what_the_changes_made(
    steps: list[tuple[str, str, BlockId, Format, int]], stride: int
) -> None:
    timeline = fresh()
    timeline._stride = stride
    expected: dict[tuple[str, BlockId], int] = {}
    seen: dict[int, dict[tuple[str, BlockId], int]] = {}
    at_ns = START_NS
    for what, store, block, form, later in steps:
        at_ns += later
        event: Event = Tick(now_ns=at_ns)
        commands: list[Command] = []
        if what == "land":
            event = landed(store, block, at_ns=at_ns, form=form)
        elif what == "drop":
            event = dropped(store, block, at_ns=at_ns, form=form)
        elif what == "fail":
            event = TransferFailed(
                now_ns=at_ns, store=store, block=block, format=form, reason=Reason.TIMEOUT
            )
        elif what == "lose":
            event = StoreLost(now_ns=at_ns, store=store, incarnation=1)
        elif what == "join":
            event = joined(store, Tier.HOST, at_ns=at_ns)
        else:
            commands = [start(store, block, form)]
        timeline.feed(event, commands)
        brute(expected, what, store, block, form)
        seen[at_ns] = dict(expected)
    for when_ns, cells in seen.items():
        found = timeline.cells_at(when_ns)
        shown = {
            (timeline.stores[store].name, timeline.block(flat)): int(found[store, flat])
            for store, flat in np.argwhere(found).tolist()
        }
        assert shown == {key: bits for key, bits in cells.items() if bits}
    assert timeline.unknown == 0
    assert not timeline.cells_at(START_NS - 1).any()


def test_what_the_checkpoint_does_not_have_is_counted() -> None:
    timeline = fresh()
    timeline.feed(landed("hbm-a", BlockId(1, 0), at_ns=START_NS))  # layer 1 is dense
    timeline.feed(landed("hbm-a", BlockId(0, EXPERTS), at_ns=START_NS))
    timeline.feed(landed("nobody", BlockId(0, 0), at_ns=START_NS))
    assert timeline.unknown == 3
    assert not timeline.cells_at(START_NS).any()


def test_states_of_stores_follow_the_journal() -> None:
    timeline = fresh()
    timeline.feed(StoreLost(now_ns=START_NS + 5, store="pool", incarnation=1))
    assert timeline.present_at(START_NS - 1) == ["absent"] * 3
    assert timeline.present_at(START_NS + 4) == ["ready"] * 3
    assert timeline.present_at(START_NS + 5) == ["ready", "ready", "lost"]


def test_load_before_and_after_a_plan() -> None:
    timeline = fresh()
    first, second, far = BlockId(0, 0), BlockId(0, 1), BlockId(3, 2)
    timeline.feed(landed("hbm-a", first, at_ns=START_NS + 1))
    timeline.feed(landed("hbm-a", second, at_ns=START_NS + 2))
    timeline.feed(
        Tick(now_ns=START_NS + 3),
        [
            PublishEpoch(epoch=4, cause="skew", reason=Reason.REBALANCE),
            start("hbm-b", first),
            DropCopy(
                epoch=4, store="hbm-a", block=second, format=Format.BF16, cause="skew",
                reason=Reason.REBALANCE,
            ),
            Veto(
                epoch=4, store="hbm-b", block=far, format=Format.INT8,
                reason=Reason.VETO_PRECISION, bound="floor bf16",
            ),
        ],
    )  # fmt: skip
    plan = timeline.plans[0]
    at_ns = timeline.to_ns
    cells = timeline.cells_at(at_ns)
    found = load_at(timeline, cells, at_ns=at_ns, states=timeline.present_at(at_ns), plan=plan)
    assert traffic(timeline, at_ns=at_ns)[1].startswith("no token")
    assert [(d.device, d.before, d.after, d.now) for d in found.devices] == [
        ("hbm-a", 2.0, 0.5, 2.0),
        ("hbm-b", 0.0, 0.5, 0.0),
    ]
    assert (found.unplaced_before, found.unplaced_after) == (4.0, 5.0)
    assert (found.balance_before, found.balance_after) == (0.5, 1.0)
    assert (found.epoch, found.reason, found.cause) == (4, "rebalance", "skew")


def recorded(tmp_path: Path) -> Run:
    run = Run.of(spec_of(tmp_path))
    for event in small_run():
        run.feed(event)
    return run


@pytest.mark.parametrize("second", [0, 1, 3, 5, 6, 9, 12])
def test_a_moment_counts_every_block_once_and_shows_no_future(tmp_path: Path, second: int) -> None:
    run = recorded(tmp_path)
    at_ns = START_NS + second * SECOND_NS
    moment, cells = run.moment(at_ns=at_ns, now_ns=0, live=False)
    assert sum(moment.states.values()) == run.timeline.blocks == 32
    assert all(one.at_ns <= at_ns for one in (*moment.decisions, *moment.arrivals))
    assert all(plan.at_ns <= at_ns for plan in moment.plans)
    assert cells.shape == (3, 32)
    for number, store in enumerate(moment.stores):
        assert sum(store.blocks.values()) == int(((cells[number] & ~np.uint16(ASKED)) > 0).sum())
        assert store.resident_bytes <= sum(store.blocks.values()) * NBYTES
    assert not moment.alarms


def test_a_move_is_seen_at_its_moment_and_told_in_the_story(tmp_path: Path) -> None:
    run = recorded(tmp_path)
    flat = run.timeline.flat(BlockId(2, 3))
    names = [store.name for store in run.timeline.stores]
    for second, holder in ((5, "worker-0"), (7, "worker-1")):
        at_ns = START_NS + second * SECOND_NS
        _, cells = run.moment(at_ns=at_ns, now_ns=0, live=False)
        in_hbm = [n for n in ("worker-0", "worker-1") if cells[names.index(n), flat] & BIT["bf16"]]
        assert in_hbm == [holder]
        why = run.why(BlockId(2, 3), at_ns=at_ns)
        assert why is not None
        assert why.summary.startswith(f"Expert 3 of layer 2 is at {holder} (hbm) in bf16")
        assert why.told == len(why.story)
    assert "came from worker-0, because of demand" in why.summary
    assert run.why(BlockId(9, 0)) is None


def test_decisions_come_from_the_same_brain(tmp_path: Path) -> None:
    run = recorded(tmp_path)
    moment, _ = run.moment(at_ns=None, now_ns=0, live=False)
    assert moment.epoch >= 1
    assert {"fetch asked for", "joined"} <= {one.what for one in moment.decisions}
    assert moment.plans[0].fetches + moment.plans[-1].fetches > 0
    assert moment.plans[-1].cause.startswith("joined cxl-0")


def test_requests_are_the_last_reports(tmp_path: Path) -> None:
    run = recorded(tmp_path)
    now_ns = START_NS + 9 * SECOND_NS
    for store, requests in (("worker-0", 3), ("worker-1", 1), ("worker-0", 2)):
        event = Concurrency(now_ns=now_ns, store=store, requests=requests, steps=1, tokens=1)
        run.timeline.feed(event)
    assert run.timeline.requests_at(now_ns) == 3
    assert run.timeline.requests_at(now_ns - 1) == 0


def test_a_spec_is_guessed_from_what_the_journal_names() -> None:
    spec = guess_spec(iter(small_run()), run="r", run_dir="d")
    assert spec is not None
    assert (spec.layers, spec.num_experts, spec.nbytes) == ((1, 2, 3, 4), 8, NBYTES)
    assert guess_spec(iter([Tick(now_ns=1)]), run="r", run_dir="d") is None


@pytest.mark.parametrize(
    ("ages", "said"),
    [
        (Ages(), []),
        (Ages(controller_ns=SILENT_NS), []),
        (Ages(controller_ns=SILENT_NS + 1), ["controller"]),
        (Ages(controller_ns=SILENT_NS + 1, ended=True), []),
        (Ages(oldest_transfer_ns=FLIGHT_NS + 1), ["transfer"]),
        (Ages(last_token_ns=TOKEN_NS + 1), []),
        (Ages(last_token_ns=TOKEN_NS + 1, requests=2), ["2 request(s)"]),
        (Ages(controller_ns=10**12, oldest_transfer_ns=10**12), ["controller", "transfer"]),
    ],
)
def test_alarms_say_what_is_late(ages: Ages, said: list[str]) -> None:
    found = alarms(ages)
    assert len(found) == len(said)
    assert all(word in text and "bound" in text for word, text in zip(said, found, strict=True))
