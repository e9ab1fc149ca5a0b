"""The command line. Parses, calls, prints; every error of ours is one line and an exit code.

Exit codes: 0 done, 1 something failed while running, 2 the request could not work as given.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import click

from hotset import __version__
from hotset.cluster.bench_equal_command import bench_equal_command, bench_wire_command
from hotset.cluster.bench_policies_command import bench_policies_command
from hotset.cluster.bench_trace import bench_trace_command
from hotset.cluster.brain_commands import (
    bench_brain_command,
    bench_simulate_command,
    record_command,
    simulate_command,
)
from hotset.cluster.calibrate_commands import bench_mix_command, calibrate_command
from hotset.cluster.console import say, silent
from hotset.cluster.dashboard import dashboard_command
from hotset.cluster.formats_command import bench_formats_command
from hotset.cluster.grafana import grafana_command
from hotset.cluster.journal_command import journal_group
from hotset.cluster.options import json_option, model_option
from hotset.cluster.plan import bench_planner_command, plan_command
from hotset.cluster.routing_commands import analyze_routing_command, replay
from hotset.cluster.top import top_command
from hotset.cluster.trace_commands import trace
from hotset.errors import HotsetError

DEMO_MODEL = Path(__file__).resolve().parent.parent / "examples" / "demo-moe"


class HotsetGroup(click.Group):
    """A group that turns our errors into one line on stderr."""

    def invoke(self, ctx: click.Context) -> Any:
        """Run a command; HotsetError becomes its text and exit code, wrong usage one line and 2."""
        try:
            return super().invoke(ctx)
        except HotsetError as error:
            click.echo(f"hotset: {error}", err=True)
            ctx.exit(error.exit_code)
        except click.UsageError as error:
            click.echo(f"hotset: {_one_line(error.format_message())}", err=True)
            ctx.exit(2)


def _one_line(text: str) -> str:
    return " ".join(text.split())


@click.group(cls=HotsetGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="hotset")
def main() -> None:
    """Cluster-wide weight residency for Mixture-of-Experts models."""


_FLOORS = ("bf16", "fp8", "int8", "nf4", "int4", "int3", "int2")


def _floors(
    _ctx: click.Context, _param: click.Parameter, values: tuple[str, ...]
) -> dict[int, str]:
    floors = {}
    for value in values:
        layer, colon, fmt = value.partition(":")
        if not (colon and layer.isdigit() and fmt in _FLOORS):
            raise click.BadParameter(f"{value!r} is not LAYER:FORMAT, for instance 0:bf16")
        floors[int(layer)] = fmt
    return floors


_CLUSTER_OPTIONS = (
    click.option("--workers", type=int, default=2, show_default=True, help="GPU workers"),
    click.option("--hbm-ratio", type=float, default=0.3, show_default=True,
                 help="share of all experts that one worker's fast memory holds"),
    click.option("--hbm-bytes", type=int, help="the same in bytes; wins over the ratio"),
    click.option("--host-pools", type=int, default=1, show_default=True),
    click.option("--host-ratio", type=float, default=0.5, show_default=True,
                 help="share of all experts that the host pools hold together"),
    click.option("--host-profile", help="emulated link of host pools, as of another node's"),
    click.option("--cxl-pools", type=int, default=1, show_default=True),
    click.option("--cxl-ratio", type=float, default=1.0, show_default=True),
    click.option("--cxl-profile", default="cxl2x8", show_default=True, help="emulated link"),
    click.option("--threads", type=int, default=1, show_default=True,
                 help="compute threads of a worker"),
    click.option("--policy", default="hotset", show_default=True,
                 help="residency policy: hotset, lru, load-on-demand, ... (docs/policies.md)"),
    click.option("--reference", default="eager", show_default=True,
                 help="transformers' experts implementation whose bits are matched"),
    click.option("--numerics", default="exact", show_default=True, help="exact or tiled"),
    click.option("--move", default="auto", show_default=True,
                 help="auto, weights (always fetch) or tokens (always dispatch)"),
    click.option("--transport", default="nixl", show_default=True,
                 help="nixl, auto (shared memory on one host, else nixl), tcp, ucx, or storage (no "
                      "peers)"),
    click.option("--reduced-ratio", type=float, default=0.0, show_default=True,
                 help="share of a worker's memory offered to int8 copies"),
    click.option("--default-floor", type=click.Choice(_FLOORS),
                 help="cheapest format allowed in layers without a --floor; default: bf16, or with "
                      "--sensitivity what the budget allows"),
    click.option("--sensitivity", type=click.Path(path_type=Path), metavar="FILE",
                 help="what cheaper formats cost, from `hotset calibrate`: formats are then chosen "
                      "within the budget"),
    click.option("--quality-budget", type=float, metavar="NATS",
                 help="most divergence (mean KL, nats a token) that formats may cost; default: "
                      "0.002 with --sensitivity; 0 is exact mode"),
    click.option("--wire", default="auto", show_default=True,
                 help="auto: blocks cross a link that is slower than decoding compressed without "
                      "loss, as its readers measure it; bf16: never"),
    click.option("--floor", "floors", multiple=True, callback=_floors, metavar="LAYER:FORMAT",
                 help="precision floor of one layer; may be given several times"),
    click.option("--mode", default="active", show_default=True,
                 help="active, or advisory: the controller decides and reports, moves nothing"),
    click.option("--device", default="cpu", show_default=True, help="torch device of workers"),
    click.option("--dashboard-port", type=click.IntRange(1, 65535),
                 help="show Ray's dashboard of a local cluster on this port"),
    click.option("--run-dir", type=click.Path(path_type=Path), help="where trace and journal go"),
    click.option("--address", envvar="RAY_ADDRESS",
                 help="Ray cluster to use; without it a local one is started"),
)  # fmt: skip


def cluster_options(command: Any) -> Any:
    """Options that describe a run's cluster."""
    for option in reversed(_CLUSTER_OPTIONS):
        command = option(command)
    return command


