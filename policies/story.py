"""What happened to a block: the lines that `hotset why` prints and that errors carry.

Decides nothing; keeps the newest lines. Must not know who writes them. A line is a fact with its
cause: when, into which state, by what and for which reason.

Invariant: at most `limit` lines of a block are kept, oldest first; a block without lines costs
nothing, so a million blocks cost what has happened to them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from hotset.policies.types import Reason, State  # noqa: TC001 - msgspec reads annotations

if TYPE_CHECKING:
    from hotset.policies.types import BlockId

_LINES = 32


class StoryLine(NamedTuple):
    """One change of a block: when, into which state, by what and why."""

    at: int  # step on a device, now_ns in the brain
    state: State
    event: str
    reason: Reason | None
    store: str = ""  # empty on a device, which knows only itself

    def __str__(self) -> str:
        """One line for `hotset why`."""
        why = f" ({self.reason.value})" if self.reason is not None else ""
        return f"{self.at} {self.state.value} {self.event}{why}"


class BlockStory:
    """The last `limit` changes of a block."""

    __slots__ = ("_limit", "_lines")

    def __init__(self, *, limit: int = _LINES) -> None:
        """Keep at most `limit` lines; older ones fall out."""
        self._limit = limit
        self._lines: list[StoryLine] = []  # short: a deque takes ten times the memory

    def add(
        self,
        at: int,
        *,
        state: State,
        event: str,
        reason: Reason | None = None,
        store: str = "",
    ) -> None:
        """Append a line."""
        self._lines.append(StoryLine(at, state, event, reason, store))
        if len(self._lines) > self._limit:
            del self._lines[0]

    def lines(self) -> tuple[StoryLine, ...]:
        """Oldest first."""
        return tuple(self._lines)

    def __str__(self) -> str:
        """All lines, oldest first, in one line of text."""
        return "; ".join(str(line) for line in self._lines) or "no story yet"


class Stories:
    """The stories of all blocks."""

    def __init__(self, *, limit: int = _LINES) -> None:
        """Keep at most `limit` lines of each block."""
        self._limit = limit
        self._of: dict[BlockId, BlockStory] = {}

    def of(self, block: BlockId) -> BlockStory:
        """Return the block's story, to add to it."""
        story = self._of.get(block)
        if story is None:
            story = self._of[block] = BlockStory(limit=self._limit)
        return story

    def lines(self, block: BlockId) -> tuple[StoryLine, ...]:
        """Return what happened to the block, oldest first."""
        story = self._of.get(block)
        return story.lines() if story is not None else ()
