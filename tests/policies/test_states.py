"""The table of states has exactly the arrows of the design."""

from __future__ import annotations

import itertools

import pytest

from hotset.errors import InvalidTransition
from hotset.policies.states import (
    ARROWS,
    StateEvent,
    advance,
    landed_event,
    state_of,
)
from hotset.policies.story import BlockStory
from hotset.policies.types import BlockId, Format, Reason, State

DESIGN = {
    "S1": "S2 S3 S4 S5 S7",
    "S2": "S1 S3 S4 S5 S6",
    "S3": "S1 S2 S4 S5 S6",
    "S4": "S5 S6 S7",
    "S5": "S4 S6",
    "S6": "S1 S2 S3 S4 S5",
    "S7": "S1 S2 S6",
}


@pytest.mark.parametrize("state", list(State))
def test_arrows_are_those_of_the_design(state: State) -> None:
    assert {after.value for after in ARROWS[state].values()} == set(DESIGN[state].split())


@pytest.mark.parametrize(("state", "event"), list(itertools.product(State, StateEvent)))
def test_every_pair_either_moves_or_raises_with_the_story(state: State, event: StateEvent) -> None:
    story = BlockStory()
    story.add(7, state=state, event="marker", reason=Reason.DEMAND)
    after = ARROWS[state].get(event)
    if after is not None:
        assert advance(state, event) is after
        return
    with pytest.raises(InvalidTransition) as caught:
        advance(state, event, block=BlockId(3, 17), story=story)
    assert "3.17" in str(caught.value)
    assert "marker" in str(caught.value)
    assert caught.value.remedy


def test_every_event_is_used() -> None:
    assert {event for arrows in ARROWS.values() for event in arrows} == set(StateEvent)


def test_story_is_bounded_and_ordered() -> None:
    story = BlockStory(limit=3)
    for at in range(10):
        story.add(at, state=State.STORED, event=f"e{at}")
    assert [line.at for line in story.lines()] == [7, 8, 9]
    assert str(story.lines()[0]) == "7 S5 e7"
    assert str(BlockStory()) == "no story yet"


@pytest.mark.parametrize("form", list(Format))
def test_landing_leads_to_the_state_of_the_format(form: Format) -> None:
    assert ARROWS[State.IN_FLIGHT][landed_event(form)] is state_of(form)
