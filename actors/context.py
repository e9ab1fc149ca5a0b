"""Where a request stands in its forward passes, and ids for the rows that tell of it.

Plain state of one thread each; decides nothing. Must not know Ray or what rows are for.

Invariant: an id is given once in the cluster, and is never 0.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass


@dataclass(slots=True)
class Context:
    """One request's place in its forward passes; lives on the request's thread."""

    request: int = 0
    trace: tuple[int, int] = (0, 0)
    parent: int = 0  # span of the request, under which its steps stand
    step: int = 0
    step_row: int = 0
    step_start_ns: int = 0
    tokens: int = 0
    stall_ns: int = 0
    fetches: int = 0  # of this layer
    started: int = 0  # prefetches included
    layer_tokens: int = 0
    layer_start_ns: int = 0
    layer_stall_ns: int = 0


class RowIds:
    """Ids of rows, unique in the cluster: a random start for each process."""

    def __init__(self, start: int) -> None:
        """`start` is a random odd 63-bit number."""
        self._next = start
        self._lock = threading.Lock()

    def take(self) -> int:
        """A fresh id, never 0."""
        with self._lock:
            self._next = (self._next + 1) & 0x7FFFFFFFFFFFFFFF or 1
            return self._next
