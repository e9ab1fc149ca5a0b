"""`hotset bench trace`: what tracing costs, in one run, next to its bounds.

- `append`: CPU time of one row with every column, on a real ring.
- `tokens`: tokens a second and CPU time of a worker with its rows on, off, on and sent to a
  collector, and on while the collector is frozen, in turns (`bench_trace_tokens`).
- `actor`: rows through a real telemetry actor: at 10,000 spans a second for some seconds, then as
  fast as it takes them; with no collector, with one over HTTP and over gRPC, with one that is
  frozen and with a closed port. `lag_ms` is how long a call that asks for the sums takes meanwhile:
  a queue that grows shows there.
"""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import click
import numpy as np

from hotset.cluster.bench_trace_sink import sink
from hotset.cluster.bench_trace_tokens import CHANGE_BOUND, WAYS, measure_tokens
from hotset.cluster.console import machine, say, silent
from hotset.cluster.options import json_option
from hotset.dashboards.text import table

if TYPE_CHECKING:
    from collections.abc import Callable

    from hotset.cluster.bench_trace_tokens import Change, Tokens

APPEND_BOUND_NS = 2_000
SPANS_PER_S = 10_000
_BATCH = 500  # rows of a message; five a heartbeat at the bound


@dataclass(frozen=True, slots=True, kw_only=True)
class Actor:
    """A telemetry actor with one kind of collector.

    Every row is a span in the file; `exported`, `dropped` and `waiting` are the collector's side.
    """

    collector: str
    asked_per_s: float
    lag_ms_median: float
    lag_ms_worst: float
    cpu_share: float
    most_per_s: float
    rows: int
    written: int
    exported: int
    dropped: int
    close_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """Everything that was measured; `spans_per_token` is what the demo wrote."""

    machine: str
    append_ns: float
    tokens: tuple[Tokens, ...]
    spans_per_token: float
    actors: tuple[Actor, ...]


def append_ns(*, rows: int = 100_000, rounds: int = 7) -> float:
    """CPU time of one append, the median of rounds."""
    from hotset.actors.ring import SwitchedRing

    ring = SwitchedRing()
    append, now_ns = ring.append, time.time_ns()
    spent = []
    for _ in range(rounds):
        began_ns = time.process_time_ns()
        for row_id in range(1, rows + 1):
            append(
                1, code=0, source=1, format_code=1, layer=3, index=5, start_ns=now_ns,
                end_ns=now_ns, row_id=row_id, waits_for=5, parent=7, trace_hi=1 << 63, trace_lo=3,
                nbytes=6 << 20, queue_ns=4, wire_ns=5, verify_ns=5, activate_ns=3, reason=1,
                used=0, attempt=0,
            )  # fmt: skip
        spent.append((time.process_time_ns() - began_ns) / rows)
    return statistics.median(spent)


# --- the telemetry actor ------------------------------------------------------------------------


def measure_actor(
    kind: str, settings: dict[str, str], *, seconds: float, hung: Callable[[], None] | None = None
) -> Actor:
    """Send rows to an actor of its own; `hung` makes the collector hang once it is connected."""
    import msgspec
    import psutil  # type: ignore[import-untyped] # it has no types
    import ray

    from hotset.actors.telemetry import TelemetrySpec, Totals
    from hotset.actors.worker import remote_classes

    def totals() -> Totals:
        return msgspec.msgpack.decode(ray.get(actor.totals.remote()), type=Totals)

    with tempfile.TemporaryDirectory() as folder:
        spec = TelemetrySpec(run="bench", run_dir=folder, node="here", settings=settings)
        actor = remote_classes()["telemetry"].remote(msgspec.msgpack.encode(spec))
        process = psutil.Process(ray.get(actor.pid.remote()))
        messages = _messages(round(seconds * SPANS_PER_S / _BATCH))
        ray.get(actor.ingest.remote(messages[0]))
        if hung is not None:
            hung()
        lag_s, sent = [], 0
        before, began = process.cpu_times(), time.monotonic()
        pace = _Pace(began, per_s=SPANS_PER_S / _BATCH)
        for number, message in enumerate(messages[1:]):
            pace.wait(number)
            actor.ingest.remote(message)
            sent += _BATCH
            if number % 10 == 9:
                asked = time.monotonic()
                totals()
                lag_s.append(time.monotonic() - asked)
        totals()
        took_s, after = time.monotonic() - began, process.cpu_times()
        cpu_s = after.user + after.system - before.user - before.system
        asked = time.monotonic()
        for message in messages:
            actor.ingest.remote(message)
        totals()
        most_per_s = len(messages) * _BATCH / (time.monotonic() - asked)
        asked = time.monotonic()
        ray.get(actor.close.remote())
        close_s = time.monotonic() - asked
        ended = totals()
        ray.kill(actor, no_restart=True)
    return Actor(
        collector=kind,
        asked_per_s=sent / took_s,
        lag_ms_median=1e3 * statistics.median(lag_s),
        lag_ms_worst=1e3 * max(lag_s),
        cpu_share=cpu_s / took_s,
        most_per_s=most_per_s,
        rows=2 * len(messages) * _BATCH,
        written=ended.spans,
        exported=ended.exported,
        dropped=ended.export_dropped,
        close_s=close_s,
    )


