"""How far another node's wall clock is from this one's, and how sure that is.

Cristian's algorithm: a clock that is read between two readings of ours lies, at that moment, within
half of the round trip around their middle. The exchange with the shortest round trip is the best.
Decides the estimate only; must not know who is asked, or Ray. F. Cristian, "Probabilistic clock
synchronization", Distributed Computing 3 (1989).

Invariant: the true offset at the time of asking is within `error_ns` of `offset_ns`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable


@dataclass(frozen=True, slots=True, kw_only=True)
class ClockOffset:
    """The other clock minus ours. `error_ns` is half of the shortest round trip, rounded up."""

    offset_ns: int
    error_ns: int


def measure_offset(
    ask_ns: Callable[[], int], *, clock_ns: Callable[[], int], tries: int = 5
) -> ClockOffset:
    """Ask the other clock `tries` times. Raises ValueError for no try, and what `ask_ns` raises."""
    if tries < 1:
        raise ValueError(f"tries must be at least 1, not {tries}: nothing would be measured")
    found: list[ClockOffset] = []
    for _ in range(tries):
        before_ns = clock_ns()
        theirs_ns = ask_ns()
        after_ns = clock_ns()
        round_ns = max(0, after_ns - before_ns)
        found.append(
            ClockOffset(
                offset_ns=theirs_ns - (before_ns + round_ns // 2), error_ns=(round_ns + 1) // 2
            )
        )
    return min(found, key=lambda one: one.error_ns)
