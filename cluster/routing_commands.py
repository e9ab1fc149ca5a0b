"""Commands on recorded routing: `hotset replay` and `hotset analyze-routing`. Parse and print."""

from __future__ import annotations

import json
from pathlib import Path

import click

from hotset.cluster.console import say, silent
from hotset.cluster.options import json_option


@click.command("replay")
@click.option(
    "--router",
    "path",
    type=click.Path(path_type=Path),
    required=True,
    help=".npz with experts [tokens, layers, k] and seq [tokens]",
)
@click.option(
    "--policy",
    default="hotset",
    show_default=True,
    help="a residency policy; a wrong name lists them",
)
@click.option("--all", "every", is_flag=True, help="replay all policies")
@click.option(
    "--resident",
    type=click.FloatRange(0, 1, min_open=True),
    default=0.25,
    show_default=True,
    help="share of all experts that the device holds",
)
@click.option(
    "--batch",
    type=click.IntRange(1, 4096),
    default=1,
    show_default=True,
    help="sequences side by side; their needs in a layer are united",
)
@click.option(
    "--profile",
    default="pcie5",
    show_default=True,
    help="link: pcie5, pcie4, cxl2x8, nvme or roce400",
)
@click.option(
    "--layer-ns",
    type=click.IntRange(min=1),
    default=400_000,
    show_default=True,
    help="compute time of a layer",
)
@click.option(
    "--expert-bytes",
    type=click.IntRange(min=1),
    default=12 << 20,
    show_default=True,
    help="bytes of an expert on the link",
)
@click.option("--tokens", type=click.IntRange(min=1), help="only the first tokens of the trace")
@json_option()
def replay(  # noqa: PLR0913 - one option each
    *,
    path: Path,
    policy: str,
    every: bool,
    resident: float,
    batch: int,
    profile: str,
    layer_ns: int,
    expert_bytes: int,
    tokens: int | None,
    as_json: bool,
) -> None:
    """Replay recorded routing through residency policies."""
    from hotset.cluster.replay import run_replay

    results, text = run_replay(
        path,
        policies=() if every else (policy,),
        resident=resident,
        batch=batch,
        profile=profile,
        layer_ns=layer_ns,
        expert_bytes=expert_bytes,
        tokens=tokens,
        say=say if every and not as_json else silent,
    )
    if as_json:
        found = {
            result.policy: {**result.numbers(), "predictors": result.predictors()}
            for result in results
        }
        click.echo(json.dumps(found if every else found[policy]))
        return
    click.echo(text)


@click.command("analyze-routing")
@click.argument("path", type=click.Path(path_type=Path), metavar="FILE")
@click.option("--tokens", type=click.IntRange(min=1), help="only the first tokens of the trace")
@json_option()
def analyze_routing_command(*, path: Path, tokens: int | None, as_json: bool) -> None:
    """Tell from recorded routing whether offloading suits the model, and at which size."""
    from dataclasses import asdict

    from hotset.cluster.replay import render_analysis
    from hotset.dashboards.routertrace import read_trace
    from hotset.policies.routing import analyze_routing

    trace = read_trace(path).head(tokens)
    found = analyze_routing(trace.experts, trace.seq, num_experts=trace.num_experts)
    if as_json:
        click.echo(json.dumps(asdict(found)))
        return
    click.echo(render_analysis(trace, found))
