"""How the transport benchmark is told: machine, ratio tables, targets; or JSON rows.

Formats and prints; measures nothing. In JSON mode standard output has the list alone and the
targets go to standard error.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click

from hotset.cluster.bench_transport_case import MEMCPY
from hotset.cluster.bench_transport_targets import judge

if TYPE_CHECKING:
    from hotset.cluster.bench_transport_case import Case, Results, Row
    from hotset.cluster.bench_transport_targets import Verdict

_PACKAGES: Final = ("nixl", "ucxx-cu12", "ray", "torch", "numpy", "xxhash")


def show(results: Results, *, as_json: bool, ray_call_ns: int) -> None:
    """Print everything."""
    if as_json:
        click.echo(json.dumps([as_row(results, row) for row in results.rows.values()], indent=1))
    else:
        for line in (*machine(), "", *tables(results)):
            click.echo(line)
    for line in targets(results):
        click.echo(line, err=as_json)
    if ray_call_ns:
        click.echo(
            f"Ray's rows include two actor calls, {ray_call_ns / 1e3:.0f} us without bytes",
            err=as_json,
        )


def as_row(results: Results, row: Row) -> dict[str, Any]:
    """One row of the JSON list. Figures of a lane that failed are null and `failed` says why."""
    key, rounds = row.lane.key, sorted(row.rounds_ns.values())
    return {
        "backend": row.lane.backend,
        "op": row.lane.op,
        "nbytes": row.case.nbytes,
        "batch": row.case.batch,
        "bytes_per_s": row.bytes_per_s or None,
        "ratio_to_memcpy": results.ratio(key, MEMCPY, row.case),
        "ratio_to_raw": results.ratio(key, row.lane.raw, row.case),
        "raw": row.lane.raw,
        "median_ns": row.median_ns or None,
        "min_ns": rounds[0] if rounds else None,
        "max_ns": rounds[-1] if rounds else None,
        "rounds": len(rounds),
        "failed": row.failed,
    }


def machine() -> list[str]:
    """Where and with what: two lines."""
    versions = [f"Python {platform.python_version()}"]
    for name in _PACKAGES:
        try:
            versions.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            versions.append(f"no {name}")
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    where = [
        _processor(),
        f"{os.cpu_count()} cores",
        f"{memory >> 30} GiB",
        f"Linux {platform.release()}",
        f"load {os.getloadavg()[0]:.1f}",
    ]
    return [", ".join(where), ", ".join(versions)]


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def tables(results: Results) -> list[str]:
    """One table for each case."""
    lines = []
    for case in results.cases:
        lines.append(
            f"{case.label:28} {'us':>9} {'min-max us':>19} {'GB/s':>7} {'of memcpy':>10} "
            f"{'of raw':>8}  raw is"
        )
        lines += [_line(results, row, case) for row in results.of_case(case)]
        lines.append("")
    return lines


def _line(results: Results, row: Row, case: Case) -> str:
    name = f"  {row.lane.backend} {row.lane.op}"
    if not row.rounds_ns:
        return f"{name:28} - {row.failed}"
    rounds = row.rounds_ns.values()
    spread = f"{min(rounds) / 1e3:.0f}-{max(rounds) / 1e3:.0f}"
    of_raw = results.ratio(row.lane.key, row.lane.raw, case)
    return (
        f"{name:28} {row.median_ns / 1e3:9.0f} {spread:>19} {row.bytes_per_s / 1e9:7.2f} "
        f"{_ratio(results.ratio(row.lane.key, MEMCPY, case)):>10} {_ratio(of_raw):>8}  "
        f"{row.lane.raw.partition('/')[0] if of_raw else ''}"
        f"{f'({row.failed})' if row.failed else ''}"
    ).rstrip()


def _ratio(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.2f}" if value >= 0.1 else f"{value:.4f}"


def targets(results: Results) -> list[str]:
    """A line for each target."""
    return [_target(verdict) for verdict in judge(results)]


def _target(verdict: Verdict) -> str:
    target = verdict.target
    text = f"{target.text}, {target.case.label}: at least {target.least:g}"
    if verdict.measured is None:
        return f"target {text}: not measured ({verdict.why})"
    return (
        f"target {text}: measured {verdict.measured:.2f} "
        f"({verdict.low:.2f}-{verdict.high:.2f}), {verdict.word}"
    )
