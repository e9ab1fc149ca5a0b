"""The cost of tracing is measured with real actors, and whatever the collector does is counted."""

from __future__ import annotations

import json

import pytest
from click.testing import CliRunner

from hotset.cluster.bench_trace import append_ns
from hotset.cluster.cli import main

pytest.importorskip("opentelemetry.exporter.otlp.proto.grpc", reason="needs the extra otlp")


def test_a_row_costs_microseconds() -> None:
    assert 0 < append_ns(rows=2_000, rounds=3) < 50_000


@pytest.mark.ray
@pytest.mark.slow
def test_no_collector_holds_anything_up_and_every_span_is_counted() -> None:
    options = ["bench", "trace", "--rounds", "2", "--tokens", "8", "--seconds", "1", "--json"]
    ran = CliRunner().invoke(main, options, catch_exceptions=False)
    cost = json.loads(ran.stdout)
    assert [one["way"] for one in cost["tokens"]] == ["on", "off", "frozen"]
    assert all(one["tokens_per_s"] > 0 for one in cost["tokens"])
    assert cost["spans_per_token"] > 0
    actors = {one["collector"]: one for one in cost["actors"]}
    assert all(one["written"] == one["rows"] for one in actors.values())
    for kind in ("http/protobuf", "grpc"):
        assert (actors[kind]["exported"], actors[kind]["dropped"]) == (actors[kind]["rows"], 0)
    for kind in ("frozen", "closed"):
        one = actors[kind]
        assert one["exported"] + one["dropped"] == one["rows"]
        assert one["lag_ms_worst"] < 2_000, "a call to the collector would take ten seconds"
    assert actors["closed"]["dropped"] > 0
