"""Spans to an OpenTelemetry collector, by the SDK's own OTLP exporters over gRPC or HTTP.

Which exporter there is says `hotset.actors.exporters`. This module decides only that a slow or
absent collector costs spans and never time: batches wait in a bounded queue, a thread of its own
encodes and sends them, and what does not fit or does not arrive is counted. A call costs more than
the spans in it, so batches are gathered for half a second, or until they fill one.
Must not know Ray.

Invariant: rows offered == exported + dropped + sampled out + waiting, and what rings lost counts as
offered and dropped.
"""

from __future__ import annotations

import threading
import warnings
from collections import deque
from dataclasses import replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Final

import msgspec
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import SpanExportResult
from opentelemetry.sdk.util.instrumentation import InstrumentationScope
from opentelemetry.trace import Link, SpanContext, SpanKind, TraceFlags
from opentelemetry.trace.status import Status, StatusCode

from hotset.actors import names
from hotset.actors.sampler import Sampler

if TYPE_CHECKING:
    from collections.abc import Sequence

    from opentelemetry.sdk.trace.export import SpanExporter

    from hotset.actors.batches import RowBatch
    from hotset.actors.spans import SpanEncoder

MOST_WAITING: Final = 1 << 18
"""Rows that wait at most: 33 MB, half a minute of 10,000 spans a second."""
LINGER_S: Final = 0.5
_SPANS_A_CALL: Final = 2048


class Collector:
    """A bounded queue in front of one exporter, emptied by a thread."""

    def __init__(
        self,
        exporter: SpanExporter,
        *,
        encoder: SpanEncoder,
        ratio: float = 1.0,
        most_waiting: int = MOST_WAITING,
        linger_s: float = LINGER_S,
    ) -> None:
        """`encoder` is this thread's own; `ratio` is the share of ordinary transfers to send.

        The first of a call's batches waits at most `linger_s` for others.
        """
        self._exporter = exporter
        self._encoder = encoder
        self._ratio = ratio
        self._most = most_waiting
        self._linger_s = linger_s
        self._samplers: dict[str, Sampler] = {}
        self._queue: deque[RowBatch] = deque()
        self._waiting = 0
        self._changed = threading.Condition()
        self._closing = False
        self._abandoned = False
        self._warned = False
        self.offered = 0
        self.exported = 0
        self.dropped = 0
        self.sampled_out = 0
        self._thread = threading.Thread(target=self._run, name="otlp-export", daemon=True)
        self._thread.start()

    def offer(self, batch: RowBatch) -> None:
        """Queue a batch, or drop it when the queue is full. Never waits for the collector."""
        count = len(batch.table()) + batch.dropped
        if not count:
            return
        with self._changed:
            self.offered += count
            if self._closing or self._waiting + count > self._most:
                self.dropped += count
                return
            self._waiting += count
            self._queue.append(batch)
            self._changed.notify()

    @property
    def waiting(self) -> int:
        """Rows in the queue, in the call under way, or held back by a sampler."""
        return self._waiting

    def close(self, *, timeout_s: float = 10.0) -> bool:
        """Send what waits; False, and the rest counted as dropped, when time is up.

        Of a call that is under way then, the collector may have taken spans that count as dropped.
        """
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._thread.join(timeout_s)
        on_time = not self._thread.is_alive()
        with self._changed:
            self._abandoned = True
            self.dropped += self._waiting
            self._waiting = 0
            self._queue.clear()
        self._exporter.shutdown()
        return on_time

    def _run(self) -> None:
        while True:
            with self._changed:
                while not self._queue and not self._closing:
                    self._changed.wait()
                if not self._queue:
                    left_out = sum(one.flush() for one in self._samplers.values())
                    self.sampled_out += left_out
                    self._waiting -= left_out
                    return
                self._changed.wait_for(self._enough, self._linger_s)
                batches = self._take()
            self._send(batches)

    def _enough(self) -> bool:
        return self._closing or self._waiting >= _SPANS_A_CALL

    def _take(self) -> list[RowBatch]:
        """Batches for about one call."""
        found, rows = [], 0
        while self._queue and rows < _SPANS_A_CALL:
            found.append(self._queue.popleft())
            rows += len(found[-1].table())
        return found

    def _send(self, batches: Sequence[RowBatch]) -> None:
        spans: list[ReadableSpan] = []
        done = left_out = lost = 0  # rows that no longer wait; of them left out; of them in vain
        for batch in batches:
            sampler = self._samplers.setdefault(batch.store, Sampler(ratio=self._ratio))
            held_before = sampler.held
            rows = batch.table()
            passed, spared = sampler.sift(rows)
            line = self._encoder.encode(replace(batch, rows=passed.tobytes()), sampled_out=spared)
            spans += readable_spans(line.text) if line and line.spans else ()
            done += len(rows) + batch.dropped - (sampler.held - held_before)
            left_out += spared
            lost += batch.dropped + len(passed)
        exported = self._export(spans)
        with self._changed:
            if self._abandoned:
                return  # `close` has counted these batches
            self._waiting -= done
            self.sampled_out += left_out
            self.exported += exported
            self.dropped += lost - exported

    def _export(self, spans: Sequence[ReadableSpan]) -> int:
        done = 0
        for first in range(0, len(spans), _SPANS_A_CALL):
            part = spans[first : first + _SPANS_A_CALL]
            done += len(part) if self._delivered(part) else 0
        return done

    def _delivered(self, part: Sequence[ReadableSpan]) -> bool:
        try:
            return self._exporter.export(part) is SpanExportResult.SUCCESS
        except Exception as error:  # noqa: BLE001 - whatever an exporter raises costs its spans only
            if not (self._abandoned or self._warned):  # `close` cuts a call that is under way
                warnings.warn(f"spans are lost, the exporter raised {error!r}", stacklevel=1)
                self._warned = True
            return False


