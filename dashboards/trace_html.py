"""An analysis as one self-contained HTML page: no script, no network, light and dark.

Shows what `hotset.dashboards.trace` computed: the same figures as the text, with bars for where
each device's time went and a line of stall over time. Every picture has a table beside it with its
numbers, so that nothing is told by colour alone. Colours are those of Okabe and Ito, which people
with any colour vision can tell apart. All text from the trace is escaped.
"""

from __future__ import annotations

from html import escape
from typing import TYPE_CHECKING

import numpy as np

from hotset.dashboards.text import human_bytes, human_ns, human_ratio
from hotset.dashboards.trace import stalled_time
from hotset.dashboards.trace_text import breakdown_parts, warnings_of

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from hotset.dashboards.trace import Analysis, Figures
    from hotset.dashboards.trace_view import View

_COLOURS = ("#0072B2", "#56B4E9", "#D55E00", "#E69F00", "#009E73", "#999999")
"""Of the parts of a window, in their order."""
_BINS = 200

_STYLE = """
:root { color-scheme: light dark; --fg: #1b1b1b; --bg: #fff; --line: #ccc; --dim: #555; }
@media (prefers-color-scheme: dark) {
  :root { --fg: #eaeaea; --bg: #16181c; --line: #444; --dim: #aaa; } }
body { font: 15px/1.45 system-ui, sans-serif; color: var(--fg); background: var(--bg);
  max-width: 80rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.4rem; } h2 { font-size: 1.1rem; margin-top: 2rem; }
table { border-collapse: collapse; margin: .5rem 0; }
th, td { padding: .2rem .7rem; border-bottom: 1px solid var(--line); text-align: right;
  font-variant-numeric: tabular-nums; white-space: nowrap; }
th { vertical-align: bottom; } td { vertical-align: top; }
th:first-child, td:first-child, .text { text-align: left; }
td.text { white-space: normal; min-width: 16rem; }
.scroll { overflow-x: auto; }
.beside { display: flex; flex-wrap: wrap; gap: 0 3rem; } .dim { color: var(--dim); }
.warn { border-left: 4px solid #D55E00; padding: .3rem .8rem; margin: .5rem 0; }
.key { display: inline-block; width: .8em; height: .8em; margin-right: .35em; }
svg { width: 100%; height: auto; display: block; } svg text { fill: var(--fg); font-size: 12px; }
"""


def render_html(analysis: Analysis, *, view: View) -> str:
    """The page; `view` holds the spans that the analysis was made of."""
    total = analysis.total
    parts = [
        f"<h1>hotset run {escape(analysis.run or '-')}</h1>",
        (
            f"<p>{total.spans:,} spans in {analysis.files} files, {total.dropped:,} dropped; "
            f"{escape(human_ns(analysis.window_ns))} from the first span to the last.</p>"
        ),
    ]
    if analysis.emulated:
        parts.append(f"<p class=warn><b>Emulated:</b> {escape('; '.join(analysis.emulated))}</p>")
    parts += [f"<p class=warn>{escape(text)}</p>" for text in warnings_of(analysis)]
    parts += [
        "<h2>Devices</h2>",
        _devices(analysis),
        (
            "<p class=dim>stall: compute waited for a block; hidden and exposed: transfer time "
            "with and without compute beside it; overlap = hidden / transfer; useful: bytes that "
            "compute read before their drop / bytes moved.</p>"
        ),
        "<h2>Where the time went</h2>",
        _bars(analysis),
        _windows(analysis),
        "<h2>Stall over time</h2>",
        _timeline(analysis, view),
        "<h2>Links</h2>",
        _links(analysis),
        "<h2>Critical path</h2>",
        _path(analysis),
        "<h2>The costliest stalls</h2>",
        _stalls(analysis),
        "<h2>Prefetches, plans and clocks</h2>",
        _facts(analysis),
    ]
    body = "\n".join(parts)
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; '
        "style-src 'unsafe-inline'\">\n"
        f"<title>hotset run {escape(analysis.run or '-')}</title>\n<style>{_STYLE}</style></head>\n"
        f"<body>\n{body}\n</body></html>\n"
    )


