"""A memory pool: carries out the controller's transfers and drops, and is read by its peers.

Its copies are what the controller asked for and nothing else. Reads of it are one-sided, so a pool
does nothing while it serves. Must not know policy or Ray.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

from hotset.actors.fetcher import Landing, Want
from hotset.policies.types import (
    BlockId,
    CancelTransfer,
    Command,
    DropCopy,
    Format,
    Reason,
    StartTransfer,
)

if TYPE_CHECKING:
    from hotset.actors.fetcher import Fetcher
    from hotset.actors.store import Store

MOST_IN_FLIGHT = 8


class PoolCore:
    """Queue of transfers towards one pool, a few at a time."""

    def __init__(self, *, store: Store, fetcher: Fetcher, nbytes: dict[Format, int]) -> None:
        """`nbytes` is the payload size of a block in each format that this pool may hold."""
        self._store = store
        self._fetcher = fetcher
        self._nbytes = nbytes
        self._queue: list[StartTransfer] = []
        self._flying: set[tuple[BlockId, Format]] = set()
        self._lock = threading.Lock()

    @property
    def pending(self) -> int:
        """Transfers asked for that have not ended."""
        return len(self._queue) + len(self._flying)

    def command(self, command: Command) -> None:
        """Carry out a command of the controller."""
        match command:
            case StartTransfer():
                with self._lock:
                    self._queue.append(command)
                self._pump()
            case CancelTransfer():
                self._cancel(command)
            case DropCopy():
                self._store.drop(command.block, command.format, reason=command.reason)
            case _:
                pass  # epochs and vetoes concern the directory and the story, not a pool

    def _cancel(self, command: CancelTransfer) -> None:
        """Answer for a transfer that has not begun; one that has answers when it has landed."""
        key = (command.block, command.format)
        with self._lock:
            if key in self._flying:
                return
            self._queue = [one for one in self._queue if (one.block, one.format) != key]
            if self._store.holds(*key):
                return
        self._store.report_failure(command.block, command.format, reason=Reason.CANCELLED)

    def _pump(self) -> None:
        wants: list[Want] = []
        refused: list[StartTransfer] = []
        with self._lock:
            while self._queue and len(self._flying) < MOST_IN_FLIGHT:
                command = self._queue.pop(0)
                key = (command.block, command.format)
                if key in self._flying or self._store.holds(*key):
                    continue
                slot = self._store.slab.allocate(self._nbytes[command.format])
                if slot is None:
                    refused.append(command)
                    continue
                self._flying.add(key)
                wants.append(
                    Want(
                        block=command.block,
                        format=command.format,
                        slot=slot,
                        nbytes=self._nbytes[command.format],
                        on_end=self._landed,
                        reason=command.reason,
                        allow=frozenset(command.sources),
                    )
                )
        for command in refused:
            self._store.report_failure(command.block, command.format, reason=Reason.VETO_MEMORY)
        if wants:
            self._fetcher.start(wants)

    def _landed(self, landing: Landing) -> None:
        with self._lock:
            self._flying.discard((landing.block, landing.format))
        if landing.slot is None:
            reason = Reason.VETO_MEMORY if landing.no_slot else Reason.LOST
            self._store.report_failure(landing.block, landing.format, reason=reason)
        else:
            self._store.adopt(landing)
            self._store.unpin(landing.slot)
        self._pump()
