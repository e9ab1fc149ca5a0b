"""The caller's handle of a submitted read: one end, seen by any number of waiters.

Invariant: `_finish` takes effect once; after it, waiters wake and each callback has run once. The
ticket must not know backends or slabs. A lock held from birth is the event: it is the cheapest
wake-up CPython has (a `threading.Event` costs three times as much).
"""

from __future__ import annotations

import logging
import threading
from typing import TYPE_CHECKING

from hotset.errors import TransferTimeout

if TYPE_CHECKING:
    from collections.abc import Callable

    from hotset.transport.base import Outcome

_log = logging.getLogger(__name__)


class Ticket:
    """A read under way. `transfer_id` is the row_id of its first item; item i has that + i."""

    __slots__ = ("_callbacks", "_cancel", "_gate", "_guard", "_outcome", "transfer_id")

    def __init__(self, *, transfer_id: int, cancel: Callable[[Ticket], None]) -> None:
        """Start without an end; `cancel` tells the engine that the caller gave up."""
        self.transfer_id = transfer_id
        self._outcome: Outcome | None = None
        self._callbacks: list[Callable[[Outcome], None]] = []
        self._cancel = cancel
        self._guard = threading.Lock()
        self._gate = threading.Lock()
        self._gate.acquire()

    @property
    def done(self) -> bool:
        """Whether the ticket has ended."""
        return self._outcome is not None

    def wait(self, timeout_ns: int | None = None) -> Outcome:
        """Block until the end, which the deadline of the read bounds.

        Raises TransferTimeout after `timeout_ns`; the ticket itself then goes on.
        """
        if self._outcome is None:
            if not self._gate.acquire(timeout=-1 if timeout_ns is None else timeout_ns / 1e9):
                raise TransferTimeout(
                    f"transfer {self.transfer_id:x} has not ended after {timeout_ns} ns",
                    remedy="wait again or cancel it",
                )
            self._gate.release()  # pass the wake-up on to the next waiter
        assert self._outcome is not None  # noqa: S101 - the gate opens after the outcome is set
        return self._outcome

    def add_callback(self, callback: Callable[[Outcome], None]) -> None:
        """Call `callback(outcome)` on the owner thread at the end, or here when it has ended.

        It must be short and must not wait for another ticket of the same engine.
        """
        with self._guard:
            if self._outcome is None:
                self._callbacks.append(callback)
                return
        callback(self._outcome)

    def cancel(self) -> None:
        """Give up: the ticket ends as CANCELLED soon, unless it ends otherwise first."""
        if self._outcome is None:
            self._cancel(self)

    def _finish(self, outcome: Outcome) -> None:
        """End the ticket; the engine calls this exactly once."""
        with self._guard:
            assert self._outcome is None, "a ticket ended twice"  # noqa: S101 - our own bug
            self._outcome = outcome
            callbacks, self._callbacks = self._callbacks, []
        self._gate.release()
        for callback in callbacks:
            try:
                callback(outcome)
            except Exception:  # noqa: BLE001 - one caller's bug must not end others' transfers
                _log.exception("a callback of transfer %x failed", self.transfer_id)
