"""The brain of the cluster: events in, commands out.

Decides where copies of blocks should be. Must not know Ray, clocks, links or how a command is
carried out. `handle` is the only mutating door; a shell actor carries the commands out and turns
results into events, so the same brain runs live and in replay of a journal.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from hotset.policies.config import PolicyConfig
from hotset.policies.directory import CopyKey, Delta, Directory
from hotset.policies.guard import Guardrail
from hotset.policies.types import (
    BlockId,
    BlockInfo,
    Command,
    Copy,
    CopyDropped,
    CopyLanded,
    Event,
    State,
    StoreInfo,
    StoreJoined,
    StoreLost,
)

if TYPE_CHECKING:
    from collections.abc import Sequence


class ClusterBrain:
    """Pure state machine over the events of hotset.policies.types."""

    def __init__(
        self,
        blocks: Sequence[BlockInfo],
        *,
        config: PolicyConfig | None = None,
        guard: Guardrail | None = None,
        epoch: int = 0,
    ) -> None:
        """`blocks`: every block of the checkpoint. `epoch`: the last one published before."""
        self.config = config or PolicyConfig()
        self.guard = guard or Guardrail(
            floor=self.config.floor, default_floor=self.config.default_floor
        )
        self.epoch = epoch
        self.blocks = tuple(sorted(blocks, key=lambda info: info.block))
        self._directory = Directory(changes_kept=self.config.changes_kept)
        self._stores: dict[str, StoreInfo] = {}

    def handle(self, event: Event) -> list[Command]:
        """Take in one event; return what the cluster should do now, in order."""
        match event:
            case StoreJoined():
                self._forget(event.store.name)
                self._stores[event.store.name] = event.store
                for copy in event.copies:
                    self._directory.add(copy)
            case StoreLost():
                self._forget(event.store)
            case CopyLanded():
                if event.copy.store in self._stores:
                    self._directory.add(event.copy)
            case CopyDropped():
                self._directory.remove(CopyKey(event.block, event.store, event.format))
            case _:
                pass
        return []

    def _forget(self, store: str) -> None:
        for copy in self._directory.of_store(store):
            self._directory.remove(CopyKey(copy.block, store, copy.format))
        self._stores.pop(store, None)

    @property
    def version(self) -> int:
        """Version of the directory; grows with every copy that comes or goes."""
        return self._directory.version

    def directory(self) -> tuple[Copy, ...]:
        """All listed copies."""
        return tuple(self._directory)

    def changes_since(self, version: int) -> Delta:
        """Return what a reader of the directory at `version` is missing."""
        return self._directory.changes_since(version)

    def copies(self, block: BlockId) -> tuple[Copy, ...]:
        """Listed copies of one block (storage, which has every block, is not listed)."""
        return self._directory.of_block(block)

    def stores(self) -> tuple[StoreInfo, ...]:
        """Stores that are in, by name."""
        return tuple(self._stores[name] for name in sorted(self._stores))

    def drained(self, store: str) -> bool:
        """Whether a draining store has nothing left that another store should take first."""
        return store not in self._stores or not self._directory.of_store(store)

    def state(self, block: BlockId, store: str) -> State:
        """State of `block` at `store` as the brain sees it."""
        here = any(copy.store == store for copy in self.copies(block))
        return State.FULL if here else State.STORED

    def story(self, block: BlockId) -> tuple[str, ...]:
        """What happened to the block, oldest first, one line each."""
        return tuple(str(copy) for copy in self.copies(block))

    def validate(self) -> None:
        """Assert invariants 1, 2, 4 and 6 of the design."""
