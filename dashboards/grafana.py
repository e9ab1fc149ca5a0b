"""The Grafana dashboard, generated from the catalog of metrics.

Decides which panels there are and how each metric is asked for. Names, labels and units come from
`hotset.actors.names`; Ray puts `ray_` before each in its Prometheus endpoint. Must not know Ray or
where the file goes.

Invariant: every metric of the catalog stands in at least one panel. A metric that may never have
been touched in a healthy run is asked for with `or vector(0)`, so that its panel shows 0.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from hotset.actors import names

PREFIX = "ray_"
FILE = "hotset_grafana_dashboard.json"
UID = "hotset"
_WINDOW = "$__rate_interval"
_RUN = 'run=~"$run"'
_WIDTH, _HEIGHT, _ACROSS = 12, 8, 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Panel:
    """A time series panel: PromQL expressions with legends, and Grafana's name of the unit."""

    title: str
    about: str
    unit: str
    targets: tuple[tuple[str, str], ...]


def series(metric: names.Metric, *, where: str = "") -> str:
    """Selector of a metric in Ray's endpoint, for the chosen runs."""
    labels = ", ".join(filter(None, (_RUN, where)))
    return f"{PREFIX}{metric.name}{{{labels}}}"


def rate(metric: names.Metric, *, by: str, where: str = "") -> str:
    """A counter as a rate, summed over all labels but `by`."""
    return f"sum by ({by}) (rate({series(metric, where=where)}[{_WINDOW}]))"


def total(metric: names.Metric, *, by: str) -> str:
    """A gauge, summed over all labels but `by`."""
    return f"sum by ({by}) ({series(metric)})"


def _or_zero(expression: str) -> str:
    return f"{expression} or vector(0)"


def panels() -> tuple[Panel, ...]:
    """All panels, in reading order: does compute wait, for what, what moves, who decides."""
    n = names
    hits = f"{rate(n.EXPERT_HITS, by='store, tier')}"
    flows = "store, tier_from, tier_to"
    flow_legend = "{{tier_from}} to {{store}}"

    def each(metric: names.Metric) -> str:
        part = rate(metric, by=flows)
        return f"{part} / {rate(n.TRANSFER_SECONDS, by=flows)}"

    return (
        Panel(
            title="Stall", about=n.STALL_SECONDS.meaning, unit="percentunit",
            targets=(
                (_or_zero(rate(n.STALL_SECONDS, by="store, reason")), "{{store}} {{reason}}"),
            ),
        ),
        Panel(
            title="Tokens", about=n.TOKENS_SERVED.meaning, unit="ops",
            targets=((rate(n.TOKENS_SERVED, by="store"), "{{store}}"),),
        ),
        Panel(
            title="Where experts were found", about=n.EXPERT_HITS.meaning, unit="percentunit",
            targets=(
                (f"{hits} / on (store) group_left {rate(n.EXPERT_QUERIES, by='store')}",
                 "{{store}} {{tier}}"),
            ),
        ),
        Panel(
            title="Bytes moved", about=n.TRANSFER_BYTES.meaning, unit="Bps",
            targets=((rate(n.TRANSFER_BYTES, by=flows), flow_legend),),
        ),
        Panel(
            title="Transfers by end", about=n.TRANSFERS.meaning, unit="ops",
            targets=((rate(n.TRANSFERS, by="store, code"), "{{store}} {{code}}"),),
        ),
        Panel(
            title="What the time of transfers went to",
            about="shares of the life times of transfers; the rest is none of the three",
            unit="percentunit",
            targets=(
                (each(n.QUEUE_SECONDS), f"queue {flow_legend}"),
                (each(n.WIRE_SECONDS), f"wire {flow_legend}"),
                (each(n.ACTIVATE_SECONDS), f"activate {flow_legend}"),
            ),
        ),
        Panel(
            title="Oldest transfer in flight", about=n.OLDEST_TRANSFER.meaning, unit="s",
            targets=((_or_zero(total(n.OLDEST_TRANSFER, by="store")), "{{store}}"),),
        ),
        Panel(
            title="Tokens sent to peers instead of weights", about=n.DISPATCHED_BYTES.meaning,
            unit="Bps",
            targets=((_or_zero(rate(n.DISPATCHED_BYTES, by="store")), "{{store}}"),),
        ),
        Panel(
            title="Resident", about=n.RESIDENT_BYTES.meaning, unit="bytes",
            targets=(
                (total(n.RESIDENT_BYTES, by="store, tier"), "{{store}}"),
                (total(n.CAPACITY_BYTES, by="store, tier"), "{{store}} may hold"),
            ),
        ),
        Panel(
            title="Quarantined", about=n.QUARANTINED_BYTES.meaning, unit="bytes",
            targets=((total(n.QUARANTINED_BYTES, by="store"), "{{store}}"),),
        ),
        Panel(
            title="Blocks by best state", about=n.BLOCKS.meaning, unit="short",
            targets=((total(n.BLOCKS, by="state"), "{{state}}"),),
        ),
        Panel(
            title="Imbalance of load", about=n.IMBALANCE.meaning, unit="none",
            targets=((_or_zero(total(n.IMBALANCE, by="run")), "{{run}}"),),
        ),
        Panel(
            title="Decisions and vetoes",
            about=f"{n.DECISIONS.meaning}; {n.VETOES.meaning}", unit="ops",
            targets=(
                (_or_zero(rate(n.DECISIONS, by="reason")), "{{reason}}"),
                (_or_zero(rate(n.VETOES, by="reason")), "refused: {{reason}}"),
            ),
        ),
        Panel(
            title="Plans for replicas",
            about=f"{n.PLANS.meaning}; {n.PLAN_MOVES.meaning}", unit="ops",
            targets=(
                (_or_zero(rate(n.PLANS, by="reason")), "{{reason}}"),
                (_or_zero(rate(n.PLAN_MOVES, by="reason")), "copies: {{reason}}"),
            ),
        ),
        Panel(
            title="Balance of the last plan", about=n.PLAN_BALANCE.meaning, unit="none",
            targets=((_or_zero(total(n.PLAN_BALANCE, by="when")), "{{when}}"),),
        ),
        Panel(
            title="Drift against the quality budget", about=n.DRIFT.meaning, unit="none",
            targets=((_or_zero(total(n.DRIFT, by="kind")), "{{kind}}"),),
        ),
        Panel(
            title="Epoch and its age", about=n.EPOCH_AGE.meaning, unit="none",
            targets=(
                (total(n.EPOCH_NUMBER, by="run"), "epoch {{run}}"),
                (total(n.EPOCH_AGE, by="run"), "age in s {{run}}"),
            ),
        ),
        Panel(
            title="Alerts of the watchdog", about=n.ALERT.meaning, unit="none",
            targets=((_or_zero(total(n.ALERT, by="alert")), "{{alert}}"),),
        ),
        Panel(
            title="Telemetry",
            about=f"{n.TELEMETRY_SPANS.meaning}; {n.TELEMETRY_DROPPED.meaning}", unit="ops",
            targets=(
                (rate(n.TELEMETRY_SPANS, by="store"), "{{store}}"),
                (_or_zero(rate(n.TELEMETRY_DROPPED, by="store")), "lost {{store}}"),
                (_or_zero(rate(n.SPANS_EXPORTED, by="node")), "exported {{node}}"),
                (_or_zero(rate(n.EXPORT_DROPPED, by="node")), "export lost {{node}}"),
            ),
        ),
    )  # fmt: skip


