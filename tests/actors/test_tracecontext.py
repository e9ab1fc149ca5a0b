"""W3C trace context: what is spelled reads back, what breaks the rules counts as absent."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hotset.actors.tracecontext import TraceContext, child_of, parse, signed, unsigned

HALVES = st.integers(0, (1 << 64) - 1)
IDS = st.integers(1, (1 << 64) - 1)


@given(high=HALVES, low=IDS, span=IDS, flags=st.integers(0, 255))
def test_what_is_spelled_reads_back(high: int, low: int, span: int, flags: int) -> None:
    context = TraceContext((high, low), span, flags)
    assert parse(context.header) == context
    assert child_of(context, span_id=7) == TraceContext((high, low), 7, flags)


@given(HALVES)
def test_halves_survive_a_signed_column(value: int) -> None:
    assert -(1 << 63) <= signed(value) < 1 << 63
    assert unsigned(signed(value)) == value


TRACE, SPAN = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"


@pytest.mark.parametrize(
    "header",
    [
        "",
        "x",
        f"00-{TRACE}-{SPAN}",
        f"00-{TRACE}-{SPAN}-1",
        f"00-{TRACE.upper()}-{SPAN}-01",
        f"00-{'0' * 32}-{SPAN}-01",
        f"00-{TRACE}-{'0' * 16}-01",
        f"ff-{TRACE}-{SPAN}-01",
        f"00-{TRACE}-{SPAN}-01-more",
        f"00-{TRACE}-{SPAN}-0g",
        f"00-{TRACE[:-1]}-{SPAN}-01",
    ],
)
def test_what_breaks_the_rules_counts_as_absent(header: str) -> None:
    assert parse(header) is None


def test_later_versions_may_say_more() -> None:
    found = parse(f" 01-{TRACE}-{SPAN}-00-what the future brings ")
    assert found is not None
    assert found.flags == 0
    assert f"{found.trace[0]:016x}{found.trace[1]:016x}" == TRACE


def test_without_a_parent_each_trace_is_new() -> None:
    found = {child_of(None, span_id=1) for _ in range(100)}
    assert len(found) == 100
    assert all(one.flags == 1 and one.trace[1] for one in found)
