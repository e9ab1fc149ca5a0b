"""A cluster with a dashboard: its provisioning finds our dashboard, its Prometheus our rules."""

from __future__ import annotations

import shutil
import socket
import subprocess
from pathlib import Path

import pytest
import ray
import yaml
from click.testing import CliRunner

from hotset.cluster.cli import main
from hotset.cluster.local import local_cluster
from hotset.dashboards import grafana, rules
from tests.cluster.world import eventually

pytestmark = pytest.mark.ray


def test_rays_provisioning_finds_dashboard_and_rules() -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with local_cluster({}, dashboard_port=port):
        session = Path(ray._private.worker._global_node.get_session_dir_path())
        config = session / "metrics" / "prometheus" / "prometheus.yml"
        eventually(config.is_file, deadline_s=60, what="Ray's configuration of Prometheus")
        result = CliRunner().invoke(main, ["grafana", "--session", str(session)])
        assert result.exit_code == 0, result.output
        provisioned = session / "metrics" / "grafana" / "provisioning" / "dashboards"
        provider = yaml.safe_load((provisioned / "default.yml").read_text())["providers"][0]
        assert (Path(provider["options"]["path"]) / grafana.FILE).is_file()
        assert yaml.safe_load(config.read_text())["rule_files"] == [rules.FILE]
        promtool = shutil.which("promtool")
        if promtool is None:
            pytest.skip("no promtool on PATH: apt-get install prometheus")
        done = subprocess.run(
            [promtool, "check", "config", str(config)], capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr
        assert "rules found" in done.stdout
