"""`hotset trace diff A B`: the figures of two runs beside each other.

Decides which figures are worth comparing and how they are scaled: times and bytes of runs of
different length mean little, so the comparison has them per step of compute, too. Must not know how
a figure was computed. It states differences and judges none: which way is better is the reader's.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import msgspec

from hotset.dashboards.text import human_bytes, human_ns, human_ratio, table
from hotset.dashboards.trace_text import BREAKDOWN, warnings_of

if TYPE_CHECKING:
    from collections.abc import Callable

    from hotset.dashboards.trace import Analysis

_TIMES = (
    "stall_ns", "dispatch_stall_ns", "hidden_ns", "exposed_ns", "transfer_ns", "compute_ns",
    "idle_ns",
)  # fmt: skip
_BYTES = ("moved_bytes", "used_bytes")
_RATIOS = ("overlap_ratio", "useful_ratio")
_COUNTS = ("steps", "waits", "spans", "dropped")


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """A figure in both runs. `change_ratio` is (b - a) / a; None when there is nothing to divide.

    `unit` is `ns`, `By`, `1` (a ratio) or empty (a count).
    """

    figure: str
    unit: str
    a: float | None
    b: float | None
    change_ratio: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Diff:
    """Totals of two runs, and by device where both have a device of that name."""

    a: str
    b: str
    total: tuple[Change, ...]
    devices: dict[str, tuple[Change, ...]]
    only_in_a: tuple[str, ...]
    only_in_b: tuple[str, ...]
    warnings: tuple[str, ...]


def diff(a: Analysis, b: Analysis) -> Diff:
    """Compare run `b` with run `a`."""
    both = sorted(a.devices.keys() & b.devices.keys())
    path = [
        _change(f"critical path {kind}_ns", "ns", _on_path(a, kind), _on_path(b, kind))
        for kind in (a.critical_path.by_kind if a.critical_path else ())
    ]
    prefetch = [
        _change(
            "prefetch precision_ratio", "1", a.prefetch.precision_ratio, b.prefetch.precision_ratio
        ),
        _change("prefetch late", "", a.prefetch.late, b.prefetch.late),
        _change("plans", "", a.control.plans, b.control.plans),
        _change("planned_bytes", "By", a.control.planned_bytes, b.control.planned_bytes),
    ]
    return Diff(
        a=a.run,
        b=b.run,
        total=(*_changes(a.total, b.total), *path, *prefetch),
        devices={name: _changes(a.devices[name], b.devices[name]) for name in both},
        only_in_a=tuple(sorted(a.devices.keys() - b.devices.keys())),
        only_in_b=tuple(sorted(b.devices.keys() - a.devices.keys())),
        warnings=tuple(
            f"{name}: {text}" for name, one in (("A", a), ("B", b)) for text in warnings_of(one)
        ),
    )


def _on_path(one: Analysis, kind: str) -> float | None:
    return one.critical_path.by_kind.get(kind) if one.critical_path else None


def _changes(a: object, b: object) -> tuple[Change, ...]:
    def pair(field: str, unit: str) -> Change:
        return _change(field, unit, getattr(a, field), getattr(b, field))

    def per_step(field: str, unit: str) -> Change:
        return _change(f"{field} / step", unit, _per_step(a, field), _per_step(b, field))

    parts = [
        _change(
            f"window: {head}",
            "ns",
            getattr(getattr(a, "breakdown"), field),  # noqa: B009 - `Figures`, read by name
            getattr(getattr(b, "breakdown"), field),  # noqa: B009 - as above
        )
        for field, head in BREAKDOWN
    ]
    return (
        *(pair(field, "") for field in _COUNTS),
        *(per_step(field, "ns") for field in _TIMES),
        *(per_step(field, "By") for field in _BYTES),
        *(pair(field, "1") for field in _RATIOS),
        *(pair(field, "ns") for field in _TIMES),
        *(pair(field, "By") for field in _BYTES),
        *parts,
    )


def _per_step(one: object, field: str) -> float | None:
    steps: int = getattr(one, "steps")  # noqa: B009 - `Figures`, read by name
    return getattr(one, field) / steps if steps else None


def _change(figure: str, unit: str, a: float | None, b: float | None) -> Change:
    ratio = (b - a) / a if a and b is not None else None
    return Change(figure=figure, unit=unit, a=a, b=b, change_ratio=ratio)


def to_json(found: Diff) -> str:
    """One line of JSON."""
    return msgspec.json.encode(found).decode()


_SPELL: dict[str, Callable[[float], str]] = {
    "ns": lambda value: human_ns(round(value)),
    "By": human_bytes,
    "1": human_ratio,
    "": lambda value: f"{value:,.0f}",
}


def render_text(found: Diff) -> str:
    """Aligned tables: the total, then each device that both runs have."""
    head = ("total", f"A {found.a}"[:28], f"B {found.b}"[:28], "change")
    lines = table(head, [_row(one) for one in found.total])
    for name, changes in found.devices.items():
        lines += ["", *table((name, "A", "B", "change"), [_row(one) for one in changes])]
    for which, names in (("A", found.only_in_a), ("B", found.only_in_b)):
        if names:
            lines += ["", f"only in {which}: {', '.join(names)}"]
    return "\n".join([*lines, *([""] if found.warnings else []), *found.warnings]) + "\n"


def _row(one: Change) -> tuple[str, ...]:
    spell = _SPELL[one.unit]
    return (
        one.figure,
        "-" if one.a is None else spell(one.a),
        "-" if one.b is None else spell(one.b),
        "-" if one.change_ratio is None else f"{100 * one.change_ratio:+.1f} %",
    )
