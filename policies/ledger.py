"""What the brain knows: stores, copies, popularity and stories, with every question about them.

Decides nothing and answers everything: `ClusterBrain` adds the decisions. Must not know events.
Reading never changes anything.

Invariants (`validate`): the books match the directory; listed and claimed bytes of a store never
exceed its capacity; epochs only grow; the states of all blocks at a store add up; every block
has a verified copy (storage has all of them, so this holds by construction and is asserted for
what is listed).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from hotset.policies import placement, score
from hotset.policies.books import Sizes, StoreBook
from hotset.policies.config import PolicyConfig
from hotset.policies.directory import CopyKey, Delta, Directory
from hotset.policies.guard import QUALITY, Guardrail
from hotset.policies.halflife import LearntPopularity
from hotset.policies.outlook import GUESSES, Outlook, Regime
from hotset.policies.popularity import ONE
from hotset.policies.states import state_of
from hotset.policies.story import Stories, StoryLine
from hotset.policies.types import (
    LOSSLESS,
    BlockId,
    BlockInfo,
    Copy,
    Format,
    Reason,
    State,
    StoreInfo,
    Tier,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from hotset.policies.linkmodel import LinkSpec


_HIDE_STEP_NS = 100_000
"""Layer times are compared in steps of this, so that their noise does not reprice all blocks."""
_FORMATS = tuple(Format)  # iterating over the class costs ten times as much


class _Prices(NamedTuple):
    """Of each block; `basis` is what they were computed from."""

    basis: tuple[LinkSpec, LinkSpec, int]
    saved_ns: NDArray[np.int64]
    move_ns: NDArray[np.int64]
    weight: NDArray[np.int64]


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
        self._popularity = LearntPopularity(
            len(self.blocks), half_life_tokens=self.config.popularity_half_life_tokens
        )
        self._outlook = Outlook(self.config)
        self._sensitivity = score.sensitivities(self.blocks, self.config.sensitivity)
        self._priced: _Prices | None = None
        self._directory = Directory(changes_kept=self.config.changes_kept)
        self._books: dict[str, StoreBook] = {}
        self._stories = Stories(limit=self.config.story_lines)
        self._now_ns = 0
        self._checked_epoch = epoch
        self._ids = tuple(info.block for info in self.blocks)
        self._planned = {
            self._flat[block]: form
            for block, form in self.config.formats.items()
            if block in self._flat
        }
        self._may_reduce = self.guard.may_compute(self._ids, Format.INT8)

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
        return not any(
            book.pending or book.queue or book.later or book.dropping
            for book in self._books.values()
        )

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
        if book.pending and any((flat, form) in book.pending for form in _FORMATS):
            return State.IN_FLIGHT
        if not copies:
            return State.STORED
        return State.RECOMPUTABLE if book.worker and _only_parts(copies) else State.STAGED

    def census(self, store: str) -> dict[State, int]:
        """Return the number of blocks in each state at a store; they add up to all blocks."""
        counts = dict.fromkeys(State, 0)
        book = self._books.get(store)
        if book is None:
            return {**counts, State.STORED: len(self.blocks)}
        listed = self._directory.blocks()
        counts[State.STAGED] = listed
        counts[State.STORED] = len(self.blocks) - listed
        parts = self._in_parts() if book.worker else set()
        counts[State.RECOMPUTABLE] = len(parts)
        counts[State.STAGED] -= len(parts)
        here = {copy.block for copy in self._directory.of_store(store)}
        moving = {self.blocks[flat].block for flat, _ in book.pending} - here
        for block in sorted(here | moving):
            counts[self.state(block, store)] += 1
            elsewhere = State.RECOMPUTABLE if block in parts else State.STAGED
            counts[elsewhere if self._directory.has(block) else State.STORED] -= 1
        return counts

    def _in_parts(self) -> set[BlockId]:
        """Blocks of which only low-rank differences are listed: rebuilt when needed (S7)."""
        if Format.LOWRANK not in self.config.formats.values():
            return set()
        found = {copy.block for copy in self._directory if copy.format is Format.LOWRANK}
        return {block for block in found if _only_parts(self._directory.of_block(block))}

    def popularity(self) -> NDArray[np.float64]:
        """Aged tokens by block, [blocks], in the order of `blocks`."""
        return self._popularity.counts / ONE

    @property
    def half_life_tokens(self) -> int:
        """Half-life of popularity that has predicted best so far."""
        return self._popularity.half_life_tokens

    @property
    def regime(self) -> Regime:
        """What a step asks of the cluster, as of the last tick."""
        return self._outlook.regime

    def pressed(self, store: str) -> bool:
        """Whether background work to and from this store waits."""
        return self._outlook.pressed(store)

    def reuse_horizon_ns(self) -> NDArray[np.int64]:
        """Expected time between two uses of each block; `score.NEVER_NS` where nobody knows."""
        return score.reuse_horizon_ns(self._popularity.counts, rates=self._rates())

    def story_lines(self, block: BlockId) -> tuple[StoryLine, ...]:
        """Return what happened to the block, oldest first."""
        return self._stories.lines(block)

    def story(self, block: BlockId) -> tuple[str, ...]:
        """Return what happened to the block, oldest first, one line each."""
        return tuple(str(line) for line in self._stories.lines(block))

    # --- shared with the brain ---------------------------------------------------------------

    def _note(self, block: BlockId, event: str, reason: Reason | None, *, store: str) -> None:
        """Add to the block's story; the line shows its state at `store` after the event."""
        self._stories.of(block).add(
            self._now_ns, state=self.state(block, store), event=event, reason=reason, store=store
        )

    def _list(self, book: StoreBook, copy: Copy) -> None:
        flat = self._flat[copy.block]
        if self._directory.add(copy) is None:
            book.used_bytes += self._sizes.of(flat, copy.format)
        book.capacity_bytes = max(book.capacity_bytes, book.used_bytes)
        here = book.full if copy.format in LOSSLESS else book.reduced
        here[flat] = True
        book.landed_ns[flat] = self._now_ns
        self._tell_guard(copy.block)

    def _tell_guard(self, block: BlockId) -> None:
        """Tell in which formats devices compute `block`: the best that each of them holds."""
        if self.guard.drift is None:
            return
        best: dict[str, Format] = {}
        for copy in self._directory.of_block(block):
            if self._books[copy.store].worker:
                formats = (copy.format, best.get(copy.store, copy.format))
                best[copy.store] = max(formats, key=lambda form: QUALITY[form])
        self.guard.resident(block, best.values(), now_ns=self._now_ns)

    def _unlist(self, book: StoreBook, key: CopyKey) -> None:
        flat = self._flat[key.block]
        book.dropping.pop((flat, key.format), None)
        if self._directory.remove(key) is None:
            return
        self._tell_guard(key.block)
        book.used_bytes -= self._sizes.of(flat, key.format)
        left = [copy for copy in self._directory.of_block(key.block) if copy.store == key.store]
        book.full[flat] = any(copy.format in LOSSLESS for copy in left)
        book.reduced[flat] = any(copy.format not in LOSSLESS for copy in left)
        book.break_promise(flat)

    def _rates(self) -> score.Rates:
        outlook = self._outlook
        return score.Rates(
            tokens_per_s=outlook.tokens_per_s(self._now_ns),
            uses_per_token=outlook.uses_per_token,
            hide_ns=outlook.hide_ns(self._now_ns),
        )

    def _prices(self, hide_ns: int) -> _Prices:
        """What reads and moves cost, computed anew only when somebody has measured anew."""
        near = self._slowest(Tier.HOST)
        far = self._slowest(Tier.CXL)
        basis = (near, far, hide_ns // _HIDE_STEP_NS)
        if self._priced is None or self._priced.basis != basis:
            nbytes = self._sizes.full
            saved = score.saved_ns(nbytes, near=near, far=far, hide_ns=hide_ns)
            move_ns = score.exposed_ns(nbytes, link=far, hide_ns=0, decode_ns=0)
            weight = score.weights(saved, nbytes)
            self._priced = _Prices(basis, saved, move_ns, weight)
        return self._priced

    def _slowest(self, tier: Tier) -> LinkSpec:
        specs = [
            self._outlook.link(name, tier)
            for name in sorted(self._books)
            if self._books[name].info.tier is tier
        ] or [GUESSES[tier]]
        return min(specs, key=lambda spec: (spec.bandwidth_bytes_per_s, -spec.latency_ns))

    def _view(self) -> placement.View:
        counts, rates = self._popularity.counts, self._rates()
        prices = self._prices(rates.hide_ns)
        return placement.View(
            books=[self._books[name] for name in sorted(self._books)],
            counts=counts,
            worth=score.worth(counts, prices.weight),
            pays=score.pays(
                counts,
                saved=prices.saved_ns,
                move_ns=prices.move_ns,
                rates=rates,
                payback_ns=self.config.payback_ns,
            ),
            dense=self._outlook.regime is Regime.DENSE,
            pressed=frozenset(name for name in self._books if self._outlook.pressed(name)),
            spread=self._spread,
            sizes=self._sizes,
            may_reduce=self._may_reduce,
            planned=self._planned,
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
            assert self.guard.check_floor(copy.block, copy.format) is None, copy  # noqa: S101 - our own bugs
        for name, book in self._books.items():
            self._validate_book(name, book)

    def _validate_book(self, name: str, book: StoreBook) -> None:
        copies = self._directory.of_store(name)
        used = sum(self._sizes.of(self._flat[copy.block], copy.format) for copy in copies)
        claimed = sum(pending.nbytes for pending in book.pending.values())
        assert used == book.used_bytes, (name, used, book.used_bytes)  # noqa: S101 - our own bugs
        assert claimed == book.pending_bytes, (name, claimed)  # noqa: S101 - our own bugs
        assert used + claimed <= book.capacity_bytes <= book.info.capacity_bytes, name  # noqa: S101 - our own bugs
        full = {self._flat[copy.block] for copy in copies if copy.format in LOSSLESS}
        assert full == set(np.flatnonzero(book.full).tolist()), name  # noqa: S101 - our own bugs
        reduced = {self._flat[copy.block] for copy in copies if copy.format not in LOSSLESS}
        assert reduced == set(np.flatnonzero(book.reduced).tolist()), name  # noqa: S101 - our own bugs
        wished = [(wish.flat, wish.format) for wish in book.wishes()]
        coming = {flat for flat, form in [*book.pending, *wished] if form is Format.BF16}
        assert coming == set(np.flatnonzero(book.coming).tolist()), name  # noqa: S101 - our own bugs
        assert len(set(wished)) == len(wished), name  # noqa: S101 - our own bugs
        lost = [f for f in book.kept if not book.full[f] and (f, Format.BF16) not in book.pending]
        assert not lost, (name, lost)  # noqa: S101 - our own bugs
        kept = sum(int(self._sizes.full[flat]) for flat in book.kept)
        assert kept <= book.info.capacity_bytes * self.config.keep_ratio, name  # noqa: S101 - our own bugs
        assert not set(wished) & set(book.pending), name  # noqa: S101 - our own bugs
        census = self.census(name)
        assert sum(census.values()) == len(self.blocks), census  # noqa: S101 - our own bugs


def _only_parts(copies: Sequence[Copy]) -> bool:
    return all(copy.format is Format.LOWRANK for copy in copies)
