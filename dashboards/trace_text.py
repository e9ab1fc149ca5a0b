"""An analysis of a trace as text and as JSON.

Shows what `hotset.dashboards.trace` computed, with what was lost and what is emulated beside it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec

from hotset.dashboards.text import human_bytes, human_ns, human_ratio, table, wrap

if TYPE_CHECKING:
    from collections.abc import Sequence

    from hotset.dashboards.trace import Analysis, Breakdown, Figures

_HEAD = ("device", "stall", "hidden", "exposed", "transfer", "overlap", "compute", "useful")
BREAKDOWN = (
    ("compute_alone_ns", "compute"),
    ("compute_hiding_ns", "+ moving"),
    ("stall_transfer_ns", "stall"),
    ("stall_peer_ns", "peer"),
    ("idle_moving_ns", "idle+mov"),
    ("idle_quiet_ns", "idle"),
)
"""Parts of a device's window, with their headings, in the order in which they are shown."""


def to_json(analysis: Analysis) -> str:
    """One line: `total`, `devices`, `links`, ... and the counts of what was lost."""
    return msgspec.json.encode(analysis).decode()


def render_text(analysis: Analysis, *, width: int = 80) -> str:
    """Aligned tables: devices with their total, then where time went, links, path and stalls."""
    total = analysis.total
    lines = wrap(
        f"run {analysis.run or '-'}: {total.spans:,} spans in {analysis.files} file(s), "
        f"{total.dropped:,} dropped",
        width=width,
    )
    if analysis.emulated:
        lines += wrap(f"EMULATED: {'; '.join(analysis.emulated)}", width=width)
    rows = [_device(name, one) for name, one in analysis.devices.items()]
    lines += ["", *table(_HEAD, [*rows, _device("total", total)])]
    lines += wrap(
        "stall: compute waited for a block. hidden and exposed: transfer time with and without "
        "compute beside it; overlap = hidden / transfer.",
        width=width,
    )
    if total.dispatch_stall_ns:
        lines += wrap(
            f"Of the stall, {human_ns(total.dispatch_stall_ns)} waited for a peer's result.",
            width=width,
        )
    lines += _windows(analysis, width=width)
    lines += _links(analysis)
    lines += _path(analysis, width=width)
    lines += _stalls(analysis, width=width)
    lines += _notes(analysis, width=width)
    warnings = warnings_of(analysis)
    return "\n".join([*lines, *([""] if warnings else []), *warnings]) + "\n"


def _device(name: str, one: Figures) -> tuple[str, ...]:
    return (
        name,
        human_ns(one.stall_ns),
        human_ns(one.hidden_ns),
        human_ns(one.exposed_ns),
        human_ns(one.transfer_ns),
        human_ratio(one.overlap_ratio),
        human_ns(one.compute_ns),
        human_ratio(one.useful_ratio),
    )


def breakdown_parts(breakdown: Breakdown) -> list[tuple[str, int]]:
    """Heading and ns of each part of a window."""
    return [(head, getattr(breakdown, field)) for field, head in BREAKDOWN]


def _windows(analysis: Analysis, *, width: int) -> list[str]:
    head = ("window", "length", *(head for _, head in BREAKDOWN))
    rows = [
        (
            name,
            human_ns(one.window_ns),
            *(human_ratio(ns / one.window_ns if one.window_ns else None)
              for _, ns in breakdown_parts(one.breakdown)),
        )
        for name, one in (*analysis.devices.items(), ("total", analysis.total))
    ]  # fmt: skip
    lines = ["", *table(head, rows)]
    slowed = [
        f"{name} {human_ratio(one.interference_ratio)}"
        for name, one in analysis.devices.items()
        if one.interference_ratio is not None
    ]
    if slowed:
        lines += wrap(f"Steps compute longer with transfers beside them: {', '.join(slowed)}.",
                      width=width)  # fmt: skip
    return lines


