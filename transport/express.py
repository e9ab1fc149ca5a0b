"""The express way: one block that has the engine to itself, read in the caller's own turn.

A ticket's tracks, posts and queues are what many reads at once need; one block that nothing
competes with needs none of them, and making them costs more than a small block's bytes. Here it is
posted, verified, published and recorded in one call. What does not end well there is not ended
here: the mover goes on from where it stands (`Begun`), with retries and deadlines as ever. It must
not know threads, or who waits.

Invariant: either the outcome is returned and nothing is in flight, or everything that was begun is
in the `Begun`, or nothing was.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import msgspec

from hotset.errors import TransportError
from hotset.transport.base import NO_HANDLE, ItemResult, Outcome, Span, Status
from hotset.transport.header import HEADER_BYTES
from hotset.transport.judge import judge_bytes
from hotset.transport.records import Kind

if TYPE_CHECKING:
    from collections.abc import Callable

    from hotset.transport.base import Backend, Priority, ReadItem
    from hotset.transport.job import Job, Verdict
    from hotset.transport.link import Link
    from hotset.transport.records import Ring
    from hotset.transport.slab import Slab


class Begun(msgspec.Struct, frozen=True):
    """A read that was posted and has not ended: in flight, failed, or landed and found bad.

    Of `handle`, `error` and `verdict` one is set. Times are monotonic ns.
    """

    posted_ns: int
    landed_ns: int = 0
    handle: int = NO_HANDLE
    error: str = ""
    verdict: Verdict | None = None


class Request(msgspec.Struct, frozen=True):
    """What a caller asks for besides items, and since when. `wall_ns` is the epoch's."""

    submitted_ns: int
    wall_ns: int
    deadline_ns: int
    trace: tuple[int, int]
    parent: int
    reason: str
    priority: Priority

    @classmethod
    def now(
        cls,
        deadline_ns: int,
        trace: tuple[int, int],
        parent: int,
        reason: str,
        priority: Priority,
    ) -> Request:
        """A request that is made now."""
        return cls(
            time.monotonic_ns(), time.time_ns(), deadline_ns, trace, parent, reason, priority
        )


class Express:
    """Reads single blocks of one engine. Called in the owner's turns, while nothing else runs."""

    def __init__(
        self,
        *,
        backend: Backend,
        slab: Slab,
        ring: Ring,
        describe: Callable[[bytes], tuple[int, int]] | None,
    ) -> None:
        """Keep the parts; `describe` as the engine's."""
        self._backend = backend
        self._slab = slab
        self._ring = ring
        self._describe = describe

    def read(
        self, link: Link, item: ReadItem, request: Request | Job, transfer_id: int
    ) -> Outcome | Begun | None:
        """Read an item whole; None where it has to go the ordinary way, and nothing was done."""
        dest, expect = item.dest, item.expect
        nbytes = expect.nbytes
        peer, whole = link.peer, HEADER_BYTES + nbytes
        if (
            peer is None
            or link.pacers
            or item.stripe
            or item.follow
            or item.stream
            or not 0 <= item.remote_offset <= peer.nbytes - whole
            or not link.carries_whole(whole)
        ):
            return None
        # Before the bytes come: they drive from the caches what is used after them.
        ring = self._ring
        source, reason = ring.name(link.name), ring.name(request.reason)
        layer, expert = self._describe(expect.key) if self._describe else (-1, -1)
        posted = time.monotonic_ns()
        if posted >= request.deadline_ns:
            return None
        span = Span(local_offset=dest.offset, remote_offset=item.remote_offset, nbytes=whole)
        try:
            handle = self._backend.post_in_call(link.name, [span])
        except TransportError as error:
            return Begun(posted, error=str(error))
        if handle != NO_HANDLE:
            return Begun(posted, handle=handle)
        landed = time.monotonic_ns()
        link.learn(whole, landed, posted)
        verdict = judge_bytes(self._slab, dest, expect)
        if verdict.status is not Status.DONE:
            return Begun(posted, landed, verdict=verdict)
        verified = time.monotonic_ns()
        landing = (dest, expect, verdict.checksum, verdict.epoch)
        [generation] = self._slab.publish_landed([landing])
        result = ItemResult(
            status=Status.DONE, dest=dest, checksum=verdict.checksum, generation=generation,
            source=link.name,
        )  # fmt: skip
        submitted = request.submitted_ns
        now = time.monotonic_ns()
        outcome = Outcome(
            status=Status.DONE,
            items=(result,),
            peer=link.name,
            nbytes=nbytes,
            started_ns=request.wall_ns,
            ended_ns=request.wall_ns + now - submitted,
            queue_ns=posted - submitted,
            wire_ns=landed - posted,
            verify_ns=verified - landed,
            activate_ns=now - verified,
            transfer_id=transfer_id,
        )
        ring.append(
            Kind.TRANSFER,
            source=source,
            format_code=expect.format_code,
            layer=layer,
            index=expert,
            start_ns=outcome.started_ns,
            end_ns=outcome.ended_ns,
            row_id=transfer_id,
            parent=request.parent,
            trace_hi=request.trace[0],
            trace_lo=request.trace[1],
            nbytes=nbytes,
            queue_ns=outcome.queue_ns,
            wire_ns=outcome.wire_ns,
            verify_ns=outcome.verify_ns,
            activate_ns=outcome.activate_ns,
            reason=reason,
        )
        return outcome
