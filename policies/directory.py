"""The directory: which verified copies exist in the cluster, by block and by store.

Decides nothing. Must not know why copies come and go. The version grows by one with every
change, so a reader that knows version v can be brought up to date by `changes_since(v)`.

Invariants: a copy is listed once, under (block, store, format); the bytes by store are the sum
of its listed copies; the counts by tier match the list.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from hotset.policies.types import BlockId, Copy, Format  # noqa: TC001 - msgspec reads annotations

if TYPE_CHECKING:
    from collections.abc import Iterator


class CopyKey(NamedTuple):
    """Where a copy is listed."""

    block: BlockId
    store: str
    format: Format


@dataclass(frozen=True, slots=True, kw_only=True)
class Delta:
    """What turns the directory of a reader at an older version into that of `version`.

    `whole`: the reader is too far behind; forget everything and take `added` as it is.
    """

    version: int
    whole: bool
    added: tuple[Copy, ...]
    removed: tuple[CopyKey, ...]


class Directory:
    """All listed copies."""

    def __init__(self, *, changes_kept: int = 65_536) -> None:
        """Keep the last `changes_kept` changes for deltas."""
        self.version = 0
        self._by_block: dict[BlockId, dict[tuple[str, Format], Copy]] = {}
        self._by_store: dict[str, dict[tuple[BlockId, Format], Copy]] = {}
        self._blocks = 0
        self._log: deque[tuple[int, CopyKey]] = deque(maxlen=changes_kept)

    def add(self, copy: Copy) -> Copy | None:
        """List the copy; return the one that it replaces."""
        copies = self._by_block.setdefault(copy.block, {})
        self._blocks += not copies
        old = copies.get((copy.store, copy.format))
        copies[copy.store, copy.format] = copy
        self._by_store.setdefault(copy.store, {})[copy.block, copy.format] = copy
        self._note(CopyKey(copy.block, copy.store, copy.format))
        return old

    def remove(self, key: CopyKey) -> Copy | None:
        """Take the copy off the list; return it, or None when it was not listed."""
        copies = self._by_block.get(key.block)
        copy = copies.pop((key.store, key.format), None) if copies else None
        if copy is None:
            return None
        self._blocks -= not copies
        del self._by_store[key.store][key.block, key.format]
        self._note(key)
        return copy

    def get(self, key: CopyKey) -> Copy | None:
        """Return the listed copy, or None."""
        return self._by_block.get(key.block, {}).get((key.store, key.format))

    def of_block(self, block: BlockId) -> tuple[Copy, ...]:
        """Copies of a block, in the order in which they were listed."""
        return tuple(self._by_block.get(block, {}).values())

    def has(self, block: BlockId) -> bool:
        """Whether any copy of the block is listed."""
        return bool(self._by_block.get(block))

    def blocks(self) -> int:
        """Return how many blocks have a listed copy."""
        return self._blocks

    def of_store(self, store: str) -> tuple[Copy, ...]:
        """Copies in a store, in the order in which they were listed."""
        return tuple(self._by_store.get(store, {}).values())

    def __iter__(self) -> Iterator[Copy]:
        """All copies, by block in the order of first listing."""
        for copies in self._by_block.values():
            yield from copies.values()

    def changes_since(self, version: int) -> Delta:
        """Return what a reader at `version` is missing."""
        if version == self.version:
            return Delta(version=version, whole=False, added=(), removed=())
        oldest = self._log[0][0] - 1 if self._log else self.version
        if version < oldest or version > self.version:
            return Delta(version=self.version, whole=True, added=tuple(self), removed=())
        keys = dict.fromkeys(key for at, key in self._log if at > version)
        added = [copy for copy in map(self.get, keys) if copy is not None]
        removed = tuple(key for key in keys if self.get(key) is None)
        return Delta(version=self.version, whole=False, added=tuple(added), removed=removed)

    def _note(self, key: CopyKey) -> None:
        self.version += 1
        self._log.append((self.version, key))
