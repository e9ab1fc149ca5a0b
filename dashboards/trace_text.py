"""An analysis of a trace as text and as JSON.

Shows what `hotset.dashboards.trace` computed, with what was lost and what is emulated beside it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec

from hotset.dashboards.text import human_bytes, human_ns, human_ratio, table, wrap

if TYPE_CHECKING:
    from hotset.dashboards.trace import Analysis, Figures

_HEAD = ("device", "stall", "hidden", "exposed", "transfer", "overlap", "compute", "useful")


def to_json(analysis: Analysis) -> str:
    """One line: `total`, `devices`, `links` and the counts of what was lost."""
    return msgspec.json.encode(analysis).decode()


def render_text(analysis: Analysis, *, width: int = 80) -> str:
    """Aligned tables: devices with their total, then links."""
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
    if analysis.links:
        links = [
            (name, human_bytes(one.bytes), f"{one.transfers:,}", human_ns(one.busy_ns),
             f"{human_bytes(one.bytes_per_s)}/s")
            for name, one in analysis.links.items()
        ]  # fmt: skip
        lines += ["", *table(("link", "bytes", "transfers", "busy", "rate"), links)]
    warnings = _warnings(analysis)
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


def _warnings(analysis: Analysis) -> list[str]:
    counted = (
        (analysis.total.dropped, "rows were dropped: every figure is a lower bound"),
        (analysis.failed_transfers, "transfers ended without their bytes"),
        (analysis.unlinked_waits, "waits name no transfer and are not in stall"),
        (analysis.unresolved_links, "waits name a transfer that is not in the trace"),
        (analysis.torn_lines, "last lines are torn: the writer was killed"),
        (analysis.damaged_lines, "lines are damaged and were skipped"),
    )
    return [f"{count:,} {text}" for count, text in counted if count]
