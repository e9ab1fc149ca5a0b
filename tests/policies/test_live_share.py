"""The live check's share of time is kept, and load delays it without ever stopping it."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hotset.policies.live_share import LiveShare, ShareBounds

RELAXED = settings(max_examples=100)


@RELAXED
@given(
    st.lists(st.integers(0, 10_000), min_size=1, max_size=300),
    st.integers(0, 50_000),
    st.floats(0.001, 1.0),
)
def test_the_share_holds_but_for_one_recomputation(
    steps: list[int], cost: int, ratio: float
) -> None:
    share = LiveShare(ShareBounds(ratio=ratio))
    for step_ns in steps:
        share.served(step_ns)
        if share.may_begin():
            share.spent(cost)
        assert share.spent_ns <= ratio * share.served_ns + cost


def test_the_first_check_begins_at_once_and_the_next_when_it_is_paid_for() -> None:
    share = LiveShare(ShareBounds(ratio=0.02))
    assert share.may_begin()
    share.spent(1_000)
    assert not share.may_begin()
    share.served(49_999)
    assert not share.may_begin()
    share.served(1)
    assert share.may_begin()
    assert share.ratio == pytest.approx(0.02)


def test_load_delays_a_check_for_its_patience_and_no_longer() -> None:
    share = LiveShare(ShareBounds(busy_requests=2, patience_ns=100))
    assert not share.must_wait(requests=2, waiting=False, now_ns=0)
    assert share.must_wait(requests=3, waiting=False, now_ns=10)
    assert share.must_wait(requests=1, waiting=True, now_ns=109)
    assert not share.must_wait(requests=3, waiting=True, now_ns=110)
    assert not share.must_wait(requests=1, waiting=False, now_ns=120)
    assert share.must_wait(requests=3, waiting=False, now_ns=130), "load began anew"


def test_what_is_kept_is_bounded() -> None:
    share = LiveShare(ShareBounds(most_kept=16, most_context=100))
    assert share.keeps(kept=15, position=100)
    assert not share.keeps(kept=16, position=1)
    assert not share.keeps(kept=0, position=101)


@pytest.mark.parametrize(
    ("wrong", "named"), [({"ratio": 0.0}, "ratio"), ({"least": 0}, "least"),
                         ({"busy_requests": 0}, "busy_requests")],
)  # fmt: skip
def test_bounds_that_mean_nothing_are_refused(wrong: dict[str, float], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        ShareBounds(**wrong)  # type: ignore[arg-type] # numbers of either kind
