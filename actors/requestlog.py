"""Rows of the requests of one front, sent to a telemetry actor as soon as each has ended.

Decides what of a request is told. A request's span is the child of the caller's when it came with a
`traceparent`, else the root of a new trace; its context goes with the request to the worker. Must
not know HTTP or how requests are served.

Invariant: requests that ended == rows sent + rows that count as dropped with the next batch.
"""

from __future__ import annotations

import os
import secrets
import threading
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from hotset.actors.batches import RowBatch
from hotset.actors.kinds import ControlKind
from hotset.actors.messages import Rows, encode
from hotset.actors.tracecontext import TraceContext, child_of, parse
from hotset.transport.records import NO_NAME, Code, Ring

if TYPE_CHECKING:
    from collections.abc import Callable

FRONT: Final = "front"
"""Name of the front among the stores of a trace."""


@dataclass(slots=True, kw_only=True)
class Request:
    """A request under way: its context, and what its span will tell."""

    context: TraceContext
    caller: int
    start_ns: int
    prompt_tokens: int
    tokens: int = 0
    first_token_ns: int = 0
    replays: int = 0
    worker: str = ""


class RequestLog:
    """Begins and ends requests. Any thread."""

    def __init__(self, send: Callable[[bytes], None]) -> None:
        """`send` gets MessagePack of `Rows`, must not wait, and raises when it cannot send."""
        self._send = send
        self._ring = Ring(capacity=1024)
        self._dropped = 0
        self._lock = threading.Lock()

    def begin(self, traceparent: str, *, prompt_tokens: int) -> Request:
        """A request has arrived; an invalid `traceparent` counts as none."""
        caller = parse(traceparent)
        return Request(
            context=child_of(caller, span_id=secrets.randbits(63) | 1),
            caller=caller.span_id if caller else 0,
            start_ns=time.time_ns(),
            prompt_tokens=prompt_tokens,
        )

    def end(self, request: Request, *, code: Code) -> None:
        """A request has ended: send its row."""
        worker = self._ring.name(request.worker) if request.worker else NO_NAME
        with self._lock:
            self._ring.append(
                int(ControlKind.REQUEST),
                code=code,
                source=worker,
                index=request.tokens,
                start_ns=request.start_ns,
                end_ns=time.time_ns(),
                row_id=request.context.span_id,
                parent=request.caller,
                trace_hi=request.context.trace[0],
                trace_lo=request.context.trace[1],
                queue_ns=request.first_token_ns,
                wire_ns=request.prompt_tokens,
                attempt=request.replays,
            )
            batch = RowBatch(
                store=FRONT,
                tier=None,
                rows=self._ring.drain(),
                names=tuple(self._ring.names()),
                dropped=self._dropped,
            )
            rows = Rows(
                batch=batch, resident_bytes=0, capacity_bytes=0, quarantined_bytes=0,
                peak_rss_bytes=0, pid=os.getpid(),
            )  # fmt: skip
            try:
                self._send(encode(rows))
                self._dropped = 0
            except Exception:  # noqa: BLE001 - a request never fails for its telemetry; it is counted
                self._dropped += 1