def _table(head: Sequence[str], rows: Iterable[Sequence[str]], *, texts: int = 0) -> str:
    """A table; the last `texts` columns are running text."""
    running = len(head) - texts
    heads = "".join(
        f'<th scope="col"{" class=text" if at >= running else ""}>{escape(one)}</th>'
        for at, one in enumerate(head)
    )
    lines = []
    for row in rows:
        first = len(row) - texts
        cells = "".join(
            f"<td{' class=text' if at >= first else ''}>{escape(cell)}</td>"
            for at, cell in enumerate(row)
        )
        lines.append(f"<tr>{cells}</tr>")
    return f"<div class=scroll><table><tr>{heads}</tr>{''.join(lines)}</table></div>"


def _everyone(analysis: Analysis) -> list[tuple[str, Figures]]:
    return [*analysis.devices.items(), ("total", analysis.total)]


def _devices(analysis: Analysis) -> str:
    head = ("device", "stall", "for peers", "hidden", "exposed", "transfer", "overlap", "compute",
            "moved", "useful", "interference", "steps", "dropped")  # fmt: skip
    rows = [
        (
            name, human_ns(one.stall_ns), human_ns(one.dispatch_stall_ns), human_ns(one.hidden_ns),
            human_ns(one.exposed_ns), human_ns(one.transfer_ns), human_ratio(one.overlap_ratio),
            human_ns(one.compute_ns), human_bytes(one.moved_bytes), human_ratio(one.useful_ratio),
            human_ratio(one.interference_ratio), f"{one.steps:,}", f"{one.dropped:,}",
        )
        for name, one in _everyone(analysis)
    ]  # fmt: skip
    return _table(head, rows)


def _bars(analysis: Analysis) -> str:
    """One stacked bar a device, scaled to its own window."""
    height = 26 * len(analysis.devices) + 4
    shapes = []
    for line, (name, one) in enumerate(analysis.devices.items()):
        at, top = 130.0, 26 * line + 4
        shapes.append(f'<text x="0" y="{top + 14}">{escape(name)}</text>')
        for colour, (head, ns) in zip(_COLOURS, breakdown_parts(one.breakdown), strict=True):
            wide = 860 * ns / one.window_ns if one.window_ns else 0
            title = escape(f"{name}: {head} {human_ns(ns)}")
            shapes.append(
                f'<rect x="{at:.2f}" y="{top}" width="{wide:.2f}" height="18" fill="{colour}">'
                f"<title>{title}</title></rect>"
            )
            at += wide
    heads = [head for head, _ in breakdown_parts(analysis.total.breakdown)]
    keys = " ".join(
        f'<span><span class=key style="background:{colour}"></span>{escape(head)}</span>&emsp;'
        for colour, head in zip(_COLOURS, heads, strict=True)
    )
    label = "share of each device's window; the table below has the numbers"
    return (
        f'<p>{keys}</p><svg viewBox="0 0 1000 {height}" role="img" aria-label="{label}">'
        f"{''.join(shapes)}</svg>"
    )


def _windows(analysis: Analysis) -> str:
    heads = [head for head, _ in breakdown_parts(analysis.total.breakdown)]
    rows = [
        (name, human_ns(one.window_ns), *(human_ns(ns) for _, ns in breakdown_parts(one.breakdown)))
        for name, one in _everyone(analysis)
    ]
    return _table(("device", "window", *heads), rows)


def stall_bins(view: View, devices: Sequence[str], *, bins: int) -> list[float]:
    """Share of time in which devices waited, by equal parts of the run; 1 is all of them."""
    begin_ns, end_ns = int(view.table["start_ns"].min()), int(view.table["end_ns"].max())
    edges = begin_ns + (np.arange(bins + 1) * (end_ns - begin_ns)) // bins
    waited = np.zeros(bins, np.int64)
    for device in devices:
        waited += stalled_time(view, device).within(edges[:-1], edges[1:])
    width = np.maximum(edges[1:] - edges[:-1], 1) * max(1, len(devices))
    shares: list[float] = (waited / width).tolist()
    return shares


