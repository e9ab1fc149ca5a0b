"""What the engine's owner thread has to do later: a heap of times and actions.

It has neither a clock nor a thread; the owner asks when the next is due.
"""

from __future__ import annotations

import heapq
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable


class Timers:
    """Actions by the monotonic time at which they are due; those of one time in order."""

    def __init__(self) -> None:
        """Start with nothing to do."""
        self._heap: list[tuple[int, int, Callable[[], None]]] = []
        self._count = 0

    def add(self, due_ns: int, action: Callable[[], None]) -> None:
        """Do `action` at `due_ns`; an action that has lost its meaning must do nothing then."""
        self._count += 1
        heapq.heappush(self._heap, (due_ns, self._count, action))

    def next_ns(self) -> int | None:
        """When the first is due."""
        return self._heap[0][0] if self._heap else None

    def run(self, now_ns: int) -> bool:
        """Do what is due; True when there was something."""
        ran = False
        while self._heap and self._heap[0][0] <= now_ns:
            heapq.heappop(self._heap)[2]()
            ran = True
        return ran
