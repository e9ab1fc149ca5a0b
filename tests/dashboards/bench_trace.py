"""What tracing costs where it is read: a recorded run of many spans, and a collector's rate.

Times are of the process's CPU, because wall time on a shared machine says little; the median of
the rounds with its spread.

    .venv/bin/python -m tests.dashboards.bench_trace --spans 1000000 --rounds 5
"""

from __future__ import annotations

import argparse
import platform
import statistics
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from hotset.actors.batches import RowBatch
from hotset.actors.export import Collector
from hotset.actors.exporters import make_exporter
from hotset.actors.spans import SpanEncoder, SpanWriter
from hotset.dashboards.export_perfetto import write_perfetto
from hotset.dashboards.otlp import read_run
from hotset.dashboards.trace import analyze_view
from hotset.dashboards.trace_text import render_text
from hotset.dashboards.trace_view import View
from hotset.policies.types import Tier
from hotset.transport.records import ROW, Kind
from tests.actors.sinks import SINKS

if TYPE_CHECKING:
    from collections.abc import Callable

BATCH = 8000
DEVICES = 4
T0 = 1_790_000_000_000_000_000


def batches(spans: int) -> list[RowBatch]:
    """Transfers, waits for them, layers and steps on four devices, like a decoding run's."""
    found = []
    for number, first in enumerate(range(0, spans, BATCH)):
        count = min(BATCH, spans - first)
        rows = np.zeros(count, ROW)
        rows["kind"] = np.resize([Kind.TRANSFER, Kind.WAIT, Kind.LAYER, Kind.STEP], count)
        rows["row_id"] = (7 << 56) + first + 1 + np.arange(count)
        wait = rows["kind"] == Kind.WAIT
        rows["waits_for"] = np.where(wait, rows["row_id"] - np.uint64(1), 0)
        rows["parent"] = np.where(wait, rows["row_id"] + np.uint64(2), 0)
        rows["start_ns"] = T0 + (first + np.arange(count)) // 4 * 1000
        rows["end_ns"] = rows["start_ns"] + np.resize([600, 400, 900, 900], count)
        rows["nbytes"] = np.where(rows["kind"] == Kind.TRANSFER, 6 << 20, 0)
        rows["queue_ns"], rows["wire_ns"], rows["trace_lo"], rows["reason"] = 100, 400, 5, 1
        rows["layer"], rows["index"] = first % 16, np.arange(count) % 64
        found.append(
            RowBatch(
                store=f"worker-{number % DEVICES}",
                tier=Tier.HBM,
                rows=rows.tobytes(),
                names=("host-0", "demand"),
                tiers={"host-0": Tier.HOST},
            )
        )
    return found


def measure(title: str, action: Callable[[], object], *, spans: int, rounds: int) -> None:
    spent = []
    for _ in range(rounds):
        began_ns = time.process_time_ns()
        action()
        spent.append((time.process_time_ns() - began_ns) / 1e9)
    median = statistics.median(spent)
    print(
        f"{title:32} {median:8.2f} s  ({min(spent):.2f} to {max(spent):.2f})  "
        f"{spans / median:12,.0f} spans/s"
    )


def send(protocol: str, made: list[RowBatch]) -> None:
    with SINKS[protocol]() as (sink, url):
        exporter = make_exporter(
            {"OTEL_EXPORTER_OTLP_ENDPOINT": url, "OTEL_EXPORTER_OTLP_PROTOCOL": protocol}
        )
        assert exporter is not None
        collector = Collector(exporter, encoder=SpanEncoder(node="n0", run="r1"))
        for batch in made:
            collector.offer(batch)
        assert collector.close(timeout_s=600)
        assert collector.exported == collector.offered == len(sink.spans)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--spans", type=int, default=1_000_000)
    parser.add_argument("--sent", type=int, default=40_000, help="spans to a collector")
    parser.add_argument("--rounds", type=int, default=5)
    given = parser.parse_args()
    print(
        f"{platform.processor() or platform.machine()}, Python {platform.python_version()}, "
        f"numpy {np.__version__}; CPU seconds, median of {given.rounds} (least to most)"
    )
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder)
        made = batches(given.spans)

        def write() -> None:
            (run / "trace-n0.jsonl").unlink(missing_ok=True)
            writer = SpanWriter(run / "trace-n0.jsonl", node="n0", run="r1")
            for batch in made:
                writer.write(batch)
            writer.close()

        sizes = {"spans": given.spans, "rounds": given.rounds}
        measure("write", write, **sizes)
        measure("read", lambda: read_run(run), **sizes)
        spans = read_run(run)
        measure("analyze what was read", lambda: analyze_view(View(spans)), **sizes)
        measure("hotset trace analyze, whole",
                lambda: render_text(analyze_view(View(read_run(run)))), **sizes)  # fmt: skip
        view = View(spans)
        measure("export to Perfetto", lambda: write_perfetto(view, run / "out.json"), **sizes)
    few = batches(given.sent)
    for protocol in SINKS:
        measure(f"send over {protocol}, with the sink", lambda: send(protocol, few),  # noqa: B023 - called in this turn
                spans=given.sent, rounds=given.rounds)  # fmt: skip


if __name__ == "__main__":
    main()
