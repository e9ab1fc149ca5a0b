"""Rows become spans: nothing is lost uncounted, every link resolves, OpenTelemetry agrees."""

from __future__ import annotations

import io
import json
import time
from collections import Counter
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from opentelemetry.exporter.otlp.json.file import FileSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.util.instrumentation import InstrumentationScope
from opentelemetry.trace import Link, SpanContext, SpanKind, TraceFlags
from opentelemetry.trace.status import Status, StatusCode

from hotset.actors import names
from hotset.actors.kinds import ControlKind
from hotset.actors.spans import RowBatch, SpanWriter, aggregate, run_trace_id
from hotset.actors.tracecontext import signed
from hotset.policies.types import Format, Tier
from hotset.transport.records import NO_NAME, ROW, Code, Kind, Ring

if TYPE_CHECKING:
    from pathlib import Path

NAMES = ("host-0", "storage", "demand", 'odd "name"\n', "worker-1")
TIERS = {"host-0": Tier.HOST, "worker-1": Tier.HBM}
START_NS = 1_790_000_000_000_000_000


def batch_of(rows: np.ndarray[Any, np.dtype[Any]], **fields: Any) -> RowBatch:
    given_fields = {"store": "worker-0", "tier": Tier.HBM, "names": NAMES, "tiers": TIERS}
    return RowBatch(rows=rows.tobytes(), **{**given_fields, **fields})


def random_rows(count: int, *, seed: int) -> np.ndarray[Any, np.dtype[Any]]:
    rng = np.random.default_rng(seed)
    rows = np.zeros(count, ROW)
    rows["kind"] = rng.choice([1, 2, 3, 4, 5, int(ControlKind.REQUEST)], count)
    rows["code"] = rng.choice([0, 0, 0, 0, 1, 2, 3, 4], count)
    rows["source"] = rng.choice([0, 1, 3, 4, NO_NAME], count)
    rows["reason"] = rng.choice([2, NO_NAME], count)
    rows["format"] = rng.integers(0, 9, count)
    rows["layer"] = rng.integers(-1, 16, count)
    rows["index"] = rng.integers(-1, 64, count)
    rows["start_ns"] = START_NS + rng.integers(0, 10**9, count)
    rows["end_ns"] = rows["start_ns"] + rng.integers(-5, 10**7, count)
    rows["row_id"] = (7 << 48) + 1 + np.arange(count, dtype=np.uint64)
    rows["parent"] = rng.choice(np.append(rows["row_id"], [0, 0, 0]), count)
    rows["waits_for"] = np.where(rows["kind"] == Kind.WAIT, rng.choice(rows["row_id"], count), 0)
    rows["trace_lo"] = rng.choice(np.array([0, 5, 2**64 - 1], np.uint64), count)
    rows["nbytes"] = rng.choice([0, 1, 6 << 20], count)
    rows["wire_ns"] = rng.integers(0, 10**6, count)
    wait = rows["kind"] == Kind.WAIT  # of a wait: the trace of what it waited for
    rows["queue_ns"] = np.where(wait, rng.choice([0, 3, -1], count), 7)
    rows["wire_ns"] = np.where(wait, rng.choice([0, -5], count), rows["wire_ns"])
    rows["used"] = rng.integers(0, 2, count)
    rows["attempt"] = rng.integers(0, 2, count)
    return rows


