"""Sets of time as sorted, disjoint, half-open intervals of int nanoseconds, in numpy.

Pure arithmetic: must not know spans or devices. `[start, end)`; an empty interval is nothing.
Everything is O(n log n) in vectorised steps, so a million intervals take a fraction of a second.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Ints = NDArray[np.int64]


@dataclass(frozen=True, slots=True, eq=False)
class Intervals:
    """A set of time. Invariant: starts[i] < ends[i] < starts[i + 1]."""

    starts: Ints
    ends: Ints

    @property
    def length_ns(self) -> int:
        """Measure of the set."""
        return int((self.ends - self.starts).sum())

    def __or__(self, other: Intervals) -> Intervals:
        """Time in either set."""
        return union(
            np.concatenate((self.starts, other.starts)), np.concatenate((self.ends, other.ends))
        )

    def __and__(self, other: Intervals) -> Intervals:
        """Time in both sets."""
        return self._select(other, inside=True)

    def __sub__(self, other: Intervals) -> Intervals:
        """Time in this set and not in the other."""
        return self._select(other, inside=False)

    def within(self, starts: Ints, ends: Ints) -> Ints:
        """Measure of the part of this set in each `[start, end)`; 0 for an empty one."""
        inside: Ints = self._before(np.maximum(starts, ends)) - self._before(starts)
        return inside

    def _before(self, at_ns: Ints) -> Ints:
        """Measure of the part of this set before each point."""
        if not len(self.starts):
            return np.zeros(len(at_ns), np.int64)
        sums = np.concatenate(([0], np.cumsum(self.ends - self.starts)))
        last = np.searchsorted(self.starts, at_ns, side="right") - 1
        place = np.maximum(last, 0)
        inside = np.minimum(at_ns, self.ends[place]) - self.starts[place]
        return np.where(last < 0, 0, sums[place] + inside)

    def _select(self, other: Intervals, *, inside: bool) -> Intervals:
        # Four sorted runs, which a stable sort merges; equal points make empty parts, and no more.
        points = np.concatenate((self.starts, self.ends, other.starts, other.ends))
        points.sort(kind="stable")
        if len(points) < 2:
            return union(self.starts[:0], self.ends[:0])
        left = points[:-1]
        chosen = self._covers(left) & (other._covers(left) == inside)
        return union(left[chosen], points[1:][chosen])

    def _covers(self, at_ns: Ints) -> NDArray[np.bool_]:
        begun = np.searchsorted(self.starts, at_ns, side="right")
        over = np.searchsorted(self.ends, at_ns, side="right")
        return begun > over


def union(starts: Ints, ends: Ints) -> Intervals:
    """Merge any intervals, in any order, that may overlap, touch or be empty."""
    real = ends > starts
    starts, ends = starts[real], ends[real]
    order = np.argsort(starts, kind="stable")
    starts, ends = starts[order], np.maximum.accumulate(ends[order])
    if not len(starts):
        return Intervals(starts, ends)
    first = np.concatenate(([True], starts[1:] > ends[:-1]))
    last = np.concatenate((first[1:], [True]))
    return Intervals(starts[first], ends[last])
