"""Plain text for terminals and logs: units for people, and tables that align.

Decides how numbers are spelled, and nothing about what they mean. No colour, no third party, so
that a report reads the same in a pipe, a log and a job's output.
"""

from __future__ import annotations

import textwrap
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

_BYTE_UNITS = ("B", "KiB", "MiB", "GiB", "TiB", "PiB")
_TIMES = ((1_000_000_000, "s"), (1_000_000, "ms"), (1_000, "us"))


def human_bytes(nbytes: float) -> str:
    """`1536` as `1.5 KiB`."""
    value = float(nbytes)
    for unit in _BYTE_UNITS[:-1]:
        if abs(value) < 1024:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.1f} {_BYTE_UNITS[-1]}"


def human_ns(duration_ns: int) -> str:
    """`1500000` as `1.50 ms`; `0` stays `0`, so that nothing is told from little."""
    if not duration_ns:
        return "0"
    for size, unit in _TIMES:
        if abs(duration_ns) >= size:
            return f"{duration_ns / size:,.2f} {unit}"
    return f"{duration_ns} ns"


def human_ratio(ratio: float | None) -> str:
    """`0.5` as `50.0 %`, None as `-`."""
    return "-" if ratio is None else f"{100 * ratio:.1f} %"


def table(head: Sequence[str], rows: Sequence[Sequence[str]], *, left: int = 1) -> list[str]:
    """Lines of a table: the first `left` columns to the left, the others to the right."""
    widths = [max(len(row[column]) for row in (head, *rows)) for column in range(len(head))]
    lines = []
    for row in (head, ["-" * width for width in widths], *rows):
        cells = [
            cell.ljust(width) if column < left else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
    return lines


def wrap(text: str, *, width: int, indent: str = "") -> list[str]:
    """Lines of a paragraph; line breaks of `text` are kept."""
    lines: list[str] = []
    for part in text.splitlines() or [""]:
        lines += textwrap.wrap(
            part, width, initial_indent=indent, subsequent_indent=indent, break_on_hyphens=False
        ) or [indent.rstrip()]
    return lines


def field(label: str, value: str, *, width: int, label_width: int = 18) -> list[str]:
    """`label   value`, wrapped under the value's column."""
    lines = wrap(value, width=max(20, width - label_width))
    first, *rest = lines
    return [
        f"{label:<{label_width}}{first}".rstrip(),
        *(" " * label_width + line for line in rest),
    ]
