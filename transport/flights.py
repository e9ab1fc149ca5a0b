"""What is in flight: posts that are polled, that wait out a grace, that nobody waits for any more.

Single-threaded, as its owner, the mover. It decides when a slot or a handle may be touched again;
it must not know what is posted next or what landed bytes mean.

Invariants: a handle is released, and a slot given back, only after the backend reported done or
error, and after an error only when the backend's grace has passed; a post settles exactly once.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Final, Protocol

from hotset.transport.base import PostState
from hotset.transport.job import Stage

if TYPE_CHECKING:
    from hotset.transport.base import Backend
    from hotset.transport.job import Post, Track
    from hotset.transport.slab import Slab
    from hotset.transport.timers import Timers

SPIN_NS: Final = 50_000
POLL_MIN_NS: Final = 50_000
POLL_MAX_NS: Final = 10_000_000
NOTIFIED_NS: Final = 1_000_000
POLL_PART: Final = 16  # a read that has been silent for t is asked about each t / 16


class Owner(Protocol):
    """What flights tell the mover."""

    def post_landed(self, post: Post, alive: list[Track], now_ns: int) -> None:
        """The bytes of a post are here; `alive` are its tracks that somebody waits for."""

    def post_failed(self, post: Post, error: str) -> None:
        """A post ended without its bytes."""

    def post_settled(self, post: Post) -> None:
        """Nothing of a post can land any more."""

    def requeue(self, track: Track) -> None:
        """Nothing of a track's former source can land any more."""


class Flights:
    """The posts of one engine."""

    def __init__(
        self, *, backend: Backend | None, slab: Slab, timers: Timers, owner: Owner
    ) -> None:
        """Nothing is in flight. Without a backend only files are read."""
        self._backend = backend
        self._slab = slab
        self._timers = timers
        self._owner = owner
        self._polled: list[Post] = []
        self._live: dict[int, Post] = {}  # whatever may still write to a slot, by id
        self.quarantine: dict[int, Post] = {}  # those that nobody waits for, by id
        self.last_progress_ns = 0

    @property
    def empty(self) -> bool:
        """Whether nothing may still write to a slot."""
        return not self._live

    def add(self, post: Post, *, polled: bool = True) -> None:
        """Follow a post until it has settled: by polling, else somebody calls `settle`."""
        if post.cell < 0:
            for track in post.tracks:
                track.posts += 1
        self._live[id(post)] = post
        if polled:
            self._polled.append(post)

    def poll_on(self, post: Post) -> None:
        """Poll from now on what was added without."""
        self._polled.append(post)

    def rest_ns(self, now_ns: int) -> int | None:
        """How long until the next poll; None when there is nothing to poll."""
        if not self._polled:
            return None
        if self._backend is not None and self._backend.notifies:
            return NOTIFIED_NS
        since = now_ns - self.last_progress_ns
        return 0 if since < SPIN_NS else min(POLL_MAX_NS, max(POLL_MIN_NS, since // POLL_PART))

    def poll(self) -> bool:
        """Ask the backend about every post; True when one has ended."""
        if not self._polled:
            return False
        assert self._backend is not None  # noqa: S101 - posts came through it
        still: list[Post] = []
        posts, self._polled = self._polled, still
        for post in posts:
            state, error = self._backend.poll(post.handle)
            if state is PostState.PENDING:
                still.append(post)
                continue
            self.last_progress_ns = time.monotonic_ns()
            self._wire_ended(post, state, error)
        return len(still) < len(posts)

    def _wire_ended(self, post: Post, state: PostState, error: str) -> None:
        assert self._backend is not None  # noqa: S101 - as above
        now = time.monotonic_ns()
        post.link.ended(post, now)
        if state is PostState.DONE:
            self._backend.release(post.handle)
            alive = [track for track in post.tracks if track.stage is Stage.WAITING]
            self.settle(post)
            self._owner.post_landed(post, alive, now)
        elif self._backend.error_grace_ns:
            self._wait_grace(post, error, now + self._backend.error_grace_ns)
        else:
            self._backend.release(post.handle)
            self.settle(post, error=error)

    def _wait_grace(self, post: Post, error: str, due_ns: int) -> None:
        """Keep slots from reuse for a while after an error; waiters hear of it at once.

        Another source may fill the same bytes of a bare piece, so that waits as well.
        """
        bare = post.pieces is not None and post.pieces.bare
        late = error if bare else ""

        def over() -> None:
            assert self._backend is not None  # noqa: S101 - the post came through it
            self._backend.release(post.handle)
            self.settle(post, error=late)

        self._timers.add(due_ns, over)
        if not bare:
            self._owner.post_failed(post, error)

    def settle(self, post: Post, *, error: str = "") -> None:
        """Nothing of this post can land any more: give back what waited for that."""
        del self._live[id(post)]
        self.quarantine.pop(id(post), None)
        self._owner.post_settled(post)
        if post.cell < 0:
            for track in post.tracks:
                track.posts -= 1
                if track.posts == 0 and track.stage is Stage.ENDED:
                    self._slab.restore(track.item.dest)
                elif track.posts == 0 and track.stage is Stage.RETIRING:
                    self._owner.requeue(track)
        if error:
            self._owner.post_failed(post, error)

    def abandon(self, track: Track) -> None:
        """Posts of an ended track are still in flight: quarantine them, and hasten their end."""
        for key, post in self._live.items():
            if track not in post.tracks or key in self.quarantine or not post.abandoned:
                continue
            self.quarantine[key] = post
            if post.storage is not None:
                post.storage.cancelled = True
            elif self._backend is not None and post in self._polled:
                self._backend.abort(post.handle)
