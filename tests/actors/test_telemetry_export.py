"""Real OTLP sinks, gRPC and HTTP, in the test's process: what arrives, what is lost and counted."""

from __future__ import annotations

import json
import os
import threading
import time
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

pytest.importorskip("opentelemetry.exporter.otlp.proto.grpc", reason="needs the extra otlp")
pytest.importorskip("opentelemetry.exporter.otlp.proto.http", reason="needs the extra otlp")

from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from hotset.actors import names
from hotset.actors.batches import RowBatch
from hotset.actors.export import Collector
from hotset.actors.exporters import make_exporter, sample_ratio, wanted
from hotset.actors.kinds import ControlKind
from hotset.actors.spans import SpanEncoder, SpanWriter
from hotset.errors import ConfigError
from hotset.policies.types import Tier
from hotset.transport.records import ROW, Code, Kind
from tests.actors.sinks import SINKS, http_sink, plain

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from opentelemetry.sdk.trace import ReadableSpan
    from opentelemetry.sdk.trace.export import SpanExportResult

DEADLINE_S = 20.0
ENDPOINT = "OTEL_EXPORTER_OTLP_ENDPOINT"
PROTOCOL = "OTEL_EXPORTER_OTLP_PROTOCOL"


@pytest.fixture(autouse=True)
def settings_of_this_test_only() -> Iterator[None]:
    before = {key: value for key, value in os.environ.items() if key.startswith("OTEL_")}
    yield
    for key in [key for key in os.environ if key.startswith("OTEL_")]:
        del os.environ[key]
    os.environ.update(before)


def batches(count: int, *, size: int = 40) -> list[RowBatch]:
    """Steps that waited for transfers, their uses, failures, a plan; ids run on over batches."""
    found, first = [], 1 << 40
    for number in range(count):
        rows = np.zeros(size, ROW)
        rows["kind"] = np.resize([Kind.TRANSFER, Kind.WAIT, ControlKind.USE, Kind.STEP], size)
        rows["row_id"] = first + np.arange(size)
        linking = np.isin(rows["kind"], [Kind.WAIT, ControlKind.USE])
        back = np.where(rows["kind"] == Kind.WAIT, 1, 2)
        rows["waits_for"] = np.where(linking, rows["row_id"] - back.astype(np.uint64), 0)
        ahead = np.where(rows["kind"] == Kind.WAIT, rows["row_id"] + np.uint64(2), 0)
        rows["parent"] = ahead
        rows["start_ns"] = 1_790_000_000_000_000_000 + np.arange(size) * 1000
        rows["end_ns"] = rows["start_ns"] + 900
        rows["code"][::8] = Code.FAILED
        rows["source"], rows["reason"], rows["format"] = 0, 1, 1
        rows["nbytes"], rows["trace_lo"], rows["used"] = 6 << 20, 77, 1
        found.append(
            RowBatch(
                store=f"worker-{number % 2}", tier=Tier.HBM, rows=rows.tobytes(),
                names=("host-0", "demand"), tiers={"host-0": Tier.HOST},
                dropped=3 if number == 1 else 0, link_bytes_per_s=25 * 10**9,
            )
        )  # fmt: skip
        first += size
    return found


def collector(url: str, protocol: str, **options: Any) -> Collector:
    exporter = make_exporter({ENDPOINT: url, PROTOCOL: protocol, "OTEL_EXPORTER_OTLP_TIMEOUT": "2"})
    assert exporter is not None
    encoder = SpanEncoder(node="n0", run="r1", emulated=("hbm: a byte budget",))
    return Collector(exporter, encoder=encoder, **options)


def spans_in(path: Path) -> dict[int, dict[str, Any]]:
    found = {}
    for line in path.read_text().splitlines():
        for scope in json.loads(line)["resourceSpans"][0]["scopeSpans"]:
            found |= {int(span["spanId"], 16): span for span in scope.get("spans", [])}
    return found


@pytest.mark.parametrize("protocol", SINKS)
def test_a_sink_receives_what_the_file_has(tmp_path: Path, protocol: str) -> None:
    made = batches(6)
    writer = SpanWriter(tmp_path / "t.jsonl", node="n0", run="r1", emulated=("hbm: a byte budget",))
    with SINKS[protocol]() as (sink, url):
        sending = collector(url, protocol)
        for batch in made:
            sending.offer(batch)
            writer.write(batch)
        assert sending.close(timeout_s=DEADLINE_S)
    rows = sum(len(batch.table()) + batch.dropped for batch in made)
    assert sending.offered == rows
    assert len(sink.spans) == sending.exported == writer.written
    assert len(sink.spans) + sending.dropped == rows
    assert sending.waiting == sending.sampled_out == 0
    of_file = spans_in(tmp_path / "t.jsonl")
    arrived = {int.from_bytes(span.span_id, "big"): span for span in sink.spans}
    assert arrived.keys() == of_file.keys()
    for number, span in arrived.items():
        other = of_file[number]
        assert span.name == other["name"]
        assert span.trace_id.hex() == other["traceId"]
        assert str(span.start_time_unix_nano) == other["startTimeUnixNano"]
        assert str(span.end_time_unix_nano) == other["endTimeUnixNano"]
        assert span.status.code == other["status"].get("code", 0)
        values = {key: next(iter(v.values())) for key, v in items(other)}
        assert {key: str(value) for key, value in plain(span.attributes).items()} == {
            key: str(value) for key, value in values.items()
        }
        assert [link.span_id.hex() for link in span.links] == [
            link["spanId"] for link in other.get("links", [])
        ]
    links = [link for span in sink.spans for link in span.links]
    targets = {int.from_bytes(link.span_id, "big") for link in links}
    assert links
    assert targets <= arrived.keys(), "every target of a link was received"
    kinds = {plain(link.attributes)[names.LINK.name] for link in links}
    assert kinds == {names.WAITED_ON, names.USED_LINK}
    assert all(one["hotset.emulated"] == ("hbm: a byte budget",) for one in sink.resources)


