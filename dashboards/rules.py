"""Prometheus rules, generated from the catalog of metrics: what to record, when to call somebody.

Decides thresholds and says why in each alert. Must not know Ray or where the file goes. Thresholds
are those of the watchdog (`hotset.dashboards.page.progress`) where it has one.
"""

from __future__ import annotations

import json
from dataclasses import dataclass

from hotset.actors import names
from hotset.dashboards.grafana import PREFIX
from hotset.dashboards.page.progress import FLIGHT_NS

FILE = "hotset_rules.yml"
_STALL_RECORD = "hotset:stall_ratio"


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """An expression that Prometheus keeps under a name."""

    record: str
    expr: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Alert:
    """An expression that must stay without a series; `held` is how long it may have one."""

    alert: str
    expr: str
    held: str
    severity: str
    summary: str
    runbook: str


def _of(metric: names.Metric) -> str:
    return PREFIX + metric.name


def records() -> tuple[Record, ...]:
    """Ratios that several panels and alerts need."""
    hits = f'sum by (run, store) (rate({_of(names.EXPERT_HITS)}{{tier="hbm"}}[1m]))'
    queries = f"sum by (run, store) (rate({_of(names.EXPERT_QUERIES)}[1m]))"
    return (
        Record(
            record=_STALL_RECORD,
            expr=f"sum by (run, store) (rate({_of(names.STALL_SECONDS)}[1m]))",
        ),
        Record(record="hotset:hbm_hit_ratio", expr=f"{hits} / {queries}"),
    )


def alerts() -> tuple[Alert, ...]:
    """What an operator should hear of; `runbook` is a heading of OPERATIONS.md."""
    epoch, resident = _of(names.EPOCH_NUMBER), _of(names.RESIDENT_BYTES)
    return (
        Alert(
            alert="HotsetNoProgress", expr=f"max by (run, alert) ({_of(names.ALERT)}) > 0",
            held="10s", severity="critical", runbook="compute-stalls",
            summary="run {{ $labels.run }}: the watchdog says {{ $labels.alert }}",
        ),
        Alert(
            alert="HotsetComputeWaits", expr=f"{_STALL_RECORD} > 0.2",
            held="2m", severity="warning", runbook="compute-stalls",
            summary="{{ $labels.store }} waited {{ $value | humanizePercentage }} of the time",
        ),
        Alert(
            alert="HotsetTransferHangs",
            expr=f"max by (run, store) ({_of(names.OLDEST_TRANSFER)}) > {FLIGHT_NS / 1e9:g}",
            held="10s", severity="critical", runbook="quarantine-grows",
            summary="a transfer towards {{ $labels.store }} is {{ $value | humanizeDuration }} old",
        ),
        Alert(
            alert="HotsetControllerGone",
            expr=f"sum by (run) ({resident}) unless on (run) {epoch}",
            held="30s", severity="critical", runbook="the-controller-restarts",
            summary="run {{ $labels.run }} has stores but no controller that reports",
        ),
        Alert(
            alert="HotsetQuarantineGrows",
            expr=f"sum by (run, store) ({_of(names.QUARANTINED_BYTES)}) > 0",
            held="5m", severity="warning", runbook="quarantine-grows",
            summary="{{ $labels.store }} has {{ $value | humanize1024 }}B in quarantine",
        ),
        Alert(
            alert="HotsetTelemetryLoses",
            expr=f"sum by (run, store) (increase({_of(names.TELEMETRY_DROPPED)}[5m])) > 0",
            held="0s", severity="info", runbook="compute-stalls",
            summary="{{ $labels.store }} lost {{ $value }} rows: other numbers are lower bounds",
        ),
    )  # fmt: skip


def to_yaml() -> str:
    """The rules file; strings are spelled as JSON, which YAML reads."""
    lines = ["# Generated from the catalog of metrics: hotset grafana", "groups:"]
    lines += ["- name: hotset-records", "  rules:"]
    for one in records():
        lines += [f"  - record: {one.record}", f"    expr: {json.dumps(one.expr)}"]
    lines += ["- name: hotset-alerts", "  rules:"]
    for alert in alerts():
        lines += [
            f"  - alert: {alert.alert}",
            f"    expr: {json.dumps(alert.expr)}",
            f"    for: {alert.held}",
            "    labels:",
            f"      severity: {alert.severity}",
            "    annotations:",
            f"      summary: {json.dumps(alert.summary)}",
            f"      runbook: OPERATIONS.md#{alert.runbook}",
        ]
    return "\n".join(lines) + "\n"
