"""Posts to backends that copy in the call: read, hash and judge at once, with two pairs of hands.

Every method is called in the owner's turns; the second thread (`hands.py`) only reads what it was
given. It must not know queues, deadlines or sources.

Invariant: a post is read here, or given away and taken back, or goes on as a flight; each settles
once.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from hotset.transport.base import NO_HANDLE
from hotset.transport.fused import Fused
from hotset.transport.hands import Hands
from hotset.transport.job import Stage

if TYPE_CHECKING:
    from collections.abc import Callable

    from hotset.transport.arrivals import Arrivals
    from hotset.transport.base import Backend
    from hotset.transport.flights import Flights
    from hotset.transport.fused import Landing
    from hotset.transport.hands import Haul
    from hotset.transport.job import Post, Track
    from hotset.transport.slab import Slab


class InCall:
    """The owner's way through such backends."""

    def __init__(  # noqa: PLR0913 - the collaborators of the owner thread, by keyword
        self,
        *,
        backend: Backend,
        slab: Slab,
        flights: Flights,
        arrivals: Arrivals,
        give: Callable[[Haul], None],
        again: Callable[[Post], None],
    ) -> None:
        """`give` brings a haul to the second thread; `again` posts what it could not read."""
        self._fused = Fused(backend, slab)
        self._hands = Hands(backend, slab, give)
        self._flights = flights
        self._arrivals = arrivals
        self._again = again

    @property
    def given(self) -> bool:
        """Whether the second thread has something that it has not brought back."""
        return self._hands.given > 0

    def carry_out(self, haul: Haul) -> None:
        """On the second thread."""
        self._hands.carry_out(haul)

    def read(self, post: Post) -> None:
        """Copy and verify now, or let the second thread. Raises what the backend's `post` does."""
        if self._hands.may_take(post):
            self._flights.add(post, polled=False)
            self._hands.give(post)
            return
        landing = self._fused.read(post)
        if landing.handle != NO_HANDLE:
            post.handle = landing.handle
            self._flights.add(post)
            return
        if post.pieces is not None:
            post.pieces.landed(post.begin, post.end, landing.digests)
        landed = time.monotonic_ns() - landing.verify_ns  # copying and hashing took turns
        self._landed(post, landing, post.tracks, landed)

    def take_back(self, *, wait: bool = False) -> bool:
        """Take what the second thread has read; True when there was something.

        `wait`: for the first of it, for a short while.
        """
        some = False
        while self._hands.given and (haul := self._hands.take_back(wait=wait)) is not None:
            some, wait = True, False
            self._hauled(haul)
        return some

    def take_all_back(self) -> None:
        """Wait until the second thread has nothing: so long as a copy takes."""
        while self._hands.given:
            self.take_back(wait=True)

    def _landed(self, post: Post, landing: Landing, alive: list[Track], landed_ns: int) -> None:
        post.link.ended(post, time.monotonic_ns(), verify_ns=landing.verify_ns)
        post.mark_landed(alive, landed_ns)
        if post.end:
            for track in alive:
                self._arrivals.piece_landed(track, post.link.name, alone=True)
            return
        verdicts = landing.verdicts
        if len(alive) < len(post.tracks):
            here = {id(track) for track in alive}
            judged = zip(post.tracks, verdicts, strict=True)
            verdicts = [verdict for track, verdict in judged if id(track) in here]
        self._arrivals.all_judged(alive, post.link.name, verdicts)

    def _hauled(self, haul: Haul) -> None:
        post, landing = haul.post, haul.landing
        if landing is not None and landing.handle != NO_HANDLE:
            post.handle = landing.handle
            self._flights.poll_on(post)
            return
        alive = [track for track in post.tracks if track.stage is Stage.WAITING]
        self._flights.settle(post)
        if landing is not None:
            if post.pieces is not None:
                post.pieces.landed(post.begin, post.end, landing.digests)
            self._landed(post, landing, alive, haul.ended_ns - landing.verify_ns)
            return
        post.link.ended(post, haul.ended_ns)
        post.tracks, post.shared = alive, False
        if alive:
            self._again(post)
