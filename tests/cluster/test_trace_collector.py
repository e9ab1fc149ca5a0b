"""A run on a real cluster sends its spans to a real OTLP collector; the books agree everywhere."""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec
import pytest

pytest.importorskip("opentelemetry.exporter.otlp.proto.grpc", reason="needs the extra otlp")
pytest.importorskip("opentelemetry.exporter.otlp.proto.http", reason="needs the extra otlp")

from hotset.actors.telemetry import Totals
from hotset.cluster.front import Front
from hotset.dashboards.trace import load
from tests.actors.sinks import SINKS
from tests.cluster.world import call, deployed, eventually, prompts

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from hotset.cluster.local import LocalCluster

pytestmark = [pytest.mark.ray, pytest.mark.nixl]


@pytest.mark.parametrize("protocol", SINKS)
def test_spans_received_and_dropped_are_the_rows_written(
    cluster: LocalCluster,
    models: Callable[[str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    protocol: str,
) -> None:
    assert cluster.address
    with SINKS[protocol]() as (sink, url):
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", url)
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_PROTOCOL", protocol)
        with deployed(models("demo"), tmp_path, workers=2, hbm_ratio=0.25) as deployment:
            front = Front(deployment)
            for prompt in prompts(3):
                front.generate(prompt, max_new_tokens=12)
            totals = deployment.totals()
            measured_ns = eventually(
                lambda: (
                    deployment.status()["stall_ns"] >= 0.99 * totals.stall_ns
                    and deployment.status()["stall_ns"]
                )
            )
            actors = list(deployment.telemetry.values())
            deployment.telemetry.clear()  # closed here, so that their last totals can be read
            for store in (*deployment.workers.values(), *deployment.pools.values()):
                call(store.close)
            call(deployment.controller.close)
            for actor in actors:
                call(actor.close)
            ended = [decode(call(actor.totals)) for actor in actors]
            deployment.telemetry.update(dict(enumerate(actors)))  # type: ignore[arg-type] # stopped below
    view = load(tmp_path)
    written, dropped = len(view.table), sum(view.spans.dropped.values())
    assert sum(one.spans for one in ended) == written
    assert len(sink.spans) == sum(one.exported for one in ended)
    assert len(sink.spans) + sum(one.export_dropped for one in ended) == written + dropped
    arrived = {(span.trace_id, span.span_id) for span in sink.spans}
    links = [(link.trace_id, link.span_id) for span in sink.spans for link in span.links]
    assert links
    assert set(links) <= arrived
    names = {span.name for span in sink.spans}
    assert {"hotset.plan", "hotset.scale", "hotset.transfer", "hotset.use"} <= names
    requests = [span for span in sink.spans if span.name == "hotset.request"]
    steps = [span for span in sink.spans if span.name == "hotset.compute.step"]
    assert len(requests) == len({span.trace_id for span in requests}) == 3
    asked = {(span.trace_id, span.span_id) for span in requests}
    assert {(span.trace_id, span.parent_span_id) for span in steps} == asked
    waits = [span for span in sink.spans if span.name == "hotset.wait"]
    stall_ns = sum(span.end_time_unix_nano - span.start_time_unix_nano for span in waits)
    assert stall_ns == pytest.approx(measured_ns, rel=0.01)
    assert view.spans.clocks, "each node stated its clock"


def decode(data: bytes) -> Totals:
    return msgspec.msgpack.decode(data, type=Totals)
