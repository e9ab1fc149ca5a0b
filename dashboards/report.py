"""The report at the end of `hotset generate` and `hotset demo`: one object, one table.

Shows what a run measured; must not measure, and must not know Ray. The text says what is emulated
beside the numbers that it touches.
"""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True, kw_only=True)
class RunReport:
    """What a run did. `identical` is None when no reference was run.

    `hits` counts expert look-ups by tier name, `bytes_by_link` bytes by `source->store`,
    `peak_rss_bytes` resident memory by actor. `trace` is the path of the run's trace or folder.
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
        raise NotImplementedError


def render(report: RunReport, *, width: int = 80) -> str:
    """Plain-text table, no colour, at most `width` columns."""
    raise NotImplementedError
