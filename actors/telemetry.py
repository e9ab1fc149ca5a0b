"""Ray shell of a node's telemetry: rows in; a trace file, metrics and spans for a collector out.

Stores send batches and never wait for it. One file a node, so no two processes write the same.
Metrics are set once a second at most, and again at least every few seconds, because Ray forgets a
gauge that is not set for half a minute. The node's clock is measured against the controller's
every half minute, and stands in every line.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
import ray

from hotset.actors import names
from hotset.actors.batches import Aggregate, aggregate
from hotset.actors.clock import measure_offset
from hotset.actors.exporters import make_exporter, sample_ratio
from hotset.actors.flight import FlightRecorder
from hotset.actors.membership import NAMESPACE
from hotset.actors.messages import Rows, decode
from hotset.actors.metrics import make_metric
from hotset.actors.spans import SpanEncoder, SpanWriter

if TYPE_CHECKING:
    from hotset.actors.export import Collector

PUBLISH_S = 1.0
CLOCK_S = 30.0
CLOCK_ANSWER_S = 2.0
_YIELD = 19  # to compute on the same node: the lowest priority, whatever Ray has given

_Key = tuple[str, tuple[tuple[str, str], ...]]  # a metric's name and labels


class TelemetrySpec(msgspec.Struct, frozen=True, kw_only=True):
    """What a telemetry actor is told at birth.

    `settings` are the driver's `OTEL_*` variables; `controller` names the actor whose clock counts,
    empty for none; `others` are the telemetry actors of the run's other nodes.
    """

    run: str
    run_dir: str
    node: str
    emulated: tuple[str, ...] = ()
    controller: str = ""
    others: tuple[str, ...] = ()
    settings: dict[str, str] = msgspec.field(default_factory=dict)


class Totals(msgspec.Struct, kw_only=True):
    """Sums since the start, for the report at the end of a run."""

    bytes_by_link: dict[str, int] = msgspec.field(default_factory=dict)
    hits: dict[str, int] = msgspec.field(default_factory=dict)
    queries: int = 0
    tokens: int = 0
    stall_ns: int = 0
    spans: int = 0
    dropped: int = 0
    exported: int = 0
    export_dropped: int = 0
    export_waiting: int = 0
    flight_dumps: int = 0
    peak_rss_bytes: dict[str, int] = msgspec.field(default_factory=dict)


class Telemetry:
    """Collects the rows of the stores of one node."""

    def __init__(self, spec: bytes) -> None:
        """Open the node's trace file in the run's directory. Raises as `make_exporter`."""
        self._spec = msgspec.msgpack.decode(spec, type=TelemetrySpec)
        os.nice(_YIELD)
        self._path = Path(self._spec.run_dir) / f"trace-{self._spec.node}.jsonl"
        run, node, emulated = self._spec.run, self._spec.node, self._spec.emulated
        self._writer = SpanWriter(self._path, run=run, node=node, emulated=emulated)
        self._flight = FlightRecorder(
            Path(self._spec.run_dir), run=run, node=node, emulated=emulated
        )
        exporter = make_exporter(self._spec.settings)
        self._collector: Collector | None = None
        if exporter is not None:
            from hotset.actors.export import Collector

            self._collector = Collector(
                exporter,
                encoder=SpanEncoder(run=run, node=node, emulated=emulated),
                ratio=sample_ratio(self._spec.settings),
            )
        self._sends = True
        self._totals = Totals()
        self._pending: dict[_Key, float] = {}
        self._gauges: dict[_Key, float] = {}
        self._metrics = {metric.name: make_metric(metric, run=run) for metric in names.METRICS}
        self._stop = threading.Event()
        self._lock = threading.Lock()
        self._publisher = threading.Thread(target=self._publish_loop, daemon=True)
        self._publisher.start()
        self._clock = threading.Thread(target=self._clock_loop, daemon=True)
        self._clock.start()

    def __repr__(self) -> str:
        """What the Ray dashboard shows beside each log line."""
        return f"telemetry[{self._writer.written} spans, {self._writer.dropped} dropped]"

    def pid(self) -> int:
        """Process id, for tests."""
        return os.getpid()

    def ingest(self, message: bytes) -> None:
        """Take a batch of a store in."""
        rows = decode(message, Rows)
        before = self._writer.dropped
        written = self._writer.write(rows.batch)
        if self._collector is not None and self._sends:
            self._collector.offer(rows.batch)
        self._flight.take(rows.batch, now_ns=time.time_ns())
        sums = aggregate(rows.batch)
        with self._lock:
            self._add_totals(rows, sums)
            self._add_metrics(rows, sums)
            labels = {"store": rows.batch.store}
            self._count(names.TELEMETRY_SPANS, written, labels)
            self._count(names.TELEMETRY_DROPPED, self._writer.dropped - before, labels)

    def send(self, *, on: bool) -> None:
        """Send spans to the collector, or write the file alone: to measure what sending costs."""
        self._sends = on

    def alarm(self, why: str, *, pass_on: bool = True) -> None:
        """Something is wrong: dump the last seconds, here and (`pass_on`) at the other nodes."""
        self._flight.alarm(why, now_ns=time.time_ns())
        for name in self._spec.others if pass_on else ():
            with contextlib.suppress(ray.exceptions.RayError, ValueError):  # it is away: no dump
                other = ray.get_actor(name, namespace=NAMESPACE)
                other.alarm.remote(why, pass_on=False)

    def totals(self) -> bytes:
        """MessagePack of `Totals`."""
        with self._lock:
            self._totals.spans = self._writer.written
            self._totals.dropped = self._writer.dropped
            self._totals.flight_dumps = len(self._flight.dumps)
            self._count_exports()
            return msgspec.msgpack.encode(self._totals)

    def close(self) -> str:
        """Write and send everything out; returns the trace file's path."""
        self._stop.set()
        if self._collector is not None:
            self._collector.close()
        self._publish()
        self._writer.close()
        return str(self._path)

    # --- inside ---------------------------------------------------------------------------------

    def _add_totals(self, rows: Rows, sums: Aggregate) -> None:
        totals, store = self._totals, rows.batch.store
        for source, nbytes in sums.bytes_by_source.items():
            link = f"{source}->{store}"
            totals.bytes_by_link[link] = totals.bytes_by_link.get(link, 0) + nbytes
        for tier, count in sums.hits_by_tier.items():
            totals.hits[tier] = totals.hits.get(tier, 0) + count
        totals.queries += sums.queries
        totals.tokens += sums.tokens
        totals.stall_ns += sum(sums.stall_ns_by_reason.values())
        if rows.batch.tier is not None:
            totals.peak_rss_bytes[store] = rows.peak_rss_bytes

    def _add_metrics(self, rows: Rows, sums: Aggregate) -> None:
        store = rows.batch.store
        add = self._count
        for flow in sums.flows:
            labels = {"store": store, "tier_from": flow.tier_from, "tier_to": flow.tier_to}
            add(names.TRANSFER_BYTES, flow.nbytes, labels)
            add(names.TRANSFER_SECONDS, flow.transfer_ns / 1e9, labels)
            add(names.QUEUE_SECONDS, flow.queue_ns / 1e9, labels)
            add(names.WIRE_SECONDS, flow.wire_ns / 1e9, labels)
            add(names.ACTIVATE_SECONDS, flow.activate_ns / 1e9, labels)
        for code, count in sums.transfers_by_code.items():
            add(names.TRANSFERS, count, {"store": store, "code": code})
        for reason, stall_ns in sums.stall_ns_by_reason.items():
            add(names.STALL_SECONDS, stall_ns / 1e9, {"store": store, "reason": reason})
        for hit_tier, count in sums.hits_by_tier.items():
            add(names.EXPERT_HITS, count, {"store": store, "tier": hit_tier})
        add(names.EXPERT_QUERIES, sums.queries, {"store": store})
        add(names.TOKENS_SERVED, sums.tokens, {"store": store})
        add(names.DISPATCHED_BYTES, sums.dispatched_bytes, {"store": store})
        if rows.batch.tier is None:
            return  # the controller holds no blocks
        labels = {"store": store, "tier": rows.batch.tier_name}
        self._gauges[_key(names.RESIDENT_BYTES, labels)] = rows.resident_bytes
        self._gauges[_key(names.CAPACITY_BYTES, labels)] = rows.capacity_bytes
        quarantined = _key(names.QUARANTINED_BYTES, {"store": store})
        self._gauges[quarantined] = rows.quarantined_bytes
        oldest = _key(names.OLDEST_TRANSFER, {"store": store})
        self._gauges[oldest] = rows.batch.oldest_transfer_ns / 1e9

    def _count(self, metric: names.Metric, value: float, labels: dict[str, str]) -> None:
        if value:
            key = _key(metric, labels)
            self._pending[key] = self._pending.get(key, 0) + value

    def _publish_loop(self) -> None:
        while not self._stop.wait(PUBLISH_S):
            self._publish()

    def _publish(self) -> None:
        with self._lock:
            self._count_exports()
            pending, self._pending = self._pending, {}
            gauges = dict(self._gauges)
        for (name, labels), value in pending.items():
            self._metrics[name].inc(value, tags=dict(labels))
        for (name, labels), value in gauges.items():
            self._metrics[name].set(value, tags=dict(labels))

    def _count_exports(self) -> None:
        if self._collector is None:
            return
        labels = {"node": self._spec.node}
        now = (self._collector.exported, self._collector.dropped)
        before = (self._totals.exported, self._totals.export_dropped)
        self._count(names.SPANS_EXPORTED, now[0] - before[0], labels)
        self._count(names.EXPORT_DROPPED, now[1] - before[1], labels)
        self._totals.exported, self._totals.export_dropped = now
        self._totals.export_waiting = self._collector.waiting

    def _clock_loop(self) -> None:
        """Measure the node's clock now and then; without an answer the last estimate stays."""
        pause_s = 0.0
        while self._spec.controller and not self._stop.wait(pause_s):
            with contextlib.suppress(ray.exceptions.RayError, ValueError):  # it is away, or gone
                controller = ray.get_actor(self._spec.controller, namespace=NAMESPACE)
                found = measure_offset(
                    lambda: int(ray.get(controller.clock.remote(), timeout=CLOCK_ANSWER_S)),  # noqa: B023 - called in this turn of the loop
                    clock_ns=time.time_ns,
                )
                self._writer.encoder.clock = found
            pause_s = CLOCK_S


def _key(metric: names.Metric, labels: dict[str, str]) -> _Key:
    return metric.name, tuple(sorted(labels.items()))


__all__ = ["Telemetry", "TelemetrySpec", "Totals"]
