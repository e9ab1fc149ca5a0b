"""Which rows go to a collector: all that may matter, and a share of the ordinary transfers.

Ordinary is a transfer that ended well and that nothing waited for. Plans, vetoes, scale events,
steps, waits, dispatches and failures always pass, and so does every transfer that a wait names,
whatever the ratio: a transfer that is not chosen is held back for a batch, because the row of the
wait for it comes right after its own, perhaps in the next batch. A use passes with its transfer.

Must not know Ray or what happens to the rows. One sampler a store. Invariants: rows in == passed +
sampled out + held; the same ids are chosen in every process (a hash of the id decides); with a
ratio of 1 everything passes at once and in order.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import numpy as np

from hotset.actors.kinds import ControlKind
from hotset.transport.records import ROW, Code, Kind

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from hotset.actors.batches import Rows

_MIX: Final = np.uint64(0x9E3779B97F4A7C15)
"""Fibonacci hashing (Knuth, TAOCP 6.4): consecutive ids spread over the whole range."""
_MOST_RESCUED: Final = 1 << 16


class Sampler:
    """Passes rows of one store on."""

    def __init__(self, *, ratio: float) -> None:
        """Share of ordinary transfers to pass. Raises ValueError outside 0 to 1."""
        if not 0 <= ratio <= 1:
            raise ValueError(f"ratio must be from 0 to 1, not {ratio}")
        self._ratio = ratio
        self._bar = np.uint64(min(int(ratio * 2**64), 2**64 - 1))
        self._held: Rows = np.zeros(0, ROW)
        self._rescued: dict[int, None] = {}  # passed against the ratio, because waited for

    @property
    def held(self) -> int:
        """Rows that are held back for a batch."""
        return len(self._held)

    def sift(self, rows: Rows) -> tuple[Rows, int]:
        """Rows to pass on now, and how many were left out for good by this call."""
        if self._ratio >= 1:
            return rows, 0
        waited = rows["waits_for"][(rows["kind"] == Kind.WAIT) & (rows["waits_for"] != 0)]
        rescued = self._held[np.isin(self._held["row_id"], waited)]
        left_out = len(self._held) - len(rescued)
        ordinary = (rows["kind"] == Kind.TRANSFER) & (rows["code"] == Code.OK)
        spare = ordinary & ~self._chosen(rows["row_id"])
        named = spare & np.isin(rows["row_id"], waited)
        self._rescue([*rescued["row_id"].tolist(), *rows["row_id"][named].tolist()])
        held = spare & ~named
        uses = (rows["kind"] == ControlKind.USE) & ~self._chosen(rows["waits_for"])
        known = np.fromiter(self._rescued, np.uint64, len(self._rescued))
        unused = uses & ~np.isin(rows["waits_for"], known)
        self._held = rows[held].copy()
        passed = np.concatenate((rescued, rows[~held & ~unused]))
        return passed, left_out + int(unused.sum())

    def flush(self) -> int:
        """Leave out what is held back (the end of a run); returns how many rows."""
        count, self._held = len(self._held), self._held[:0]
        return count

    def _chosen(self, ids: NDArray[np.uint64]) -> NDArray[np.bool_]:
        mixed: Any = ids * _MIX
        chosen: NDArray[np.bool_] = (mixed < self._bar) & (ids != 0)
        return chosen

    def _rescue(self, ids: list[int]) -> None:
        self._rescued |= dict.fromkeys(ids)
        while len(self._rescued) > _MOST_RESCUED:
            del self._rescued[next(iter(self._rescued))]
