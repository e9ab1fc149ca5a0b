"""Follows the trace files of a run while they grow: transfers and waits, in columns.

Unlike `hotset.dashboards.otlp`, which reads a finished run whole, this reads on from where it
stopped, and keeps the block of each transfer. Decides nothing about what the times mean.

Invariants: a line is taken once, and only when its end has been written; a line that does not parse
is counted and skipped.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np

from hotset.actors import names
from hotset.dashboards.intervals import union
from hotset.dashboards.otlp import Attribute, Value
from hotset.dashboards.page.timeline import Column
from hotset.errors import UNREADABLE

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

MOST_BYTES = 8 << 20
"""Most bytes of a file that are read at once."""


class _Span(msgspec.Struct, gc=False, rename="camel"):
    name: str
    start_time_unix_nano: int
    end_time_unix_nano: int
    attributes: list[Attribute] = []
    links: list[msgspec.Raw] = []


class _Holder(msgspec.Struct, gc=False):
    attributes: list[Attribute] = []


class _ScopeSpans(msgspec.Struct, gc=False):
    scope: _Holder = msgspec.field(default_factory=_Holder)
    spans: list[_Span] = []


class _ResourceSpans(msgspec.Struct, gc=False, rename="camel"):
    resource: _Holder
    scope_spans: list[_ScopeSpans] = []


class _Line(msgspec.Struct, gc=False, rename="camel"):
    resource_spans: list[_ResourceSpans] = []


FLIGHT = np.dtype(
    [
        ("start_ns", "<i8"),
        ("end_ns", "<i8"),
        ("store", "<i4"),  # this and the next four: index into texts
        ("source", "<i4"),
        ("form", "<i4"),
        ("reason", "<i4"),
        ("code", "<i4"),
        ("layer", "<i4"),
        ("index", "<i4"),
        ("nbytes", "<i8"),
    ]
)
WAIT = np.dtype([("start_ns", "<i8"), ("end_ns", "<i8"), ("store", "<i4")])


@dataclass(slots=True)
class Traces:
    """Transfers and waits of a run, read so far. Waits are those that name what they waited for."""

    flights: Column = field(default_factory=lambda: Column(FLIGHT))
    waits: Column = field(default_factory=lambda: Column(WAIT))
    texts: list[str] = field(default_factory=list)
    emulated: dict[str, None] = field(default_factory=dict)
    dropped: int = 0
    damaged: int = 0
    to_ns: int = 0
    _numbers: dict[str, int] = field(default_factory=dict)
    _offsets: dict[str, int] = field(default_factory=dict)
    _decoder: msgspec.json.Decoder[_Line] = field(
        default_factory=lambda: msgspec.json.Decoder(_Line, strict=False)
    )

    def poll(self, run_dir: Path) -> bool:
        """Read what was written since the last call; True when there was something."""
        news = False
        for path in sorted(run_dir.glob("trace-*.jsonl")):
            with path.open("rb") as file:
                while True:
                    file.seek(self._offsets.get(path.name, 0))
                    whole, newline, _ = file.read(MOST_BYTES).rpartition(b"\n")
                    if not newline:
                        break
                    self._offsets[path.name] = self._offsets.get(path.name, 0) + len(whole) + 1
                    news = True
                    for line in whole.split(b"\n"):
                        self.take(line)
        return news

    def take(self, line: bytes) -> None:
        """Take in one line of a trace file."""
        try:
            found = self._decoder.decode(line)
        except UNREADABLE:
            self.damaged += 1
            return
        for resource in found.resource_spans:
            self._resource(resource)

    def _resource(self, found: _ResourceSpans) -> None:
        about = {one.key: one.value for one in found.resource.attributes}
        store = self._number(about.get(names.STORE.name, _NOTHING).string_value)
        flags = about.get(names.EMULATED.name, _NOTHING).array_value
        for flag in flags.values if flags else ():
            self.emulated[flag.string_value] = None
        for part in found.scope_spans:
            for one in part.scope.attributes:
                if one.key == names.DROPPED.name:
                    self.dropped += one.value.int_value
            for span in part.spans:
                self._span(span, store)

    def _span(self, span: _Span, store: int) -> None:
        start_ns, end_ns = span.start_time_unix_nano, span.end_time_unix_nano
        self.to_ns = max(self.to_ns, end_ns)
        if span.name == names.SPAN_WAIT.name:
            if span.links:
                self.waits.append((start_ns, end_ns, store))
            return
        if span.name != names.SPAN_TRANSFER.name:
            return
        said = {one.key: one.value for one in span.attributes}
        get = said.get
        self.flights.append(
            (
                start_ns,
                end_ns,
                store,
                self._number(get(names.SOURCE.name, _NOTHING).string_value),
                self._number(get(names.FORMAT.name, _NOTHING).string_value),
                self._number(get(names.REASON.name, _NOTHING).string_value),
                self._number(get(names.CODE.name, _NOTHING).string_value),
                get(names.LAYER.name, _NOTHING).int_value,
                get(names.INDEX.name, _NOTHING).int_value,
                get(names.NBYTES.name, _NOTHING).int_value,
            )
        )

    def _number(self, text: str) -> int:
        number = self._numbers.get(text)
        if number is None:
            number = self._numbers[text] = len(self.texts)
            self.texts.append(text)
        return number

    # --- asking ---------------------------------------------------------------------------------

    def flying(self, at_ns: int) -> NDArray[Any]:
        """Transfers that had begun and had not ended at a moment."""
        table = self.flights.table
        found: NDArray[Any] = table[(table["start_ns"] <= at_ns) & (table["end_ns"] > at_ns)]
        return found

    def stall_ns(self, *, until_ns: int) -> int:
        """Time in which compute of some device waited, summed over devices, up to a moment."""
        table = self.waits.table
        total = 0
        for store in np.unique(table["store"]):
            mine = table[(table["store"] == store) & (table["start_ns"] < until_ns)]
            ends = np.minimum(mine["end_ns"], until_ns)
            total += union(mine["start_ns"], ends).length_ns
        return total

    def stalled_by_device(self, edges_ns: NDArray[np.int64]) -> dict[str, NDArray[np.float64]]:
        """Share of each bin [edges[i], edges[i + 1]) in which a device's compute waited, 0..1."""
        table = self.waits.table
        shares = {}
        for store in np.unique(table["store"]).tolist():
            mine = table[table["store"] == store]
            waited = union(mine["start_ns"], mine["end_ns"])
            shares[self.texts[store]] = _share(waited.starts, waited.ends, edges_ns)
        return dict(sorted(shares.items()))

    def moved_bytes(self, edges_ns: NDArray[np.int64]) -> NDArray[np.int64]:
        """Bytes of transfers that ended well in each bin."""
        table = self.flights.table
        good = self._numbers.get("ok", -1)
        table = table[table["code"] == good]
        sums, _ = np.histogram(table["end_ns"], bins=edges_ns, weights=table["nbytes"])
        return sums.astype(np.int64)


def _share(
    starts: NDArray[np.int64], ends: NDArray[np.int64], edges_ns: NDArray[np.int64]
) -> NDArray[np.float64]:
    """Covered share of each bin by sorted disjoint intervals: differences of one running sum."""
    before = np.concatenate(([0], np.cumsum(ends - starts)))
    place = np.searchsorted(starts, edges_ns, side="right")
    covered = before[place]
    inside = place > 0
    last_end = ends[np.maximum(place - 1, 0)] if len(ends) else edges_ns
    covered = covered - np.where(inside, np.maximum(last_end - edges_ns, 0), 0)
    share: NDArray[np.float64] = np.diff(covered) / np.diff(edges_ns)
    return share


_NOTHING = Value()
