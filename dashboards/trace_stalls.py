"""The costliest stalls of a run with their stories, and what prefetching was worth.

A story says why compute waited, from spans alone: what was waited for, when it was asked for, where
its time went, what shared the link, and whether the block had been here before. Must not know how
anything was decided.

Prefetches: precision = used / (used + dropped unread); those still unread at the end count as
neither. A prefetch is late when compute waited for it all the same.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from hotset.dashboards.text import human_bytes, human_ns

if TYPE_CHECKING:
    from hotset.dashboards.trace_view import View


@dataclass(frozen=True, slots=True, kw_only=True)
class Stall:
    """One wait. `at_ns` counts from the run's first span; the phases are those of the transfer.

    `lead_ns` is how long before the wait its transfer was asked for; None when its span is lost.
    """

    device: str
    at_ns: int
    stall_ns: int
    block: str
    source: str
    reason: str
    lead_ns: int | None
    queue_ns: int
    wire_ns: int
    settle_ns: int
    nbytes: int
    others_on_link: int
    story: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Prefetches:
    """Prefetches that ended, over all devices. Times are of the late ones, and of the early ones.

    `slack_p50_ns` is the median time between landing and first use of those that were in time.
    """

    transfers: int
    failed: int
    used: int
    wasted: int
    unread: int
    bytes: int
    wasted_bytes: int
    precision_ratio: float | None
    late: int
    late_ns: int
    late_p50_ns: int
    late_max_ns: int
    slack_p50_ns: int


def costliest_stalls(view: View, *, most: int = 10) -> tuple[Stall, ...]:
    """The longest waits, longest first; of equals the earlier one first."""
    waits = np.flatnonzero(view.wait)
    length_ns = (view.table["end_ns"] - view.table["start_ns"])[waits]
    order = np.lexsort((view.table["start_ns"][waits], -length_ns))[:most]
    zero_ns = int(view.table["start_ns"].min()) if len(view.table) else 0
    return tuple(_stall(view, int(at), zero_ns=zero_ns) for at in waits[order])


def _stall(view: View, at: int, *, zero_ns: int) -> Stall:
    row = view.table[at]
    device = view.name(int(row["store"]))
    target = int(view.find(view.table["link"][[at]])[0]) if row["link"] else -1
    cause = view.table[target] if target >= 0 else row
    source = view.name(int(cause["source"]))
    transfer = target >= 0 and bool(view.transfer[target])
    others = _others_on_link(view, target) if transfer else 0
    found = Stall(
        device=device,
        at_ns=int(row["start_ns"]) - zero_ns,
        stall_ns=int(row["end_ns"] - row["start_ns"]),
        block=view.block(target if transfer else at),
        source=source,
        reason=view.name(int(cause["reason"])) or view.name(int(row["reason"])),
        lead_ns=int(row["start_ns"] - cause["start_ns"]) if target >= 0 else None,
        queue_ns=int(cause["queue_ns"]) if transfer else 0,
        wire_ns=int(cause["wire_ns"]) if transfer else 0,
        settle_ns=int(cause["settle_ns"]) if transfer else 0,
        nbytes=int(cause["nbytes"]) if target >= 0 else 0,
        others_on_link=others,
        story="",
    )
    return _with_story(view, found, target=target, transfer=transfer)


def _with_story(view: View, stall: Stall, *, target: int, transfer: bool) -> Stall:
    parts = []
    if target < 0:
        parts.append("the span that it waited for is not in the trace")
    elif not transfer:
        parts.append(f"waited for the result of {stall.source}, which computed in its place")
    else:
        parts.append(f"{stall.block} came from {stall.source} ({stall.reason})")
        parts.append(_asked(stall))
        parts.append(_phases(stall))
        if stall.others_on_link:
            parts.append(f"{stall.others_on_link} other transfers shared the link")
        before = _before(view, target)
        if before:
            parts.append(before)
    fields = {name: getattr(stall, name) for name in Stall.__slots__}
    return Stall(**{**fields, "story": "; ".join(parts)})


def _asked(stall: Stall) -> str:
    assert stall.lead_ns is not None  # noqa: S101 - the target is there
    if stall.lead_ns <= 0:
        return "asked for when compute already waited"
    return f"asked for {human_ns(stall.lead_ns)} before compute needed it"


def _phases(stall: Stall) -> str:
    phases = {"queue": stall.queue_ns, "wire": stall.wire_ns, "check": stall.settle_ns}
    worst = max(phases, key=phases.__getitem__)
    spelled = ", ".join(f"{name} {human_ns(spent)}" for name, spent in phases.items())
    return f"{human_bytes(stall.nbytes)}: {spelled}: mostly {worst}"


def _others_on_link(view: View, target: int) -> int:
    """Transfers from the same source that overlap this one, to any store."""
    row = view.table[target]
    beside = view.from_source(view.name(int(row["source"])))
    begun = view.table["start_ns"][beside] < row["end_ns"]
    overlap = view.table["end_ns"][beside[begun]] > row["start_ns"]
    return int(overlap.sum()) - 1 if len(beside) else 0


def _before(view: View, target: int) -> str:
    """When the block last came to this device before: it was dropped since."""
    row = view.table[target]
    mine = view.of(view.name(int(row["store"])))
    for column in ("layer", "index"):
        mine = mine[view.table[column][mine] == row[column]]
    mine = mine[view.transfer[mine] & view.ok[mine]]
    ends_ns = view.table["end_ns"][mine]
    ends_ns = ends_ns[ends_ns <= row["start_ns"]]
    if not len(ends_ns):
        return "it had not been here before"
    ago_ns = int(row["start_ns"] - ends_ns.max())
    return f"it had come here {human_ns(ago_ns)} earlier and was dropped since"


def prefetches(view: View) -> Prefetches:
    """Precision and lateness of the transfers that a predictor asked for."""
    table = view.table
    ended = view.prefetch & view.ok
    used, wasted = ended & view.used, ended & view.wasted
    waits = np.flatnonzero(view.linked)
    target = view.find(table["link"][waits])
    waits = waits[(target >= 0) & view.prefetch[target]]
    late_ns = (table["end_ns"] - table["start_ns"])[waits]
    uses = np.flatnonzero(view.use & (table["used"] == 1))
    of = view.find(table["link"][uses])
    in_time = (of >= 0) & ended[of] & ~np.isin(table["link"][uses], table["link"][waits])
    slack_ns = (table["end_ns"] - table["start_ns"])[uses[in_time]]
    told = int(used.sum()) + int(wasted.sum())
    knows = view.knows_use and told > 0
    return Prefetches(
        transfers=int(ended.sum()),
        failed=int((view.prefetch & ~view.ok).sum()),
        used=int(used.sum()),
        wasted=int(wasted.sum()),
        unread=int(ended.sum()) - told,
        bytes=int(table["nbytes"][ended].sum()),
        wasted_bytes=int(table["nbytes"][wasted].sum()),
        precision_ratio=int(used.sum()) / told if knows else None,
        late=len(np.unique(table["link"][waits])),
        late_ns=int(late_ns.sum()),
        late_p50_ns=int(np.median(late_ns)) if len(late_ns) else 0,
        late_max_ns=int(late_ns.max(initial=0)),
        slack_p50_ns=int(np.median(slack_ns)) if len(slack_ns) else 0,
    )
