"""Which copies of a worker change their format: pure proposals, like `placement`.

Decides demotions and promotions in place; the guardrail may still refuse them. Must not know how
bytes are encoded. What a block suffers from a cheap format is popularity times its measured
sensitivity, so a block that is little used or little sensitive is demoted first.

With hysteresis: a copy keeps its format for `min_dwell_ns`, a pair changes only when the one to be
promoted suffers `min_gain_ratio` times as much. In the dense regime, where bytes are what is short,
demotions also refill the share of memory that is offered to reduced copies.

Where formats are planned for each block (`formatplan`), stores are filled by that plan when they
join: workers with each block in its own format, host memory with the cheap copies that workers will
ask for, so that a miss moves few bytes.

Invariants: at most `changes_per_tick` of each kind; never a format below a floor; nothing while
nobody has counted anything.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from hotset.policies.placement import Put
from hotset.policies.types import LOSSLESS, Format, Reason, Tier

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from hotset.policies.books import StoreBook
    from hotset.policies.placement import View

_UNIT = 1024
RESERVED_SLOTS = 2
"""Slots of a worker that a plan cannot use: one to decode into, one for the live check."""


class Change(NamedTuple):
    """A copy at `book`'s store should change its format."""

    book: StoreBook
    flat: int
    format: Format
    into: Format
    reason: Reason


def reformat(view: View, book: StoreBook, *, sensitivity: NDArray[np.int64]) -> list[Change]:
    """Propose changes at one worker; `sensitivity` [blocks] in units of 1 / 1024 of the mean."""
    share = view.config.hbm_reduced_ratio
    if not book.worker or book.draining or share <= 0 or not view.counts.any():
        return []
    pain = view.counts // _UNIT * sensitivity
    ripe = book.landed_ns + view.config.min_dwell_ns <= view.now_ns
    for flat, _ in book.pending:
        ripe[flat] = False
    cold = np.flatnonzero(book.full & ripe & view.may_reduce & ~book.reduced)
    hurt = np.flatnonzero(book.reduced & ripe & ~book.full)
    most = view.config.changes_per_tick
    cold = cold[np.argsort(pain[cold], kind="stable")][: 2 * most]
    hurt = hurt[np.argsort(-pain[hurt], kind="stable")][:most]
    gain = int(view.config.min_gain_ratio * _UNIT)
    changes: list[Change] = []
    pairs = 0
    for low, high in zip(cold.tolist(), hurt.tolist(), strict=False):
        if int(pain[high]) * _UNIT <= int(pain[low]) * gain:
            break
        changes += [_demote(book, low), _promote(book, high)]
        pairs += 1
    if view.dense:
        lacks = share * book.capacity_bytes - float(view.sizes.reduced[book.reduced].sum())
        for low in cold[pairs : pairs + most].tolist():
            lacks -= float(view.sizes.reduced[low])
            if lacks < 0:
                break
            changes.append(_demote(book, low))
    return changes


def _demote(book: StoreBook, flat: int) -> Change:
    return Change(book, flat, Format.BF16, Format.INT8, Reason.DEMOTE)


def _promote(book: StoreBook, flat: int) -> Change:
    return Change(book, flat, Format.INT8, Format.BF16, Reason.PROMOTE)


def fill_planned(view: View, book: StoreBook) -> list[Put]:
    """Fill a worker that joined with what fits, hottest first, each block in its planned format.

    Less `RESERVED_SLOTS`: what would go there is evicted again before it was used.
    """
    order = view.hot_order()
    order = order[~(book.full | book.reduced | book.coming)[order]]
    left = book.free_bytes(view.sizes) - RESERVED_SLOTS * view.sizes.of(0, Format.BF16)
    puts: list[Put] = []
    for flat in order.tolist():
        form = view.planned.get(flat, Format.BF16)
        nbytes = view.sizes.of(flat, form)
        if nbytes > left:
            break
        left -= nbytes
        puts.append(Put(book, flat, form, Reason.WARM if form in LOSSLESS else Reason.DEMOTE))
    return puts


def stage_planned(view: View) -> list[Put]:
    """Give cheap copies a place in host memory, then full ones what is left; hottest first."""
    puts: list[Put] = []
    free = {
        book.info.name: (book, book.free_bytes(view.sizes) - view.sizes.of(0, Format.BF16))
        for book in view.stays(Tier.HOST)  # less the slot in which a pool encodes
    }
    for cheap in (True, False):
        for flat in view.hot_order().tolist():
            form = view.planned.get(flat, Format.BF16)
            if not free or (form not in LOSSLESS) is not cheap:
                continue
            book, left = max(free.values(), key=lambda one: one[1])
            nbytes = view.sizes.of(flat, form)
            if nbytes > left or book.full[flat] or book.reduced[flat] or book.coming[flat]:
                continue
            free[book.info.name] = (book, left - nbytes)
            puts.append(Put(book, flat, form, Reason.STAGE))
    return puts
