"""Calibration, composed: `blocks.calibrate` measures, `policies.allocate` chooses mixes to check.

Also turns a sensitivity file into what policies decide on: `costs_of`, `meter_of`, `mix_within`.
Must not know Ray.
"""

from __future__ import annotations

import re
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, NamedTuple

import msgspec

from hotset.errors import ConfigError
from hotset.policies.allocate import Costs, allocate, caps
from hotset.policies.drift import Budget, DriftMeter

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    import numpy as np
    from numpy.typing import NDArray

    from hotset.blocks.lowrank_measure import Finding
    from hotset.blocks.sensitivity import KLMeter
    from hotset.blocks.sensitivity_table import SensitivityTable
    from hotset.policies.allocate import Allocation

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
    return within(costs_of(table), budget=budget_of(table, nats=nats))


def within(costs: Costs, *, budget: Budget) -> Allocation:
    """The fewest bytes that a drift meter with this budget accepts block by block."""
    layer_cap, expert_cap = caps(budget.nats, gamma=budget.gamma)
    return allocate(
        costs,
        nats_at_most=budget.nats * budget.margin_ratio / budget.gamma,
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
    bases: str = "",
) -> SensitivityTable:
    """Measure. Raises ConfigError and CheckpointError. `bases` is the name of their file."""
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
        return msgspec.structs.replace(run.run(), bases=bases)
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


class Offer(NamedTuple):
    """The formats to measure, `lowrank` among them where it pays, and the figures that say so.

    `bases` names the file of bases beside the table; empty where nothing is offered.
    """

    formats: tuple[str, ...]
    bases: str
    finding: Finding


def offered(
    model: Path, formats: tuple[str, ...], *, out: Path, say: Callable[[str], None]
) -> Offer:
    """Measure whether experts may be kept as base and difference; say so with the figures.

    The bases are written beside `out`.
    """
    from hotset.blocks.checkpoint import Catalog
    from hotset.blocks.lowrank import install, write_bases
    from hotset.blocks.lowrank_measure import measure

    found, bases = measure(Catalog.open(model))
    say(found.render())
    if bases is None:
        return Offer(formats, "", found)
    install(bases)
    path = out.with_suffix(".bases.safetensors")
    write_bases(bases, path)
    say(f"wrote {path}")
    return Offer((*formats, "lowrank"), path.name, found)


def lossy_formats(text: str) -> tuple[str, ...]:
    """Lossy formats to measure. Raises ConfigError."""
    from hotset.blocks.formats import CODECS
    from hotset.policies.guard import is_lossless

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


def summary(table: SensitivityTable, *, out: Path, nats: float, finding: Finding) -> dict[str, Any]:
    """What `hotset calibrate --json` prints."""
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
        "lowrank": {"offered": finding.offered, **asdict(finding)},
    }