def spans_in(path: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    scopes = [line["resourceSpans"][0]["scopeSpans"][0] for line in lines]
    return [span for scope in scopes for span in scope.get("spans", [])]


def attributes_of(holder: dict[str, Any]) -> dict[str, Any]:
    found = {}
    for item in holder.get("attributes", []):
        [(kind, value)] = item["value"].items()
        if kind == "arrayValue":
            value = [one["stringValue"] for one in value["values"]]
        found[item["key"]] = int(value) if kind == "intValue" else value
    return found


def readable(
    span: dict[str, Any], *, resource: Resource, scope: InstrumentationScope
) -> ReadableSpan:
    def context(holder: dict[str, Any], key: str = "spanId") -> SpanContext:
        trace_id = int(holder.get("traceId", span["traceId"]), 16)
        remote = key == "parentSpanId" and span["kind"] == 2
        return SpanContext(trace_id, int(holder[key], 16), remote, TraceFlags(1))

    failed = span["status"].get("message")
    return ReadableSpan(
        span["name"],
        context=context(span),
        parent=context(span, "parentSpanId") if "parentSpanId" in span else None,
        resource=resource,
        instrumentation_scope=scope,
        attributes=attributes_of(span),
        kind=SpanKind.SERVER if span["kind"] == 2 else SpanKind.INTERNAL,
        links=[Link(context(link), attributes_of(link)) for link in span.get("links", [])],
        start_time=int(span["startTimeUnixNano"]),
        end_time=int(span["endTimeUnixNano"]),
        status=Status(StatusCode.ERROR, failed) if failed else Status(),
    )


@pytest.mark.parametrize("seed", [1, 2])
def test_file_is_what_the_official_exporter_writes(tmp_path: Path, seed: int) -> None:
    path = tmp_path / "trace-n0.jsonl"
    writer = SpanWriter(path, node='n"0', run="r1", emulated=["cxl: paced", "hbm: budget"])
    writer.write(batch_of(random_rows(300, seed=seed), dropped=4))
    writer.close()
    ours = path.read_text()
    line = json.loads(ours)["resourceSpans"][0]
    scope = line["scopeSpans"][0]
    sdk_resource = Resource(attributes_of(line["resource"]))
    sdk_scope = InstrumentationScope("hotset", attributes=attributes_of(scope["scope"]))
    official = io.StringIO()
    FileSpanExporter(stream=official).export(
        [readable(span, resource=sdk_resource, scope=sdk_scope) for span in scope["spans"]]
    )
    assert json.loads(ours) == json.loads(official.getvalue())
    assert ours == official.getvalue()


@pytest.mark.parametrize("seed", [3])
def test_each_row_is_told_whole(tmp_path: Path, seed: int) -> None:
    rows = random_rows(200, seed=seed)
    writer = SpanWriter(tmp_path / "t.jsonl", node="n0", run="r1")
    writer.write(batch_of(rows))
    for row, span in zip(rows, spans_in(tmp_path / "t.jsonl"), strict=True):
        seen = attributes_of(span)
        assert int(span["spanId"], 16) == row["row_id"]
        assert int(span.get("parentSpanId", "0"), 16) == row["parent"]
        assert int(span["startTimeUnixNano"]) == row["start_ns"]
        assert int(span["endTimeUnixNano"]) == max(row["start_ns"], row["end_ns"])
        assert seen[names.CODE.name] == Code(row["code"]).name.lower()
        if row["kind"] != ControlKind.REQUEST:
            assert seen.get(names.NBYTES.name, 0) == row["nbytes"]
        own = run_trace_id("r1")
        assert int(span["traceId"], 16) == (row["trace_lo"] or own)
        if row["kind"] == ControlKind.REQUEST:
            assert span["kind"] == 2
            assert seen[names.TOKENS.name] == row["index"]
            assert seen[names.PROMPT_TOKENS.name] == row["wire_ns"]
            assert seen[names.FIRST_TOKEN.name] == row["queue_ns"]
            known = row["source"] != NO_NAME
            assert seen.get(names.WORKER.name) == (NAMES[row["source"]] if known else None)
        elif row["kind"] in (Kind.STEP, Kind.LAYER):
            assert seen[names.TOKENS.name] == row["index"]
        else:
            assert (seen[names.LAYER.name], seen[names.INDEX.name]) == (row["layer"], row["index"])
            known = row["source"] != NO_NAME
            assert seen.get(names.SOURCE.name) == (NAMES[row["source"]] if known else None)
            if 0 < row["format"] <= len(Format):
                assert seen[names.FORMAT.name] == list(Format)[row["format"] - 1]
        known_names = {one.name for kind in names.SPANS for one in kind.attributes}
        assert set(seen) <= known_names


@given(
    kinds=st.lists(st.integers(0, 7), max_size=60),
    codes=st.lists(st.integers(0, 6), min_size=60, max_size=60),
    lost=st.integers(0, 5),
    max_rows=st.integers(0, 60),
)
@settings(max_examples=60)
def test_rows_are_spans_or_dropped(
    tmp_path_factory: pytest.TempPathFactory,
    kinds: list[int],
    codes: list[int],
    lost: int,
    max_rows: int,
) -> None:
    path = tmp_path_factory.mktemp("spans") / "t.jsonl"
    rows = np.zeros(len(kinds), ROW)
    rows["kind"], rows["code"] = kinds, codes[: len(kinds)]
    rows["row_id"] = np.arange(len(kinds))  # the first has no id: damaged
    writer = SpanWriter(path, node="n0", run="r1", max_rows=max_rows)
    assert writer.write(batch_of(rows, dropped=lost)) == writer.written
    assert writer.written + writer.dropped == len(rows) + lost
    assert len(spans_in(path)) == writer.written
    told = Counter(span["name"] for span in spans_in(path))
    whole = rows[(rows["row_id"] > 0) & (rows["code"] <= max(Code))]
    for kind, span in (
        (Kind.STEP, names.SPAN_STEP),
        (Kind.WAIT, names.SPAN_WAIT),
        (Kind.TRANSFER, names.SPAN_TRANSFER),
    ):
        assert told[span.name] == (whole["kind"] == kind).sum(), "never dropped to save time"
    failed = whole[(whole["kind"] == Kind.DISPATCH) & (whole["code"] != Code.OK)]
    assert told[names.SPAN_DISPATCH.name] >= len(failed)


def test_ring_that_overflowed_is_accounted_for(tmp_path: Path) -> None:
    ring = Ring(capacity=64)
    writer = SpanWriter(tmp_path / "t.jsonl", node="n0", run="r1")
    for burst in (10, 200, 64, 0, 65):
        before = ring.dropped
        for _ in range(burst):
            ring.append(Kind.TRANSFER, start_ns=1, end_ns=2, row_id=ring.written + 1)
        rows = ring.drain()
        writer.write(RowBatch(store="s", tier=Tier.HOST, rows=rows, dropped=ring.dropped - before))
    assert writer.dropped == 200 - 64 + 1
    assert writer.written + writer.dropped == ring.written


def one_row(kind: Kind, row_id: int, **columns: int) -> np.ndarray[Any, np.dtype[Any]]:
    row = np.zeros(1, ROW)
    row["source"] = row["reason"] = NO_NAME
    row["kind"], row["row_id"], row["start_ns"], row["end_ns"] = kind, row_id, 10, 20
    for column, value in columns.items():
        row[column] = value
    return row


def test_links_resolve_across_batches_stores_and_nodes(tmp_path: Path) -> None:
    """Step 1 waits for 5 and 6, of other requests (one at another node, one later), and for 7."""
    high = (1 << 64) - 3
    waits = np.concatenate(
        [
            one_row(Kind.WAIT, 2, parent=1, waits_for=5, trace_lo=77, wire_ns=88),
            one_row(Kind.WAIT, 3, parent=1, waits_for=6, trace_lo=77, queue_ns=signed(high)),
            one_row(Kind.WAIT, 4, parent=1, waits_for=6, trace_lo=77, queue_ns=signed(high)),
            one_row(Kind.WAIT, 8, parent=1, waits_for=7, trace_lo=77),
        ]
    )
    near = SpanWriter(tmp_path / "trace-a.jsonl", node="a", run="r1")
    far = SpanWriter(tmp_path / "trace-b.jsonl", node="b", run="r1")
    near.write(batch_of(waits))
    near.write(batch_of(one_row(Kind.TRANSFER, 9), store="host-0", tier=Tier.HOST))
    near.write(batch_of(one_row(Kind.STEP, 1, trace_lo=77)))
    near.write(batch_of(one_row(Kind.TRANSFER, 5, trace_lo=88)))
    near.write(batch_of(one_row(Kind.TRANSFER, 7)))  # nobody's request caused it
    far.write(batch_of(one_row(Kind.TRANSFER, 6, trace_hi=high), store="worker-1"))
    spans = spans_in(tmp_path / "trace-a.jsonl") + spans_in(tmp_path / "trace-b.jsonl")
    by_id = {(span["traceId"], int(span["spanId"], 16)): span for span in spans}
    links = [
        (span, (link["traceId"], int(link["spanId"], 16)), attributes_of(link))
        for span in spans
        for link in span.get("links", [])
    ]
    assert all(by_id[target]["name"] == names.SPAN_TRANSFER.name for _, target, _ in links)
    assert all(seen == {names.LINK.name: names.WAITED_ON} for _, _, seen in links)
    of_step = [target[1] for span, target, _ in links if span["name"] == names.SPAN_STEP.name]
    assert of_step == [5, 6, 7], "a step links each transfer once"
    assert run_trace_id("r1") != run_trace_id("r2")


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_sums_agree_with_counting_rows_one_by_one(seed: int) -> None:
    rows = random_rows(400, seed=seed)
    sums = aggregate(batch_of(rows, hits_by_tier={"hbm": 7}, queries=9, tokens=2, dropped=3))
    flows: Counter[str] = Counter()
    stalls: Counter[str] = Counter()
    codes: Counter[str] = Counter()
    tiers = {0: "host", 1: "storage", 4: "hbm"}
    for row in rows:
        life_ns = max(0, int(row["end_ns"] - row["start_ns"]))
        if row["kind"] == Kind.WAIT:
            stalls["demand" if row["reason"] == 2 else "unknown"] += life_ns
        if row["kind"] == Kind.TRANSFER:
            codes[Code(row["code"]).name.lower()] += 1
            if row["code"] == Code.OK:
                flows[tiers.get(int(row["source"]), "unknown")] += int(row["nbytes"])
    assert {flow.tier_from: flow.nbytes for flow in sums.flows} == dict(flows)
    assert {flow.tier_to for flow in sums.flows} == {"hbm"}
    assert sum(sums.bytes_by_source.values()) == sum(flows.values())
    assert sums.stall_ns_by_reason == dict(stalls)
    assert sums.transfers_by_code == dict(codes)
    assert (sums.hits_by_tier, sums.queries, sums.tokens) == ({"hbm": 7}, 9, 2)
    assert (sums.rows, sums.dropped) == (400, 3)


def test_empty_batch_sums_to_nothing_and_writes_nothing(tmp_path: Path) -> None:
    empty = RowBatch(store="host-0", tier=Tier.HOST)
    assert aggregate(empty).flows == ()
    writer = SpanWriter(tmp_path / "t.jsonl", node="n0", run="r1")
    assert writer.write(empty) == 0
    assert (tmp_path / "t.jsonl").read_text() == ""


def test_batch_travels_as_messagepack() -> None:
    batch = batch_of(random_rows(3, seed=1), hits_by_tier={"hbm": 1}, dropped=2)
    wire = msgspec.msgpack.encode(batch)
    assert msgspec.msgpack.decode(wire, type=RowBatch) == batch


def test_a_core_writes_at_least_ten_thousand_spans_a_second(tmp_path: Path) -> None:
    batch = batch_of(random_rows(10_000, seed=1))
    writer = SpanWriter(tmp_path / "t.jsonl", node="n0", run="r1")
    began_ns = time.process_time_ns()
    for _ in range(3):
        writer.write(batch)
    spent_ns = time.process_time_ns() - began_ns
    assert writer.written * 10**9 / spent_ns > 10_000


def test_names_are_unique_and_metrics_have_bounded_labels() -> None:
    for group in (names.SPANS, names.METRICS, names.SPAN_ATTRIBUTES, names.RESOURCE):
        spelled = [one.name for one in group]
        assert len(spelled) == len(set(spelled))
        assert all(one.meaning for one in group)
    labels = {label for metric in names.METRICS for label in metric.labels}
    assert labels <= {
        "run", "node", "store", "tier", "tier_from", "tier_to", "reason", "code", "state", "alert",
        "when", "kind",
    }  # fmt: skip
    assert all("run" in metric.labels for metric in names.METRICS)
