"""`hotset bench policies`: options, and figures as text. Measures nothing itself."""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import TYPE_CHECKING

import click

from hotset.cluster.console import say, silent
from hotset.cluster.options import json_option, policies_option, rounds_option, tokens_option
from hotset.dashboards.text import table

if TYPE_CHECKING:
    from collections.abc import Sequence

    from hotset.cluster.bench_policies import Policies


@click.command("policies")
@click.option(
    "--model",
    type=click.Path(path_type=Path),
    help="Hugging Face directory of a Mixture-of-Experts model; default: the demo model",
)
@policies_option("; the first is held against the others")
@tokens_option()
@rounds_option("requests of each policy, in turns, after one to warm up")
@click.option(
    "--hbm-ratio",
    type=float,
    default=0.3,
    show_default=True,
    help="share of all experts that one worker's fast memory holds",
)
@json_option()
def bench_policies_command(  # noqa: PLR0913 - one option each
    *, model: Path | None, policies: str, tokens: int, rounds: int, hbm_ratio: float, as_json: bool
) -> None:
    """Stall and step time of live runs under several policies, served in turns."""
    from dataclasses import asdict

    from hotset.cluster.bench_policies import run_bench
    from hotset.cluster.cli import DEMO_MODEL

    found = run_bench(
        [name.strip() for name in policies.split(",")],
        model=model or DEMO_MODEL,
        tokens=tokens,
        rounds=rounds,
        options={"hbm_ratio": hbm_ratio},
        say=silent if as_json else say,
    )
    click.echo(json.dumps(asdict(found)) if as_json else render(found))


def render(found: Policies) -> str:
    """A table by policy, and how the first compares with each other one."""
    rows = [
        (
            side.policy,
            _spread(side.stall_ns), _spread(side.step_ns),
            *(f"{statistics.median(values):.2f}" for values in (
                side.waits, side.demands, side.prefetches, side.dispatches)),
            str(side.interrupted),
        )
        for side in found.sides
    ]  # fmt: skip
    first, *others = found.sides
    head = (
        f"{found.model}, {found.machine}; medians (range) of {found.rounds} requests of "
        f"{found.tokens} tokens under each policy, in turns; per decoded token"
    )
    lines = [
        head,
        *(f"emulated: {text}" for text in found.emulated),
        "",
        *table(
            ("policy", "stall ms", "step ms", "waits", "demand reads", "prefetches", "dispatches",
             "interrupted"),
            rows,
        ),
        "",
    ]  # fmt: skip
    lines += [
        f"{first.policy} / {other.policy}: stall "
        f"{statistics.median(first.stall_ns) / max(1, statistics.median(other.stall_ns)):.2f}, "
        f"less in {first.won(other)} of {len(first.stall_ns)} rounds"
        for other in others
    ]
    total, others_total = sum(first.stall_ns), [sum(other.stall_ns) for other in others]
    lines += [
        f"over all rounds: {total / max(1, other):.2f} of the stall under {side.policy}"
        for side, other in zip(others, others_total, strict=True)
    ]
    lines.append("the same tokens under all policies" if found.same_tokens else "TOKENS DIFFER")
    return "\n".join(lines)


def _spread(values_ns: Sequence[int]) -> str:
    low, mid, high = min(values_ns), statistics.median(values_ns), max(values_ns)
    return f"{mid / 1e6:.3f} ({low / 1e6:.3f}-{high / 1e6:.3f})"