class _Pace:
    """Waits so that call `n` comes `n / per_s` after the start, or at once when it is late."""

    def __init__(self, began: float, *, per_s: float) -> None:
        self._began, self._per_s = began, per_s

    def wait(self, number: int) -> None:
        time.sleep(max(0.0, self._began + number / self._per_s - time.monotonic()))


def _messages(count: int) -> list[bytes]:
    """Rows of a decoding run: transfers, waits for them, layers and steps."""
    from hotset.actors.batches import RowBatch
    from hotset.actors.messages import Rows, encode
    from hotset.policies.types import Tier
    from hotset.transport.records import ROW, Kind

    found, first = [], 1 << 40
    for number in range(count):
        rows = np.zeros(_BATCH, ROW)
        rows["kind"] = np.resize([Kind.TRANSFER, Kind.WAIT, Kind.LAYER, Kind.STEP], _BATCH)
        rows["row_id"] = first + np.arange(_BATCH)
        wait = rows["kind"] == Kind.WAIT
        rows["waits_for"] = np.where(wait, rows["row_id"] - np.uint64(1), 0)
        rows["parent"] = np.where(wait, rows["row_id"] + np.uint64(2), 0)
        rows["start_ns"] = time.time_ns()
        rows["end_ns"] = rows["start_ns"] + 900
        rows["nbytes"] = np.where(rows["kind"] == Kind.TRANSFER, 6 << 20, 0)
        rows["trace_lo"], rows["reason"] = 1 + number % 8, 1
        batch = RowBatch(
            store=f"worker-{number % 4}", tier=Tier.HBM, rows=rows.tobytes(),
            names=("host-0", "demand"), tiers={"host-0": Tier.HOST},
        )  # fmt: skip
        found.append(
            encode(
                Rows(batch=batch, resident_bytes=1, capacity_bytes=1, quarantined_bytes=0,
                     peak_rss_bytes=1, pid=1)
            )
        )  # fmt: skip
        first += _BATCH
    return found


# --- the command --------------------------------------------------------------------------------


def measure(*, rounds: int, tokens: int, seconds: float, tell: Callable[[str], None]) -> Cost:
    """Measure everything on a local cluster of its own."""
    import os

    from hotset.cluster.cli import DEMO_MODEL
    from hotset.cluster.config import RunConfig
    from hotset.cluster.launch import plan_nodes, prepare
    from hotset.cluster.local import quiet_environment
    from hotset.cluster.serve import new_run_id, on_cluster

    quiet_environment()
    tell("rows")
    appending = append_ns()
    with tempfile.TemporaryDirectory() as folder, sink("http/protobuf") as collector:
        os.environ.update(collector.settings)
        config = RunConfig.build(
            model=DEMO_MODEL, workers=1, transport="auto", run_dir=Path(folder)
        )
        deployment = prepare(config, run=new_run_id(), say=silent)
        with on_cluster(None, plan_nodes(config), say=silent):
            try:
                deployment.start()
                deployment.wait_settled()
                tell(f"{rounds} rounds of {len(WAYS)} requests")
                found, rows = measure_tokens(deployment, collector, rounds=rounds, tokens=tokens)
            finally:
                deployment.stop()
            actors = _actors(seconds=seconds, tell=tell)
    return Cost(
        machine=machine(), append_ns=appending, tokens=found, spans_per_token=rows,
        actors=actors,
    )  # fmt: skip


