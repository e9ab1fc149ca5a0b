"""A queue of many senders and one receiver that may wait for a bounded time.

`queue.SimpleQueue.get(timeout=...)` can wait for ever in CPython 3.11 and 3.12: when its lock is
found released by an earlier `put` and the time is up just then, a negative rest means "no limit".
A lock's own `acquire` treats that right, so here a lock is the bell and a deque holds the items.

Invariants: an item that was put before `get` waits is found; whoever rings after the items were
looked at wakes the next wait.
"""

from __future__ import annotations

import contextlib
import threading
from collections import deque
from queue import Empty
from time import monotonic_ns
from typing import Generic, TypeVar

_T = TypeVar("_T")


class Inbox(Generic[_T]):
    """Items in the order in which they were put. Any thread may put; one thread gets."""

    __slots__ = ("_bell", "_items")

    def __init__(self) -> None:
        """Start empty."""
        self._items: deque[_T] = deque()
        self._bell = threading.Lock()
        self._bell.acquire()

    def put(self, item: _T) -> None:
        """Add an item and wake the receiver; never waits."""
        self._items.append(item)
        self.ring()

    def put_quietly(self, item: _T) -> None:
        """Add an item for whoever looks next; the sender looks itself, or rings."""
        self._items.append(item)

    def ring(self) -> None:
        """Wake the receiver."""
        if self._bell.locked():
            with contextlib.suppress(RuntimeError):  # somebody else has just rung
                self._bell.release()

    def __len__(self) -> int:
        """How many items wait."""
        return len(self._items)

    def empty(self) -> bool:
        """Whether there is nothing to get."""
        return not self._items

    def get_nowait(self) -> _T:
        """Take the first item. Raises queue.Empty."""
        try:
            return self._items.popleft()
        except IndexError:
            raise Empty from None

    def wait(self, timeout_ns: int | None = None) -> None:
        """Wait until there is an item, somebody rings, or `timeout_ns` have passed."""
        if not self._items:
            self._bell.acquire(timeout=-1 if timeout_ns is None else timeout_ns / 1e9)

    def get(self, timeout_ns: int | None = None) -> _T:
        """Take the first item, waiting for it. Raises queue.Empty after `timeout_ns`."""
        end = None if timeout_ns is None else monotonic_ns() + timeout_ns
        while not self._items:
            left_s = -1 if end is None else max(0, end - monotonic_ns()) / 1e9
            if not self._bell.acquire(timeout=left_s) and not self._items:
                raise Empty
        return self._items.popleft()
