"""The kill matrix, a few rounds a cell; `python -m tests.transport.killmatrix` runs many more."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.transport.cells import EVENTS
from tests.transport.killmatrix import LOCAL, run_cell
from tests.transport.pair import Pair
from tests.transport.stores import missing

if TYPE_CHECKING:
    from collections.abc import Iterator

ROUNDS = 3
pytestmark = pytest.mark.slow


def _param(kind: str) -> object:
    marks = [pytest.mark.nixl] if kind.startswith("nixl") else []
    if missing(kind):
        marks.append(pytest.mark.skip(reason=missing(kind)))
    return pytest.param(kind, marks=marks)


@pytest.fixture(scope="module", params=[_param(kind) for kind in LOCAL])
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module", params=[False, True], ids=["READ", "WRITE"])
def pairs(kind: str, request: pytest.FixtureRequest) -> Iterator[list[Pair]]:
    """A list of one pair, so that a test can put a new one in place of one that broke."""
    made = [Pair(kind, writes=request.param)]
    yield made
    assert made[0].close() == []


@pytest.mark.parametrize("event", EVENTS)
def test_every_end_is_typed_in_time_and_harms_nobody(pairs: list[Pair], event: str) -> None:
    pair = pairs[0]
    if not EVENTS[event].fits(pair.kind, writes=pair.writes):
        pytest.skip("this event makes no sense here")
    try:
        cell = run_cell(pair, event, EVENTS[event], rounds=ROUNDS, warm=1)
    except BaseException:
        pair.discard()
        pairs[0] = Pair(pair.kind, writes=pair.writes)
        raise
    assert cell.wrong == []
    assert cell.rounds == ROUNDS
