"""Ray shell of a node's telemetry: rows in; a trace file, Ray metrics and totals out.

Stores send batches and never wait for it. One file a node, so no two processes write the same.
Metrics are set once a second at most, and again at least every few seconds, because Ray forgets a
gauge that is not set for half a minute.
"""

from __future__ import annotations

import os
import threading
from pathlib import Path

import msgspec

from hotset.actors import names
from hotset.actors.batches import Aggregate, aggregate
from hotset.actors.messages import Rows, decode
from hotset.actors.metrics import make_metric
from hotset.actors.spans import SpanWriter

PUBLISH_S = 1.0


class TelemetrySpec(msgspec.Struct, frozen=True, kw_only=True):
    """What a telemetry actor is told at birth."""

    run: str
    run_dir: str
    node: str
    emulated: tuple[str, ...] = ()


class Totals(msgspec.Struct, kw_only=True):
    """Sums since the start, for the report at the end of a run."""

    bytes_by_link: dict[str, int] = msgspec.field(default_factory=dict)
    hits: dict[str, int] = msgspec.field(default_factory=dict)
    queries: int = 0
    tokens: int = 0
    stall_ns: int = 0
    spans: int = 0
    dropped: int = 0
    peak_rss_bytes: dict[str, int] = msgspec.field(default_factory=dict)


class Telemetry:
    """Collects the rows of the stores of one node."""

    def __init__(self, spec: bytes) -> None:
        """Open the node's trace file in the run's directory."""
        self._spec = msgspec.msgpack.decode(spec, type=TelemetrySpec)
        path = Path(self._spec.run_dir) / f"trace-{self._spec.node}.jsonl"
        self._writer = SpanWriter(
            path, run=self._spec.run, node=self._spec.node, emulated=self._spec.emulated
        )
        self._totals = Totals()
        self._pending: dict[tuple[str, tuple[tuple[str, str], ...]], float] = {}
        self._gauges: dict[tuple[str, tuple[tuple[str, str], ...]], float] = {}
        self._metrics = {metric.name: make_metric(metric) for metric in names.METRICS}
        self._stop = threading.Event()
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._publish_loop, daemon=True)
        self._thread.start()

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
        sums = aggregate(rows.batch)
        with self._lock:
            self._add_totals(rows, sums)
            self._add_metrics(rows, sums)
            labels = {"store": rows.batch.store}
            self._count(names.TELEMETRY_SPANS, written, labels)
            self._count(names.TELEMETRY_DROPPED, self._writer.dropped - before, labels)

    def totals(self) -> bytes:
        """MessagePack of `Totals`."""
        with self._lock:
            self._totals.spans = self._writer.written
            self._totals.dropped = self._writer.dropped
            return msgspec.msgpack.encode(self._totals)

    def close(self) -> str:
        """Write everything out; returns the trace file's path."""
        self._stop.set()
        self._publish()
        self._writer.close()
        return str(Path(self._spec.run_dir) / f"trace-{self._spec.node}.jsonl")

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
        totals.peak_rss_bytes[store] = rows.peak_rss_bytes

    def _add_metrics(self, rows: Rows, sums: Aggregate) -> None:
        store, tier = rows.batch.store, rows.batch.tier.name.lower()
        add = self._count
        for flow in sums.flows:
            labels = {"store": store, "tier_from": flow.tier_from, "tier_to": flow.tier_to}
            add(names.TRANSFER_BYTES, flow.nbytes, labels)
            add(names.TRANSFER_SECONDS, flow.transfer_ns / 1e9, labels)
        for code, count in sums.transfers_by_code.items():
            add(names.TRANSFERS, count, {"store": store, "code": code})
        for reason, stall_ns in sums.stall_ns_by_reason.items():
            add(names.STALL_SECONDS, stall_ns / 1e9, {"store": store, "reason": reason})
        for hit_tier, count in sums.hits_by_tier.items():
            add(names.EXPERT_HITS, count, {"store": store, "tier": hit_tier})
        add(names.EXPERT_QUERIES, sums.queries, {"store": store})
        add(names.TOKENS_SERVED, sums.tokens, {"store": store})
        add(names.DISPATCHED_BYTES, sums.dispatched_bytes, {"store": store})
        labels = {"store": store, "tier": tier}
        self._gauges[_key(names.RESIDENT_BYTES, labels)] = rows.resident_bytes
        self._gauges[_key(names.CAPACITY_BYTES, labels)] = rows.capacity_bytes
        quarantined = _key(names.QUARANTINED_BYTES, {"store": store})
        self._gauges[quarantined] = rows.quarantined_bytes

    def _count(self, metric: names.Metric, value: float, labels: dict[str, str]) -> None:
        if value:
            key = _key(metric, labels)
            self._pending[key] = self._pending.get(key, 0) + value

    def _publish_loop(self) -> None:
        while not self._stop.wait(PUBLISH_S):
            self._publish()

    def _publish(self) -> None:
        with self._lock:
            pending, self._pending = self._pending, {}
            gauges = dict(self._gauges)
        for (name, labels), value in pending.items():
            self._metrics[name].inc(value, tags=dict(labels))
        for (name, labels), value in gauges.items():
            self._metrics[name].set(value, tags=dict(labels))


def _key(metric: names.Metric, labels: dict[str, str]) -> tuple[str, tuple[tuple[str, str], ...]]:
    return metric.name, tuple(sorted(labels.items()))


__all__ = ["Telemetry", "TelemetrySpec", "Totals"]
