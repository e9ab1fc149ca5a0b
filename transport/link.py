"""The way from one source: who waits for it, how much it may carry at once, how fast it is.

Pure bookkeeping of the engine's owner thread: no clock of its own, no backend. It must not know
what the bytes are.

**Credits.** A link carries at most one window of bytes of a class and those more urgent; the window
is what the link moves in WINDOW_NS at its measured rate. So bytes of a lesser class never hold an
urgent read back by more than a window, and a slow link gets small pieces without being told.
**Order.** Priority, then deadline, then submission.

Invariants: a track that has ended is never handed out; credits return exactly once per post.
"""

from __future__ import annotations

import heapq
from typing import TYPE_CHECKING, Final

from hotset.transport.base import FileItem, Priority
from hotset.transport.job import Stage

if TYPE_CHECKING:
    from collections.abc import Sequence

    from hotset.transport.base import PeerInfo
    from hotset.transport.job import Post, Track
    from hotset.transport.pacing import Pacer

WINDOW_NS: Final = 4_000_000
WINDOW_MIN_BYTES: Final = 512 << 10
WINDOW_MAX_BYTES: Final = 32 << 20
FILE_WINDOW_MIN_BYTES: Final = (32 << 20) + (128 << 10)  # a disk wants several long reads at once
PIECE_MIN_BYTES: Final = 2 << 20  # of a fast link: below, its posts cost more than it saves
FIRST_RATE: Final = 2_000_000_000  # bytes/s, until measured
# Posts that copy in the call, to be shared out: room for 8 blocks, at last 2, of 1 MiB and headers.
IN_CALL_BYTES: Final = (8 << 20) + (64 << 10)
IN_CALL_MIN_BYTES: Final = (2 << 20) + (64 << 10)
ALONE_BYTES: Final = (4 << 20) + (64 << 10)  # one thread reads so much sooner than it wakes another
HALVES_BYTES: Final = 16 << 20  # so much each of two threads reads in one post
RATE_MIN_BYTES: Final = 256 << 10  # shorter posts measure latency
POST_ITEMS: Final = 1024

Entry = tuple[int, int, int, int, int, "Track"]


