"""Links that are cut, restored and slowed between two network namespaces."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.transport.cells import CABLE_EVENTS
from tests.transport.killmatrix import CABLE, run_cell
from tests.transport.netlab import NetLab, why_not
from tests.transport.pair import Pair
from tests.transport.stores import missing

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.transport.killmatrix import Cell

TRIES = 5
_REASON = why_not()
pytestmark = [pytest.mark.nixl, pytest.mark.skipif(bool(_REASON), reason=_REASON or "-")]


@pytest.fixture(scope="module")
def lab() -> Iterator[NetLab]:
    with NetLab() as made:
        yield made


_WAYS = [(kind, writes) for kind in CABLE for writes in (False, True)]


@pytest.fixture(
    scope="module", params=_WAYS, ids=[f"{k}-{'WRITE' if w else 'READ'}" for k, w in _WAYS]
)
def pairs(request: pytest.FixtureRequest, lab: NetLab) -> Iterator[list[Pair]]:
    kind, writes = request.param
    if missing(kind):
        pytest.skip(missing(kind))
    made = [Pair(kind, writes=writes, lab=lab)]
    assert made[0].good() == []  # NIXL connects at the first read
    yield made
    assert made[0].close() == []
    lab.repair()


@pytest.mark.slow
@pytest.mark.parametrize("event", CABLE_EVENTS)
def test_a_bad_link_ends_every_read_in_time(pairs: list[Pair], event: str) -> None:
    cells = [_once(pairs, event)]
    while not (cells[-1].mid or cells[-1].wrong) and len(cells) < TRIES:
        cells.append(_once(pairs, event))
    assert cells[-1].wrong == []
    assert cells[-1].mid == 1


def _once(pairs: list[Pair], event: str) -> Cell:
    """One round; it may miss the middle of a transfer when others take the cores."""
    pair = pairs[0]
    cell = None
    try:
        cell = run_cell(pair, event, CABLE_EVENTS[event], rounds=1, warm=0)
    finally:
        if cell is None or cell.wrong:  # the next event begins with stores that are whole
            pair.discard()
            pairs[0] = Pair(pair.kind, writes=pair.writes, lab=pair.lab)
            pairs[0].good()
    return cell


def test_the_cable_carries_what_it_is_told_to(lab: NetLab) -> None:
    pair = Pair("tcp", lab=lab)
    try:
        assert pair.good() == []
        lab.slow(100)
        begun = pair.begin(seconds=0.5)
        report = pair.sink.call("wait")
        assert begun.open
        assert "timed_out" in report.statuses
    finally:
        lab.repair()
        assert pair.sink.call("settle", 20.0) >= 0
        assert pair.close() == []
