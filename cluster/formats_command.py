"""The command `hotset bench formats`. Parses and calls; imports torch only when it runs."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import click

from hotset.cluster.options import json_option

DEMO_MODEL = Path(__file__).resolve().parent.parent / "examples" / "demo-moe"


@click.command("formats")
@click.option(
    "--model",
    type=click.Path(path_type=Path),
    default=None,
    help="Hugging Face directory of a Mixture-of-Experts model; default: the demo model",
)
@click.option("--quick", is_flag=True, help="few rounds, experts and calibration seconds")
@click.option(
    "--repeat",
    type=click.IntRange(min=5),
    help="rounds of all contenders in turns; default: 5 when quick, else 11",
)
@click.option(
    "--mix/--no-mix",
    "with_mix",
    default=True,
    show_default=True,
    help="also measure the mix of formats that the guardrail allows, as `hotset bench mix`",
)
@json_option()
def bench_formats_command(
    *, model: Path | None, quick: bool, repeat: int | None, **options: Any
) -> None:
    """Size, speed and error of each format, next to torchao, bitsandbytes and blosc2."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch and the libraries read it
    from hotset.cluster.bench_formats import run_bench

    run_bench(
        model=model or DEMO_MODEL, quick=quick, repeat=repeat or (5 if quick else 11), **options
    )
