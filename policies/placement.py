"""Where copies should go: pure proposals from the brain's books, in a fixed order.

Decides targets; `brain` asks for them and keeps the books. Must not know events, epochs or how
bytes move. Ties fall to the block's spread order (same expert of every layer before the next
expert), then to the store's name, so equal inputs give equal proposals.

Pools hold the checkpoint between them: the hottest blocks in host memory, the rest in CXL.
A worker is filled once, when it joins, with the hottest blocks that the fewest other workers
hold; what it caches afterwards is its own decision.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from hotset.policies.types import Format, Reason, Tier

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray

    from hotset.policies.books import Sizes, StoreBook
    from hotset.policies.config import PolicyConfig

_MILLI = 1024
"""Ratios are compared as integers in this unit, so that no rounding differs between machines."""


@dataclass(frozen=True, slots=True)
class Put:
    """`book`'s store should get a copy of the block, by `due_ns` (0: some time).

    `displaces` is the block whose copy it takes the place of, by a `Take` before it; -1: none.
    """

    book: StoreBook
    flat: int
    format: Format
    reason: Reason
    due_ns: int = 0
    displaces: int = -1


@dataclass(frozen=True, slots=True)
class Take:
    """`book`'s store should free its full copy of the block."""

    book: StoreBook
    flat: int
    reason: Reason


@dataclass(frozen=True, slots=True, kw_only=True)
class View:
    """What every planner looks at. `spread[i]` is the i-th block of the spread order.

    `counts` is popularity, `worth` that times the stall that a nearer copy avoids, `pays` says
    whether this outweighs moving the block. `may_reduce[flat]`: the precision floor allows a
    reduced copy. `dense`: a step touches nearly all blocks. `pressed`: stores that compute keeps
    busy, where nothing is rearranged. `planned`: blocks that compute takes in another format than
    full precision.
    """

    books: Sequence[StoreBook]
    counts: NDArray[np.int64]
    worth: NDArray[np.int64]
    pays: NDArray[np.bool_]
    dense: bool
    pressed: frozenset[str]
    spread: NDArray[np.intp]
    sizes: Sizes
    may_reduce: NDArray[np.bool_]
    config: PolicyConfig
    now_ns: int
    planned: Mapping[int, Format] = field(default_factory=dict)

    def hot_order(self, counts: NDArray[np.int64] | None = None) -> NDArray[np.intp]:
        """Blocks, the one worth most first, ties in spread order."""
        ranked = self.worth if counts is None else counts
        return self.spread[np.argsort(-ranked[self.spread], kind="stable")]

    def copies(self, *tiers: Tier, landed_only: bool = False) -> NDArray[np.int64]:
        """Return full copies by block in stores of these tiers that stay (queued ones count)."""
        total = np.zeros(len(self.counts), dtype=np.int64)
        for book in self.books:
            if book.info.tier in tiers and not book.draining:
                total += book.full if landed_only else (book.full | book.coming)
        return total

    def stays(self, tier: Tier) -> list[StoreBook]:
        """Return the stores of a tier that take copies."""
        return [book for book in self.books if book.info.tier is tier and not book.draining]


class _Room:
    """Free bytes by store while a plan is made, with each store's own refusals."""

    def __init__(self, view: View, books: Sequence[StoreBook], *, cooled: bool = False) -> None:
        """`cooled`: a block that has just left a store does not come back."""
        self._view = view
        self._since_ns = view.now_ns - view.config.cool_down_ns if cooled else view.now_ns
        self._free = {book.info.name: book.free_bytes(view.sizes) for book in books}
        self._books = list(books)

    def most(self) -> int:
        """Most bytes free in one store."""
        return max(self._free.values(), default=0)

    def take(self, flat: int) -> StoreBook | None:
        """Claim room for a full copy in the store with the most room that lacks the block."""
        nbytes = int(self._view.sizes.full[flat])
        best: StoreBook | None = None
        for book in self._books:
            room = self._free[book.info.name]
            if room < nbytes or (best and room <= self._free[best.info.name]):
                continue
            wait = book.retry_ns.get((flat, Format.BF16), 0) > self._view.now_ns
            hot = book.left_ns[flat] > self._since_ns
            if not (wait or hot or book.full[flat] or book.coming[flat]):
                best = book
        if best:
            self._free[best.info.name] -= nbytes
        return best


