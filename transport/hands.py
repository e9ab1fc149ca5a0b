"""A second pair of hands: another thread that reads posts, where the backend copies in the call.

One thread copies at a fraction of what memory gives; two copy and hash 1.4 to 1.7 times as much. A
second core is worth that only when somebody waits, so background reads are left to the owner. The
owner gives posts away, reads the next ones itself and takes results back in its own turns: only
there do slots, tracks and credits change. What is given away is in flight like any other post.

Invariants: a haul comes back exactly once; the other thread touches only the bytes of the post's
slots, through its own lane of the backend.
"""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from queue import Empty
from typing import TYPE_CHECKING, Final

from hotset.errors import TransportError
from hotset.transport.base import Priority
from hotset.transport.cores import Aside
from hotset.transport.fused import Fused
from hotset.transport.inbox import Inbox

if TYPE_CHECKING:
    from collections.abc import Callable

    from hotset.transport.base import Backend
    from hotset.transport.fused import Landing
    from hotset.transport.job import Post
    from hotset.transport.slab import Slab

MOST: Final = 2  # one in work and one that waits for its end
WAIT_NS: Final = 1_000_000


@dataclass(slots=True, eq=False)
class Haul:
    """A post that is read by the second thread, and what became of it."""

    post: Post
    landing: Landing | None = None
    error: Exception | None = None
    ended_ns: int = 0


class Hands:
    """The owner's end. `give` and `take_back` are called in the owner's turns."""

    def __init__(self, backend: Backend, slab: Slab, put: Callable[[Haul], None]) -> None:
        """`put` brings a haul to the second thread, which calls `carry_out`."""
        self._backend = backend
        self._fused = Fused(backend, slab, lane=1)
        self._put = put
        self._back: Inbox[Haul] = Inbox()
        self.given = 0
        self._cores = len(os.sched_getaffinity(0))
        self._thread = Aside()

    def may_take(self, post: Post) -> bool:
        """Whether to give a post away: somebody waits, and there is as much left for the owner."""
        pieces = post.pieces
        return (
            post.shared
            and self.given < MOST
            and self._cores > 1
            and post.priority is Priority.IMMINENT
            and (pieces is None or not pieces.bare)
            and post.more >= post.nbytes * (1 + 2 * self.given)
            and self._backend.has_second_lane(post.link.name)
        )

    def give(self, post: Post) -> None:
        """Let the second thread read it."""
        if not self.given:
            self._thread.part()
        self.given += 1
        self._put(Haul(post))

    def carry_out(self, haul: Haul) -> None:
        """On the second thread."""
        self._thread.here()
        try:
            haul.landing = self._fused.read(haul.post)
        except Exception as error:  # noqa: BLE001 - a bug is raised again in the owner's turn
            haul.error = error
        haul.ended_ns = time.monotonic_ns()
        self._back.put(haul)

    def take_back(self, *, wait: bool) -> Haul | None:
        """Return a haul that has ended; None when there is none, or none within WAIT_NS.

        Raises what only a bug raises over there.
        """
        try:
            haul = self._back.get(WAIT_NS if wait else 0)
        except Empty:
            return None
        self.given -= 1
        if not self.given:
            self._thread.rejoin()
        if haul.error is not None and not isinstance(haul.error, TransportError):
            raise haul.error
        return haul
