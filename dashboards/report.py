"""The report at the end of `hotset generate` and `hotset demo`: one object, one table.

Shows what a run measured; must not measure, and must not know Ray. The text says what is emulated
and what was lost beside the numbers that they touch.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import msgspec

from hotset.dashboards import text as plain

_EMULATED_MARK = " *"
_TIER_ORDER = ("hbm", "compressed", "host", "peer", "cxl", "storage")


@dataclass(frozen=True, slots=True, kw_only=True)
class RunReport:
    """What a run did. `identical` is None when no reference was run.

    `hits` counts expert look-ups by tier name, `bytes_by_link` bytes by `source->store`,
    `peak_rss_bytes` resident memory by actor. `trace` is the path of the run's trace or folder.
    `emulated` has sentences such as `cxl-0: paced to 28 GB/s`; a row of the text whose key holds
    the part before the colon is marked.
    """

    text: str
    tokens: list[int]
    identical: bool | None
    tokens_per_s: float
    stall_ns_per_token: int
    hits: dict[str, int]
    bytes_by_link: dict[str, int]
    peak_rss_bytes: dict[str, int]
    trace: str
    reference: str = ""
    reference_tokens_per_s: float | None = None
    emulated: list[str] = field(default_factory=list)
    requests: int = 1
    wall_s: float = 0.0
    model: str = ""
    digest: str = ""
    dropped: int = 0
    vetoes: dict[str, int] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def to_json(self) -> str:
        """One line of JSON with the fields as keys."""
        return msgspec.json.encode(self).decode()


def render(report: RunReport, *, width: int = 80) -> str:
    """Plain-text tables without the served text, at most `width` columns where names allow."""
    lines: list[str] = []
    for label, value in _facts(report):
        lines += plain.field(label, value, width=width)
    marks = [flag.partition(":")[0].strip() for flag in report.emulated]
    for title, head, counts in (
        ("hits", "expert found in", _by_tier(report.hits)),
        ("vetoes", "refused because of", report.vetoes),
    ):
        if counts:
            lines += ["", *_counts_table(head, counts, marks=marks, unit=title)]
    if report.bytes_by_link:
        lines += ["", *_bytes_table("link", report.bytes_by_link, marks=marks, unit="moved")]
    if report.peak_rss_bytes:
        lines += [
            "",
            *_bytes_table("actor", report.peak_rss_bytes, marks=marks, unit="peak memory"),
        ]
    if report.emulated:
        lines.append("")
        for flag in report.emulated:
            lines += plain.field("* emulated", flag, width=width)
    for note in report.notes:
        lines += ["", *plain.wrap(note, width=width)]
    return "\n".join(lines) + "\n"


def _facts(report: RunReport) -> list[tuple[str, str]]:
    speed = f"{report.tokens_per_s:.1f} tokens/s"
    if report.reference_tokens_per_s:
        ratio = report.tokens_per_s / report.reference_tokens_per_s
        speed += f"; reference {report.reference_tokens_per_s:.1f} ({ratio:.2f}x)"
    served = f"{len(report.tokens):,} tokens, {report.requests:,} request(s), {report.wall_s:.1f} s"
    facts = [
        ("model", " ".join(filter(None, (report.model, report.digest and f"[{report.digest}]")))),
        ("served", served),
        ("speed", speed),
        ("stall", f"{plain.human_ns(report.stall_ns_per_token)} per token"),
        ("same tokens", _identity(report)),
        ("trace", f"{report.trace}  ({report.dropped:,} rows dropped)"),
    ]
    return [(label, value) for label, value in facts if value]


def _identity(report: RunReport) -> str:
    against = report.reference or "the unmodified model"
    if report.identical is None:
        return "not compared"
    return f"yes, as {against}" if report.identical else f"NO: they differ from {against}"


def _by_tier(hits: dict[str, int]) -> dict[str, int]:
    known = {tier: hits[tier] for tier in _TIER_ORDER if tier in hits}
    return known | hits


def _counts_table(head: str, counts: dict[str, int], *, marks: list[str], unit: str) -> list[str]:
    total = sum(counts.values())
    rows = [
        (_marked(name, marks), f"{count:,}", plain.human_ratio(count / total if total else None))
        for name, count in counts.items()
    ]
    return plain.table((head, unit, "share"), rows)


def _bytes_table(head: str, counts: dict[str, int], *, marks: list[str], unit: str) -> list[str]:
    rows = [
        (_marked(name, marks), plain.human_bytes(nbytes), f"{nbytes:,}")
        for name, nbytes in counts.items()
    ]
    return plain.table((head, unit, "bytes"), rows)


def _marked(name: str, marks: list[str]) -> str:
    parts = [name, *name.split("->")]
    return name + _EMULATED_MARK if any(mark in parts for mark in marks) else name
