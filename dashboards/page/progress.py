"""Does the run make progress? What to tell the operator when it does not.

Pure: ages in, sentences out. Must not know where the ages come from. A sentence says what is late,
by how much, and against which bound.
"""

from __future__ import annotations

from dataclasses import dataclass

from hotset.dashboards import text as plain

SILENT_NS = 5_000_000_000
"""Stores beat five times a second and the controller ticks each second: this is silence."""
FLIGHT_NS = 10_000_000_000
"""A transfer's deadline is 2 s plus ten times what its link predicts; longer has no reason."""
TOKEN_NS = 10_000_000_000
"""Longest time between tokens while requests are in flight."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Ages:
    """How long ago things happened last; None where it is not known or there is nothing."""

    controller_ns: int | None = None
    oldest_transfer_ns: int | None = None
    last_token_ns: int | None = None
    requests: int = 0
    ended: bool = False


def alarms(ages: Ages) -> list[str]:
    """Sentences for the banner, worst first; empty when all is well or the run has ended."""
    said: list[str] = []
    if ages.ended:
        return said
    for age_ns, bound_ns, what in (
        (ages.controller_ns, SILENT_NS, "the controller has written nothing"),
        (ages.oldest_transfer_ns, FLIGHT_NS, "the oldest transfer has not ended"),
        (
            ages.last_token_ns if ages.requests else None,
            TOKEN_NS,
            f"{ages.requests} request(s) in flight got no token",
        ),
    ):
        if age_ns is not None and age_ns > bound_ns:
            said.append(f"{what} for {plain.human_ns(age_ns)} (bound {plain.human_ns(bound_ns)})")
    return said
