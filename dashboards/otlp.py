"""Reads a run's trace files (OTLP JSON lines) into columns.

Decides which lines count: a torn last line is expected after a crash, any other line that does not
parse is counted as damaged and told to the reader. Must not know what the numbers mean.

Invariants: columns have one entry a span; times and ids are integers, never floats; names are
interned in one table for all files.
"""

from __future__ import annotations

import gc
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import msgspec
import numpy as np

from hotset.actors import names
from hotset.actors.spans import run_trace_id
from hotset.errors import ConfigError

if TYPE_CHECKING:
    import os

    from numpy.typing import NDArray

    from hotset.dashboards.otlp_scan import Scanned

    Table = np.ndarray[Any, np.dtype[Any]]

    class _Scan(Protocol):
        """`otlp_scan.scan`."""

        def __call__(self, body: bytes, *, own: str) -> Scanned | None: ...


NONE = -1
MANY_BYTES = 128 << 20
"""From this size on a run is read by compiled code, which takes a second to be there."""


class Value(msgspec.Struct, gc=False, rename="camel"):
    """What an attribute holds: one of these."""

    string_value: str = ""
    int_value: int = 0
    bool_value: bool = False
    array_value: Array | None = None


class Array(msgspec.Struct, gc=False):
    """Several values."""

    values: list[Value] = []


class Attribute(msgspec.Struct, gc=False):
    """A name and its value."""

    key: str
    value: Value


class _Link(msgspec.Struct, gc=False, rename="camel"):
    span_id: str
    attributes: list[Attribute] = []


class _Span(msgspec.Struct, gc=False, rename="camel"):
    span_id: str
    name: str
    start_time_unix_nano: int
    end_time_unix_nano: int
    trace_id: str = ""
    parent_span_id: str = ""
    attributes: list[Attribute] = []
    links: list[_Link] = []


class _Scope(msgspec.Struct, gc=False):
    attributes: list[Attribute] = []


class _ScopeSpans(msgspec.Struct, gc=False):
    scope: _Scope = msgspec.field(default_factory=_Scope)
    spans: list[_Span] = []


class _Resource(msgspec.Struct, gc=False):
    attributes: list[Attribute] = []


class _ResourceSpans(msgspec.Struct, gc=False, rename="camel"):
    resource: _Resource = msgspec.field(default_factory=_Resource)
    scope_spans: list[_ScopeSpans] = []


class _Line(msgspec.Struct, gc=False, rename="camel"):
    resource_spans: list[_ResourceSpans] = []


