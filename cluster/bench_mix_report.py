"""The figures of `hotset bench mix` as text and as a plot. Reads; decides nothing."""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING, Any

from hotset.errors import ConfigError, DependencyError

if TYPE_CHECKING:
    from pathlib import Path

    from hotset.cluster.bench_mix import LiveFigures, MixFigures, Point

_LINES = {"hotset": "o-", "edgemoe": "s--", "hobbit": "^--", "random": "x:"}


def render(found: MixFigures) -> str:
    """All figures as tables."""
    budget = found.budget_nats
    lines = [
        f"{found.model}: budget {budget:g} nats, gamma {found.gamma:.2f}",
        f"optimism of the table {found.optimism:.2f} (at most {found.optimism_upper:.2f})",
        "",
        _row("inside the budget", found.mix),
        f"  blocks: {', '.join(f'{count} {name}' for name, count in found.formats.items())}",
        f"  drift as the guardrail states it: {found.drift_nats:.2e} nats",
        f"  the same after text of another kind: {found.drift_shifted_nats:.2e} nats",
        _samples("held-out text", found.samples_nats, budget=budget),
        _samples("text of another kind", found.shifted_nats, budget=budget),
        "",
        "uniform formats",
        *(_row(point.name, point) for point in found.uniform),
        "",
        "the same bytes, chosen by others (KL in nats, 95 % bounds)",
        *(_row(point.name, point) for point in found.frontier),
        "",
        "the same on text of another kind",
        *(_row(point.name, point) for point in found.frontier_shifted),
        "",
        "cheapest format of a whole layer: "
        + ", ".join(f"{layer}:{form}" for layer, form in found.floors.items()),
        *(f"  vetoed {key}: {bound}" for key, bound in found.vetoes.items()),
        "",
        *(
            f"rank correlation with true KL of {rank.blocks} single blocks in {rank.format}: "
            f"{rank.by} {rank.correlation:.2f} ({rank.lower:.2f} .. {rank.upper:.2f})"
            for rank in found.ranks
        ),
        "",
        _live("the measured table", found.live),
        _live("a table of zeros", found.live_zeros),
        ", ".join(f"{key} {value}" for key, value in found.versions.items()),
    ]
    return "\n".join(lines)


def _row(name: str, point: Point) -> str:
    return (
        f"  {name:18} {point.bits_per_weight:6.2f} bits  {point.kl_nats:.2e} "
        f"({point.kl_lower_nats:.2e} .. {point.kl_upper_nats:.2e})  p99 {point.p99_nats:.1e}  "
        f"flips {point.flip_ratio:.1%}"
    )


def _samples(name: str, nats: tuple[float, ...], *, budget: float) -> str:
    inside = sum(value <= budget for value in nats)
    return (
        f"  {name}: {inside} of {len(nats)} samples inside, {min(nats):.2e} .. {max(nats):.2e} nats"
    )


def _live(name: str, live: LiveFigures) -> str:
    if live.noticed_step < 0:
        return f"live check, {name}: no alarm, KL {live.kl_before_nats:.2e} nats"
    return (
        f"live check, {name}: alarm at step {live.noticed_step}, {live.repaired_blocks} blocks "
        f"repaired, KL {live.kl_before_nats:.2e} -> {live.kl_after_nats:.2e} nats"
    )


def draw(found: MixFigures, path: Path) -> None:
    """Draw bytes against KL. Raises DependencyError without matplotlib, ConfigError for a path."""
    if importlib.util.find_spec("matplotlib") is None:
        raise DependencyError(
            "matplotlib is not installed", remedy="pip install 'hotset[bench]', or leave out --plot"
        )
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes: Any = figure.subplots()
    for name, style in _LINES.items():
        points = [point for point in found.frontier if point.name == name]
        axes.errorbar(
            [point.bits_per_weight for point in points],
            [point.kl_nats for point in points],
            yerr=[
                [max(0.0, point.kl_nats - point.kl_lower_nats) for point in points],
                [max(0.0, point.kl_upper_nats - point.kl_nats) for point in points],
            ],
            fmt=style, label=name, capsize=2, markersize=4,
        )  # fmt: skip
    axes.plot(
        [point.bits_per_weight for point in found.uniform],
        [point.kl_nats for point in found.uniform],
        "k*",
        label="uniform",
    )
    axes.axhline(found.budget_nats, color="grey", linewidth=0.8)
    axes.annotate(
        f"budget {found.budget_nats:g}", (8, found.budget_nats), fontsize=8, ha="right", va="bottom"
    )
    axes.set(
        yscale="log", xlabel="bits of an expert's weight", ylabel="KL, nats a token",
        title=f"{found.model}: formats by measured damage and by popularity",
    )  # fmt: skip
    axes.legend()
    try:
        figure.savefig(path)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"cannot draw to {path.name}: {error}", remedy="give a path that ends in .svg or .png"
        ) from error
