"""Draws docs/overview.svg: the stores of a run, the links between them, and the controller beside.

Plain text out, no dependency. Colours come from two sets, chosen by the reader's light or dark
setting; nothing depends on colour alone.

    .venv/bin/python -m docs.figures.overview
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

TARGET = Path(__file__).resolve().parent.parent / "overview.svg"
WIDTH, HEIGHT = 940, 556

STYLE = """
svg { --ink: #1f2328; --soft: #59636e; --line: #8c959f; --paper: #ffffff; --box: #f6f8fa;
      --data: #0550ae; --tokens: #9a3412; --beat: #57606a; --hot: #dbeafe; --cold: #eaeef2; }
@media (prefers-color-scheme: dark) {
  svg { --ink: #e6edf3; --soft: #9da7b1; --line: #6e7681; --paper: #0d1117; --box: #161b22;
        --data: #79b8ff; --tokens: #ffa657; --beat: #9da7b1; --hot: #1f3a5f; --cold: #21262d; }
}
text { font: 14px system-ui, sans-serif; fill: var(--ink); }
.name { font-weight: 600; } .soft { font-size: 12px; fill: var(--soft); }
.box { fill: var(--box); stroke: var(--line); stroke-width: 1.2; }
.slot { fill: var(--hot); stroke: var(--line); } .free { fill: var(--cold); stroke: var(--line); }
.data { stroke: var(--data); stroke-width: 2.4; fill: none; }
.tokens { stroke: var(--tokens); stroke-width: 2.4; fill: none; stroke-dasharray: 8 4; }
.beat { stroke: var(--beat); stroke-width: 1.4; fill: none; stroke-dasharray: 2 4; }
.on-data { font-size: 12px; fill: var(--data); }
.on-tokens { font-size: 12px; fill: var(--tokens); }
.h-data { fill: var(--data); } .h-tokens { fill: var(--tokens); } .h-beat { fill: var(--beat); }
"""


class Box(NamedTuple):
    """A store or an actor: place, size, name and the lines under it."""

    x: int
    y: int
    w: int
    h: int
    name: str
    lines: tuple[str, ...]
    slots: str = ""  # one letter a slot: h holds a copy, . is free


BOXES = (
    Box(24, 60, 256, 176, "worker-0   (tier 0: HBM)",
        ("dense part of the model, requests,", "token path, residency policy"), "hhhhhh.h"),
    Box(440, 60, 256, 176, "worker-1   (tier 0: HBM)",
        ("dense part of the model, requests,", "token path, residency policy"), "hh.hhhhh"),
    Box(24, 310, 256, 96, "host-0   (tier 2: host memory)",
        ("copies that the controller placed;", "read one-sidedly"), "hhhhhhhh"),
    Box(440, 310, 256, 96, "cxl-0   (tier 3: CXL, emulated)",
        ("host memory of another process;", "its link is paced by a profile"), "hhhhhhhh"),
    Box(24, 476, 672, 56, "storage   (tier 4: the checkpoint's safetensors files)",
        ("every store reads byte ranges; always the verified last copy",)),
    Box(756, 60, 160, 176, "controller",
        ("the brain: events in,", "commands out", "epochs, directory,", "leases, journal")),
    Box(756, 310, 160, 96, "telemetry",
        ("one a node:", "rows in, spans and", "metrics out")),
)  # fmt: skip


def box(one: Box) -> str:
    """A rectangle with its text; slots stand in a row at the bottom."""
    parts = [
        f'<rect class="box" x="{one.x}" y="{one.y}" width="{one.w}" height="{one.h}" rx="7"/>',
        text(one.x + 14, one.y + 24, one.name, style="name"),
    ]
    parts += [
        text(one.x + 14, one.y + 44 + 17 * i, line, style="soft")
        for i, line in enumerate(one.lines)
    ]
    if one.slots:
        low = one.y + one.h - (40 if one.h > 100 else 26)
        size = 22 if one.h > 100 else 14
        if one.h > 100:
            parts.append(text(one.x + 14, low - 8, "expert slots, a byte budget", style="soft"))
        for i, kind in enumerate(one.slots):
            style = "free" if kind == "." else "slot"
            left = one.x + 14 + i * (size + 6)
            parts.append(
                f'<rect class="{style}" x="{left}" y="{low}" width="{size}" height="{size}" '
                'rx="3"/>'
            )
    return "\n".join(parts)


def text(x: int, y: int, words: str, *, style: str = "", anchor: str = "start") -> str:
    """One line of text."""
    return f'<text class="{style}" x="{x}" y="{y}" text-anchor="{anchor}">{words}</text>'


def arrow(path: str, *, kind: str) -> str:
    """A line with a head; `kind` is data, tokens or beat."""
    return f'<path class="{kind}" d="{path}" marker-end="url(#{kind})"/>'


def marker(kind: str) -> str:
    """The head of one kind of line."""
    return (
        f'<marker id="{kind}" viewBox="0 0 10 10" refX="9" refY="5" markerWidth="9" '
        f'markerHeight="9" markerUnits="userSpaceOnUse" orient="auto-start-reverse">'
        f'<path class="h-{kind}" d="M0 0 L10 5 L0 10 z"/></marker>'
    )


def draw() -> str:
    """The whole picture."""
    kinds = ("data", "tokens", "beat")
    lines = [
        # between the workers
        arrow("M282 108 H438", kind="tokens"),
        text(360, 100, "tokens to peer", style="on-tokens", anchor="middle"),
        arrow("M438 128 H282", kind="tokens"),
        text(360, 146, "expert's output", style="on-tokens", anchor="middle"),
        arrow("M438 196 H282", kind="data"),
        text(360, 188, "weights here", style="on-data", anchor="middle"),
        # pools to workers
        arrow("M130 308 V238", kind="data"),
        arrow("M566 308 V238", kind="data"),
        arrow("M282 326 L438 222", kind="data"),
        arrow("M438 326 L282 222", kind="data"),
        text(142, 278, "reads over NIXL", style="on-data"),
        text(578, 278, "reads over NIXL", style="on-data"),
        # storage upwards
        arrow("M130 474 V408", kind="data"),
        arrow("M566 474 V408", kind="data"),
        arrow("M360 474 V340 L284 234", kind="data"),
        text(142, 446, "file ranges", style="on-data"),
        text(578, 446, "file ranges", style="on-data"),
        text(370, 446, "file ranges", style="on-data"),
        # control
        arrow("M698 92 H754", kind="beat"),
        arrow("M754 122 H698", kind="beat"),
        arrow("M698 320 L772 238", kind="beat"),
        arrow("M698 372 H754", kind="beat"),
        text(726, 84, "beat", style="soft", anchor="middle"),
        text(726, 140, "reply", style="soft", anchor="middle"),
        text(726, 390, "rows", style="soft", anchor="middle"),
    ]
    legend = [
        '<path class="data" d="M24 24 H64" marker-end="url(#data)"/>',
        text(72, 28, "weights, checked after each read", style="soft"),
        '<path class="tokens" d="M290 24 H330" marker-end="url(#tokens)"/>',
        text(338, 28, "activations", style="soft"),
        '<path class="beat" d="M440 24 H480" marker-end="url(#beat)"/>',
        text(
            488,
            28,
            "heartbeat: events up; lease, directory and commands in the reply",
            style="soft",
        ),
    ]
    note = [
        text(756, 492, "All stores beat to the", style="soft"),
        text(756, 509, "controller and send rows;", style="soft"),
        text(756, 526, "one of each is drawn.", style="soft"),
    ]
    return "\n".join(
        (
            '<svg xmlns="http://www.w3.org/2000/svg" role="img" aria-labelledby="title"',
            f' viewBox="0 0 {WIDTH} {HEIGHT}">',
            '<title id="title">Stores of a run, the links between them, and the controller</title>',
            f"<style>{STYLE}</style>",
            "<defs>" + "".join(marker(kind) for kind in kinds) + "</defs>",
            f'<rect width="{WIDTH}" height="{HEIGHT}" style="fill: var(--paper)"/>',
            *legend,
            *(box(one) for one in BOXES),
            *lines,
            *note,
            "</svg>",
        )
    )


if __name__ == "__main__":
    TARGET.write_text(draw() + "\n", encoding="utf-8")
