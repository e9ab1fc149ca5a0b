"""A real Prometheus scrapes a live run: every expression of the dashboard has a series."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import urllib.parse
import urllib.request
from typing import TYPE_CHECKING, Any

import pytest
import ray

from hotset.actors import names
from hotset.cluster.front import Front
from hotset.dashboards import grafana, rules
from tests.cluster.world import deployed, eventually, prompts

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from hotset.cluster.local import LocalCluster

pytestmark = pytest.mark.ray
# What a healthy run may never touch; the panels show 0 then.
MAY_BE_SILENT = {
    names.STALL_SECONDS, names.DISPATCHED_BYTES, names.TELEMETRY_DROPPED, names.VETOES,
    names.DECISIONS, names.IMBALANCE, names.OLDEST_TRANSFER, names.ALERT, names.SPANS_EXPORTED,
    names.EXPORT_DROPPED, names.DRIFT, names.PLAN_MOVES,
}  # fmt: skip


class Prometheus:
    """A server that scrapes every node of the cluster once a second."""

    def __init__(self, folder: Path) -> None:
        binary = shutil.which("prometheus")
        if binary is None:
            pytest.skip("no prometheus on PATH: apt-get install prometheus")
        targets = [f"127.0.0.1:{node['MetricsExportPort']}" for node in ray.nodes()]
        (folder / rules.FILE).write_text(rules.to_yaml())
        config = folder / "prometheus.yml"
        scrape = {"job_name": "ray", "static_configs": [{"targets": targets}]}
        config.write_text(
            json.dumps(
                {
                    "global": {"scrape_interval": "1s", "evaluation_interval": "1s"},
                    "rule_files": [rules.FILE],
                    "scrape_configs": [scrape],
                }
            )
        )
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = free.getsockname()[1]
        self.process = subprocess.Popen(
            [binary, f"--config.file={config}", f"--storage.tsdb.path={folder / 'data'}",
             f"--web.listen-address=127.0.0.1:{self.port}", "--log.level=error"],
        )  # fmt: skip

    def ask(self, path: str, **query: str) -> Any:
        url = f"http://127.0.0.1:{self.port}/api/v1/{path}?{urllib.parse.urlencode(query)}"
        try:
            with urllib.request.urlopen(url, timeout=10) as answer:
                return json.load(answer)["data"]
        except OSError:
            return None

    def series(self, expr: str) -> list[Any]:
        found = self.ask("query", query=expr)
        return found["result"] if found else []


@pytest.fixture
def prometheus(cluster: LocalCluster, tmp_path: Path) -> Iterator[Prometheus]:
    assert cluster.nodes
    server = Prometheus(tmp_path)
    yield server
    server.process.terminate()
    server.process.wait(30)


def test_each_expression_returns_a_series(
    prometheus: Prometheus, models: Callable[[str], Path], tmp_path: Path
) -> None:
    with deployed(models("demo"), tmp_path / "run", transport="auto") as run:
        asked = prompts(2)

        def settled(metric: names.Metric) -> bool:
            Front(run).generate_many(asked, max_new_tokens=4)
            return len(prometheus.series(grafana.PREFIX + metric.name)) > 0

        for metric in names.METRICS:
            if metric not in MAY_BE_SILENT:
                eventually(lambda m=metric: settled(m), deadline_s=120, what=metric.name)
        for panel in grafana.panels():
            for expr, _ in panel.targets:
                query = expr.replace("$__rate_interval", "30s").replace("$run", ".*")
                what = f"{panel.title}: {query}"
                eventually(lambda q=query: prometheus.series(q), deadline_s=60, what=what)
        groups = prometheus.ask("rules")["groups"]
        health = {rule["name"]: rule["health"] for group in groups for rule in group["rules"]}
        assert set(health.values()) == {"ok"}
        assert len(health) == len(rules.records()) + len(rules.alerts())
        runs = {one["metric"]["run"] for one in prometheus.series("ray_hotset_epoch")}
        assert run.run in runs
