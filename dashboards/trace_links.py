"""How much of each link a run used, against what the link can give.

A link is a pair (source, destination) over which transfers arrived. Its bound is the profile of an
emulated link, which all readers of that source share; of a real link it is the best rate that one
transfer of this run reached on the wire, or all of them together while any was under way: a lower
bound of the truth, and named `seen`. Must not know what the bytes were for.

Invariant: busy time is a union, so that it never exceeds the window.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from hotset.dashboards.trace_view import Index, View

_BEST_QUANTILE = 0.95
"""The best transfers, without the few whose clock readings are too close for a rate."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LinkFigures:
    """Transfers that arrived over one link; `busy_ns` is the union of their times.

    `bytes_per_s` is the rate while busy, `use_ratio` the share of `bound_bytes_per_s` that the run
    used over its whole window, `rate_ratio` the same while busy. `bound` is `profile` or `seen`.
    """

    bytes: int
    busy_ns: int
    transfers: int
    bytes_per_s: float
    queue_ns: int
    wire_ns: int
    bound: str
    bound_bytes_per_s: float
    use_ratio: float
    rate_ratio: float


def link_figures(view: View, *, window_ns: int) -> dict[str, LinkFigures]:
    """Every link by `source->destination`."""
    table = view.table
    arrived = np.flatnonzero(view.transfer & view.ok & (table["source"] >= 0))
    width = len(view.spans.names)
    key = table["source"][arrived].astype(np.int64) * width + table["store"][arrived]
    order = np.argsort(key, kind="stable")
    pairs, first = np.unique(key[order], return_index=True)
    parts = np.split(arrived[order], first[1:]) if len(pairs) else []
    found = {
        f"{view.name(pair // width)}->{view.name(pair % width)}": _figures(
            view, mine, source=view.name(pair // width), window_ns=window_ns
        )
        for pair, mine in zip(pairs.tolist(), parts, strict=True)
    }
    return dict(sorted(found.items()))


def _figures(view: View, mine: Index, *, source: str, window_ns: int) -> LinkFigures:
    rows = view.table[mine]
    nbytes = int(rows["nbytes"].sum())
    busy_ns = view.intervals(mine).length_ns
    rate = nbytes * 1e9 / busy_ns if busy_ns else 0.0
    profile = view.spans.bounds.get(source, 0)
    timed = rows[rows["wire_ns"] > 0]
    best = (
        float(np.quantile(timed["nbytes"] * 1e9 / timed["wire_ns"], _BEST_QUANTILE))
        if len(timed)
        else 0.0
    )
    bound = float(profile) if profile else max(best, rate)
    return LinkFigures(
        bytes=nbytes,
        busy_ns=busy_ns,
        transfers=len(mine),
        bytes_per_s=rate,
        queue_ns=int(rows["queue_ns"].sum()),
        wire_ns=int(rows["wire_ns"].sum()),
        bound="profile" if profile else "seen",
        bound_bytes_per_s=bound,
        use_ratio=nbytes * 1e9 / (bound * window_ns) if bound and window_ns else 0.0,
        rate_ratio=rate / bound if bound else 0.0,
    )
