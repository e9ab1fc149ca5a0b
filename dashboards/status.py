"""A snapshot of the cluster as text or JSON: `hotset status` and `hotset why BLOCK`.

Shows what the controller said; must not ask it, and must not know Ray. Invariant shown to the
reader: the sum of the blocks' states is the number of blocks, or the table says that it is not.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from hotset.policies.types import BlockId, Copy


@dataclass(frozen=True, slots=True, kw_only=True)
class StoreStatus:
    """One store. `tier` is a name (hbm, host, cxl); `blocks` counts copies by format.

    `state` is `ready`, `draining` or `lost`. `in_flight` counts transfers towards it.
    """

    name: str
    tier: str
    node: str
    incarnation: int
    capacity_bytes: int
    resident_bytes: int
    blocks: dict[str, int]
    state: str = "ready"
    in_flight: int = 0
    quarantined_bytes: int = 0
    emulated: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Status:
    """The cluster at one moment.

    `states` counts blocks by their best state in the cluster (`S1` to `S7`), so that its sum is
    `blocks`. `vetoes` counts by reason. `alerts` are sentences for the operator.
    """

    run: str
    model: str
    digest: str
    blocks: int
    states: dict[str, int]
    stores: tuple[StoreStatus, ...]
    epoch: int
    epoch_age_ns: int
    requests_in_flight: int
    tokens: int
    stall_ns: int = 0
    vetoes: dict[str, int] = field(default_factory=dict)
    alerts: tuple[str, ...] = ()
    emulated: tuple[str, ...] = ()
    dropped: int = 0
    mode: str = "active"

    def to_json(self) -> str:
        """One line of JSON with the fields as keys."""
        raise NotImplementedError


def render(status: Status, *, width: int = 80) -> str:
    """Plain-text tables, no colour."""
    raise NotImplementedError


@dataclass(frozen=True, slots=True, kw_only=True)
class StoryLine:
    """One thing that happened to a block. `cause` names the event that led here."""

    at_ns: int
    store: str
    what: str
    reason: str
    cause: str = ""
    epoch: int = 0


def render_why(
    block: BlockId, *, story: Sequence[StoryLine], copies: Sequence[Copy], width: int = 80
) -> str:
    """Where the block is and how it came there, oldest first."""
    raise NotImplementedError


def why_json(block: BlockId, *, story: Sequence[StoryLine], copies: Sequence[Copy]) -> str:
    """One line of JSON with `block`, `copies` and `story`."""
    raise NotImplementedError