class Link:
    """What is queued for one source and what is under way from it."""

    def __init__(self, name: str, *, pacers: Sequence[Pacer] = (), is_files: bool = False) -> None:
        """A link to nobody yet, or to the files of storage."""
        self.name = name
        self.peer: PeerInfo | None = None
        self.pacers = pacers
        self.rate = FIRST_RATE  # bytes a second, measured
        self.window_bytes = 0
        """How many bytes of a class, and of those more urgent, may be under way."""
        self.is_files = is_files
        self.in_call = False  # the backend copies while it posts
        self._profile_rate = 0
        self._queue: list[Entry] = []
        self._pushes = 0
        self._in_flight = [0] * len(Priority)
        self._last_end_ns = 0
        self.last_post = 0  # the mover's count of turns
        self._set_window()

    @property
    def idle(self) -> bool:
        """Whether nothing is queued or under way."""
        return not self._queue and not any(self._in_flight)

    def set_pace(self, pacers: Sequence[Pacer], *, profile_rate: int) -> None:
        """Emulate: `profile_rate` is what the profile gives at most, 0 without a bound."""
        self.pacers = pacers
        self._profile_rate = profile_rate
        self._set_window()

    def _set_window(self) -> None:
        rate = min(self.rate, self._profile_rate) if self._profile_rate else self.rate
        least = FILE_WINDOW_MIN_BYTES if self.is_files else WINDOW_MIN_BYTES
        self.window_bytes = min(WINDOW_MAX_BYTES, max(least, rate * WINDOW_NS // 1_000_000_000))

    def unreadable(self, track: Track) -> str:
        """Why a slot cannot be read from here; '' when it can."""
        if self.peer is None:
            return f"store {self.name!r} is not connected"
        if not 0 <= track.remote_offset(self.name) <= self.peer.nbytes - track.slot_bytes:
            return f"the slot is outside of store {self.name!r}'s slab"
        return ""

    # --- the queue --------------------------------------------------------------------------------

    def push(self, track: Track) -> None:
        """Queue a track, or what is left of it."""
        job = track.job
        self._pushes += 1  # a track that is queued twice must not be compared with itself
        order = (job.priority, job.deadline_ns, job.ticket.transfer_id, track.index)
        heapq.heappush(self._queue, (*order, self._pushes, track))

    def head(self) -> Entry | None:
        """The entry that goes next; None when the queue is empty."""
        queue = self._queue
        while queue:
            track = queue[0][5]
            if track.stage is Stage.WAITING and (
                track.first_hand or self.is_files or track.reads_from(self.name)
            ):
                return queue[0]
            heapq.heappop(queue)
        return None

    def pop(self) -> Track:
        """Take the head, which must have been asked for."""
        return heapq.heappop(self._queue)[5]

    def pop_group(self, first: Track) -> list[Track]:
        """Take small slots of the same ticket that may travel with `first`, which is taken."""
        group, nbytes = [first], first.slot_bytes
        if len(first.job.items) == 1:
            return group
        limit = self.window_bytes // 2
        if not self.is_files:
            total = len(first.job.items) * first.slot_bytes
            limit = self.piece_bytes(total - first.index * first.slot_bytes, total)
        while (entry := self.head()) is not None and len(group) < POST_ITEMS:
            track = entry[5]
            nbytes += track.slot_bytes
            if track.job is not first.job or nbytes > limit or not self.is_small(track):
                break
            group.append(self.pop())
        return group

    def is_small(self, track: Track) -> bool:
        """Whether a slot travels whole."""
        if isinstance(track.item, FileItem):
            return True
        if track.pieces is not None:
            return False
        return self.carries_whole(track.slot_bytes)

    def carries_whole(self, slot_bytes: int) -> bool:
        """Whether a slot of that size, header included, travels in one post."""
        return slot_bytes <= min(PIECE_MIN_BYTES, self.window_bytes // 2)

    def piece_bytes(self, left: int, total: int) -> int:
        """Bytes of the next post when `left` of a job's `total` are to go.

        Half a window at most. Half of what is left at most, because the last piece is verified
        while nothing moves; on slow links pieces are shorter than PIECE_MIN_BYTES. What is copied
        in the call is cut to be shared by two threads.
        """
        half = self.window_bytes // 2
        if self.in_call:
            if total <= HALVES_BYTES:
                return min(half, left if total <= ALONE_BYTES else total // 2)
            short = max(left // 4, IN_CALL_MIN_BYTES)  # towards the end: both shall end together
            return min(half, short, IN_CALL_BYTES)
        piece = min(half, max(left // 2, min(PIECE_MIN_BYTES, half)))
        return piece if left - piece > piece // 2 else left  # no crumbs

    # --- credits ----------------------------------------------------------------------------------

    def has_room(self, priority: int) -> bool:
        """Whether one more post of that class may go out.

        Always where posts copy in the call: then the owner is free, and what it has given to the
        second thread must not keep it from reading.
        """
        if self.in_call:
            return True
        busy = self._in_flight[0] if priority == 0 else sum(self._in_flight[: priority + 1])
        return busy <= self.window_bytes // 2

    def wait_ns(self, now_ns: int, *, imminent: bool) -> int:
        """Ns until the emulated ends of the link let the next post go."""
        waits = [pacer.wait_ns(now_ns, imminent=imminent) for pacer in self.pacers]
        return max(waits, default=0)

    def posted(self, post: Post, *, queued_ns: int) -> None:
        """Take the credits of a post and occupy the emulated link."""
        self._in_flight[post.priority] += post.nbytes
        for pacer in self.pacers:
            free_ns = pacer.reserve(
                post.nbytes,
                now_ns=post.posted_ns,
                queued_ns=queued_ns,
                imminent=post.priority is Priority.IMMINENT,
            )
            post.release_ns = max(post.release_ns, free_ns)

    def ended(self, post: Post, now_ns: int, *, verify_ns: int = 0) -> None:
        """Give the credits of a post back, and learn how fast the link is."""
        self._in_flight[post.priority] -= post.nbytes
        self.learn(post.nbytes, now_ns, post.posted_ns, verify_ns=verify_ns)

    def learn(self, nbytes: int, now_ns: int, posted_ns: int, *, verify_ns: int = 0) -> None:
        """Take a read that ended now for a measurement of the link."""
        before_ns, self._last_end_ns = self._last_end_ns, now_ns
        if nbytes < RATE_MIN_BYTES:
            return
        busy_ns = now_ns - verify_ns - max(posted_ns, before_ns)
        if busy_ns > 0:
            seen = nbytes * 1_000_000_000 // busy_ns
            self.rate += (seen - self.rate) // 4
            self._set_window()
