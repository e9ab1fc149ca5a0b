"""`hotset bench equal`: its options, and its figures as text. Decides and measures nothing."""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from hotset.cluster.console import say, silent
from hotset.dashboards import text as plain
from hotset.policies.guard import BUDGET_NATS

if TYPE_CHECKING:
    from hotset.cluster.bench_equal import Equal, Side


@click.command("equal")
@click.option(
    "--model",
    type=click.Path(path_type=Path),
    required=True,
    help="Hugging Face directory of a Mixture-of-Experts model",
)
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
@click.option("--json", "as_json", is_flag=True, help="print one JSON object, nothing else")
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