def _timeline(analysis: Analysis, view: View) -> str:
    shares = stall_bins(view, list(analysis.devices), bins=_BINS)
    most = max(shares)
    if not most:
        return "<p>No device waited.</p>"
    wide = 1000 / _BINS
    bars = "".join(
        f'<rect x="{at * wide:.1f}" y="{100 - 96 * share / most:.2f}" width="{wide:.1f}" '
        f'height="{96 * share / most:.2f}" fill="{_COLOURS[2]}"/>'
        for at, share in enumerate(shares)
        if share
    )
    label = escape(
        f"share of time in which devices waited, at most {human_ratio(most)} of a "
        f"{human_ns(analysis.window_ns // _BINS)} part of the run"
    )
    return (
        f'<svg viewBox="0 0 1000 120" role="img" aria-label="{label}">{bars}'
        '<line x1="0" y1="100" x2="1000" y2="100" stroke="currentColor"/>'
        '<text x="0" y="115">0</text><text x="1000" y="115" text-anchor="end">'
        f"{human_ns(analysis.window_ns)}</text></svg>"
        f"<p class=dim>{label}</p>"
    )


def _links(analysis: Analysis) -> str:
    head = ("link", "bytes", "transfers", "busy", "rate while busy", "bound", "kind of bound",
            "use of bound", "rate of bound")  # fmt: skip
    rows = [
        (
            name, human_bytes(one.bytes), f"{one.transfers:,}", human_ns(one.busy_ns),
            f"{human_bytes(one.bytes_per_s)}/s", f"{human_bytes(one.bound_bytes_per_s)}/s",
            one.bound, human_ratio(one.use_ratio), human_ratio(one.rate_ratio),
        )
        for name, one in analysis.links.items()
    ]  # fmt: skip
    return _table(head, rows)


def _path(analysis: Analysis) -> str:
    path = analysis.critical_path
    if path is None:
        return "<p>No step is in the trace.</p>"
    kinds = [
        (kind, human_ns(ns), human_ratio(ns / path.length_ns if path.length_ns else None))
        for kind, ns in path.by_kind.items()
    ]
    sources = [(name, human_ns(ns)) for name, ns in path.by_source.items()]
    blocks = [(name, human_ns(ns)) for name, ns in path.blocks.items()]
    return (
        f"<p>{escape(path.device)}: {human_ns(path.length_ns)} over {path.steps:,} steps and "
        f"{path.waits:,} waits.</p><div class=beside>{_table(('kind', 'time', 'share'), kinds)}"
        f"{_table(('source', 'time on the path'), sources)}"
        f"{_table(('block', 'time on the path'), blocks)}</div>"
    )


def _stalls(analysis: Analysis) -> str:
    rows = [
        (human_ns(one.stall_ns), human_ns(one.at_ns), one.device, one.block, one.source, one.story)
        for one in analysis.stalls
    ]
    return _table(("stall", "at", "device", "block", "source", "story"), rows, texts=1)


def _facts(analysis: Analysis) -> str:
    found, control = analysis.prefetch, analysis.control
    rows = [
        ("prefetches", f"{found.transfers:,} ended, {found.failed:,} failed"),
        ("precision", human_ratio(found.precision_ratio)),
        ("dropped unread", f"{found.wasted:,}, {human_bytes(found.wasted_bytes)}"),
        ("late", f"{found.late:,}, {human_ns(found.late_ns)}; worst {human_ns(found.late_max_ns)}"),
        ("in time by (median)", human_ns(found.slack_p50_ns)),
        ("plans", f"{control.plans:,} in {human_ns(control.plan_ns)}"),
        ("asked to move", human_bytes(control.planned_bytes)),
        ("vetoes", _counts(control.vetoes)),
        ("stores", _counts(control.scale)),
    ]
    rows += [
        (f"clock of {node}", f"{one.offset_ns / 1e3:+,.0f} us, within {one.error_ns / 1e3:,.0f} us")
        for node, one in sorted(analysis.clocks.items())
    ]
    return _table(("what", "figure"), rows, texts=1)


def _counts(counts: dict[str, int]) -> str:
    return ", ".join(f"{count:,} {name}" for name, count in counts.items()) or "none"
