"""W3C trace context: which trace a request belongs to, and under which span its work stands.

Decides only how a `traceparent` is read and spelled (W3C Trace Context, section 3.2). A header
that breaks its rules is not an error: it counts as absent, and the request gets a trace of its
own. Must not know Ray, HTTP or rows.

Invariant: ids are never 0; what is spelled reads back as it was.
"""

from __future__ import annotations

import re
import secrets
from typing import Final, NamedTuple

SAMPLED: Final = 1
"""The only flag of version 00 that hotset sets."""
_HALF: Final = (1 << 64) - 1
_FORM: Final = re.compile(r"([0-9a-f]{2})-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})(-.*)?")


class TraceContext(NamedTuple):
    """A trace id in two halves, the span that asks, and the flags."""

    trace: tuple[int, int]
    span_id: int
    flags: int = SAMPLED

    @property
    def header(self) -> str:
        """The value of `traceparent`."""
        high, low = self.trace
        return f"00-{high:016x}{low:016x}-{self.span_id:016x}-{self.flags:02x}"


def parse(header: str) -> TraceContext | None:
    """What a `traceparent` says; None for one that is absent or breaks the rules.

    Fields behind the flags are allowed from version 01 on, and ignored.
    """
    found = _FORM.fullmatch(header.strip())
    if found is None:
        return None
    version, trace, span, flags, more = found.groups()
    if version == "ff" or (version == "00" and more):
        return None
    trace_id, span_id = int(trace, 16), int(span, 16)
    if not trace_id or not span_id:
        return None
    return TraceContext((trace_id >> 64, trace_id & _HALF), span_id, int(flags, 16))


def child_of(parent: TraceContext | None, *, span_id: int) -> TraceContext:
    """The context of a span under `parent`; a new trace, sampled, when there is none."""
    if parent is not None:
        return TraceContext(parent.trace, span_id, parent.flags)
    return TraceContext((secrets.randbits(64), secrets.randbits(63) + 1), span_id)


def signed(value: int) -> int:
    """Half of a trace id as a column of signed 64 bits holds it."""
    return value - (1 << 64) if value >> 63 else value


def unsigned(value: int) -> int:
    """What `signed` was given."""
    return value & _HALF
