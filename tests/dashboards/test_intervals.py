"""Interval arithmetic against sets of single nanoseconds."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from hotset.dashboards.intervals import Intervals, union

Pairs = list[tuple[int, int]]
pairs = st.lists(st.tuples(st.integers(0, 25), st.integers(0, 25)), max_size=12)
far_ns = st.sampled_from([0, 1_790_000_000_000_000_000])


def build(found: Pairs, *, offset_ns: int = 0) -> Intervals:
    array = np.array(found, np.int64).reshape(-1, 2) + offset_ns
    return union(array[:, 0], array[:, 1])


def points(found: Pairs) -> set[int]:
    return {at for start, end in found for at in range(start, end)}


def members(found: Intervals, *, offset_ns: int) -> set[int]:
    ends = zip(found.starts.tolist(), found.ends.tolist(), strict=True)
    return points([(start - offset_ns, end - offset_ns) for start, end in ends])


@given(pairs, pairs, far_ns)
def test_operators_are_those_of_sets(one: Pairs, two: Pairs, offset_ns: int) -> None:
    left, right = build(one, offset_ns=offset_ns), build(two, offset_ns=offset_ns)
    for found, expected in (
        (left, points(one)),
        (left | right, points(one) | points(two)),
        (left & right, points(one) & points(two)),
        (left - right, points(one) - points(two)),
    ):
        assert members(found, offset_ns=offset_ns) == expected
        assert found.length_ns == len(expected)
        assert (found.starts < found.ends).all()
        assert (found.ends[:-1] < found.starts[1:]).all(), "disjoint, and no two touch"


@given(pairs, pairs)
def test_parts_add_up(one: Pairs, two: Pairs) -> None:
    left, right = build(one), build(two)
    assert (left & right).length_ns + (left - right).length_ns == left.length_ns
