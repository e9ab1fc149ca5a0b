"""The kill matrix, a few rounds a cell; `python -m tests.transport.killmatrix` runs many more."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.transport.cells import EVENTS, Pair
from tests.transport.killmatrix import LOCAL, run_cell
from tests.transport.stores import missing

if TYPE_CHECKING:
    from collections.abc import Iterator

ROUNDS = 4


def _param(kind: str) -> object:
    marks = [pytest.mark.nixl] if kind.startswith("nixl") else []
    if missing(kind):
        marks.append(pytest.mark.skip(reason=missing(kind)))
    return pytest.param(kind, marks=marks)


@pytest.fixture(scope="module", params=[_param(kind) for kind in LOCAL])
def pairs(request: pytest.FixtureRequest) -> Iterator[list[Pair]]:
    """A list of one pair, so that a test can put a new one in place of one that broke."""
    made = [Pair(request.param)]
    yield made
    assert made[0].close() == []


@pytest.mark.parametrize("event", EVENTS)
def test_every_end_is_typed_in_time_and_harms_nobody(pairs: list[Pair], event: str) -> None:
    if EVENTS[event].kinds and pairs[0].kind not in EVENTS[event].kinds:
        pytest.skip(f"only over {', '.join(EVENTS[event].kinds)}")
    try:
        cell = run_cell(pairs[0], event, EVENTS[event], rounds=ROUNDS)
    except BaseException:
        pairs[0].discard()
        pairs[0] = Pair(pairs[0].kind)
        raise
    assert cell.wrong == []
    assert cell.rounds == ROUNDS
    assert cell.mid > 0, "the event never came while bytes landed"