def cover(view: View, *, reason: Reason) -> list[Put]:
    """Give every block that no pool holds a place in one, the hottest nearest to compute.

    Where compute takes cheaper formats, host memory is theirs and full copies go to CXL first.
    """
    bare = view.copies(Tier.HOST, Tier.CXL) == 0
    if not bare.any():
        return []
    tiers = (Tier.CXL, Tier.HOST) if view.planned else (Tier.HOST, Tier.CXL)
    rooms = [_Room(view, view.stays(tier)) for tier in tiers]
    puts: list[Put] = []
    for flat in view.hot_order():
        if not bare[flat]:
            continue
        if max(room.most() for room in rooms) < view.sizes.smallest:
            break
        for room in rooms:
            book = room.take(int(flat))
            if book:
                puts.append(Put(book, int(flat), Format.BF16, reason))
                break
    return puts


def fill_host(view: View) -> list[Put]:
    """Use free host memory for blocks that only slower tiers hold, hottest first.

    For a host pool that joined after the CXL pool had taken the blocks.
    """
    room = _Room(view, view.stays(Tier.HOST))
    order = view.hot_order()
    puts: list[Put] = []
    for flat in order[view.copies(Tier.HOST)[order] == 0]:
        if room.most() < view.sizes.smallest:
            break
        book = room.take(int(flat))
        if book:
            puts.append(Put(book, int(flat), Format.BF16, Reason.STAGE))
    return puts


