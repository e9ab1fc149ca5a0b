"""`hotset bench equal` and `bench wire`: options, and figures as text. Measures nothing itself."""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from hotset.cluster.console import say, silent
from hotset.cluster.options import json_option, model_option
from hotset.dashboards import text as plain
from hotset.policies.guard import BUDGET_NATS

if TYPE_CHECKING:
    from hotset.cluster.bench_equal import Equal, Side
    from hotset.cluster.bench_wire import WireFigures


@click.command("equal")
@model_option()
@click.option(
    "--sensitivity",
    type=click.Path(path_type=Path),
    required=True,
    metavar="FILE",
    help="what cheaper formats cost, from `hotset calibrate`",
)
@click.option(
    "--quality-budget",
    "budget_nats",
    type=click.FloatRange(min=0),
    default=BUDGET_NATS,
    show_default=True,
    metavar="NATS",
    help="most divergence that formats may cost, nats a token",
)
@click.option(
    "--hbm-ratio",
    type=float,
    default=0.3,
    show_default=True,
    help="share of all experts, at full precision, that a worker's memory holds",
)
@click.option(
    "--host-ratio", type=float, default=0.5, show_default=True, help="the same of the host pool"
)
@click.option("--cxl-profile", default="cxl2x8", show_default=True, help="emulated link")
@click.option("--transport", default="nixl", show_default=True, help="as of `hotset generate`")
@click.option(
    "--tokens",
    type=click.IntRange(min=2),
    default=32,
    show_default=True,
    help="tokens of each of four requests",
)
@click.option(
    "--rounds",
    type=click.IntRange(min=1),
    default=5,
    show_default=True,
    help="rounds of both runs in turns; the median is printed",
)
@json_option()
def bench_equal_command(*, model: Path, as_json: bool, **options: Any) -> None:
    """Tokens/s and stall at equal bytes: formats within a budget against bf16 only."""
    from hotset.cluster.bench_equal import run_bench

    found = run_bench(model, say=silent if as_json else say, **options)
    click.echo(json.dumps(found.to_json()) if as_json else render(found))


def render(found: Equal) -> str:
    """The figures as text."""
    rows = [_row(side) for side in (found.full, found.mixed)]
    drift = found.drift
    ratio = "-" if found.stall_ratio is None else f"{found.stall_ratio:.2f}"
    bytes_near = plain.human_bytes(found.hbm_bytes)
    verdict = "inside" if found.inside else "OVER THE BUDGET"
    table = plain.table(
        (
            "formats",
            "bits",
            "tokens/s (range)",
            "stall ms/token (range)",
            "found near",
            "kB moved/token",
            "blocks near, by format",
        ),
        rows,
    )
    head = (
        f"{found.model}: {bytes_near} near compute in both runs, {found.hbm_ratio:g} of the "
        f"experts at full precision\n{found.machine}; median of {found.rounds} rounds of "
        f"{found.tokens} tokens, in turns"
    )
    compared = (
        f"mixed / bf16: tokens/s {found.speed_ratio:.2f}, stall {ratio}; the same token in "
        f"{found.same_tokens} of {found.tokens} places"
    )
    cost = (
        f"drift of the mixed run's text: {drift.mean:.2g} nats a token ({drift.lower:.2g} .. "
        f"{drift.upper:.2g}, 95 %), budget {found.budget_nats:g}: {verdict}"
    )
    emulated = [f"emulated: {text}" for text in found.emulated]
    return "\n".join([head, *emulated, "", *table, "", compared, cost])


def _row(side: Side) -> tuple[str, ...]:
    held = ", ".join(f"{count} {form}" for form, count in sorted(side.held.items()))
    return (
        side.name,
        f"{side.bits_per_weight:.2f}",
        _spread(side.tokens_per_s, "{:.1f}"),
        _spread(side.stall_ms_per_token, "{:.2f}"),
        plain.human_ratio(side.near_ratio),
        f"{statistics.median(side.moved_kb_per_token):.0f}",
        held,
    )


def _spread(values: list[float], form: str) -> str:
    low, middle, high = min(values), statistics.median(values), max(values)
    return f"{form.format(middle)} ({form.format(low)}-{form.format(high)})"


def _rates(_ctx: click.Context, _param: click.Parameter, text: str) -> tuple[float, ...]:
    try:
        rates = tuple(float(part) for part in text.split(","))
    except ValueError:
        rates = ()
    if not rates or min(rates) <= 0:
        raise click.BadParameter(f"{text!r} is not a list of GB/s, for instance 0.3,1")
    return rates


@click.command("wire")
@model_option()
@click.option(
    "--rates",
    callback=_rates,
    default="0.125,0.3,1,3",
    show_default=True,
    metavar="GB/S,...",
    help="rates to which the link is paced",
)
@click.option(
    "--blocks",
    type=click.IntRange(min=1),
    default=8,
    show_default=True,
    help="experts that are read",
)
@click.option(
    "--rounds",
    type=click.IntRange(min=1),
    default=5,
    show_default=True,
    help="rounds of all rates and formats in turns; the median is printed",
)
@json_option()
def bench_wire_command(*, model: Path, as_json: bool, **options: Any) -> None:
    """Time per block over a paced link: bf16 against packed and reduced formats."""
    from dataclasses import asdict

    from hotset.cluster.bench_wire import run_bench

    found = run_bench(model, say=silent if as_json else say, **options)
    click.echo(json.dumps(asdict(found)) if as_json else render_wire(found))


def render_wire(found: WireFigures) -> str:
    """The figures as text."""
    rows = [
        (
            f"{row.link_gb_per_s:g}",
            row.format,
            plain.human_bytes(row.wire_bytes),
            f"{row.block_us:.0f}",
            f"{row.bound_us:.0f}",
            f"{row.decode_us:.0f}",
            f"{row.against_bf16:.2f}",
            "yes" if row.same_bytes else "no",
        )
        for row in found.rows
    ]
    head = (
        f"{found.model}: {found.blocks} blocks of {plain.human_bytes(found.block_bytes)}, median "
        f"of {found.rounds} rounds\n{found.machine}\nlink: plain TCP in one process, emulated: "
        "paced to the rate"
    )
    packs = ", ".join(
        f"{rate} GB/s {'yes' if pays else 'no'}" for rate, pays in found.packs.items()
    )
    columns = (
        "GB/s",
        "format",
        "on the wire",
        "us/block",
        "link alone",
        "decode",
        "of bf16",
        "exact",
    )
    table = plain.table(columns, rows, left=2)
    return "\n".join([head, "", *table, "", f"a live pool would pack: {packs}"])
