"""The seven states of a block at a device, as a table (state, event) -> state.

Decides which change of state is legal. Must not know who asks for it, clocks or memory.
Invariant: the arrows are exactly those of ARROWS; anything else raises `InvalidTransition` with
the block's story, because it is a bug of the caller and not a condition to work around.
"""

from __future__ import annotations

from enum import StrEnum
from typing import TYPE_CHECKING

from hotset.errors import InvalidTransition
from hotset.policies.types import Format, State

if TYPE_CHECKING:
    from collections.abc import Mapping

    from hotset.policies.story import BlockStory


class StateEvent(StrEnum):
    """What may happen to a block at a device. Named for what the device saw."""

    FETCH_STARTED = "fetch_started"  # bytes are on their way here
    LANDED_FULL = "landed_full"
    LANDED_REDUCED = "landed_reduced"
    LANDED_COMPRESSED = "landed_compressed"
    FAILED_TO_HOST = "failed_to_host"  # failed or cancelled; a staged copy remains elsewhere
    FAILED_TO_STORAGE = "failed_to_storage"  # failed or cancelled; only storage has it
    KEPT_REDUCED = "kept_reduced"  # a better copy failed; the reduced one is still here
    KEPT_COMPRESSED = "kept_compressed"  # a better copy failed; the compressed one is still here
    PROMOTED = "promoted"  # rebuilt here in full precision, without a transfer
    DEMOTED = "demoted"  # encoded here in a reduced format, without a transfer
    PACKED = "packed"  # compressed here without loss
    DROPPED_TO_HOST = "dropped_to_host"  # freed here; a staged copy remains elsewhere
    DROPPED_TO_STORAGE = "dropped_to_storage"  # freed here; only storage has it
    FORGOTTEN = "forgotten"  # from now on rebuilt when needed
    STAGED = "staged"  # a copy appeared in host, a peer or CXL
    UNSTAGED = "unstaged"  # the last staged copy went


_E = StateEvent
_S = State
ARROWS: Mapping[State, Mapping[StateEvent, State]] = {
    _S.FULL: {
        _E.DEMOTED: _S.REDUCED,
        _E.PACKED: _S.COMPRESSED,
        _E.DROPPED_TO_HOST: _S.STAGED,
        _E.DROPPED_TO_STORAGE: _S.STORED,
        _E.FORGOTTEN: _S.RECOMPUTABLE,
    },
    _S.REDUCED: {
        _E.PROMOTED: _S.FULL,
        _E.PACKED: _S.COMPRESSED,
        _E.DROPPED_TO_HOST: _S.STAGED,
        _E.DROPPED_TO_STORAGE: _S.STORED,
        _E.FETCH_STARTED: _S.IN_FLIGHT,
    },
    _S.COMPRESSED: {
        _E.PROMOTED: _S.FULL,
        _E.DEMOTED: _S.REDUCED,
        _E.DROPPED_TO_HOST: _S.STAGED,
        _E.DROPPED_TO_STORAGE: _S.STORED,
        _E.FETCH_STARTED: _S.IN_FLIGHT,
    },
    _S.STAGED: {
        _E.UNSTAGED: _S.STORED,
        _E.FETCH_STARTED: _S.IN_FLIGHT,
        _E.FORGOTTEN: _S.RECOMPUTABLE,
    },
    _S.STORED: {
        _E.STAGED: _S.STAGED,
        _E.FETCH_STARTED: _S.IN_FLIGHT,
    },
    _S.IN_FLIGHT: {
        _E.LANDED_FULL: _S.FULL,
        _E.LANDED_REDUCED: _S.REDUCED,
        _E.LANDED_COMPRESSED: _S.COMPRESSED,
        _E.KEPT_REDUCED: _S.REDUCED,
        _E.KEPT_COMPRESSED: _S.COMPRESSED,
        _E.FAILED_TO_HOST: _S.STAGED,
        _E.FAILED_TO_STORAGE: _S.STORED,
    },
    _S.RECOMPUTABLE: {
        _E.PROMOTED: _S.FULL,
        _E.DEMOTED: _S.REDUCED,
        _E.FETCH_STARTED: _S.IN_FLIGHT,
    },
}
"""The table of the design: every arrow, and no other. Two events may share an arrow."""

_LANDED = {
    Format.BF16: _E.LANDED_FULL,
    Format.BF16Z: _E.LANDED_COMPRESSED,
}
_STATE_OF = {Format.BF16: _S.FULL, Format.BF16Z: _S.COMPRESSED}


def landed_event(form: Format) -> StateEvent:
    """Return the event of a landed copy. `bf16` stands for the checkpoint's own precision."""
    return _LANDED.get(form, _E.LANDED_REDUCED)


def state_of(form: Format) -> State:
    """Return the state of a block whose copy in HBM has this format."""
    return _STATE_OF.get(form, _S.REDUCED)


def advance(
    state: State, event: StateEvent, *, block: object = "", story: BlockStory | None = None
) -> State:
    """Return the state after `event`. Raises InvalidTransition when no such arrow exists."""
    after = ARROWS[state].get(event)
    if after is None:
        raise InvalidTransition(
            f"block {block} in state {state.value} cannot take {event.value}; story: {story}",
            remedy=f"only {', '.join(ARROWS[state])} may happen in {state.value}: "
            "report this with the run's journal",
        )
    return after