def fill_worker(view: View, book: StoreBook) -> list[Put]:
    """Fill a worker that joined: hottest first, each other worker's copy halving the worth.

    A share `hbm_reduced_ratio` of its memory is offered to reduced copies of the blocks that
    follow. Those below their layer's floor are proposed as well, so that the brain's guardrail
    refuses them by name, but no room is planned for them: full copies take it.
    """
    left = book.free_bytes(view.sizes)
    elsewhere = view.copies(Tier.HBM, Tier.COMPRESSED)
    order = view.hot_order((view.worth + _MILLI) // (1 + elsewhere))
    order = order[~(book.full | book.coming)[order]]
    full, reduced = view.sizes.full, view.sizes.reduced
    share = view.config.hbm_reduced_ratio if view.may_reduce.any() else 0.0
    cut = _prefix(full, order, left - int(left * share))
    due_ns = view.now_ns + view.config.fill_ns
    puts = [Put(book, int(flat), Format.BF16, Reason.WARM, due_ns) for flat in order[:cut]]
    left -= int(full[order[:cut]].sum())
    rest = order[cut:]
    if view.config.hbm_reduced_ratio <= 0:
        return puts
    allowed = view.may_reduce[rest]
    offered = rest[allowed][: _prefix(reduced, rest[allowed], left)]
    refused = rest[: _prefix(reduced, rest, left)]
    refused = refused[~view.may_reduce[refused]]
    left -= int(reduced[offered].sum())
    others = rest[~np.isin(rest, offered)]
    more = others[: _prefix(full, others, left)]
    puts += [Put(book, int(flat), Format.BF16, Reason.WARM, due_ns) for flat in more]
    for flats in (offered, refused):
        puts += [Put(book, int(flat), Format.INT8, Reason.DEMOTE) for flat in flats]
    return puts


def _prefix(nbytes: NDArray[np.int64], order: NDArray[np.intp], budget: int) -> int:
    """Return how many of the first blocks of `order` fit into the budget."""
    return int(np.searchsorted(np.cumsum(nbytes[order]), budget, side="right"))


def rebalance(view: View) -> list[Put | Take]:
    """Bring what has become hot into host memory, at most `bytes_per_tick`, with hysteresis.

    Free host room is used first (STAGE, then REPLICATE). Then hot blocks displace cold copies
    that have stayed `min_dwell_ns` and are less popular by `min_gain_ratio`; a victim that no
    other pool holds is first copied to CXL (SPILL) when there is room, and leaves on a later
    tick. Last, copies in a full CXL pool that host memory also holds make way for blocks that no
    pool holds. A move that does not pay is not made, a block that has just left does not come
    back, and where a step touches nearly all blocks popularity displaces nothing.
    """
    if not view.counts.any():
        return []
    hosts = [book for book in view.stays(Tier.HOST) if book.info.name not in view.pressed]
    moves: list[Put | Take] = []
    left = view.config.bytes_per_tick
    if hosts:
        left = _stage(view, hosts, moves, left=left)
        if not view.dense:
            left = _swap(view, hosts, moves, left=left)
    _dedupe(view, moves, left=left)
    return moves


def _stage(view: View, hosts: list[StoreBook], moves: list[Put | Take], *, left: int) -> int:
    room = _Room(view, hosts, cooled=True)
    copies = view.copies(Tier.HOST)
    bar = max(1, int(view.counts.mean() * view.config.replicate_ratio))
    again = (view.counts >= bar) & (copies < view.config.max_host_copies)
    wanted = (view.counts > 0) & view.pays & ((copies == 0) | again)
    order = view.hot_order()
    for flat in order[wanted[order]]:
        nbytes = int(view.sizes.full[flat])
        if left < nbytes or room.most() < nbytes:
            break
        book = room.take(int(flat))
        if book:
            reason = Reason.REPLICATE if copies[flat] else Reason.STAGE
            due_ns = view.now_ns + view.config.payback_ns
            moves.append(Put(book, int(flat), Format.BF16, reason, due_ns))
            left -= nbytes
    return left


def _swap(view: View, hosts: list[StoreBook], moves: list[Put | Take], *, left: int) -> int:
    gain = int(view.config.min_gain_ratio * _MILLI)
    copies = view.copies(Tier.HOST)
    asked = {move.flat for move in moves}
    order = view.hot_order()
    since_ns = view.now_ns - view.config.cool_down_ns
    cold = np.logical_and.reduce([book.left_ns <= since_ns for book in hosts])
    wanted = (copies == 0) & view.pays & cold
    hot = (int(flat) for flat in order[wanted[order]] if int(flat) not in asked)
    cxl_holds = view.copies(Tier.CXL)
    landed_cxl = view.copies(Tier.CXL, landed_only=True)
    spill = _Room(view, view.stays(Tier.CXL))
    due_ns = view.now_ns + view.config.payback_ns
    victims = _cold_copies(view, hosts, copies)
    flat = next(hot, None)
    for worth, book, victim in victims:
        if flat is None or left < view.sizes.full[flat]:
            break
        if int(view.worth[flat]) * _MILLI <= worth * gain:
            break
        alone = copies[victim] < 2 and not landed_cxl[victim]
        target = spill.take(victim) if alone and not cxl_holds[victim] else None
        if target:
            moves.append(Put(target, victim, Format.BF16, Reason.SPILL))
            left -= int(view.sizes.full[victim])
            flat = next(hot, None)  # its turn comes when the victim has been copied
            continue
        if alone and cxl_holds[victim]:
            continue  # its spill is on the way
        if view.sizes.full[flat] > view.sizes.full[victim]:
            continue
        moves.append(Take(book, victim, Reason.REBALANCE))
        moves.append(Put(book, flat, Format.BF16, Reason.STAGE, due_ns, displaces=victim))
        left -= int(view.sizes.full[flat])
        copies[victim] -= 1
        flat = next(hot, None)
    return left


def _cold_copies(
    view: View, hosts: list[StoreBook], copies: NDArray[np.int64]
) -> list[tuple[int, StoreBook, int]]:
    """Host copies that may leave, coldest first: (worth, store, block)."""
    found: list[tuple[NDArray[np.int64], NDArray[np.intp], int]] = []
    for index, book in enumerate(hosts):
        if book.queue or book.later:
            continue  # it is still busy with the last plan
        ripe = book.full & (book.landed_ns + view.config.min_dwell_ns <= view.now_ns)
        for flat, _ in book.dropping:
            ripe[flat] = False
        where = np.flatnonzero(ripe)
        found.append((view.worth[where] // np.maximum(copies[where], 1), where, index))
    if not found:
        return []
    worth = np.concatenate([part for part, _, _ in found])
    where = np.concatenate([part for _, part, _ in found])
    owner = np.concatenate([np.full(len(part), index) for _, part, index in found])
    # Only as many as one tick can move: sorting is cheap, Python objects are not.
    most = int(view.config.bytes_per_tick // max(view.sizes.smallest, 1)) + 1
    order = np.argsort(worth, kind="stable")[:most]
    return [(int(worth[at]), hosts[int(owner[at])], int(where[at])) for at in order]


def _dedupe(view: View, moves: list[Put | Take], *, left: int) -> None:
    bare = int((view.copies(Tier.HOST, Tier.CXL) == 0).sum())
    pools = view.stays(Tier.CXL)
    if not bare or not pools or _Room(view, pools).most() >= view.sizes.smallest:
        return
    in_host = view.copies(Tier.HOST, landed_only=True) > 0
    going = {(move.book.info.name, move.flat) for move in moves if isinstance(move, Take)}
    going_flats = {flat for _, flat in going}
    for book in pools:
        ripe = book.full & in_host & (book.landed_ns + view.config.min_dwell_ns <= view.now_ns)
        for flat in np.flatnonzero(ripe):
            nbytes = int(view.sizes.full[flat])
            if left < nbytes or not bare:
                return
            if int(flat) in going_flats or (int(flat), Format.BF16) in book.dropping:
                continue
            moves.append(Take(book, int(flat), Reason.REBALANCE))
            left -= nbytes
            bare -= 1
