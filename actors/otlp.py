"""OTLP JSON text of spans, in bulk: one call turns the rows of a batch into one line of a file.

Decides only how values are spelled. The text is byte for byte what OpenTelemetry's own
`FileSpanExporter` writes for the same spans (a test compares them); that exporter costs 105 us a
span on one core, which is more than the token path may lose to telemetry, and this costs 8.
Must not know Ray, files or what happens to the text.

Invariants: 64-bit integers are decimal strings and ids are lower-case hex, as OTLP's JSON mapping
asks; text is escaped once per name, not once per span.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence

from hotset.actors import names

AttributeValue = str | int | bool | Sequence[str]

ERROR_STATUS = 2
"""OTLP's STATUS_CODE_ERROR."""

_INTERNAL = 1  # SPAN_KIND_INTERNAL
_SERVER = 2  # SPAN_KIND_SERVER
_FLAGS = 256  # SPAN_FLAGS_CONTEXT_HAS_IS_REMOTE: known, and not remote
_REMOTE = 512  # SPAN_FLAGS_CONTEXT_IS_REMOTE: the parent came with a message from outside


def quote(text: str) -> str:
    """JSON string of `text`."""
    return json.dumps(text)


def attribute(key: names.Attribute, value: AttributeValue) -> str:
    """One attribute as JSON."""
    return f'{{"key":"{key.name}","value":{_value(value)}}}'


def _value(value: AttributeValue) -> str:
    if isinstance(value, bool):
        return f'{{"boolValue":{"true" if value else "false"}}}'
    if isinstance(value, int):
        return f'{{"intValue":"{value}"}}'
    if isinstance(value, str):
        return f'{{"stringValue":{quote(value)}}}'
    return f'{{"arrayValue":{{"values":[{",".join(_value(item) for item in value)}]}}}}'


def int_prefix(key: names.Attribute) -> str:
    """Text before the digits of an integer attribute; `INT_SUFFIX` comes after them."""
    return f'{{"key":"{key.name}","value":{{"intValue":"'


INT_SUFFIX = '"}}'


def link_text(trace: str, span_id: int, *, kind: str) -> str:
    """Text of a link; `trace` is 32 hex digits, `kind` one of the values of `hotset.link`."""
    return f'{{"traceId":"{trace}","spanId":"{span_id:016x}",{_LINK_ENDS[kind]}'


def span_text(  # noqa: PLR0913 - a span's fields, without an object, once per row
    name: str,
    *,
    trace: str,
    span_id: int,
    parent: int,
    start_ns: int,
    end_ns: int,
    attributes: str,
    links: str = "",
    error: str = "",
    serves: bool = False,
) -> str:
    """Text of one span; `attributes` and `links` are joined JSON, `trace` is 32 hex digits.

    With `serves` it is the span of a server, and its parent is the caller's.
    """
    parent_text = f'"parentSpanId":"{parent:016x}",' if parent else ""
    links_text = f'"links":[{links}],' if links else ""
    attributes_text = f'"attributes":[{attributes}],' if attributes else ""
    status = f'{{"message":"{error}","code":{ERROR_STATUS}}}' if error else "{}"
    flags = _FLAGS | _REMOTE if serves and parent else _FLAGS
    return (
        f'{{"traceId":"{trace}","spanId":"{span_id:016x}",{parent_text}"flags":{flags},'
        f'"name":"{name}","kind":{_SERVER if serves else _INTERNAL},'
        f'"startTimeUnixNano":"{start_ns}",'
        f'"endTimeUnixNano":"{end_ns}",{attributes_text}{links_text}"status":{status}}}'
    )


def line(
    spans: Sequence[str],
    *,
    resource: Mapping[names.Attribute, AttributeValue],
    scope: Mapping[names.Attribute, AttributeValue],
) -> str:
    """One line of an OTLP JSON file: one resource, one scope, its spans."""
    resource_text = ",".join(attribute(key, value) for key, value in resource.items())
    scope_text = ",".join(attribute(key, value) for key, value in scope.items())
    scope_attributes = f',"attributes":[{scope_text}]' if scope_text else ""
    spans_text = f',"spans":[{",".join(spans)}]' if spans else ""
    return (
        f'{{"resourceSpans":[{{"resource":{{"attributes":[{resource_text}]}},"scopeSpans":'
        f'[{{"scope":{{"name":"{names.SCOPE}"{scope_attributes}}}{spans_text}}}]}}]}}\n'
    )


_LINK_ENDS = {
    kind: f'"attributes":[{attribute(names.LINK, kind)}],"flags":{_FLAGS}}}'
    for kind in (names.WAITED_ON, names.USED_LINK)
}
"""Text behind the span id of a link, by its kind."""
