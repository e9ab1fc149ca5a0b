"""`hotset trace ...`: reading recorded runs. Parses, calls, prints; the work is in dashboards."""

from __future__ import annotations

from pathlib import Path

import click

_RUN = click.argument("run", type=click.Path(path_type=Path))
_FORM = click.option(
    "--format",
    "form",
    type=click.Choice(["text", "json"]),
    default="text",
    show_default=True,
    help="text, or JSON on one line",
)


@click.group()
def trace() -> None:
    """Read recorded traces."""


@trace.command()
@_RUN
@_FORM
@click.option(
    "--html",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="FILE",
    help="write one self-contained page, too",
)
@click.option(
    "--stalls",
    type=click.IntRange(min=0),
    default=10,
    show_default=True,
    help="how many of the costliest stalls to tell",
)
def analyze(run: Path, form: str, html: Path | None, stalls: int) -> None:
    """Stall, hidden and exposed transfer time of the run recorded in folder RUN."""
    from hotset.dashboards.trace import analyze_view, load
    from hotset.dashboards.trace_text import render_text, to_json

    view = load(run)
    analysis = analyze_view(view, stalls=stalls)
    if html is not None:
        from hotset.dashboards.trace_html import render_html

        html.write_text(render_html(analysis, view=view), encoding="utf-8")
        click.echo(f"wrote {html}", err=True)
    click.echo(to_json(analysis) if form == "json" else render_text(analysis))


@trace.command("export")
@_RUN
@click.option(
    "--format",
    "form",
    type=click.Choice(["perfetto", "kineto", "csv"]),
    required=True,
    help="perfetto: Chrome's trace JSON; kineto: a file a device, for Holistic Trace Analysis",
)
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    required=True,
    metavar="PATH",
    help="file to write; of kineto the folder",
)
def export_command(run: Path, form: str, out: Path) -> None:
    """Write the run recorded in folder RUN for another tool."""
    from hotset.dashboards.trace import load

    view = load(run)
    if form == "perfetto":
        from hotset.dashboards.export_perfetto import write_perfetto

        click.echo(f"wrote {write_perfetto(view, out):,} slices to {out}")
    elif form == "kineto":
        from hotset.dashboards.export_kineto import write_kineto

        for path in write_kineto(view, out):
            click.echo(f"wrote {path}")
    else:
        from hotset.dashboards.columns import write_csv

        click.echo(f"wrote {write_csv(view.spans, out):,} spans to {out}")


@trace.command("diff")
@click.argument("run_a", type=click.Path(path_type=Path))
@click.argument("run_b", type=click.Path(path_type=Path))
@_FORM
def diff_command(run_a: Path, run_b: Path, form: str) -> None:
    """Show the figures of two recorded runs beside each other."""
    from hotset.dashboards.trace import analyze as read
    from hotset.dashboards.trace_diff import diff, render_text, to_json

    found = diff(read(run_a), read(run_b))
    click.echo(to_json(found) if form == "json" else render_text(found))


@trace.command("sql")
@click.argument("statement")
@click.option(
    "--run",
    type=click.Path(path_type=Path),
    required=True,
    metavar="RUN",
    help="folder of the recorded run",
)
@_FORM
def sql_command(statement: str, run: Path, form: str) -> None:
    """Answer STATEMENT about the spans of a recorded run (table `spans`), by DuckDB."""
    from hotset.dashboards.otlp import read_run
    from hotset.dashboards.trace_sql import ask, render_text, to_json

    answer = ask(read_run(run), statement)
    click.echo(to_json(answer) if form == "json" else render_text(answer))
