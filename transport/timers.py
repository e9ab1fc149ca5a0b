"""What the engine's owner thread has to do later, and which jobs are late.

Heaps of monotonic times, without a clock or a thread; the owner asks when the next is due.
"""

from __future__ import annotations

import heapq
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Callable

    from hotset.transport.job import Job

MOST_ENDED: Final = 256  # deadlines of ended jobs that are kept before they are swept


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


class Deadlines:
    """Deadlines of jobs. A job that has ended is passed over, and forgotten in time."""

    def __init__(self) -> None:
        """Start with no job."""
        self._heap: list[tuple[int, int, Job]] = []
        self._sweep_at = MOST_ENDED

    def add(self, job: Job) -> None:
        """Follow a job until it has ended."""
        if len(self._heap) >= self._sweep_at:
            self._heap = [entry for entry in self._heap if entry[2].open_tracks]
            heapq.heapify(self._heap)
            self._sweep_at = 2 * len(self._heap) + MOST_ENDED
        heapq.heappush(self._heap, (job.deadline_ns, job.ticket.transfer_id, job))

    def next_ns(self) -> int | None:
        """The earliest deadline of a job that runs."""
        heap = self._heap
        while heap and not heap[0][2].open_tracks:
            heapq.heappop(heap)
        return heap[0][0] if heap else None

    def late(self, now_ns: int) -> Job | None:
        """Take out a job that runs and whose deadline has passed."""
        if not self._heap or self._heap[0][0] > now_ns:
            return None
        due = self.next_ns()
        return heapq.heappop(self._heap)[2] if due is not None and due <= now_ns else None