def dashboard() -> dict[str, Any]:
    """Grafana's model of the dashboard (schema 38), with the data source and the run to choose."""
    return {
        "uid": UID,
        "title": "hotset",
        "tags": ["hotset", "ray"],
        "schemaVersion": 38,
        "editable": True,
        "refresh": "10s",
        "time": {"from": "now-30m", "to": "now"},
        "templating": {"list": [_source(), _runs()]},
        "panels": [_panel(place, panel) for place, panel in enumerate(panels())],
    }


def to_json() -> str:
    """The file that Grafana's provisioning reads."""
    return json.dumps(dashboard(), indent=1) + "\n"


def _source() -> dict[str, Any]:
    return {"name": "datasource", "type": "datasource", "query": "prometheus", "label": "Source"}


def _runs() -> dict[str, Any]:
    ask = f"label_values({PREFIX}{names.EPOCH_NUMBER.name}, run)"
    return {
        "name": "run",
        "label": "Run",
        "type": "query",
        "datasource": {"type": "prometheus", "uid": "${datasource}"},
        "query": {"query": ask, "refId": "run"},
        "refresh": 2,
        "sort": 2,
        "multi": True,
        "includeAll": True,
        "allValue": ".*",
        "current": {"text": "All", "value": "$__all"},
    }


def _panel(place: int, panel: Panel) -> dict[str, Any]:
    source = {"type": "prometheus", "uid": "${datasource}"}
    return {
        "id": place + 1,
        "type": "timeseries",
        "title": panel.title,
        "description": panel.about,
        "datasource": source,
        "gridPos": {
            "x": place % _ACROSS * _WIDTH,
            "y": place // _ACROSS * _HEIGHT,
            "w": _WIDTH,
            "h": _HEIGHT,
        },
        "fieldConfig": {"defaults": {"unit": panel.unit, "min": 0}, "overrides": []},
        "options": {"legend": {"displayMode": "list", "placement": "bottom"}},
        "targets": [
            {"refId": chr(ord("A") + number), "expr": expr, "legendFormat": legend,
             "datasource": source}
            for number, (expr, legend) in enumerate(panel.targets)
        ],
    }  # fmt: skip
