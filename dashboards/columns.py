"""The spans of a run as plain columns, for CSV and SQL: names as text, ids as text, times as int.

Decides spelling and nothing else. Invariant: one row a span, in the order of the trace files.
"""

from __future__ import annotations

import csv
from typing import TYPE_CHECKING

import numpy as np

from hotset.dashboards.otlp import NONE

if TYPE_CHECKING:
    from pathlib import Path
    from typing import Any

    from numpy.typing import NDArray

    from hotset.dashboards.otlp import Spans

_TEXTS = ("name", "store", "source", "reason", "code", "format", "target")
_COUNTS = ("layer", "index", "epoch", "used")
_NUMBERS = ("start_ns", "end_ns", "nbytes", "tokens", "queue_ns", "wire_ns", "settle_ns", "links")
_IDS = ("span_id", "parent", "link", "request")
COLUMNS = ("name", "store", "start_ns", "end_ns", "duration_ns", "source", "reason", "code",
           "format", "target", "layer", "index", "epoch", "used", "nbytes", "tokens", "queue_ns",
           "wire_ns", "settle_ns", "links", "span_id", "parent", "link", "request")  # fmt: skip
"""Every column, in order. Counts of -1 mean absent, ids of 0 as well."""


def columns(spans: Spans) -> dict[str, NDArray[Any]]:
    """Arrays by column. Texts are object arrays of str (empty when absent), ids are uint64."""
    table = spans.table
    texts = np.array([*spans.names, ""], dtype=object)  # NONE is the last one
    assert NONE == -1  # noqa: S101 - the index of the empty text
    found: dict[str, NDArray[Any]] = {one: texts[table[one]] for one in _TEXTS}
    found |= {one: table[one].astype(np.int64) for one in (*_COUNTS, *_NUMBERS)}
    found |= {one: table[one] for one in _IDS}
    found["duration_ns"] = found["end_ns"] - found["start_ns"]
    return {one: found[one] for one in COLUMNS}


def write_csv(spans: Spans, path: Path) -> int:
    """Write every span with a line of headings; returns the number of spans. Ids are in hex."""
    found = columns(spans)
    for one in _IDS:
        found[one] = np.array([f"{value:016x}" if value else "" for value in found[one].tolist()],
                              dtype=object)  # fmt: skip
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(COLUMNS)
        writer.writerows(zip(*(column.tolist() for column in found.values()), strict=True))
    return len(spans.table)