# --- from the text of a line to what the SDK exports --------------------------------------------


class _Value(msgspec.Struct, gc=False, rename="camel"):
    string_value: str | None = None
    int_value: int | None = None
    bool_value: bool | None = None
    array_value: _Array | None = None

    def plain(self) -> Any:
        if self.array_value is not None:
            return tuple(one.plain() for one in self.array_value.values)
        if self.int_value is not None:
            return self.int_value
        return self.bool_value if self.string_value is None else self.string_value


class _Array(msgspec.Struct, gc=False):
    values: list[_Value] = []


class _Attribute(msgspec.Struct, gc=False):
    key: str
    value: _Value


class _Link(msgspec.Struct, gc=False, rename="camel"):
    trace_id: str
    span_id: str
    attributes: list[_Attribute] = []


class _Status(msgspec.Struct, gc=False):
    message: str = ""


class _Span(msgspec.Struct, gc=False, rename="camel"):
    trace_id: str
    span_id: str
    name: str
    start_time_unix_nano: int
    end_time_unix_nano: int
    kind: int = 1
    parent_span_id: str = ""
    attributes: list[_Attribute] = []
    links: list[_Link] = []
    status: _Status = msgspec.field(default_factory=_Status)


class _Holder(msgspec.Struct, gc=False):
    attributes: list[_Attribute] = []


class _ScopeSpans(msgspec.Struct, gc=False):
    scope: _Holder = msgspec.field(default_factory=_Holder)
    spans: list[_Span] = []


class _ResourceSpans(msgspec.Struct, gc=False, rename="camel"):
    resource: _Holder
    scope_spans: list[_ScopeSpans]


class _Line(msgspec.Struct, gc=False, rename="camel"):
    resource_spans: list[_ResourceSpans]


_decoder = msgspec.json.Decoder(_Line, strict=False)


def readable_spans(text: str) -> list[ReadableSpan]:
    """Spans of one line of the trace file, as the SDK's exporters take them.

    They are made from the file's own text, so that collector and file cannot disagree.
    """
    found: list[ReadableSpan] = []
    for group in _decoder.decode(text).resource_spans:
        resource = _resource(tuple(_plain(group.resource.attributes).items()))
        for part in group.scope_spans:
            scope = InstrumentationScope(names.SCOPE, attributes=_plain(part.scope.attributes))
            found += [_readable(span, resource=resource, scope=scope) for span in part.spans]
    return found


class _Resource(Resource):
    """A resource that is spelled once for its hash, and not for each of its spans."""

    def __init__(self, attributes: dict[str, Any]) -> None:
        super().__init__(attributes)
        self._known = super().__hash__()

    def __hash__(self) -> int:
        return self._known


@lru_cache(maxsize=64)
def _resource(attributes: tuple[tuple[str, Any], ...]) -> Resource:
    """One object for the equal resources of many lines."""
    return _Resource(dict(attributes))


def _readable(span: _Span, *, resource: Resource, scope: InstrumentationScope) -> ReadableSpan:
    message = span.status.message
    serves = span.kind == _SERVER
    parent = span.parent_span_id
    return ReadableSpan(
        span.name,
        context=_context(span.trace_id, span.span_id),
        parent=_context(span.trace_id, parent, is_remote=serves) if parent else None,
        kind=SpanKind.SERVER if serves else SpanKind.INTERNAL,
        resource=resource,
        instrumentation_scope=scope,
        attributes=_plain(span.attributes),
        links=[
            Link(_context(one.trace_id, one.span_id), _plain(one.attributes)) for one in span.links
        ],
        start_time=span.start_time_unix_nano,
        end_time=span.end_time_unix_nano,
        status=Status(StatusCode.ERROR, message) if message else Status(),
    )


def _context(trace: str, span_id: str, *, is_remote: bool = False) -> SpanContext:
    return SpanContext(int(trace, 16), int(span_id, 16), is_remote, trace_flags=_SAMPLED)


def _plain(attributes: list[_Attribute]) -> dict[str, Any]:
    return {one.key: one.value.plain() for one in attributes}


_SERVER = 2  # as the file spells it
_SAMPLED = TraceFlags(TraceFlags.SAMPLED)