def _links(analysis: Analysis) -> list[str]:
    if not analysis.links:
        return []
    rows = [
        (
            name,
            human_bytes(one.bytes),
            f"{one.transfers:,}",
            human_ns(one.busy_ns),
            f"{human_bytes(one.bytes_per_s)}/s",
            f"{'~' if one.bound == 'seen' else ''}{human_bytes(one.bound_bytes_per_s)}/s",
            human_ratio(one.use_ratio),
        )
        for name, one in analysis.links.items()
    ]
    head = ("link", "bytes", "count", "busy", "rate", "bound", "use")
    lines = ["", *table(head, rows)]
    if any(one.bound == "seen" for one in analysis.links.values()):
        lines.append("~: a real link; the best rate that this run saw stands for its bound")
    return lines


def _path(analysis: Analysis, *, width: int) -> list[str]:
    path = analysis.critical_path
    if path is None or not path.length_ns:
        return []
    parts = [
        f"{kind} {human_ratio(ns / path.length_ns)}" for kind, ns in path.by_kind.items() if ns
    ]
    lines = ["", f"critical path of {path.device}: {human_ns(path.length_ns)}"]
    lines += wrap(
        f"{', '.join(parts)}; over {path.steps:,} steps and {path.waits:,} waits", width=width
    )
    if path.by_source:
        sources = [f"{name} {human_ns(ns)}" for name, ns in path.by_source.items()]
        lines += wrap(f"of it from: {', '.join(sources)}", width=width)
    return lines


def _stalls(analysis: Analysis, *, width: int) -> list[str]:
    if not analysis.stalls:
        return []
    lines = ["", f"the {len(analysis.stalls)} costliest stalls"]
    for stall in analysis.stalls:
        head = f"{human_ns(stall.stall_ns)} at {human_ns(stall.at_ns)} on {stall.device}"
        lines += wrap(f"{head}: {stall.story}", width=width, indent="  ")
    return lines


def _notes(analysis: Analysis, *, width: int) -> list[str]:
    lines = [""]
    found = analysis.prefetch
    if found.transfers or found.failed:
        lines += wrap(
            f"prefetches: {found.transfers:,}, precision {human_ratio(found.precision_ratio)} "
            f"({found.used:,} used, {found.wasted:,} dropped unread, {found.unread:,} unread at "
            f"the end); {found.late:,} late by {human_ns(found.late_ns)} in all, at most "
            f"{human_ns(found.late_max_ns)}; the others {human_ns(found.slack_p50_ns)} early "
            "(median)",
            width=width,
        )
    control = analysis.control
    if control.plans or control.vetoes:
        vetoes = ", ".join(f"{count:,} {reason}" for reason, count in control.vetoes.items())
        lines += wrap(
            f"plans: {control.plans:,} in {human_ns(control.plan_ns)} (slowest "
            f"{human_ns(control.slowest_plan_ns)}), {human_bytes(control.planned_bytes)} asked to "
            f"move, epoch {control.epoch:,}; vetoes: {vetoes or 'none'}",
            width=width,
        )
    if analysis.clocks:
        offsets = [
            f"{node} {clock.offset_ns / 1e3:+,.0f} +- {clock.error_ns / 1e3:,.0f} us"
            for node, clock in sorted(analysis.clocks.items())
        ]
        lines += wrap(f"clocks against the controller's: {', '.join(offsets)}", width=width)
    return lines if len(lines) > 1 else []


def warnings_of(analysis: Analysis) -> Sequence[str]:
    """Sentences on what makes the figures less than the truth."""
    counted = (
        (analysis.total.dropped, "rows were dropped: every figure is a lower bound"),
        (analysis.sampled_out, "ordinary transfers were sampled out: transfer time is too low"),
        (analysis.failed_transfers, "transfers ended without their bytes"),
        (analysis.unlinked_waits, "waits name no transfer and are not in stall"),
        (analysis.unresolved_links, "waits name a transfer that is not in the trace"),
        (analysis.torn_lines, "last lines are torn: the writer was killed"),
        (analysis.damaged_lines, "lines are damaged and were skipped"),
    )
    return [f"{count:,} {text}" for count, text in counted if count]
