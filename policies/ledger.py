"""What the brain knows: stores, copies, popularity and stories, with every question about them.

Decides nothing and answers everything: `ClusterBrain` adds the decisions. Must not know events.
Reading never changes anything.

Invariants (`validate`): the books match the directory; listed and claimed bytes of a store never
exceed its capacity; epochs only grow; the states of all blocks at a store add up; every block
has a verified copy (storage has all of them, so this holds by construction and is asserted for
what is listed).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from hotset.policies import placement
from hotset.policies.books import Sizes, StoreBook
from hotset.policies.config import PolicyConfig
from hotset.policies.directory import CopyKey, Delta, Directory
from hotset.policies.guard import Guardrail
from hotset.policies.popularity import ONE, Popularity
from hotset.policies.states import BlockStory, StoryLine, state_of
from hotset.policies.types import BlockId, BlockInfo, Copy, Format, Reason, State, StoreInfo

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray


class ClusterLedger:
    """The books of the cluster."""

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
        self.ignored = 0
        """Stale events that changed nothing."""
        self.blocks = tuple(sorted(blocks, key=lambda info: info.block))
        self._flat = {info.block: flat for flat, info in enumerate(self.blocks)}
        spread = sorted(self._flat, key=lambda block: (block.index, block.layer))
        self._spread = np.array([self._flat[block] for block in spread], dtype=np.intp)
        self._sizes = Sizes(self.blocks, config=self.config)
        self._popularity = Popularity(
            len(self.blocks), half_life_tokens=self.config.popularity_half_life_tokens
        )
        self._directory = Directory(changes_kept=self.config.changes_kept)
        self._books: dict[str, StoreBook] = {}
        self._stories: dict[BlockId, BlockStory] = {}
        self._now_ns = 0
        self._checked_epoch = epoch
        self._may_reduce = np.array(
            [self.guard.check_demotion(info.block, Format.INT8) is None for info in self.blocks],
            dtype=bool,
        )

    # --- questions ---------------------------------------------------------------------------

    @property
    def version(self) -> int:
        """Version of the directory; grows with every copy that comes or goes."""
        return self._directory.version

    def directory(self) -> tuple[Copy, ...]:
        """Return all listed copies (storage, which has every block, is not listed)."""
        return tuple(self._directory)

    def changes_since(self, version: int) -> Delta:
        """Return what a reader of the directory at `version` is missing."""
        return self._directory.changes_since(version)

    def copies(self, block: BlockId) -> tuple[Copy, ...]:
        """Return the listed copies of one block."""
        return self._directory.of_block(block)

    def stores(self) -> tuple[StoreInfo, ...]:
        """Return the stores that are in, by name."""
        return tuple(self._books[name].info for name in sorted(self._books))

    def used_bytes(self, store: str) -> int:
        """Bytes of the copies listed at a store, slot headers included."""
        return self._books[store].used_bytes if store in self._books else 0

    def pending(self) -> int:
        """Return how many transfers are asked for and not reported on."""
        return sum(len(book.pending) for book in self._books.values())

    def settled(self) -> bool:
        """Whether nothing is on its way, queued or about to be dropped."""
        return not any(book.pending or book.queue or book.dropping for book in self._books.values())

    def drained(self, store: str) -> bool:
        """Whether no copy of this store is on its way to, or waits for, another store."""
        book = self._books.get(store)
        if book is None:
            return True
        others = [other for other in self._books.values() if other.pool and other is not book]
        return not any(bool((other.coming & book.full).any()) for other in others)

    def state(self, block: BlockId, store: str) -> State:
        """State of `block` at `store`: for a pool, S4 says that the pool has a copy."""
        flat = self._flat[block]
        book = self._books.get(store)
        if book is None:
            return State.STORED
        copies = self._directory.of_block(block)
        here = [copy.format for copy in copies if copy.store == store]
        if here and not book.worker:
            return State.STAGED
        if here:
            return state_of(Format.BF16 if Format.BF16 in here else here[0])
        if any((flat, form) in book.pending for form in Format):
            return State.IN_FLIGHT
        return State.STAGED if copies else State.STORED

    def census(self, store: str) -> dict[State, int]:
        """Return the number of blocks in each state at a store; they add up to all blocks."""
        counts = dict.fromkeys(State, 0)
        book = self._books.get(store)
        if book is None:
            return {**counts, State.STORED: len(self.blocks)}
        listed = {copy.block for copy in self._directory}
        counts[State.STAGED] = len(listed)
        counts[State.STORED] = len(self.blocks) - len(listed)
        here = {copy.block for copy in self._directory.of_store(store)}
        moving = {self.blocks[flat].block for flat, _ in book.pending} - here
        for block in sorted(here | moving):
            counts[self.state(block, store)] += 1
            counts[State.STAGED if block in listed else State.STORED] -= 1
        return counts

    def popularity(self) -> NDArray[np.float64]:
        """Aged tokens by block, [blocks], in the order of `blocks`."""
        return self._popularity.counts / ONE

    def story_lines(self, block: BlockId) -> tuple[StoryLine, ...]:
        """Return what happened to the block, oldest first."""
        story = self._stories.get(block)
        return story.lines() if story else ()

    def story(self, block: BlockId) -> tuple[str, ...]:
        """Return what happened to the block, oldest first, one line each."""
        story = self._stories.get(block)
        return tuple(str(line) for line in story.lines()) if story else ()

    # --- shared with the brain ---------------------------------------------------------------

    def _note(self, block: BlockId, event: str, reason: Reason | None, *, store: str) -> None:
        """Add to the block's story; the line shows its state at `store` after the event."""
        story = self._stories.get(block)
        if story is None:
            story = self._stories[block] = BlockStory(limit=self.config.story_lines)
        story.add(
            self._now_ns, state=self.state(block, store), event=event, reason=reason, store=store
        )

    def _list(self, book: StoreBook, copy: Copy) -> None:
        flat = self._flat[copy.block]
        if self._directory.add(copy) is None:
            book.used_bytes += self._sizes.of(flat, copy.format)
        book.capacity_bytes = max(book.capacity_bytes, book.used_bytes)
        if copy.format is Format.BF16:
            book.full[flat] = True
            book.landed_ns[flat] = self._now_ns

    def _unlist(self, book: StoreBook, key: CopyKey) -> None:
        flat = self._flat[key.block]
        book.dropping.pop((flat, key.format), None)
        if self._directory.remove(key) is None:
            return
        book.used_bytes -= self._sizes.of(flat, key.format)
        if key.format is Format.BF16:
            book.full[flat] = False

    def _view(self) -> placement.View:
        return placement.View(
            books=[self._books[name] for name in sorted(self._books)],
            counts=self._popularity.counts,
            spread=self._spread,
            sizes=self._sizes,
            may_reduce=self._may_reduce,
            config=self.config,
            now_ns=self._now_ns,
        )

    # --- invariants --------------------------------------------------------------------------

    def validate(self) -> None:
        """Assert invariants 1, 2, 4 and 6 of the design."""
        assert self.epoch >= self._checked_epoch, "epochs only grow"  # noqa: S101 - our own bugs
        self._checked_epoch = self.epoch
        for copy in self._directory:
            book = self._books.get(copy.store)
            assert book is not None, f"{copy.store} is gone, its copy is listed"  # noqa: S101 - our own bugs
            assert copy.incarnation == book.info.incarnation, copy  # noqa: S101 - our own bugs
            assert self.guard.check_demotion(copy.block, copy.format) is None, copy  # noqa: S101 - our own bugs
        for name, book in self._books.items():
            self._validate_book(name, book)

    def _validate_book(self, name: str, book: StoreBook) -> None:
        copies = self._directory.of_store(name)
        used = sum(self._sizes.of(self._flat[copy.block], copy.format) for copy in copies)
        claimed = sum(pending.nbytes for pending in book.pending.values())
        assert used == book.used_bytes, (name, used, book.used_bytes)  # noqa: S101 - our own bugs
        assert claimed == book.pending_bytes, (name, claimed)  # noqa: S101 - our own bugs
        assert used + claimed <= book.capacity_bytes <= book.info.capacity_bytes, name  # noqa: S101 - our own bugs
        full = {self._flat[copy.block] for copy in copies if copy.format is Format.BF16}
        assert full == set(np.flatnonzero(book.full).tolist()), name  # noqa: S101 - our own bugs
        wished = [(wish.flat, wish.format) for wish in book.queue]
        coming = {flat for flat, form in [*book.pending, *wished] if form is Format.BF16}
        assert coming == set(np.flatnonzero(book.coming).tolist()), name  # noqa: S101 - our own bugs
        assert len(set(wished)) == len(wished), name  # noqa: S101 - our own bugs
        assert not set(wished) & set(book.pending), name  # noqa: S101 - our own bugs
        census = self.census(name)
        assert sum(census.values()) == len(self.blocks), census  # noqa: S101 - our own bugs
