"""Draws a part of a Perfetto export: what a trace viewer shows, without one.

Reads the exported file and nothing else, so the picture shows what the export holds: lanes as
rows, slices as bars, `waited_on` arrows.

    .venv/bin/python -m docs.figures.trace TRACE.json docs/trace.png --from-ms 7500 --to-ms 7560
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

_COLOURS = {
    "compute.step": "#0072B2",
    "compute.layer": "#56B4E9",
    "wait": "#D55E00",
    "dispatch": "#E69F00",
    "transfer": "#009E73",
    "plan": "#CC79A7",
    "veto": "#000000",
    "scale": "#999999",
}  # Okabe and Ito: to be told apart with any colour vision


def draw(trace: dict[str, Any], out: Path, *, from_ms: float, to_ms: float, only: str) -> int:
    """Draw the slices of processes whose name begins with `only`; returns how many."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    events = trace["traceEvents"]
    titles = {
        (one["name"], one["pid"], one["tid"]): one["args"]["name"]
        for one in events
        if one["ph"] == "M" and "name" in one["args"]
    }
    slices = [
        one
        for one in events
        if one["ph"] == "X"
        and one["ts"] < to_ms * 1000
        and one["ts"] + one["dur"] > from_ms * 1000
        and titles["process_name", one["pid"], 0].startswith(only)
    ]
    lanes = sorted({(one["pid"], one["tid"]) for one in slices})
    row = {lane: len(lanes) - at for at, lane in enumerate(lanes)}
    figure, axes = plt.subplots(figsize=(11, 0.32 * len(lanes) + 1.3))
    for one in slices:
        begin, length = one["ts"] / 1000, max(one["dur"] / 1000, (to_ms - from_ms) / 2000)
        axes.broken_barh(
            [(begin, length)],
            (row[one["pid"], one["tid"]] - 0.4, 0.8),
            color=_COLOURS.get(one["name"], "#999999"),
            linewidth=0,
        )
    ends = {one["id"]: one for one in events if one["ph"] == "f"}
    for start in (one for one in events if one["ph"] == "s"):
        end = ends[start["id"]]
        tail, head = (start["pid"], start["tid"]), (end["pid"], end["tid"])
        if tail in row and head in row and from_ms <= start["ts"] / 1000 <= to_ms:
            axes.annotate(
                "",
                (end["ts"] / 1000, row[head]),
                (start["ts"] / 1000, row[tail]),
                arrowprops={"arrowstyle": "->", "color": "#555555", "lw": 0.7},
            )
    axes.set_xlim(from_ms, to_ms)
    axes.set_yticks([row[lane] for lane in lanes], [_title(titles, lane) for lane in lanes])
    axes.set_xlabel("ms since the run's first span; arrows: waited_on")
    shown = [name for name in _COLOURS if any(one["name"] == name for one in slices)]
    handles = [plt.Rectangle((0, 0), 1, 1, color=_COLOURS[name]) for name in shown]
    axes.legend(handles, shown, loc="upper center", ncols=len(shown), frameon=False,
                bbox_to_anchor=(0.5, 1.0 + 0.9 / (0.32 * len(lanes) + 1.3)))  # fmt: skip
    figure.savefig(out, dpi=110, bbox_inches="tight", metadata={"Software": None})
    return len(slices)


def _title(titles: dict[tuple[str, int, int], str], lane: tuple[int, int]) -> str:
    pid, tid = lane
    return f"{titles['process_name', pid, 0].split(' ')[0]}: {titles['thread_name', pid, tid]}"


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("trace", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--from-ms", type=float, default=0.0)
    parser.add_argument("--to-ms", type=float, default=1e12)
    parser.add_argument("--only", default="", help="processes whose name begins so")
    given = parser.parse_args()
    trace = json.loads(given.trace.read_text(encoding="utf-8"))
    count = draw(trace, given.out, from_ms=given.from_ms, to_ms=given.to_ms, only=given.only)
    print(f"drew {count} slices to {given.out}")


if __name__ == "__main__":
    main()
