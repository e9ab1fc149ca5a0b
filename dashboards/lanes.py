"""Lanes: which row of a picture or trace viewer a span is drawn in, so that none overlap.

Pure arithmetic. The lane of a span is the lowest that is free at its start (greedy colouring of an
interval graph, optimal in the number of lanes: Kleinberg and Tardos, "Algorithm Design", 4.1).

Invariants: two spans of one lane never overlap (they may touch); the number of lanes is the
largest number of spans that overlap at one moment.
"""

from __future__ import annotations

import heapq
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Ints = NDArray[np.int64]


def lanes(starts: Ints, ends: Ints) -> Ints:
    """Lane of each interval `[start, end)`; an empty one takes its instant."""
    order = np.lexsort((ends, starts)).tolist()
    lane = [0] * len(starts)
    begin, over = starts.tolist(), ends.tolist()
    busy: list[tuple[int, int]] = []  # (end, lane)
    free: list[int] = []
    count = 0
    for at in order:
        while busy and busy[0][0] <= begin[at]:
            heapq.heappush(free, heapq.heappop(busy)[1])
        if free:
            mine = heapq.heappop(free)
        else:
            mine, count = count, count + 1
        lane[at] = mine
        heapq.heappush(busy, (max(over[at], begin[at] + 1), mine))
    return np.array(lane, np.int64)