_GENERATE_OPTIONS = (
    click.option("--max-new-tokens", type=click.IntRange(min=1), default=48, show_default=True),
    json_option(),
    click.option("--check/--no-check", default=True, show_default=True,
                 help="compare with the unmodified transformers model"),
)  # fmt: skip


def generate_options(command: Any) -> Any:
    """Options of everything that generates text."""
    for option in reversed(_GENERATE_OPTIONS):
        command = option(command)
    return command


@main.command()
@model_option()
@click.option(
    "--prompt",
    "prompts",
    multiple=True,
    required=True,
    help="text to continue; several prompts are served at once",
)
@click.option(
    "--add-worker-after",
    type=int,
    metavar="TOKENS",
    help="add a worker when this many tokens have come",
)
@click.option(
    "--drain-worker-after",
    type=int,
    metavar="TOKENS",
    help="drain the last worker when this many tokens have come",
)
@generate_options
@cluster_options
def generate(**options: Any) -> None:
    """Generate text greedily, with experts in a cluster's memory tiers."""
    _generate(**options)


@main.command()
@generate_options
@cluster_options
def demo(**options: Any) -> None:
    """Serve the model of this repository from a local cluster, and report."""
    if not (DEMO_MODEL / "config.json").exists():
        raise HotsetError(
            f"the demo model is not at {DEMO_MODEL}",
            remedy="run from a checkout, or train it with examples/train_demo_moe.py",
        )
    _generate(model=DEMO_MODEL, prompts=("def __init__(self",), **options)


@main.command()
@click.option(
    "--model",
    type=click.Path(path_type=Path),
    help="Hugging Face directory of a Mixture-of-Experts model; default: the demo model",
)
@click.option(
    "--host", default="127.0.0.1", show_default=True,
    help="address to listen on; off loopback whoever reaches it can ask the model",
)  # fmt: skip
@click.option(
    "--port", type=click.IntRange(0, 65535), default=8269, show_default=True,
    help="port to listen on; 0 takes a free one",
)  # fmt: skip
@cluster_options
def serve(model: Path | None, host: str, port: int, address: str | None, **cluster: Any) -> None:
    """Serve completions over HTTP, until Ctrl-C."""
    from hotset.cluster.config import RunConfig
    from hotset.cluster.serve import run_serve

    given = {key: value for key, value in cluster.items() if value is not None}
    config = RunConfig.build(model=model or DEMO_MODEL, **given)
    run_serve(config, host=host, port=port, address=address, say=say)


def _generate(  # noqa: PLR0913 - the options of two commands, by name
    *,
    as_json: bool,
    check: bool,
    prompts: tuple[str, ...],
    max_new_tokens: int,
    address: str | None,
    add_worker_after: int | None = None,
    drain_worker_after: int | None = None,
    **cluster: Any,
) -> None:
    from hotset.cluster.config import RunConfig
    from hotset.cluster.serve import GenerateOptions, run_generate

    config = RunConfig.build(**{key: value for key, value in cluster.items() if value is not None})
    report = run_generate(
        config,
        GenerateOptions(
            prompts=prompts,
            max_new_tokens=max_new_tokens,
            check=check,
            address=address,
            add_worker_after=add_worker_after,
            drain_worker_after=drain_worker_after,
        ),
        say=silent if as_json else say,
        echo=silent if as_json else lambda text: click.echo(text, nl=False),
    )
    if as_json:
        click.echo(report.to_json())
        return
    from hotset.dashboards.report import render

    click.echo()
    click.echo(render(report))
    if report.identical is False and config.exact:
        raise HotsetError(
            "the tokens differ from the reference's", remedy="this is a bug: keep the run's folder"
        )


