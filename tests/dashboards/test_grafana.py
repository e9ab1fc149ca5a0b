"""Dashboard and rules made from the catalog: complete, well formed, installed where Ray looks."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from click.testing import CliRunner

from hotset.actors import names
from hotset.cluster.cli import main
from hotset.dashboards import grafana, rules

ROOT = Path(__file__).resolve().parents[2]
_METRIC = re.compile(rf"{grafana.PREFIX}(hotset_\w+)")
_LABELS = re.compile(r"by \(([^)]*)\)")


def expressions() -> list[str]:
    return [expr for panel in grafana.panels() for expr, _ in panel.targets]


def alerts_and_records() -> list[str]:
    return [one.expr for one in (*rules.records(), *rules.alerts())]


def test_every_metric_of_the_catalog_has_a_panel() -> None:
    shown = {name for expr in expressions() for name in _METRIC.findall(expr)}
    assert shown == {metric.name for metric in names.METRICS}


@pytest.mark.parametrize("expr", [*expressions(), *alerts_and_records()])
def test_expressions_name_metrics_and_labels_that_exist(expr: str) -> None:
    known = {metric.name: metric for metric in names.METRICS}
    used = [known[name] for name in _METRIC.findall(expr)]
    assert used or "hotset:" in expr
    for metric in used:
        assert (metric.kind == "counter") == (metric.name.endswith("_total"))
    for group in _LABELS.findall(expr):
        for label in group.split(", "):
            assert any(label in metric.labels for metric in used), label


def test_panels_tile_and_counters_are_rates() -> None:
    board = json.loads(grafana.to_json())
    places = {(one["gridPos"]["x"], one["gridPos"]["y"]) for one in board["panels"]}
    assert len(places) == len(board["panels"]) == len({one["id"] for one in board["panels"]})
    for panel in grafana.panels():
        assert panel.about
        for expr, legend in panel.targets:
            assert legend
            for name in _METRIC.findall(expr):
                assert name.endswith("_total") == bool(
                    re.search(rf"rate\({grafana.PREFIX}{name}\b", expr)
                )


def test_runbooks_are_headings_of_the_manual() -> None:
    headings = re.findall(r"^#+ (.+)$", (ROOT / "OPERATIONS.md").read_text(), re.MULTILINE)
    anchors = {re.sub(r"[^\w\- ]", "", text.lower()).replace(" ", "-") for text in headings}
    assert {one.runbook for one in rules.alerts()} <= anchors


def test_promtool_accepts_the_rules(tmp_path: Path) -> None:
    promtool = shutil.which("promtool")
    if promtool is None:
        pytest.skip("no promtool on PATH: apt-get install prometheus")
    path = tmp_path / rules.FILE
    path.write_text(rules.to_yaml())
    done = subprocess.run(
        [promtool, "check", "rules", str(path)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{len(rules.records()) + len(rules.alerts())} rules found" in done.stdout


def session(folder: Path) -> Path:
    """What a cluster with a dashboard leaves, as far as it matters here."""
    config = folder / "metrics" / "prometheus" / "prometheus.yml"
    config.parent.mkdir(parents=True)
    config.write_text("global:\n  scrape_interval: 10s\n")
    return folder


def test_files_go_to_where_rays_provisioning_looks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RAY_METRICS_GRAFANA_DASHBOARD_OUTPUT_DIR", raising=False)
    folder = session(tmp_path)
    for _ in range(2):  # a second time changes nothing
        result = CliRunner().invoke(main, ["grafana", "--session", str(folder)])
        assert result.exit_code == 0, result.output
    board = folder / "metrics" / "grafana" / "dashboards" / grafana.FILE
    assert json.loads(board.read_text())["uid"] == "hotset"
    config = (folder / "metrics" / "prometheus" / "prometheus.yml").read_text()
    assert config.count("rule_files") == 1
    assert (folder / "metrics" / "prometheus" / rules.FILE).read_text() == rules.to_yaml()


def test_another_output_folder_of_rays_is_obeyed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_METRICS_GRAFANA_DASHBOARD_OUTPUT_DIR", str(tmp_path / "boards"))
    result = CliRunner().invoke(main, ["grafana", "--session", str(session(tmp_path / "s"))])
    assert result.exit_code == 0, result.output
    assert (tmp_path / "boards" / grafana.FILE).exists()


def test_without_a_session_the_remedy_is_named(tmp_path: Path) -> None:
    result = CliRunner().invoke(main, ["grafana", "--session", str(tmp_path)])
    assert result.exit_code == 2
    assert "--out FOLDER" in result.output


def test_files_can_be_written_anywhere(tmp_path: Path) -> None:
    result = CliRunner().invoke(main, ["grafana", "--out", str(tmp_path / "o")])
    assert result.exit_code == 0, result.output
    assert {path.name for path in (tmp_path / "o").iterdir()} == {grafana.FILE, rules.FILE}
