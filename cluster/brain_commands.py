"""Commands of the brain: `hotset record`, `hotset simulate` and its benches. Parse and print."""

from __future__ import annotations

import json
from pathlib import Path

import click

from hotset.cluster.console import say, silent
from hotset.cluster.options import json_option, policies_option, rounds_option, tokens_option


@click.command("record")
@click.option(
    "--model",
    type=click.Path(path_type=Path),
    help="Hugging Face directory of a Mixture-of-Experts model; default: the demo model",
)
@click.option(
    "--prompt",
    "prompts",
    multiple=True,
    required=True,
    help="text to continue; each prompt is one sequence of the recording",
)
@click.option(
    "--out",
    type=click.Path(path_type=Path, dir_okay=False),
    required=True,
    help="the .npz file to write",
)
@click.option(
    "--max-new-tokens",
    type=click.IntRange(min=1),
    default=128,
    show_default=True,
    help="most tokens to generate for each prompt",
)
@click.option("--workers", type=int, default=1, show_default=True, help="GPU workers")
@click.option(
    "--hbm-ratio",
    type=float,
    default=0.3,
    show_default=True,
    help="share of all experts that one worker's fast memory holds",
)
@click.option("--policy", default="hotset", show_default=True, help="residency policy")
@click.option("--transport", default="nixl", show_default=True, help="as for `hotset generate`")
@click.option(
    "--address",
    envvar="RAY_ADDRESS",
    help="Ray cluster to use; without it a local one is started",
)
@json_option()
def record_command(  # noqa: PLR0913 - one option each
    *,
    model: Path | None,
    prompts: tuple[str, ...],
    out: Path,
    max_new_tokens: int,
    workers: int,
    hbm_ratio: float,
    policy: str,
    transport: str,
    address: str | None,
    as_json: bool,
) -> None:
    """Serve prompts and write which experts each token used, for `hotset replay`."""
    from hotset.cluster.cli import DEMO_MODEL
    from hotset.cluster.config import RunConfig
    from hotset.cluster.record import run_record

    config = RunConfig.build(
        model=model or DEMO_MODEL, workers=workers, hbm_ratio=hbm_ratio, policy=policy,
        transport=transport, record=True,
    )  # fmt: skip
    written = run_record(
        config,
        prompts=prompts,
        max_new_tokens=max_new_tokens,
        out=out,
        address=address,
        say=silent if as_json else say,
    )
    if as_json:
        click.echo(json.dumps(written))
        return
    click.echo(
        f"{written['tokens']} tokens of {written['sequences']} sequences, {written['layers']} "
        f"layers, top {written['top_k']} of {written['num_experts']}: {written['file']}"
    )


@click.command("simulate")
@click.argument("path", type=click.Path(path_type=Path), metavar="CONFIG.yaml")
@click.option("--policy", default="hotset", show_default=True, help="residency policy of workers")
@click.option("--seed", type=int, default=1, show_default=True, help="of the made routing")
@json_option()
def simulate_command(*, path: Path, policy: str, seed: int, as_json: bool) -> None:
    """Run the brain on a modelled cluster in discrete events."""
    from hotset.cluster.simulate import numbers, read_config, render, run_simulation

    config = read_config(path)
    score, seconds = run_simulation(config, policy=policy, seed=seed)
    if as_json:
        click.echo(json.dumps({**numbers(score), "seconds": round(seconds, 3)}))
        return
    click.echo(render(config, score, policy=policy, seconds=seconds))


@click.command("brain")
@click.option(
    "--blocks",
    default="15000,60000,250000,1000000",
    show_default=True,
    metavar="N,...",
    help="numbers of blocks",
)
@click.option(
    "--repeat",
    type=click.IntRange(min=1),
    default=7,
    show_default=True,
    help="ticks at each size; the median is printed",
)
@json_option("a JSON list of rows")
def bench_brain_command(*, blocks: str, repeat: int, as_json: bool) -> None:
    """Time of the brain's tick over many blocks, next to its bounds."""
    from dataclasses import asdict

    from hotset.cluster.bench_brain import EXPERTS, measure, render

    try:
        sizes = [int(part) for part in blocks.split(",")]
    except ValueError:
        raise click.BadParameter(f"{blocks!r} is not N,N,...", param_hint="--blocks") from None
    if min(sizes) < EXPERTS:
        raise click.BadParameter(f"at least {EXPERTS} blocks", param_hint="--blocks")
    rows = [measure(size, repeat=repeat) for size in sizes]
    click.echo(json.dumps([asdict(row) for row in rows]) if as_json else render(rows))


@click.command("simulate")
@policies_option(", one live run each")
@tokens_option()
@rounds_option("calibrating and tested requests of a run, in turns")
@click.option(
    "--runs",
    type=click.IntRange(min=1),
    default=1,
    show_default=True,
    help="live runs of each policy, in turns; medians are printed",
)
@json_option("a JSON list of runs")
def bench_simulate_command(
    *, policies: str, tokens: int, rounds: int, runs: int, as_json: bool
) -> None:
    """Step time and stall of live demo runs next to their simulation, by policy."""
    from dataclasses import asdict

    from hotset.cluster.bench_simulate import compare, medians, render

    tell = silent if as_json else say
    found = [
        compare(name.strip(), tokens=tokens, rounds=rounds, say=tell)
        for _ in range(runs)
        for name in policies.split(",")
    ]
    if as_json:
        rows = [
            {**asdict(one), "step_error": one.step_error, "stall_error": one.stall_error}
            for one in found
        ]
        click.echo(json.dumps(rows))
        return
    if runs > 1:
        click.echo(f"{render(found)}\n\nmedians\n")
    click.echo(render(medians(found)))
