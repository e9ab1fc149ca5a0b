"""Draws what the transport benchmark measured: bandwidth by size, and the widest batch as bars.

A backend and what it is held against share a colour: solid line and full bar for the backend,
dashed and hatched for the bound. Ray's ways are black. Needs matplotlib (the extra `bench`).
"""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from hotset.cluster.bench_transport_case import BOUNDS, KIB, MIB, Case
from hotset.cluster.bench_transport_report import machine
from hotset.errors import ConfigError, DependencyError

if TYPE_CHECKING:
    from pathlib import Path

    from hotset.cluster.bench_transport_case import Lane, Results, Row

# Okabe and Ito's colours, which readers with any kind of colour vision tell apart.
_COLOURS: Final = {
    "bounds": "#0072b2",
    "shm": "#0072b2",
    "node": "#56b4e9",
    "nixl": "#d55e00",
    "nixl-tcp": "#e69f00",
    "socket": "#009e73",
    "tcp": "#009e73",
    "ucx": "#56b4e9",
    "storage": "#cc79a7",
    "ray": "#000000",
}
_MARKERS: Final = {"ray-store": "o", "rdt-nixl": "^", "rdt-gloo": "s"}
_ENDINGS: Final = frozenset({".svg", ".png"})


class _Look(NamedTuple):
    """How a lane is drawn."""

    colour: str
    line: str
    marker: str
    width: float


def require_matplotlib(path: Path) -> None:
    """Raise before anything is measured: DependencyError, or ConfigError for another ending."""
    if path.suffix not in _ENDINGS:
        raise ConfigError(
            f"cannot draw {path.name!r}", remedy="end the name of the plot in .svg or .png"
        )
    if importlib.util.find_spec("matplotlib") is None:
        raise DependencyError("a plot needs matplotlib", remedy="pip install 'hotset[bench]'")


def draw(results: Results, path: Path) -> None:
    """Write the figure; the ending of `path` chooses the format."""
    import matplotlib as mpl

    mpl.use("Agg")
    mpl.rcParams["svg.hashsalt"] = "hotset"  # the same run gives the same file
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(
        1, 2, figsize=(12.5, 5.6), width_ratios=(1.35, 1), layout="constrained"
    )
    _draw_sizes(left, results)
    batches = [case for case in results.cases if case.batch > 1] or list(results.cases)
    _draw_bars(right, results, max(batches, key=lambda case: case.total))
    figure.supxlabel(machine()[0], fontsize=8, color="#666666")
    path.parent.mkdir(parents=True, exist_ok=True)
    metadata = {"Date": None} if path.suffix == ".svg" else {}
    figure.savefig(path, dpi=150, metadata=metadata)
    plt.close(figure)


def _look(lane: Lane) -> _Look:
    bound = lane.backend in BOUNDS
    cold = lane.op == "read-cold"
    line = "--" if bound else "-"
    if lane.group == "ray" or cold:
        line = ":" if not bound else "-."
    return _Look(_COLOURS[lane.group], line, _MARKERS.get(lane.backend, "."), 1.3 if bound else 2.0)


def _label(lane: Lane) -> str:
    return f"{lane.backend} {lane.op.removeprefix('read-')}" if "-" in lane.op else lane.backend


def _draw_sizes(axes: Any, results: Results) -> None:
    singles = [case for case in results.cases if case.batch == 1]
    for lane in results.lanes:
        rows = [row for case in singles if (row := results.row(lane.key, case)) and row.rounds_ns]
        if not rows:
            continue
        look = _look(lane)
        axes.plot(
            [row.case.nbytes for row in rows],
            [row.bytes_per_s / 1e9 for row in rows],
            color=look.colour,
            linestyle=look.line,
            marker=look.marker,
            linewidth=look.width,
            label=_label(lane),
        )
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    sizes = [case.nbytes for case in singles]
    axes.set_xticks(sizes, [Case(nbytes=size, batch=1).label for size in sizes])
    axes.minorticks_off()
    ticks = (0.003, 0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30)
    axes.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.set_xlim(min(sizes, default=64 * KIB) / 1.5, max(sizes, default=256 * MIB) * 1.5)
    axes.grid(visible=True, which="major", alpha=0.25)
    axes.set_xlabel("size of the block")
    axes.set_ylabel("GB/s (median, log)")
    axes.set_title("One block at a time")
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize=8, frameon=False)


def _draw_bars(axes: Any, results: Results, case: Case) -> None:
    rows = [row for row in results.of_case(case) if row.rounds_ns]
    rows.sort(key=lambda row: row.bytes_per_s)
    speeds = [row.bytes_per_s / 1e9 for row in rows]
    bars = axes.barh(
        [_label(row.lane) for row in rows],
        speeds,
        xerr=[[_below(row) for row in rows], [_above(row) for row in rows]],
        color=[_look(row.lane).colour for row in rows],
        error_kw={"elinewidth": 1, "ecolor": "#666666"},
    )
    for bar, row, speed in zip(bars, rows, speeds, strict=True):
        if row.lane.backend in BOUNDS:
            bar.set(facecolor="white", edgecolor=bar.get_facecolor(), hatch="///")
        axes.annotate(
            f"{speed:.2f}",
            (speed + _above(row), bar.get_y() + bar.get_height() / 2),
            xytext=(4, 0),
            textcoords="offset points",
            va="center",
            fontsize=8,
        )
    axes.margins(x=0.12)
    axes.set_xlabel("GB/s (median; line: slowest to fastest round)")
    axes.set_title(case.label)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def _below(row: Row) -> float:
    return (row.bytes_per_s - row.case.total / max(row.rounds_ns.values()) * 1e9) / 1e9


def _above(row: Row) -> float:
    return (row.case.total / min(row.rounds_ns.values()) * 1e9 - row.bytes_per_s) / 1e9
