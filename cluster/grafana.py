"""`hotset grafana`: dashboard and rules to where Ray's Grafana and Prometheus find them."""

from __future__ import annotations

import os
from pathlib import Path

import click

from hotset.errors import ConfigError

OUTPUT_ENV = "RAY_METRICS_GRAFANA_DASHBOARD_OUTPUT_DIR"  # Ray's own name for it


@click.command("grafana")
@click.option(
    "--session", type=click.Path(path_type=Path),
    help="Ray's session folder; default: that of the last cluster of this machine",
)  # fmt: skip
@click.option(
    "--out", type=click.Path(path_type=Path),
    help="write both files into this folder, and touch nothing of Ray's",
)  # fmt: skip
def grafana_command(session: Path | None, out: Path | None) -> None:
    """Write Grafana's dashboard and Prometheus' rules to where Ray's provisioning finds them."""
    from hotset.dashboards import grafana, rules

    if out is not None:
        _write(out / grafana.FILE, grafana.to_json())
        _write(out / rules.FILE, rules.to_yaml())
        return
    metrics = (session or _last_session()) / "metrics"
    if not (metrics / "prometheus" / "prometheus.yml").is_file():
        raise ConfigError(
            f"{metrics} holds no configuration of Prometheus",
            remedy="start the cluster with a dashboard (`ray start --head`), or give --out FOLDER",
        )
    boards = Path(os.environ.get(OUTPUT_ENV) or metrics / "grafana" / "dashboards")
    _write(boards / grafana.FILE, grafana.to_json())
    _write(metrics / "prometheus" / rules.FILE, rules.to_yaml())
    _include(metrics / "prometheus" / "prometheus.yml", rules.FILE)


def _last_session() -> Path:
    from ray._common import utils  # Ray has no public name for its folder

    return Path(utils.get_default_ray_temp_dir()) / "session_latest"


def _write(path: Path, text: str) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise ConfigError(
            f"cannot write {path} ({error.strerror})", remedy="choose a folder with --out"
        ) from None
    click.echo(f"hotset: wrote {path}", err=True)


def _include(config: Path, file: str) -> None:
    """Name the rules in Ray's prometheus.yml, which has no `rule_files` of its own; once."""
    text = config.read_text(encoding="utf-8")
    if file in text:
        return
    if "rule_files:" in text:
        raise ConfigError(f"{config} has rules of its own", remedy=f"add {file} to its rule_files")
    _write(config, f"{text.rstrip()}\n\nrule_files:\n- '{file}'\n")
    click.echo("hotset: a running Prometheus reads its configuration again at SIGHUP", err=True)
