"""Fixed-width rows of what happened, in a ring: the data path appends, telemetry drains.

A row is written on the token path, so appending must cost under 2 us and must never allocate,
lock for long or block: when the ring is full the oldest rows are overwritten and counted as
dropped. Rows are plain bytes of `ROW` and can be shipped and stored as they are.

This module knows rows, not what reads them. Codes of kinds and statuses are append-only.
"""

from __future__ import annotations

import struct
import threading
from enum import IntEnum
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence


class Kind(IntEnum):
    """What a row tells."""

    TRANSFER = 1  # one block arrived (or did not) at this store
    STEP = 2  # one forward pass of one request
    LAYER = 3  # one MoE layer of one step (sampled)
    WAIT = 4  # compute waited for a transfer (a stall)
    DISPATCH = 5  # tokens sent to a peer that has the expert


class Code(IntEnum):
    """How it ended."""

    OK = 0
    FAILED = 1
    STALE = 2
    TIMED_OUT = 3
    CANCELLED = 4


NO_NAME = 0xFFFF

ROW = np.dtype(
    [
        ("kind", "<u2"),
        ("code", "<u2"),
        ("source", "<u2"),  # index into the ring's name table; NO_NAME when absent
        ("format", "<u2"),  # format code of the block
        ("layer", "<i4"),
        ("index", "<i4"),  # expert, or number of tokens for STEP and LAYER
        ("start_ns", "<i8"),  # wall clock
        ("end_ns", "<i8"),
        ("row_id", "<u8"),  # span id of this row, unique in the cluster
        ("waits_for", "<u8"),  # row_id of the transfer waited for; 0 when none
        ("parent", "<u8"),  # row_id of the step this belongs to; 0 when none
        ("trace_hi", "<u8"),  # trace id of the request
        ("trace_lo", "<u8"),
        ("nbytes", "<i8"),
        ("queue_ns", "<i8"),
        ("wire_ns", "<i8"),
        ("verify_ns", "<i8"),
        ("activate_ns", "<i8"),
        ("reason", "<u2"),  # index into the ring's name table
        ("used", "<u2"),  # 1 when compute used the bytes, 0 when unknown
        ("attempt", "<u4"),
    ]
)
_PACK = struct.Struct("<HHHHiiqqQQQQQqqqqqHHI")
assert _PACK.size == ROW.itemsize  # noqa: S101 - the two descriptions of a row must agree


class Ring:
    """A ring of rows with a table of names, written by many threads and drained by one.

    Invariant: written == drained + dropped + still in the ring.
    """

    def __init__(self, *, capacity: int = 1 << 16) -> None:
        """Reserve `capacity` rows now, so that appending never allocates."""
        self._rows = bytearray(capacity * ROW.itemsize)
        self._capacity = capacity
        self._lock = threading.Lock()
        self._written = 0
        self._drained = 0
        self._names: dict[str, int] = {}
        self.dropped = 0

    @property
    def written(self) -> int:
        """Rows appended since the start."""
        return self._written

    def name(self, text: str) -> int:
        """Index of a name (store, reason); new names are added."""
        index = self._names.get(text)
        if index is None:
            with self._lock:
                index = self._names.setdefault(text, len(self._names))
        return index

    def names(self) -> list[str]:
        """Names by index."""
        return list(self._names)

    def append(  # noqa: PLR0913 - one argument a column, on the hot path, without an object
        self,
        kind: int,
        *,
        code: int = 0,
        source: int = NO_NAME,
        format_code: int = 0,
        layer: int = -1,
        index: int = -1,
        start_ns: int,
        end_ns: int,
        row_id: int,
        waits_for: int = 0,
        parent: int = 0,
        trace_hi: int = 0,
        trace_lo: int = 0,
        nbytes: int = 0,
        queue_ns: int = 0,
        wire_ns: int = 0,
        verify_ns: int = 0,
        activate_ns: int = 0,
        reason: int = NO_NAME,
        used: int = 0,
        attempt: int = 0,
    ) -> None:
        """Write one row."""
        with self._lock:
            _PACK.pack_into(
                self._rows,
                (self._written % self._capacity) * ROW.itemsize,
                kind, code, source, format_code, layer, index, start_ns, end_ns,
                row_id, waits_for, parent, trace_hi, trace_lo, nbytes,
                queue_ns, wire_ns, verify_ns, activate_ns, reason, used, attempt,
            )  # fmt: skip
            self._written += 1

    def extend(self, rows: Sequence[Sequence[int]]) -> None:
        """Write rows that have a value for each column of `ROW`, in its order."""
        with self._lock:
            for row in rows:
                _PACK.pack_into(self._rows, (self._written % self._capacity) * ROW.itemsize, *row)
                self._written += 1

    def drain(self) -> bytes:
        """Take all rows out, oldest first, as bytes of `ROW`."""
        with self._lock:
            start = max(self._drained, self._written - self._capacity)
            self.dropped += start - self._drained
            self._drained = self._written
            count = self._written - start
            first = start % self._capacity
            width = ROW.itemsize
            head = min(count, self._capacity - first)
            data = bytes(self._rows[first * width : (first + head) * width])
            return data + bytes(self._rows[: (count - head) * width])
