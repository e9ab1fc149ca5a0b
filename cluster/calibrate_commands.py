"""Commands on measured formats: `hotset calibrate` and `hotset bench mix`. Parse and print.

Nothing heavy is imported before a command runs.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from hotset.cluster.console import say, silent
from hotset.cluster.options import json_option, model_option
from hotset.policies.guard import BUDGET_NATS, LOSSY

FORMATS = ",".join(LOSSY)


@click.command("calibrate")
@model_option()
@click.option(
    "--text",
    "text",
    type=click.Path(path_type=Path),
    multiple=True,
    required=True,
    help="text file of the kind that will be served; several may be given",
)
@click.option(
    "--budget", "duration", default="10min", show_default=True, help="time: 90s, 10min or 1h"
)
@click.option(
    "--nats",
    type=click.FloatRange(min=0, min_open=True),
    default=BUDGET_NATS,
    show_default=True,
    help="quality budget near which the mixes are checked: mean KL in nats a token",
)
@click.option("--formats", default=FORMATS, show_default=True, help="formats to measure")
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    default=Path("sensitivity.json"),
    show_default=True,
    help="file to write; it serves this checkpoint only",
)
@click.option("--seed", type=int, default=0, show_default=True, help="order of text, draws")
@click.option(
    "--threads", type=click.IntRange(min=1), default=1, show_default=True, help="compute threads"
)
@json_option()
def calibrate_command(  # noqa: PLR0913 - one option each
    *,
    model: Path,
    text: tuple[Path, ...],
    duration: str,
    nats: float,
    formats: str,
    out: Path,
    seed: int,
    threads: int,
    as_json: bool,
) -> None:
    """Measure what each format costs in each expert, in nats of KL."""
    from hotset.blocks.sensitivity_table import write_table
    from hotset.cluster.calibrate import (
        lossy_formats,
        offered,
        parse_duration_ns,
        render,
        run_calibrate,
        summary,
    )

    said = silent if as_json else say
    offer = offered(model, lossy_formats(formats), out=out, say=said)
    table = run_calibrate(
        model,
        text=text,
        formats=offer.formats,
        bases=offer.bases,
        budget_nats=nats,
        time_ns=parse_duration_ns(duration),
        seed=seed,
        threads=threads,
        say=said,
    )
    write_table(table, out)
    if as_json:
        click.echo(json.dumps(summary(table, out=out, nats=nats, finding=offer.finding)))
        return
    click.echo(render(table, nats=nats))
    say(f"wrote {out}")


@click.command("mix")
@model_option()
@click.option(
    "--text",
    type=click.Path(path_type=Path),
    multiple=True,
    help="text for calibration; default: every second module of the standard library",
)
@click.option(
    "--held-out",
    type=click.Path(path_type=Path),
    multiple=True,
    help="text of the same kind to measure on; default: the other modules",
)
@click.option(
    "--shifted",
    type=click.Path(path_type=Path),
    multiple=True,
    help="text of another kind; default: the language's reference manual",
)
@click.option(
    "--table",
    "table_path",
    type=click.Path(path_type=Path),
    help="file of `hotset calibrate`; without it the model is calibrated first",
)
@click.option(
    "--nats",
    "budget_nats",
    type=click.FloatRange(min=0, min_open=True),
    default=BUDGET_NATS,
    show_default=True,
    help="quality budget: mean KL in nats a token",
)
@click.option(
    "--budget", "duration", default="3min", show_default=True, help="time for calibration"
)
@click.option("--quick", is_flag=True, help="fewer sizes and less text")
@click.option("--seed", type=int, default=0, show_default=True, help="order of text, draws")
@click.option(
    "--threads", type=click.IntRange(min=1), default=1, show_default=True, help="compute threads"
)
@click.option(
    "--plot", type=click.Path(path_type=Path), metavar="FILE", help="draw it (.svg or .png)"
)
@json_option()
def bench_mix_command(
    *, model: Path, duration: str, plot: Path | None, as_json: bool, **options: Any
) -> None:
    """KL of mixed formats: uniform, by popularity, and within a quality budget."""
    from dataclasses import asdict

    from hotset.cluster.bench_mix import run_bench
    from hotset.cluster.bench_mix_report import draw, render
    from hotset.cluster.calibrate import parse_duration_ns

    found = run_bench(
        model,
        time_ns=parse_duration_ns(duration),
        say=silent if as_json else say,
        **options,
    )
    if plot is not None:
        draw(found, plot)
    click.echo(json.dumps(asdict(found)) if as_json else render(found))