def items(span: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    return [(one["key"], one["value"]) for one in span["attributes"]]


@pytest.mark.parametrize("protocol", SINKS)
def test_sampling_leaves_no_link_without_its_target(protocol: str) -> None:
    made = batches(4)
    with SINKS[protocol]() as (sink, url):
        sending = collector(url, protocol, ratio=0.0)
        for batch in made:
            sending.offer(batch)
        assert sending.close(timeout_s=DEADLINE_S)
    assert sending.offered == sending.exported + sending.dropped + sending.sampled_out
    arrived = {span.span_id for span in sink.spans}
    assert {link.span_id for span in sink.spans for link in span.links} <= arrived


@pytest.mark.parametrize("protocol", SINKS)
def test_a_stopped_sink_never_blocks_and_loses_counted_spans_only(protocol: str) -> None:
    made = batches(200)
    with SINKS[protocol]() as (_, url):
        pass  # stopped: nobody listens there now
    sending = collector(url, protocol, most_waiting=1000)
    longest_s = 0.0
    for batch in made:
        began = time.perf_counter()
        sending.offer(batch)
        longest_s = max(longest_s, time.perf_counter() - began)
        assert sending.waiting <= 1000
    assert longest_s < 0.1, "an offer takes microseconds; a call to the sink would take seconds"
    sending.close(timeout_s=0.2)
    assert sending.exported == 0
    assert sending.dropped == sending.offered == 200 * 40 + 3
    sending.offer(made[0])
    assert sending.dropped == sending.offered


def test_a_sink_that_stops_midway_is_accounted_for() -> None:
    made = batches(20)
    with http_sink() as (sink, url):
        sending = collector(url, "http/protobuf")
        for batch in made[:5]:
            sending.offer(batch)
        end = time.monotonic() + DEADLINE_S
        pace = threading.Event()
        while sending.waiting and time.monotonic() < end:
            pace.wait(0.01)
        received = len(sink.spans)
        assert received == 200
    for batch in made[5:]:
        sending.offer(batch)
    sending.close(timeout_s=0.2)
    assert sending.exported == received
    assert sending.exported + sending.dropped == sending.offered


def test_an_exporter_that_raises_costs_its_own_spans_only() -> None:
    class Moody(InMemorySpanExporter):
        calls = 0

        def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
            self.calls += 1
            if self.calls == 1:
                raise OSError("the channel is closed")
            return super().export(spans)

    made, exporter = batches(2, size=2048), Moody()
    sending = Collector(exporter, encoder=SpanEncoder(node="n0", run="r1"))

    def send() -> bool:
        for batch in made:
            sending.offer(batch)
        return sending.close(timeout_s=DEADLINE_S)

    with pytest.warns(UserWarning, match="spans are lost, the exporter raised OSError"):
        assert send()
    assert len(exporter.get_finished_spans()) == sending.exported == 2048
    assert sending.exported + sending.dropped == sending.offered


@pytest.mark.parametrize(
    ("settings", "protocol"),
    [
        ({}, ""),
        ({ENDPOINT: "http://h:4318"}, "http/protobuf"),
        ({ENDPOINT: "http://h:4317", PROTOCOL: "grpc"}, "grpc"),
        ({"OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": "http://h/t"}, "http/protobuf"),
        ({ENDPOINT: "x", PROTOCOL: "grpc", "OTEL_EXPORTER_OTLP_TRACES_PROTOCOL": "http/protobuf"},
         "http/protobuf"),
        ({"OTEL_TRACES_EXPORTER": "otlp", PROTOCOL: "grpc"}, "grpc"),
        ({ENDPOINT: "x", "OTEL_TRACES_EXPORTER": "none"}, ""),
        ({ENDPOINT: "x", "OTEL_SDK_DISABLED": "true"}, ""),
    ],
)  # fmt: skip
def test_the_standard_variables_decide(settings: dict[str, str], protocol: str) -> None:
    assert wanted(settings) == protocol


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({ENDPOINT: "x", PROTOCOL: "http/json"}, "use grpc or http/protobuf"),
        ({"OTEL_TRACES_EXPORTER": "zipkin"}, "use otlp or none"),
    ],
)
def test_what_is_not_supported_says_what_is(settings: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        wanted(settings)


def test_the_share_of_ordinary_transfers() -> None:
    sampler = {"OTEL_TRACES_SAMPLER": "parentbased_traceidratio"}
    assert sample_ratio({}) == 1.0
    assert sample_ratio({"OTEL_TRACES_SAMPLER_ARG": "0.2"}) == 1.0, "no sampler is named"
    assert sample_ratio({**sampler, "OTEL_TRACES_SAMPLER_ARG": "0.2"}) == 0.2
    for wrong in ("2", "x", "-1"):
        with pytest.raises(ConfigError, match="use a number from 0 to 1"):
            sample_ratio({**sampler, "OTEL_TRACES_SAMPLER_ARG": wrong})