@main.command()
@click.option("--address", envvar="RAY_ADDRESS", default="auto", show_default=True)
@click.option("--run", "run", help="run id; needed when several runs are on the cluster")
@click.option("--json", "as_json", is_flag=True)
def status(address: str, run: str | None, *, as_json: bool) -> None:
    """Show stores, blocks by state and epoch of a live run."""
    from hotset.cluster.inspect import connect, live_status
    from hotset.dashboards.status import render

    with connect(address, run=run) as controller:
        found = live_status(controller)
    click.echo(found.to_json() if as_json else render(found))


@main.command()
@click.argument("block")
@click.option("--address", envvar="RAY_ADDRESS", default="auto", show_default=True)
@click.option("--run", "run", help="run id of a live run, or the folder of a recorded one")
@click.option("--json", "as_json", is_flag=True)
def why(block: str, address: str, run: str | None, *, as_json: bool) -> None:
    """Tell where BLOCK (LAYER.EXPERT) is and how it came there."""
    from hotset.cluster.inspect import block_id, connect, live_story, recorded_story
    from hotset.dashboards.status import render_why, why_json

    wanted = block_id(block)
    if run is not None and Path(run).is_dir():
        story, copies = recorded_story(Path(run), wanted)
    else:
        with connect(address, run=run) as controller:
            story, copies = live_story(controller, wanted)
    show = why_json if as_json else render_why
    click.echo(show(wanted, story=story, copies=copies))


main.add_command(plan_command)
main.add_command(calibrate_command)
main.add_command(replay)
main.add_command(analyze_routing_command)
main.add_command(record_command)
main.add_command(simulate_command)
main.add_command(journal_group)
main.add_command(trace)


@main.group()
def bench() -> None:
    """Measure, next to bounds and peers in the same run."""


@bench.command("serve")
@click.option("--model", type=click.Path(path_type=Path), help="default: a random 1.8 GB MoE")
@click.option(
    "--limit-mb",
    type=int,
    default=700,
    show_default=True,
    help="memory above the imports for the limited runs",
)
@click.option("--tokens", type=int, default=16, show_default=True)
@click.option("--threads", type=int, default=1, show_default=True)
@click.option("--repeat", type=int, default=1, show_default=True)
@click.option("--peers", default="full,mmap,storage,host,host-shm", show_default=True)
@click.option("--json", "as_json", is_flag=True)
def bench_serve(**options: Any) -> None:
    """Tokens a second: full memory (bound), memory-mapped peer, storage only, host pool."""
    from hotset.cluster.bench_serve import run_bench

    run_bench(**options)


@bench.command("transport")
@click.option("--quick", is_flag=True, help="few sizes and rounds; over within 40 s")
@click.option(
    "--sizes",
    metavar="SIZE,...",
    help="sizes of blocks, for instance 64KiB,12MiB,64x1MiB; default: all",
)
@click.option(
    "--backends",
    metavar="NAME,...",
    help="contenders, with the bounds they are held against; default: all",
)
@click.option(
    "--repeat",
    type=int,
    default=7,
    show_default=True,
    help="rounds of all contenders in turns; the median is printed",
)
@click.option(
    "--ray/--no-ray",
    "with_ray",
    default=True,
    show_default=True,
    help="measure Ray's object store and Direct Transport too",
)
@click.option(
    "--plot",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="draw the figures (.svg or .png)",
)
@json_option("a JSON list of rows")
def bench_transport(**options: Any) -> None:
    """Bytes a second: each backend next to memcpy, raw NIXL, a socket, preadv and Ray."""
    from hotset.cluster.bench_transport import run_bench

    run_bench(**options)


@main.command()
@json_option("a JSON list of findings")
def doctor(*, as_json: bool) -> None:
    """Say which parts work on this machine, and why the others do not."""
    import json

    from hotset.cluster.doctor import examine

    findings, good = examine()
    if as_json:
        click.echo(json.dumps([found.row() for found in findings]))
    else:
        for found in findings:
            click.echo(found.line())
    sys.exit(0 if good else 1)


bench.add_command(bench_planner_command)
bench.add_command(bench_brain_command)
bench.add_command(bench_policies_command)
bench.add_command(bench_simulate_command)
bench.add_command(bench_formats_command)
bench.add_command(bench_mix_command)
bench.add_command(bench_equal_command)
bench.add_command(bench_wire_command)
bench.add_command(bench_trace_command)
main.add_command(dashboard_command)
main.add_command(grafana_command)
main.add_command(top_command)

if os.environ.get("HOTSET_DEBUG"):
    import faulthandler

    faulthandler.enable()