SPAN = np.dtype(
    [
        ("name", "<i4"),  # this and the next six: index into names, or NONE
        ("store", "<i4"),
        ("source", "<i4"),
        ("reason", "<i4"),
        ("code", "<i4"),
        ("format", "<i4"),
        ("target", "<i4"),
        ("links", "<i4"),
        ("layer", "<i4"),  # NONE when absent, as index and epoch
        ("index", "<i4"),
        ("start_ns", "<i8"),
        ("end_ns", "<i8"),
        ("nbytes", "<i8"),
        ("tokens", "<i8"),
        ("queue_ns", "<i8"),
        ("wire_ns", "<i8"),
        ("settle_ns", "<i8"),  # checking the bytes and making them readable
        ("epoch", "<i8"),
        ("span_id", "<u8"),
        ("parent", "<u8"),  # 0 without one, as link and request
        ("link", "<u8"),  # id of the first linked span
        ("request", "<u8"),  # low half of the request's trace id, 0 in the run's own trace
        ("used", "<i1"),  # 1 used, 0 dropped unread, NONE unknown
    ]
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Clock:
    """A node's clock against the controller's, as its telemetry measured it last."""

    offset_ns: int
    error_ns: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Spans:
    """Spans of a run (`table`, of dtype SPAN), with what the files say of themselves.

    `dropped` counts lost rows by store, `tiers` names each store's tier, `bounds` says what the
    emulated link to a store gives (bytes a second), `clocks` are by node.
    """

    table: Table
    names: list[str]
    runs: list[str]
    emulated: list[str]
    tiers: dict[str, str]
    bounds: dict[str, int]
    clocks: dict[str, Clock]
    dropped: dict[str, int]
    sampled_out: int
    files: int
    torn_lines: int
    damaged_lines: int

    def number(self, text: str) -> int:
        """Number of a name in the columns of names; one that occurs nowhere when it is unknown."""
        return self.names.index(text) if text in self.names else NONE - 1

    def where(self, column: str, text: str) -> NDArray[np.bool_]:
        """Mask of the spans whose column of names says `text`."""
        mask: NDArray[np.bool_] = self.table[column] == self.number(text)
        return mask


def read_run(run: str | os.PathLike[str]) -> Spans:
    """Read every `trace-*.jsonl` of a run's folder, or one file. Raises ConfigError."""
    paths = _trace_files(Path(run))
    nbytes = sum(path.stat().st_size for path in paths)
    reader = _Reader(scan=_compiled_scan() if nbytes >= MANY_BYTES else None)
    was_enabled = gc.isenabled()
    gc.disable()  # millions of small structs without cycles; collecting them doubles the time
    try:
        for path in paths:
            reader.read(path)
    finally:
        if was_enabled:
            gc.enable()
    return reader.spans()


def _trace_files(run: Path) -> list[Path]:
    if run.is_file():
        return [run]
    if not run.is_dir():
        raise ConfigError(
            f"no run at {run}", remedy="give the folder that `hotset generate` prints as trace"
        )
    files = sorted(run.glob("trace-*.jsonl"))
    if not files:
        raise ConfigError(
            f"{run} holds no trace-*.jsonl",
            remedy="give the folder of a run, not the one above it; a run writes it at its start",
        )
    return files


def _compiled_scan() -> _Scan | None:
    from hotset.dashboards import otlp_scan

    return otlp_scan.scan if otlp_scan.COMPILED else None


@dataclass(slots=True)
class _Reader:
    scan: _Scan | None = None
    chunks: list[Table] = field(default_factory=list)
    numbers: dict[str, int] = field(default_factory=dict)
    runs: dict[str, str] = field(default_factory=dict)  # with the trace id of each
    emulated: dict[str, None] = field(default_factory=dict)
    tiers: dict[str, str] = field(default_factory=dict)
    bounds: dict[str, int] = field(default_factory=dict)
    clocks: dict[str, Clock] = field(default_factory=dict)
    dropped: dict[str, int] = field(default_factory=dict)
    sampled_out: int = 0
    files: int = 0
    torn_lines: int = 0
    damaged_lines: int = 0

    def read(self, path: Path) -> None:
        decoder = msgspec.json.Decoder(_Line, strict=False)
        self.files += 1
        with path.open("rb") as file:
            for text in file:
                try:
                    self._line(text, decoder)
                except (ValueError, OverflowError, msgspec.DecodeError):
                    if text.endswith(b"\n"):
                        self.damaged_lines += 1
                    else:
                        self.torn_lines += 1

    def _line(self, text: bytes, decoder: msgspec.json.Decoder[_Line]) -> None:
        head, mark, rest = text.partition(_SPANS) if self.scan else (text, b"", b"")
        if mark and rest.endswith(_TAIL) and self._take_scanned(head, rest):
            return
        for resource in decoder.decode(text).resource_spans:
            self._take(resource)

    def _take_scanned(self, head: bytes, rest: bytes) -> bool:
        """Take a line in by the compiled scan; False, and nothing taken, when it refuses."""
        assert self.scan is not None  # noqa: S101 - the caller has asked
        line = msgspec.json.decode(head + _SPANS + _TAIL, type=_Line, strict=False)
        if len(line.resource_spans) != 1:
            return False
        resource = line.resource_spans[0]
        run = _text_of(resource.resource.attributes, names.RUN.name)
        found = self.scan(rest[: -len(_TAIL)], own=f"{run_trace_id(run):032x}")
        if found is None:
            return False
        numbers = np.array([*(self._number(text) for text in found.texts), NONE])
        for column in TEXTS:
            place = COLUMNS.index(column)
            found.rows[:, place] = numbers[found.rows[:, place]]
        self._take(resource)
        store = self._number(_text_of(resource.resource.attributes, names.STORE.name))
        self.chunks.append(_columns(found.rows, store=store))
        return True

    def spans(self) -> Spans:
        return Spans(
            table=np.concatenate([np.zeros(0, SPAN), *self.chunks]),
            names=list(self.numbers),
            runs=list(self.runs),
            emulated=list(self.emulated),
            tiers=self.tiers,
            bounds=self.bounds,
            clocks=self.clocks,
            dropped=self.dropped,
            sampled_out=self.sampled_out,
            files=self.files,
            torn_lines=self.torn_lines,
            damaged_lines=self.damaged_lines,
        )

    def _take(self, found: _ResourceSpans) -> None:
        about = {one.key: one.value for one in found.resource.attributes}
        store = about.get(names.STORE.name, _NOTHING).string_value
        run = about.get(names.RUN.name, _NOTHING).string_value
        self.runs.setdefault(run, f"{run_trace_id(run):032x}")
        if names.TIER.name in about:
            self.tiers[store] = about[names.TIER.name].string_value
        if names.LINK_BOUND.name in about:
            self.bounds[store] = about[names.LINK_BOUND.name].int_value
        if names.CLOCK_OFFSET.name in about:
            self.clocks[about.get(names.HOST_NAME.name, _NOTHING).string_value] = Clock(
                offset_ns=about[names.CLOCK_OFFSET.name].int_value,
                error_ns=about.get(names.CLOCK_ERROR.name, _NOTHING).int_value,
            )
        emulated = about.get(names.EMULATED.name, _NOTHING).array_value
        for flag in emulated.values if emulated else ():
            self.emulated[flag.string_value] = None
        number = self._number(store)
        for part in found.scope_spans:
            for one in part.scope.attributes:
                if one.key == names.DROPPED.name:
                    self.dropped[store] = self.dropped.get(store, 0) + one.value.int_value
                elif one.key == names.SAMPLED_OUT.name:
                    self.sampled_out += one.value.int_value
            if part.spans:
                rows = self._rows(part.spans, store=number, own=self.runs[run])
                self.chunks.append(rows)

    def _rows(self, spans: list[_Span], *, store: int, own: str) -> Table:
        """One array of all values, then columns: filling row by row takes three times as long."""
        return _columns(
            np.array([self._row(span, own=own) for span in spans], np.int64), store=store
        )

    def _row(self, span: _Span, *, own: str) -> list[int]:
        """Values of a span; `own` is the trace of what no request caused."""
        row = EMPTY_ROW.copy()
        if span.trace_id != own:
            row[_REQUEST_AT] = _signed(span.trace_id[16:] or "0")
        numbers = self.numbers
        for one in span.attributes:
            key = one.key
            place = _TEXTS.get(key)
            if place is not None:
                text = one.value.string_value
                number = numbers.get(text)
                row[place] = self._number(text) if number is None else number
                continue
            place = _COUNTS.get(key)
            if place is not None:
                row[place] = one.value.int_value
            elif key in _SETTLING:
                row[_SETTLE_AT] += one.value.int_value
            elif key == _REQUEST:
                row[_REQUEST_AT] = _signed(one.value.string_value[16:])
            elif key == _USED:
                row[_USED_AT] = one.value.bool_value
        row[0] = self._number(span.name)
        row[1] = len(span.links)
        row[2] = span.start_time_unix_nano
        row[3] = span.end_time_unix_nano
        row[4] = _signed(span.span_id)
        row[5] = _signed(span.parent_span_id) if span.parent_span_id else 0
        row[6] = _signed(span.links[0].span_id) if span.links else 0
        return row

    def _number(self, text: str) -> int:
        number = self.numbers.get(text)
        return self.numbers.setdefault(text, len(self.numbers)) if number is None else number


def _columns(values: NDArray[np.int64], *, store: int) -> Table:
    rows = np.empty(len(values), SPAN)
    rows["store"] = store
    for place, column in enumerate(COLUMNS):
        rows[column] = values[:, place]  # of ids the bits: 64 of them in an int64
    return rows


def _text_of(attributes: list[Attribute], key: str) -> str:
    return next((one.value.string_value for one in attributes if one.key == key), "")


def _signed(hexadecimal: str) -> int:
    """64 bits as int64 has them."""
    value = int(hexadecimal, 16)
    return value - (1 << 64) if value >> 63 else value


_NOTHING = Value()
_SPANS, _TAIL = b'"spans":[', b"]}]}]}\n"
COLUMNS = (
    "name", "links", "start_ns", "end_ns", "span_id", "parent", "link",  # places 0 to 6 of a row
    "source", "reason", "code", "format", "target", "nbytes", "tokens", "queue_ns", "wire_ns",
    "settle_ns", "layer", "index", "epoch", "request", "used",
)  # fmt: skip
"""Columns of a row of numbers as it is decoded, before it is one of SPAN."""
TEXTS = ("name", "source", "reason", "code", "format", "target")
"""Those of them that hold the number of a text."""
_TEXTS = {
    names.SOURCE.name: COLUMNS.index("source"),
    names.REASON.name: COLUMNS.index("reason"),
    names.CODE.name: COLUMNS.index("code"),
    names.FORMAT.name: COLUMNS.index("format"),
    names.TARGET.name: COLUMNS.index("target"),
}
_COUNTS = {
    names.NBYTES.name: COLUMNS.index("nbytes"),
    names.TOKENS.name: COLUMNS.index("tokens"),
    names.QUEUE.name: COLUMNS.index("queue_ns"),
    names.WIRE.name: COLUMNS.index("wire_ns"),
    names.LAYER.name: COLUMNS.index("layer"),
    names.INDEX.name: COLUMNS.index("index"),
    names.EPOCH.name: COLUMNS.index("epoch"),
}
_USED, _REQUEST = names.USED.name, names.REQUEST.name
_USED_AT, _REQUEST_AT = COLUMNS.index("used"), COLUMNS.index("request")
_SETTLING, _SETTLE_AT = {names.VERIFY.name, names.ACTIVATE.name}, COLUMNS.index("settle_ns")
_ABSENT = {
    "source", "reason", "code", "format", "target", "layer", "index", "epoch", "used",
}  # fmt: skip
EMPTY_ROW = [NONE if column in _ABSENT else 0 for column in COLUMNS]
"""A decoded row of a span that says nothing."""
