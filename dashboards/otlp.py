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
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np

from hotset.actors import names
from hotset.errors import ConfigError

if TYPE_CHECKING:
    import os

    from numpy.typing import NDArray

    Table = np.ndarray[Any, np.dtype[Any]]

NONE = -1


class _Value(msgspec.Struct, gc=False, rename="camel"):
    string_value: str = ""
    int_value: int = 0
    bool_value: bool = False
    array_value: _Array | None = None


class _Array(msgspec.Struct, gc=False):
    values: list[_Value] = []


class _Attribute(msgspec.Struct, gc=False):
    key: str
    value: _Value


class _Link(msgspec.Struct, gc=False, rename="camel"):
    span_id: str
    attributes: list[_Attribute] = []


class _Span(msgspec.Struct, gc=False, rename="camel"):
    span_id: str
    name: str
    start_time_unix_nano: int
    end_time_unix_nano: int
    attributes: list[_Attribute] = []
    links: list[_Link] = []


class _Scope(msgspec.Struct, gc=False):
    attributes: list[_Attribute] = []


class _ScopeSpans(msgspec.Struct, gc=False):
    scope: _Scope = msgspec.field(default_factory=_Scope)
    spans: list[_Span] = []


class _Resource(msgspec.Struct, gc=False):
    attributes: list[_Attribute] = []


class _ResourceSpans(msgspec.Struct, gc=False, rename="camel"):
    resource: _Resource = msgspec.field(default_factory=_Resource)
    scope_spans: list[_ScopeSpans] = []


class _Line(msgspec.Struct, gc=False, rename="camel"):
    resource_spans: list[_ResourceSpans] = []


SPAN = np.dtype(
    [
        ("name", "<i4"),  # this and the next four: index into names, or NONE
        ("store", "<i4"),
        ("source", "<i4"),
        ("reason", "<i4"),
        ("code", "<i4"),
        ("links", "<i4"),
        ("start_ns", "<i8"),
        ("end_ns", "<i8"),
        ("nbytes", "<i8"),
        ("tokens", "<i8"),
        ("span_id", "<u8"),
        ("link", "<u8"),  # id of the first linked span; 0 without one
        ("used", "?"),
    ]
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Spans:
    """Spans of a run (`table`, of dtype SPAN), with what the files say of themselves.

    `dropped` counts lost rows by store, `tiers` names each store's tier.
    """

    table: Table
    names: list[str]
    runs: list[str]
    emulated: list[str]
    tiers: dict[str, str]
    dropped: dict[str, int]
    files: int
    torn_lines: int
    damaged_lines: int

    def where(self, column: str, text: str) -> NDArray[np.bool_]:
        """Mask of the spans whose column of names says `text`."""
        number = self.names.index(text) if text in self.names else NONE - 1
        mask: NDArray[np.bool_] = self.table[column] == number
        return mask


def read_run(run: str | os.PathLike[str]) -> Spans:
    """Read every `trace-*.jsonl` of a run's folder, or one file. Raises ConfigError."""
    reader = _Reader()
    was_enabled = gc.isenabled()
    gc.disable()  # millions of small structs without cycles; collecting them doubles the time
    try:
        for path in _trace_files(Path(run)):
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


@dataclass(slots=True)
class _Reader:
    chunks: list[Table] = field(default_factory=list)
    numbers: dict[str, int] = field(default_factory=dict)
    runs: dict[str, None] = field(default_factory=dict)
    emulated: dict[str, None] = field(default_factory=dict)
    tiers: dict[str, str] = field(default_factory=dict)
    dropped: dict[str, int] = field(default_factory=dict)
    files: int = 0
    torn_lines: int = 0
    damaged_lines: int = 0

    def read(self, path: Path) -> None:
        decoder = msgspec.json.Decoder(_Line, strict=False)
        self.files += 1
        with path.open("rb") as file:
            for text in file:
                try:
                    line = decoder.decode(text)
                except (msgspec.DecodeError, UnicodeDecodeError):
                    if text.endswith(b"\n"):
                        self.damaged_lines += 1
                    else:
                        self.torn_lines += 1
                    continue
                for resource in line.resource_spans:
                    self._take(resource)

    def spans(self) -> Spans:
        return Spans(
            table=np.concatenate([np.zeros(0, SPAN), *self.chunks]),
            names=list(self.numbers),
            runs=list(self.runs),
            emulated=list(self.emulated),
            tiers=self.tiers,
            dropped=self.dropped,
            files=self.files,
            torn_lines=self.torn_lines,
            damaged_lines=self.damaged_lines,
        )

    def _take(self, found: _ResourceSpans) -> None:
        about = {one.key: one.value for one in found.resource.attributes}
        store = about.get(names.STORE.name, _NOTHING).string_value
        self.runs[about.get(names.RUN.name, _NOTHING).string_value] = None
        if names.TIER.name in about:
            self.tiers[store] = about[names.TIER.name].string_value
        emulated = about.get(names.EMULATED.name, _NOTHING).array_value
        for flag in emulated.values if emulated else ():
            self.emulated[flag.string_value] = None
        number = self._number(store)
        for part in found.scope_spans:
            for one in part.scope.attributes:
                if one.key == names.DROPPED.name:
                    self.dropped[store] = self.dropped.get(store, 0) + one.value.int_value
            self.chunks.append(
                np.array([self._row(span, store=number) for span in part.spans], SPAN)
            )

    def _row(self, span: _Span, *, store: int) -> tuple[int, ...]:
        values = {one.key: one.value for one in span.attributes}
        get = values.get
        return (
            self._number(span.name),
            store,
            self._number_of(get(_SOURCE)),
            self._number_of(get(_REASON)),
            self._number_of(get(_CODE)),
            len(span.links),
            span.start_time_unix_nano,
            span.end_time_unix_nano,
            get(_NBYTES, _NOTHING).int_value,
            get(_TOKENS, _NOTHING).int_value,
            int(span.span_id, 16),
            int(span.links[0].span_id, 16) if span.links else 0,
            get(_USED, _NOTHING).bool_value,
        )

    def _number_of(self, value: _Value | None) -> int:
        return NONE if value is None else self._number(value.string_value)

    def _number(self, text: str) -> int:
        number = self.numbers.get(text)
        return self.numbers.setdefault(text, len(self.numbers)) if number is None else number


_NOTHING = _Value()
_SOURCE, _REASON, _CODE = names.SOURCE.name, names.REASON.name, names.CODE.name
_NBYTES, _TOKENS, _USED = names.NBYTES.name, names.TOKENS.name, names.USED.name
