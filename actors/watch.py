"""The progress watchdog: says when the cluster should have moved on and has not.

Decides which facts are alarming; a pure function of what the controller sees. Must not know Ray,
stores or what is done about it. Two bounds:

- `epoch`: stores have not reported on what the epoch in force asks of them for `epoch_ns`. An old
  epoch alone is no alarm: a cluster whose load does not change keeps its placement for days.
- `transfer`: a transfer is older than `transfer_ns`, although its deadline has long ended its wait.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Mapping

KINDS: Final = ("epoch", "transfer")
DUMP: Final = "alert_"
"""With a kind, why a dump was written."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Bounds:
    """How long progress may take. A transfer's own deadline is 2 s and ten times its estimate."""

    epoch_ns: int = 60_000_000_000
    transfer_ns: int = 30_000_000_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """What the controller sees. `unsettled_ns` is 0 when stores have reported on everything."""

    epoch: int
    epoch_age_ns: int
    unsettled_ns: int
    oldest_transfer_ns: Mapping[str, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Alert:
    """One alert state, with a sentence for the operator."""

    kind: str
    text: str


def alerts(progress: Progress, *, bounds: Bounds) -> tuple[Alert, ...]:
    """Alert states in force, in the order of KINDS."""
    found = []
    if progress.unsettled_ns > bounds.epoch_ns:
        found.append(
            Alert(
                kind="epoch",
                text=f"epoch {progress.epoch} is {progress.epoch_age_ns / 1e9:.0f} s old, and for "
                f"{progress.unsettled_ns / 1e9:.0f} s stores have not reported on what it asks: "
                "look for a store that hangs",
            )
        )
    late = {
        store: age_ns
        for store, age_ns in progress.oldest_transfer_ns.items()
        if age_ns > bounds.transfer_ns
    }
    if late:
        worst = max(sorted(late), key=late.__getitem__)
        found.append(
            Alert(
                kind="transfer",
                text=f"a transfer to {worst} is in flight for {late[worst] / 1e9:.0f} s"
                f"{f', and others to {len(late) - 1} more stores' if len(late) > 1 else ''}: "
                "look at its source",
            )
        )
    return tuple(found)
