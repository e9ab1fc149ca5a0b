"""`hotset top`: a run at a moment as a screen of plain text, at most `width` wide.

Shows a `Moment` and, with the one before, rates. Decides how it is spelled; must not read, ask or
draw. No colour is needed to read it; bars are of ASCII.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from hotset.dashboards import text as plain

if TYPE_CHECKING:
    from hotset.dashboards.page.moment import Moment, StoreView

_BAR = 20
_LINES = 8
"""Lines of each list."""


def render(
    now: Moment, *, run: str, before: Moment | None = None, width: int = 100, lines: int = _LINES
) -> str:
    """The screen. Rates need a `before` of an earlier moment; without one they show `-`."""
    parts = [_head(now, run=run, before=before, width=width), _stores(now)]
    parts.append(_flights(now, lines=lines))
    parts.append(_decisions(now, lines=lines))
    out: list[str] = []
    for alarm in now.alarms:
        out += plain.field("ALERT", alarm, width=width)
    for part in parts:
        out += [*part, ""]
    for flag in now.emulated:
        out += plain.field("EMULATED", flag, width=width)
    return "\n".join(line[:width].rstrip() for line in out) + "\n"


def _head(now: Moment, *, run: str, before: Moment | None, width: int) -> list[str]:
    states = ", ".join(f"{count:,} {state}" for state, count in now.states.items() if count)
    span_ns = now.at_ns - before.at_ns if before else 0
    stalled = tokens = "-"
    if before and span_ns > 0:
        stalled = plain.human_ratio((now.stall_ns - before.stall_ns) / span_ns)
        tokens = f"{(now.tokens - before.tokens) * 1e9 / span_ns:,.1f}/s"
    where = "live" if now.live else f"at +{plain.human_ns(now.at_ns - now.from_ns)}"
    facts = [
        ("run", f"{run} ({where}), epoch {now.epoch}, {plain.human_ns(now.epoch_age_ns)} old"),
        ("blocks", states or "none"),
        ("stall", f"{plain.human_ns(now.stall_ns)} so far, {stalled} of the time now"),
        ("tokens", f"{now.tokens:,} routed, {tokens}; {now.requests:,} request(s) in flight"),
        ("telemetry", f"{now.dropped:,} rows lost"),
    ]
    out: list[str] = []
    for label, value in facts:
        out += plain.field(label, value, width=width, label_width=11)
    return out


def _stores(now: Moment) -> list[str]:
    if not now.stores:
        return ["no store has joined"]
    loads = {one.device: one.now for one in now.load.devices}
    most = max(loads.values(), default=0.0)
    rows = [_store(one, load=loads.get(one.name), most=most) for one in now.stores]
    head = ("store", "tier", "state", "full", "resident", "copies", "coming", "load")
    return plain.table(head, rows, left=4)


def _store(one: StoreView, *, load: float | None, most: float) -> tuple[str, ...]:
    full = one.resident_bytes / one.capacity_bytes if one.capacity_bytes else 0.0
    copies = ", ".join(f"{count:,} {form}" for form, count in one.blocks.items()) or "none"
    return (
        one.name,
        one.tier,
        one.state,
        _bar(full),
        plain.human_bytes(one.resident_bytes),
        copies,
        f"{one.asked:,}",
        "-" if load is None else f"{plain.human_ratio(load / most if most else 0.0)}",
    )


def _bar(share: float) -> str:
    filled = min(_BAR, round(share * _BAR))
    return f"[{'#' * filled}{'.' * (_BAR - filled)}] {100 * share:.0f} %"


def _flights(now: Moment, *, lines: int) -> list[str]:
    if not now.flights:
        return ["nothing is on its way"]
    oldest = sorted(now.flights, key=lambda one: -one.age_ns)[:lines]
    rows = [
        (one.block, one.format, f"{one.source} -> {one.store}", one.reason, one.state,
         plain.human_ns(one.age_ns))
        for one in oldest
    ]  # fmt: skip
    head = (f"{now.flights_total:,} in flight", "format", "link", "reason", "state", "age")
    return plain.table(head, rows, left=5)


def _decisions(now: Moment, *, lines: int) -> list[str]:
    if not now.decisions:
        return ["nothing was decided yet"]
    rows = [
        (f"-{plain.human_ns(now.at_ns - one.at_ns)}", one.what, one.block or "-", one.store,
         one.reason, one.note or "-")
        for one in now.decisions[:lines]
    ]  # fmt: skip
    return plain.table(("decided", "what", "block", "store", "reason", "cause"), rows, left=6)
