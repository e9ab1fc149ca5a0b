"""Metrics in Ray's registry, made from the one table of names."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ray.util import metrics as ray_metrics

if TYPE_CHECKING:
    from hotset.actors import names


def make_metric(metric: names.Metric, *, run: str) -> Any:
    """A counter or gauge of `ray.util.metrics` with the table's labels, its run and text."""
    kind = ray_metrics.Counter if metric.kind == "counter" else ray_metrics.Gauge
    made = kind(metric.name, description=metric.meaning, tag_keys=metric.labels)
    made.set_default_tags({"run": run})
    return made
