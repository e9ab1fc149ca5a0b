"""The controller's rows, first uses, the watchdog, clocks, sampling and the flight recorder."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hotset.actors import names
from hotset.actors.batches import RowBatch
from hotset.actors.clock import measure_offset
from hotset.actors.controllog import CONTROLLER, ControlLog
from hotset.actors.fetcher import Landing
from hotset.actors.flight import FlightRecorder
from hotset.actors.kinds import ControlKind
from hotset.actors.sampler import Sampler
from hotset.actors.spans import SpanWriter
from hotset.actors.uses import Uses
from hotset.actors.watch import Bounds, Progress, alerts
from hotset.policies.types import (
    BlockId,
    DropCopy,
    Format,
    PublishEpoch,
    Reason,
    RouterCounts,
    StartTransfer,
    StoreInfo,
    StoreJoined,
    StoreLost,
    Tick,
    Tier,
    Veto,
)
from hotset.transport.records import ROW, Code, Kind, Ring

if TYPE_CHECKING:
    from pathlib import Path

    from hotset.policies.types import Command, Event

BLOCK = BlockId(3, 17)
S = 1_000_000_000


def spans_in(path: Path) -> list[dict[str, Any]]:
    found = []
    for line in path.read_text().splitlines():
        for scope in json.loads(line)["resourceSpans"][0]["scopeSpans"]:
            found += scope.get("spans", [])
    return found


def told(span: dict[str, Any]) -> dict[str, Any]:
    return {item["key"]: next(iter(item["value"].values())) for item in span["attributes"]}


def start(reason: Reason = Reason.STAGE) -> StartTransfer:
    return StartTransfer(
        epoch=4, store="host-0", block=BLOCK, format=Format.BF16, sources=("storage",),
        cause="x", reason=reason,
    )  # fmt: skip


DROP = DropCopy(
    epoch=4, store="cxl-0", block=BLOCK, format=Format.BF16, cause="x", reason=Reason.SPILL
)
PUBLISH = PublishEpoch(epoch=4, cause="x", reason=Reason.REBALANCE)
VETO = Veto(
    epoch=4, store="worker-0", block=BLOCK, format=Format.INT8, reason=Reason.VETO_PRECISION,
    bound='layer 3 has the "floor" bf16',
)  # fmt: skip


def new_log(**options: int) -> ControlLog:
    return ControlLog(first_row_id=7 << 40, nbytes={"bf16": 1000, "int8": 500}, **options)


def handled(log: ControlLog, event: Event, *commands: Command, end_ns: int = 20 * S) -> None:
    log.handled(event, commands, epoch=4, start_ns=10 * S, end_ns=end_ns)


def written(batch: RowBatch, path: Path) -> list[dict[str, Any]]:
    writer = SpanWriter(path, node="head", run="r1")
    assert writer.write(batch) == len(batch.table())
    writer.close()
    return spans_in(path)


def test_a_plan_tells_what_it_asked_for_and_what_it_costs(tmp_path: Path) -> None:
    log = new_log()
    handled(log, Tick(now_ns=1), PUBLISH, start(), start(Reason.REPLICATE), DROP)
    [span] = written(log.take(), tmp_path / "t.jsonl")
    assert span["name"] == names.SPAN_PLAN.name
    assert told(span) == {
        "hotset.code": "ok", "hotset.epoch": "4", "hotset.reason": "rebalance",
        "hotset.bytes": "2000", "hotset.plan.transfers": "2", "hotset.plan.drops": "1",
    }  # fmt: skip
    assert int(span["endTimeUnixNano"]) - int(span["startTimeUnixNano"]) == 10 * S
    assert log.decisions == {"stage": 1, "replicate": 1, "spill": 1}


def test_an_event_that_changes_nothing_is_no_plan() -> None:
    log = new_log()
    handled(log, Tick(now_ns=1))
    assert log.take() == RowBatch(store=CONTROLLER, tier=None)


def test_a_veto_names_store_block_and_the_bound_that_it_protects(tmp_path: Path) -> None:
    log = new_log()
    handled(log, Tick(now_ns=1), VETO)
    [span] = written(log.take(), tmp_path / "t.jsonl")
    assert span["name"] == names.SPAN_VETO.name
    assert told(span) == {
        "hotset.code": "ok", "hotset.target": "worker-0", "hotset.layer": "3",
        "hotset.index": "17", "hotset.format": "int8", "hotset.reason": "veto_precision",
        "hotset.bound": 'layer 3 has the "floor" bf16',
    }  # fmt: skip


def test_stores_that_come_and_go_are_scale_spans(tmp_path: Path) -> None:
    log = new_log()
    info = StoreInfo(name="worker-1", tier=Tier.HBM, node="n", incarnation=5 * S, capacity_bytes=1)
    handled(log, StoreJoined(now_ns=20 * S, store=info))
    handled(log, StoreLost(now_ns=30 * S, store="worker-1", incarnation=5 * S), end_ns=30 * S)
    joined, lost = written(log.take(), tmp_path / "t.jsonl")
    assert (told(joined)["hotset.target"], told(joined)["hotset.reason"]) == ("worker-1", "joined")
    assert int(joined["endTimeUnixNano"]) - int(joined["startTimeUnixNano"]) == 15 * S
    assert told(lost)["hotset.reason"] == "lost"
    assert {joined["name"], lost["name"]} == {names.SPAN_SCALE.name}


@given(st.lists(st.integers(0, 12), max_size=12), st.integers(1, 9))
def test_rows_of_the_controller_are_taken_or_counted(bursts: list[int], capacity: int) -> None:
    log, appended, accounted = new_log(capacity=capacity), 0, 0
    for burst in bursts:
        for _ in range(burst):
            handled(log, Tick(now_ns=1), PUBLISH)
        appended += burst
        batch = log.take()
        if burst % 3 == 2:
            log.put_back(batch)
        else:
            accounted += len(batch.table()) + batch.dropped
        assert len(batch.table()) <= capacity
    last = log.take()
    assert accounted + len(last.table()) + last.dropped == appended


def test_imbalance_is_largest_over_mean_and_forgets() -> None:
    log = new_log()
    assert log.imbalance() is None
    for store, tokens in (("worker-0", 30), ("worker-1", 10)):
        counts = ((BLOCK, tokens),)
        handled(log, RouterCounts(now_ns=S, store=store, counts=counts, tokens=tokens))
    assert log.imbalance() == pytest.approx(1.5)
    late = RouterCounts(now_ns=31 * S, store="worker-1", counts=((BLOCK, 10),), tokens=10)
    handled(log, late)
    assert log.imbalance() == pytest.approx(1.0), "after 30 s old load counts half: 15 and 5 + 10"


def landing(block: BlockId, transfer: int) -> Landing:
    return Landing(
        block=block, format=Format.BF16, slot=None, nbytes=100, checksum=0, generation=1,
        source="host-0", transfer_id=transfer, reason=Reason.PREFETCH,
    )  # fmt: skip


@given(st.lists(st.tuples(st.sampled_from("lud"), st.integers(0, 2)), max_size=30))
def test_each_landing_leaves_one_row_at_its_first_use_or_its_drop(
    story: list[tuple[str, int]],
) -> None:
    ring, ids = Ring(capacity=64), iter(range(1000, 2000))
    uses = Uses(ring, take_id=lambda: next(ids))
    expected: list[tuple[int, int]] = []
    fresh: dict[int, int] = {}
    for number, (what, index) in enumerate(story, 1):
        block = BlockId(0, index)
        if what == "l":
            if index not in fresh:
                uses.landed(landing(block, number))
                fresh[index] = number
        elif what == "u":
            uses.used(block)
        else:
            uses.dropped(block)
        if what != "l" and index in fresh:
            expected.append((fresh.pop(index), int(what == "u")))
    rows = np.frombuffer(ring.drain(), ROW)
    assert [(int(row["waits_for"]), int(row["used"])) for row in rows] == expected
    assert set(rows["kind"].tolist()) <= {ControlKind.USE}


def test_a_use_links_to_its_transfer_with_another_kind_of_link(tmp_path: Path) -> None:
    ring = Ring(capacity=8)
    uses = Uses(ring, take_id=lambda: 99)
    uses.landed(landing(BLOCK, 41))
    uses.used(BLOCK)
    batch = RowBatch(store="w", tier=Tier.HBM, rows=ring.drain(), names=tuple(ring.names()))
    [span] = written(batch, tmp_path / "t.jsonl")
    [link] = span["links"]
    assert int(link["spanId"], 16) == 41
    assert link["attributes"][0]["value"] == {"stringValue": names.USED_LINK}
    assert told(span)["hotset.used"] is True


@pytest.mark.parametrize(
    ("unsettled_s", "oldest_s", "raised"),
    [
        (0, {}, []),
        (59, {"a": 29}, []),
        (61, {}, ["epoch"]),
        (0, {"a": 31, "b": 40}, ["transfer"]),
        (61, {"a": 31}, ["epoch", "transfer"]),
    ],
)
def test_watchdog(unsettled_s: int, oldest_s: dict[str, int], raised: list[str]) -> None:
    found = alerts(
        Progress(
            epoch=9,
            epoch_age_ns=10**6 * S,  # an old epoch alone is no alarm
            unsettled_ns=unsettled_s * S,
            oldest_transfer_ns={name: age * S for name, age in oldest_s.items()},
        ),
        bounds=Bounds(),
    )
    assert [one.kind for one in found] == raised
    if len(oldest_s) == 2:
        assert "to b is in flight for 40 s, and others to 1 more stores" in found[0].text


@given(st.integers(-(10**12), 10**12), st.lists(st.tuples(st.integers(0, 10**7),
       st.integers(0, 10**7)), min_size=1, max_size=6))  # fmt: skip
def test_the_true_clock_offset_is_within_the_stated_error(
    offset_ns: int, legs: list[tuple[int, int]]
) -> None:
    now_ns, turns = 10**15, iter(legs)
    back_ns = 0

    def ask() -> int:
        nonlocal now_ns, back_ns
        out_ns, back_ns = next(turns)
        now_ns += out_ns
        answer = now_ns + offset_ns
        now_ns += back_ns
        return answer

    found = measure_offset(ask, clock_ns=lambda: now_ns, tries=len(legs))
    assert abs(found.offset_ns - offset_ns) <= found.error_ns
    assert found.error_ns == min((out + back + 1) // 2 for out, back in legs)


def test_no_try_measures_no_clock() -> None:
    with pytest.raises(ValueError, match="tries must be at least 1"):
        measure_offset(lambda: 0, clock_ns=lambda: 0, tries=0)


def rows_of(kinds: list[int], codes: list[int], targets: list[int]) -> Any:
    rows = np.zeros(len(kinds), ROW)
    rows["kind"], rows["code"] = kinds, codes
    rows["row_id"] = 1 + np.arange(len(kinds))
    linking = np.isin(rows["kind"], [Kind.WAIT, ControlKind.USE])
    rows["waits_for"] = np.where(linking, np.minimum(targets, rows["row_id"] - 1), 0)
    return rows


@given(
    st.lists(
        st.tuples(
            st.sampled_from([Kind.TRANSFER, Kind.TRANSFER, Kind.WAIT, Kind.STEP, 16, 17, 18, 19]),
            st.sampled_from([0, 0, 0, 1]),
            st.integers(1, 40),
        ),
        max_size=40,
    ),
    st.lists(st.integers(1, 12), min_size=1, max_size=6),
    st.sampled_from([0.0, 0.2, 0.7, 1.0]),
)
@settings(max_examples=80)
def test_sampling_loses_ordinary_transfers_only_and_counts_them(
    facts: list[tuple[int, int, int]], cuts: list[int], ratio: float
) -> None:
    rows = rows_of(*(list(column) for column in zip(*facts, strict=True)) if facts else ([],) * 3)
    sampler, passed, left_out, at = Sampler(ratio=ratio), [], 0, 0
    while at < len(rows):
        size = cuts[at % len(cuts)]
        # a wait's row comes at most one batch after its transfer's, as on the token path
        out, less = sampler.sift(rows[at : at + size])
        passed += out["row_id"].tolist()
        left_out += less
        at += size
        assert len(passed) + left_out + sampler.held == min(at, len(rows))
    left_out += sampler.flush()
    assert len(passed) + left_out == len(rows)
    assert len(set(passed)) == len(passed)
    ordinary = ((rows["kind"] == Kind.TRANSFER) & (rows["code"] == Code.OK)) | (
        rows["kind"] == ControlKind.USE
    )
    assert set(rows["row_id"][~ordinary].tolist()) <= set(passed)
    if ratio == 1:
        assert left_out == 0


@pytest.mark.parametrize("apart", [False, True])
def test_a_transfer_that_was_waited_for_passes_whatever_the_ratio(*, apart: bool) -> None:
    sampler = Sampler(ratio=0.0)
    rows = rows_of([Kind.TRANSFER, Kind.TRANSFER, Kind.WAIT, 19, 19], [0] * 5, [0, 0, 2, 2, 1])
    parts = [rows[:2], rows[2:]] if apart else [rows]
    passed = [row for part in parts for row in sampler.sift(part)[0]["row_id"].tolist()]
    assert set(passed) == {2, 3, 4}, "the waited transfer, its wait, its use; not the other pair"


def test_the_share_that_passes_is_the_ratio() -> None:
    rows = np.zeros(20_000, ROW)
    rows["kind"], rows["row_id"] = Kind.TRANSFER, (9 << 50) + np.arange(20_000)
    passed, _ = Sampler(ratio=0.1).sift(rows)
    assert len(passed) == pytest.approx(2000, rel=0.05)
    with pytest.raises(ValueError, match="ratio must be from 0 to 1"):
        Sampler(ratio=1.5)


def calm(count: int, first: int) -> RowBatch:
    rows = np.zeros(count, ROW)
    rows["kind"], rows["row_id"] = Kind.TRANSFER, first + np.arange(count)
    return RowBatch(store="w", tier=Tier.HBM, rows=rows.tobytes())


def test_the_flight_recorder_dumps_the_last_seconds(tmp_path: Path) -> None:
    recorder = FlightRecorder(tmp_path, node="n0", run="r1", most_dumps=2)
    for second in range(30):
        assert recorder.take(calm(3, 1 + 3 * second), now_ns=second * S) is None
    rows = rows_of([Kind.WAIT], [0], [0])
    rows["row_id"], rows["end_ns"] = 1000, 2 * S
    stalled = RowBatch(store="w", tier=Tier.HBM, rows=rows.tobytes())
    path = recorder.take(stalled, now_ns=30 * S)
    assert path is not None
    assert path.name.endswith("-stall.jsonl")
    kept = [int(span["spanId"], 16) for span in spans_in(path)]
    assert kept == [*range(1 + 3 * 20, 1 + 3 * 30), 1000], "ten seconds and the anomaly"
    assert recorder.take(stalled, now_ns=31 * S) is None, "one dump a minute"
    assert recorder.take(stalled, now_ns=95 * S) is not None
    assert recorder.take(stalled, now_ns=500 * S) is None, "a bounded number of dumps"
    assert (len(recorder.dumps), recorder.passed_over) == (2, 2)
    after = FlightRecorder(tmp_path, node="n0", run="r1", most_dumps=2)
    assert after.take(stalled, now_ns=900 * S) is None, "also over a restart"


def test_an_alert_is_dumped_although_an_anomaly_just_was(tmp_path: Path) -> None:
    recorder = FlightRecorder(tmp_path, node="n0", run="r1", most_dumps=1)
    late = rows_of([Kind.TRANSFER], [Code.TIMED_OUT], [0]).tobytes()
    assert recorder.take(RowBatch(store="w", tier=Tier.HBM, rows=late), now_ns=S) is not None
    path = recorder.alarm("alert_transfer", now_ns=2 * S)
    assert path is not None
    assert path.name == f"flight-n0-{2 * S}-alert_transfer.jsonl"
    assert recorder.alarm("alert_epoch", now_ns=3 * S) is None, "alerts are a minute apart too"
    after = FlightRecorder(tmp_path, node="n0", run="r1", most_dumps=2)
    after.take(calm(3, 9), now_ns=90 * S)
    assert after.alarm("alert_transfer", now_ns=90 * S) is not None, "the anomaly does not count"
    assert after.alarm("alert_epoch", now_ns=900 * S) is None, "also over a restart"


def test_a_dump_is_bounded_in_size_by_leaving_out_the_oldest(tmp_path: Path) -> None:
    recorder = FlightRecorder(tmp_path, node="n0", run="r1", most_bytes=50 * ROW.itemsize)
    for number in range(20):
        recorder.take(calm(8, 1 + 8 * number), now_ns=S)
    path = recorder.alarm("alert_epoch", now_ns=S)
    assert path is not None
    assert path.name == f"flight-n0-{S}-alert_epoch.jsonl"
    kept = [int(span["spanId"], 16) for span in spans_in(path)]
    assert kept == [*range(1 + 8 * 14, 1 + 8 * 20)], "whole batches, the latest"


@pytest.mark.parametrize(
    ("code", "dropped", "why"),
    [
        (Code.TIMED_OUT, 0, "timed_out"),
        (Code.FAILED, 0, "failed"),
        (99, 0, "damaged"),
        (Code.OK, 3, "dropped"),
        (Code.OK, 0, ""),
        (Code.STALE, 0, ""),
        (Code.CANCELLED, 0, ""),
    ],
)
def test_what_is_an_anomaly(tmp_path: Path, code: int, dropped: int, why: str) -> None:
    rows = rows_of([Kind.TRANSFER], [code], [0])
    recorder = FlightRecorder(tmp_path, node="n0", run="r1")
    batch = RowBatch(store="w", tier=Tier.HBM, rows=rows.tobytes(), dropped=dropped)
    path = recorder.take(batch, now_ns=S)
    assert (path.name.split("-")[-1] if path else "") == (f"{why}.jsonl" if why else "")