def _actors(*, seconds: float, tell: Callable[[str], None]) -> tuple[Actor, ...]:
    found = []
    for kind in ("none", "http/protobuf", "grpc", "frozen", "closed"):
        tell(f"the telemetry actor, collector: {kind}")
        if kind == "none":
            found.append(measure_actor(kind, {"OTEL_TRACES_EXPORTER": "none"}, seconds=seconds))
            continue
        with sink(kind if kind == "grpc" else "http/protobuf") as one:
            hung = {"frozen": one.freeze, "closed": one.end}.get(kind)
            found.append(measure_actor(kind, one.settings, seconds=seconds, hung=hung))
    return tuple(found)


def render(cost: Cost) -> str:
    """Aligned tables, with the bounds."""
    lines = [
        cost.machine,
        (
            f"one row: {cost.append_ns:,.0f} ns (bound {APPEND_BOUND_NS:,} ns); "
            f"{cost.spans_per_token:.1f} spans for a token"
        ),
        "",
    ]
    head = ("tracing", "tokens/s", "least", "most", "change", "95 %", "CPU ms/token", "change",
            "95 %", "telemetry ms/token")  # fmt: skip
    lines += table(
        head,
        [
            (
                one.way, f"{one.tokens_per_s:.1f}", f"{one.least:.1f}", f"{one.most:.1f}",
                *_spelled(one.change), f"{one.cpu_ms_per_token:.2f}", *_spelled(one.cpu_change),
                f"{one.telemetry_ms_per_token:.2f}",
            )
            for one in cost.tokens
        ],
    )  # fmt: skip
    lines += [
        (
            f"a loss of less than {CHANGE_BOUND:.0%} of tokens a second: "
            + ", ".join(
                f"{one.way} {one.change.verdict}" for one in cost.tokens if one.way != "off"
            )
            + "; on: to the file; sent: to a collector too; frozen: it does not answer"
        ),
        "",
    ]
    heads = ("collector", "spans/s", "lag ms", "worst", "CPU", "most/s", "rows", "file", "sent",
            "lost", "close s")  # fmt: skip
    lines += table(
        heads,
        [
            (
                one.collector, f"{one.asked_per_s:,.0f}", f"{one.lag_ms_median:.1f}",
                f"{one.lag_ms_worst:.0f}", f"{one.cpu_share:.0%}", f"{one.most_per_s:,.0f}",
                f"{one.rows:,}", f"{one.written:,}", f"{one.exported:,}", f"{one.dropped:,}",
                f"{one.close_s:.1f}",
            )
            for one in cost.actors
        ],
    )  # fmt: skip
    lines.append(f"bound: {SPANS_PER_S:,} spans a second; rows == file, and sent + lost == rows")
    return "\n".join(lines)


def _spelled(found: Change) -> tuple[str, str]:
    return f"{found.ratio:+.1%}", f"{found.low:+.1%} to {found.high:+.1%}"


@click.command("trace")
@click.option(
    "--rounds", type=click.IntRange(min=1), default=12, show_default=True,
    help="rounds of requests with tracing on, off, sent, and with a frozen collector",
)  # fmt: skip
@click.option(
    "--tokens", type=click.IntRange(min=8), default=64, show_default=True,
    help="tokens of each request",
)  # fmt: skip
@click.option(
    "--seconds", type=click.FloatRange(min=1), default=5, show_default=True,
    help="how long each telemetry actor gets 10,000 spans a second",
)  # fmt: skip
@json_option()
def bench_trace_command(*, rounds: int, tokens: int, seconds: float, as_json: bool) -> None:
    """Cost of tracing: a row, tokens a second with and without it, the telemetry actor."""
    tell = silent if as_json else say
    cost = measure(rounds=rounds, tokens=tokens, seconds=seconds, tell=tell)
    click.echo(json.dumps(asdict(cost)) if as_json else render(cost))
