"""Writing, done safely: the owner offers a copy, the destination pulls it and says how it ended.

`push` runs at the source, `Offers.handle` at the destination (as `on_offer` of its `Exchange`). The
destination decides where the bytes go and reads them with its own engine, so all that holds for
reads holds here: validated headers, quarantine, one end. It must not know what keys mean.

Invariants: `push` ends once, by its deadline; only a status of DONE says that the copy is there,
any other leaves it open, and repeating an offer is harmless because copies are immutable; a slot
taken for an offer is the engine's from the read on, and is given back by whoever holds it whatever
happens to the source.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import msgspec

from hotset.errors import UNREADABLE, HotsetError, TransferTimeout, TransportError
from hotset.transport.base import Expect, ItemResult, PeerInfo, ReadItem, Status
from hotset.transport.exchange import offer
from hotset.transport.handshake import ANY, Identity
from hotset.transport.token import check, sign

if TYPE_CHECKING:
    from collections.abc import Callable

    from hotset.transport.engine import Engine
    from hotset.transport.slab import Slab, Slot

GRACE_NS: Final = 50_000_000
"""The destination gives up up to that much earlier than the source: its answer must arrive."""
MOST_NS: Final = 600_000_000_000
_ENGINE_NS: Final = 5_000_000_000  # an engine ends reads at their deadline; this is for its bugs


class _Message(msgspec.Struct, frozen=True, array_like=True):
    """An offer: `left_ns` is what is left of its deadline, because clocks differ between hosts."""

    info: PeerInfo
    remote_offset: int
    expect: Expect
    left_ns: int


class _Answer(msgspec.Struct, frozen=True, array_like=True):
    status: Status
    error: str
    checksum: int
    generation: int


# Made at import: msgspec crashes when two threads meet a type for the first time.
_MESSAGE: Final = msgspec.msgpack.Decoder(_Message)
_ANSWER: Final = msgspec.msgpack.Decoder(_Answer)


@dataclass(frozen=True, slots=True, kw_only=True)
class Pushed:
    """How an offer ended. On DONE, `generation` is that of the copy at the destination."""

    status: Status
    error: str = ""
    checksum: int = 0
    generation: int = 0


def push(  # noqa: PLR0913 - what is offered, to whom, until when; all by keyword
    info: PeerInfo,
    *,
    remote_offset: int,
    expect: Expect,
    to: tuple[str, int],
    deadline_ns: int,
    token: bytes = b"",
    wanted: Identity = ANY,
) -> Pushed:
    """Offer the copy at `remote_offset` of the store `info` to the store whose exchange is at `to`.

    `remote_offset` and `expect` say what a `ReadItem` of that copy would say; `deadline_ns` is
    `time.monotonic_ns()` time. Never raises for what happens on the way: FAILED when the
    destination refused, died or could not read, STALE when the slot held another copy by then,
    TIMED_OUT when the deadline passed; `error` says why.
    """
    left_ns = deadline_ns - time.monotonic_ns()
    if left_ns <= 0:
        return Pushed(status=Status.TIMED_OUT, error="the deadline passed")
    message = _Message(sign(info, token), remote_offset, expect, left_ns)
    try:
        reply = offer(
            to, msgspec.msgpack.encode(message), token=token, timeout_ns=left_ns, wanted=wanted
        )
        answer = _ANSWER.decode(reply)
    except TransferTimeout as error:
        return Pushed(status=Status.TIMED_OUT, error=str(error))
    except (TransportError, *UNREADABLE) as error:
        return Pushed(status=Status.FAILED, error=str(error))
    return Pushed(
        status=answer.status,
        error=answer.error,
        checksum=answer.checksum,
        generation=answer.generation,
    )


class Offers:
    """Takes offers for one store. Thread-safe: each offer is pulled on its caller's thread."""

    def __init__(
        self,
        *,
        slab: Slab,
        engine: Engine,
        token: bytes = b"",
        landed: Callable[[Expect, ItemResult], None] | None = None,
    ) -> None:
        """`landed` gets each copy that arrived, with its pin, which it must let go in time.

        Without it the pin is let go at once and the copy stays READY.
        """
        self._slab = slab
        self._engine = engine
        self._token = token
        self._landed = landed

    def handle(self, message: bytes) -> bytes:
        """Pull what is offered and answer how that ended; the `on_offer` of an `Exchange`."""
        start_ns = time.monotonic_ns()
        try:
            asked = _MESSAGE.decode(message)
            check(asked.info, self._token)
        except UNREADABLE as error:
            answer = _Answer(Status.FAILED, f"the offer is damaged ({error})", 0, 0)
        except TransportError as error:
            answer = _Answer(Status.FAILED, str(error), 0, 0)
        else:
            life_ns = max(0, min(asked.left_ns, MOST_NS))
            life_ns -= min(GRACE_NS, life_ns // 4)
            answer = self._pull(asked, deadline_ns=start_ns + life_ns)
        return msgspec.msgpack.encode(answer)

    def _pull(self, asked: _Message, *, deadline_ns: int) -> _Answer:
        slot: Slot | None = None
        try:
            if asked.expect.nbytes < 0:
                return _Answer(Status.FAILED, "the offer is of a negative size", 0, 0)
            slot = self._slab.allocate(asked.expect.nbytes)
            if slot is None:
                return _Answer(Status.FAILED, "the store is full", 0, 0)
            item = ReadItem(remote_offset=asked.remote_offset, dest=slot, expect=asked.expect)
            self._engine.connect(asked.info)
            ticket = self._engine.read(
                asked.info.name, [item], deadline_ns=deadline_ns, reason="offer"
            )
        except HotsetError as error:  # nothing was posted: the slot is still ours
            if slot is not None:
                self._slab.fail(slot)
            return _Answer(Status.FAILED, str(error), 0, 0)
        try:
            outcome = ticket.wait(timeout_ns=max(0, deadline_ns - time.monotonic_ns()) + _ENGINE_NS)
        except TransferTimeout as error:  # the engine hangs; it keeps the slot
            return _Answer(Status.TIMED_OUT, str(error), 0, 0)
        result = outcome.items[0]
        if result.status is Status.DONE:
            self._keep(asked.expect, result)
        return _Answer(result.status, result.error, result.checksum, result.generation)

    def _keep(self, expect: Expect, result: ItemResult) -> None:
        if self._landed is None:
            self._slab.unpin(result.dest)
            return
        try:
            self._landed(expect, result)
        except BaseException:
            self._slab.unpin(result.dest)
            raise
