"""`hotset calibrate`: measures how much each format costs in each block, and writes the file.

Parses, composes and prints: `blocks.calibrate` measures, `policies.allocate` chooses. Must not know
Ray. `costs_of` and `meter_of` turn a file into what policies decide on.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from hotset.errors import ConfigError
from hotset.policies.allocate import Costs, allocate, caps
from hotset.policies.drift import Budget, DriftMeter

if TYPE_CHECKING:
    from collections.abc import Callable

    import numpy as np
    from numpy.typing import NDArray

    from hotset.blocks.sensitivity import KLMeter
    from hotset.blocks.sensitivity_table import SensitivityTable
    from hotset.policies.allocate import Allocation

FORMATS = "fp8,int8,nf4,int4,int3,int2"
_UNITS = {"s": 1, "min": 60, "h": 3600}
_DURATION = re.compile(r"(\d+(?:\.\d+)?)\s*(s|min|h)")


def parse_duration_ns(text: str) -> int:
    """Read `90s`, `10min` or `1h`. Raises ConfigError."""
    found = _DURATION.fullmatch(text.strip())
    if found is None or float(found[1]) <= 0:
        raise ConfigError(f"{text!r} is not a duration", remedy="write 90s, 10min or 1h")
    return int(float(found[1]) * _UNITS[found[2]] * 1_000_000_000)


def costs_of(table: SensitivityTable) -> Costs:
    """Costs with full precision first, for `allocate` and `DriftMeter`."""
    return _costs(table.damage, formats=table.formats, nbytes=table.nbytes, full=table.full_nbytes)


def budget_of(table: SensitivityTable, *, nats: float) -> Budget:
    """A budget whose gamma covers the optimism that was measured."""
    return Budget(nats=nats, gamma=max(Budget().gamma, table.optimism_upper))


def meter_of(table: SensitivityTable, *, nats: float) -> DriftMeter:
    """A drift meter for the checkpoint of the table; everything at full precision."""
    return DriftMeter(
        costs_of(table),
        layers=table.layers,
        frequency=table.use,
        budget=budget_of(table, nats=nats),
    )


def mix_within(table: SensitivityTable, *, nats: float) -> Allocation:
    """The fewest bytes whose drift, as `DriftMeter` states it, stays inside a budget of `nats`."""
    budget = budget_of(table, nats=nats)
    layer_cap, expert_cap = caps(nats, gamma=budget.gamma)
    return allocate(
        costs_of(table),
        nats_at_most=nats * budget.margin_ratio / budget.gamma,
        layer_cap_nats=layer_cap,
        expert_cap_nats=expert_cap,
    )


def run_calibrate(  # noqa: PLR0913 - one option each
    model: Path,
    *,
    text: tuple[Path, ...],
    formats: tuple[str, ...],
    budget_nats: float,
    time_ns: int,
    seed: int,
    threads: int,
    say: Callable[[str], None],
) -> SensitivityTable:
    """Measure. Raises ConfigError and CheckpointError."""
    import torch

    from hotset.blocks.calibrate import Calibration, Settings
    from hotset.blocks.calibrate_text import read_text
    from hotset.blocks.sensitivity import KLMeter

    torch.set_num_threads(threads)
    read = read_text(model, text, seed=seed)
    meter = KLMeter(model)
    sizes = _sizes(meter, formats)
    run = Calibration(
        meter,
        fit=read.fit,
        check=read.check,
        text=read.digest,
        settings=Settings(formats=formats, budget_nats=budget_nats, time_ns=time_ns, seed=seed),
        choose=lambda nats, most: _choose(nats, most, formats=formats, sizes=sizes),
        say=say,
    )
    try:
        return run.run()
    finally:
        meter.close()


def _choose(
    nats: NDArray[np.float64], most: float, *, formats: tuple[str, ...], sizes: tuple[int, ...]
) -> NDArray[np.int64]:
    costs = _costs(nats, formats=formats, nbytes=sizes[1:], full=sizes[0])
    layer_cap, expert_cap = caps(most, gamma=1.0)
    return allocate(
        costs, nats_at_most=most, layer_cap_nats=layer_cap, expert_cap_nats=expert_cap
    ).codes


def _costs(
    nats: NDArray[np.float64], *, formats: tuple[str, ...], nbytes: tuple[int, ...], full: int
) -> Costs:
    import numpy as np

    free = np.zeros((*nats.shape[:2], 1))
    return Costs(
        formats=("bf16", *formats),
        nbytes=np.array([full, *nbytes], dtype=np.int64),
        nats=np.concatenate([free, nats], axis=2),
    )


def _sizes(meter: KLMeter, formats: tuple[str, ...]) -> tuple[int, ...]:
    return (meter.catalog.block_nbytes, *(meter.nbytes(form) for form in formats))


def _formats(text: str) -> tuple[str, ...]:
    """Lossy formats to measure. Raises ConfigError."""
    from hotset.blocks.formats import CODECS
    from hotset.policies.allocate import is_lossless

    known = [str(name) for name in CODECS if not is_lossless(name)]
    names = tuple(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))
    wrong = [name for name in names if name not in known]
    if wrong or not names:
        raise ConfigError(
            f"--formats {text!r} names {', '.join(wrong) or 'nothing'}",
            remedy=f"choose of {', '.join(known)}",
        )
    return names


def render(table: SensitivityTable, *, nats: float) -> str:
    """Say what was measured."""
    lines = [
        f"checkpoint {table.checkpoint}, text {table.text}, {table.tokens} tokens",
        "",
        "true KL of a whole layer in one format, nats a token (95 % bounds) / first-order estimate",
    ]
    groups = {(row.layer, row.format): row for row in table.groups}
    for layer in table.layers:
        for form in table.formats:
            row = groups.get((layer, form))
            if row is None:
                lines.append(f"  layer {layer:3} {form:6} not measured")
                continue
            lines.append(
                f"  layer {layer:3} {form:6} {row.mean:.2e} ({row.lower:.2e} .. {row.upper:.2e})"
                f" / {row.estimate:.2e}"
            )
    lines += ["", "whole mixes on text that the table did not see: bits a weight, KL, estimate"]
    lines += [
        f"  {row.bits_per_weight:.2f} bits  {row.mean:.2e} ({row.lower:.2e} .. {row.upper:.2e})"
        f" / {row.estimate:.2e}"
        for row in table.mixes
    ]
    mix = mix_within(table, nats=nats)
    full = len(table.layers) * table.num_experts * table.full_nbytes
    lines += [
        "",
        f"optimism {table.optimism:.2f}, at most {table.optimism_upper:.2f} (95 %)",
        f"a budget of {nats:g} nats: experts in {mix.nbytes / full:.3f} of their bytes",
    ]
    return "\n".join(lines)


def _say(text: str) -> None:
    click.echo(f"hotset: {text}", err=True)


@click.command("calibrate")
@click.option(
    "--model",
    type=click.Path(path_type=Path),
    required=True,
    help="Hugging Face directory of a Mixture-of-Experts model",
)
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
    default=Budget().nats,
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
@click.option("--json", "as_json", is_flag=True, help="print one JSON object, nothing else")
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

    table = run_calibrate(
        model,
        text=text,
        formats=_formats(formats),
        budget_nats=nats,
        time_ns=parse_duration_ns(duration),
        seed=seed,
        threads=threads,
        say=(lambda _text: None) if as_json else _say,
    )
    write_table(table, out)
    if as_json:
        click.echo(json.dumps(_summary(table, out=out, nats=nats)))
        return
    click.echo(render(table, nats=nats))
    _say(f"wrote {out}")


def _summary(table: SensitivityTable, *, out: Path, nats: float) -> dict[str, Any]:
    mix = mix_within(table, nats=nats)
    full = len(table.layers) * table.num_experts * table.full_nbytes
    return {
        "out": str(out),
        "checkpoint": table.checkpoint,
        "text": table.text,
        "tokens": table.tokens,
        "groups": len(table.groups),
        "optimism": table.optimism,
        "optimism_upper": table.optimism_upper,
        "budget_nats": nats,
        "bytes_ratio": mix.nbytes / full,
    }
