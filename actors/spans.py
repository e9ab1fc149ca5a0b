"""Rows become spans in a file of OTLP JSON lines.

Moves nothing but telemetry and decides only what is kept when there is too much. Must not know Ray,
actors or placement: the Telemetry actor hands batches in.

**One trace a request.** What a request does and causes carries its trace id: its steps, waits,
dispatches (on both sides) and the transfers that it asked for. What nobody's request caused (plans,
background transfers, scaling) stands in the run's own trace (`run_trace_id(run)`); a row without a
trace means that one. A step may wait for a transfer that another request caused, and the transfer's
row may arrive later or be lost; so a WAIT row has trace and id of what it waited for, and every
link can be written at once and resolves in any order of arrival.

Invariants: rows handed in + rows that rings lost = spans + dropped; a span's id is its row's id;
one line of the file is one batch, so a crash tears at most the last line; plans, waits, steps,
transfers and failures are never dropped to save time.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from hotset.actors import names, otlp
from hotset.actors.batches import (
    CODE_NAMES,
    Aggregate,
    Flow,
    RowBatch,
    aggregate,
    name_at,
)
from hotset.actors.kinds import KINDS, ControlKind
from hotset.actors.tracecontext import unsigned
from hotset.policies.types import Format
from hotset.transport.records import NO_NAME, Code, Kind

if TYPE_CHECKING:
    import os
    from collections.abc import Sequence

    from hotset.actors.batches import Rows
    from hotset.actors.clock import ClockOffset

__all__ = [
    "Aggregate",
    "Flow",
    "Line",
    "RowBatch",
    "SpanEncoder",
    "SpanWriter",
    "aggregate",
    "run_trace_id",
]

FORMAT_NAMES = ("", *Format)
"""Names of the codes in rows: the place in the append-only enum, from 1; 0 is no format."""

_MAX_WAITING_STEPS = 1 << 16
_NAMES = {
    int(Kind.TRANSFER): names.SPAN_TRANSFER.name,
    int(Kind.STEP): names.SPAN_STEP.name,
    int(Kind.LAYER): names.SPAN_LAYER.name,
    int(Kind.WAIT): names.SPAN_WAIT.name,
    int(Kind.DISPATCH): names.SPAN_DISPATCH.name,
    int(ControlKind.PLAN): names.SPAN_PLAN.name,
    int(ControlKind.SCALE): names.SPAN_SCALE.name,
    int(ControlKind.VETO): names.SPAN_VETO.name,
    int(ControlKind.USE): names.SPAN_USE.name,
    int(ControlKind.REQUEST): names.SPAN_REQUEST.name,
}


def run_trace_id(run: str) -> int:
    """Trace id (128 bits, not 0) of what no request caused, from the run's id on any node."""
    return int.from_bytes(hashlib.blake2b(run.encode(), digest_size=16).digest(), "big") or 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """A batch as text of one line; rows of the batch = `spans` + what `lost` adds to its drops."""

    text: str
    spans: int
    lost: int


class SpanEncoder:
    """Turns batches into lines of OTLP JSON. Remembers, by step, what was waited for."""

    def __init__(
        self,
        *,
        node: str,
        run: str,
        emulated: Sequence[str] = (),
        formats: Sequence[str] = FORMAT_NAMES,
        max_rows: int = 100_000,
    ) -> None:
        """`formats[code]` names a row's `format`.

        Of a batch of more than `max_rows` rows, sampled layers, then uses, then dispatches that
        went well are dropped and counted.
        """
        self._node = node
        self._run = run
        self._emulated = tuple(emulated)
        self._formats = tuple(formats)
        self._max_rows = max_rows
        self._trace = f"{run_trace_id(run):032x}"
        self._waits: dict[int, dict[str, None]] = {}  # step -> links of its waits, in order
        self.clock: ClockOffset | None = None

    def encode(self, batch: RowBatch, *, sampled_out: int = 0) -> Line | None:
        """One line; None when the batch has nothing to tell."""
        table = batch.table()
        kept = _keep(table, max_rows=self._max_rows)
        self._remember_waits(kept)
        lost = batch.dropped + len(table) - len(kept)
        if not (lost or len(kept) or sampled_out):
            return None
        scope: dict[names.Attribute, otlp.AttributeValue] = {names.DROPPED: lost} if lost else {}
        if sampled_out:
            scope[names.SAMPLED_OUT] = sampled_out
        text = otlp.line(self._spans(batch, kept), resource=self._resource(batch), scope=scope)
        return Line(text=text, spans=len(kept), lost=lost)

    def _resource(self, batch: RowBatch) -> dict[names.Attribute, otlp.AttributeValue]:
        resource: dict[names.Attribute, otlp.AttributeValue] = {
            names.SERVICE_NAME: names.SCOPE,
            names.SERVICE_INSTANCE: batch.store,
            names.HOST_NAME: self._node,
            names.RUN: self._run,
            names.STORE: batch.store,
        }
        if self._emulated:
            resource[names.EMULATED] = self._emulated
        resource[names.TIER] = batch.tier_name
        if batch.link_bytes_per_s:
            resource[names.LINK_BOUND] = batch.link_bytes_per_s
        if self.clock is not None:
            resource[names.CLOCK_OFFSET] = self.clock.offset_ns
            resource[names.CLOCK_ERROR] = self.clock.error_ns
        return resource

    def _remember_waits(self, rows: Rows) -> None:
        """Keep, by step, links to what was waited for: a step's row comes after its waits."""
        linked = rows[
            (rows["kind"] == Kind.WAIT) & (rows["waits_for"] != 0) & (rows["parent"] != 0)
        ]
        columns = (linked[name].tolist() for name in ("parent", "waits_for", "queue_ns", "wire_ns"))
        for step, target, high, low in zip(*columns, strict=True):
            self._waits.setdefault(step, {})[self._waited_on(target, high, low)] = None
        while len(self._waits) > _MAX_WAITING_STEPS:  # steps whose rows were lost
            del self._waits[next(iter(self._waits))]

    def _spans(self, batch: RowBatch, rows: Rows) -> list[str]:
        fragments = _Fragments(batch, self._formats)
        texts: list[str] = []
        for row in rows.tolist():
            kind, code, *_ = row
            start_ns, end_ns, row_id, waits_for, parent, high, low = row[6:13]
            trace = self._trace_of(high, low)
            links = ""
            if kind == _STEP:
                links = ",".join(self._waits.pop(row_id, ()))
            elif kind == _WAIT and waits_for:
                links = self._waited_on(waits_for, row[14], row[15])
            elif kind == _USE and waits_for:
                links = otlp.link_text(trace, waits_for, kind=names.USED_LINK)
            texts.append(
                otlp.span_text(
                    _NAMES[kind],
                    trace=trace,
                    span_id=row_id,
                    parent=parent,
                    start_ns=start_ns,
                    end_ns=max(start_ns, end_ns),  # the wall clock may step back
                    attributes=fragments.attributes(row),
                    links=links,
                    error="" if code == _OK else CODE_NAMES[code],
                    serves=kind == _REQUEST,
                )
            )
        return texts

    def _trace_of(self, high: int, low: int) -> str:
        return f"{high:016x}{low:016x}" if high or low else self._trace

    def _waited_on(self, target: int, high: int, low: int) -> str:
        trace = self._trace_of(unsigned(high), unsigned(low))
        return otlp.link_text(trace, target, kind=names.WAITED_ON)


class SpanWriter:
    """Appends batches to one file, `trace-<node>.jsonl` by convention. One thread only."""

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        node: str,
        run: str,
        emulated: Sequence[str] = (),
        max_rows: int = 100_000,
    ) -> None:
        """Open for appending and create the folder. The rest is as for `SpanEncoder`."""
        self.encoder = SpanEncoder(node=node, run=run, emulated=emulated, max_rows=max_rows)
        self._written = 0
        self._dropped = 0
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        self._file = target.open("a", encoding="utf-8")

    @property
    def written(self) -> int:
        """Spans written."""
        return self._written

    @property
    def dropped(self) -> int:
        """Rows that did not become spans: lost by rings, damaged, or over `max_rows` a batch."""
        return self._dropped

    def write(self, batch: RowBatch) -> int:
        """Append one line; returns the number of spans in it. An empty batch writes nothing."""
        line = self.encoder.encode(batch)
        if line is None:
            return 0
        self._file.write(line.text)
        self._file.flush()
        self._written += line.spans
        self._dropped += line.lost
        return line.spans

    def close(self) -> None:
        """Close the file. Idempotent."""
        self._file.close()


_OK, _STEP, _LAYER, _TRANSFER, _WAIT = (
    int(Code.OK), int(Kind.STEP), int(Kind.LAYER), int(Kind.TRANSFER), int(Kind.WAIT),
)  # fmt: skip
_PLAN, _SCALE, _VETO, _USE, _REQUEST = (int(kind) for kind in ControlKind)
_LAYER_IS = otlp.int_prefix(names.LAYER)
_INDEX_IS = otlp.int_prefix(names.INDEX)
_TOKENS_IS = otlp.int_prefix(names.TOKENS)
_NBYTES_IS = otlp.int_prefix(names.NBYTES)
_QUEUE_IS = otlp.int_prefix(names.QUEUE)
_WIRE_IS = otlp.int_prefix(names.WIRE)
_VERIFY_IS = otlp.int_prefix(names.VERIFY)
_ACTIVATE_IS = otlp.int_prefix(names.ACTIVATE)
_ATTEMPT_IS = otlp.int_prefix(names.ATTEMPT)
_EPOCH_IS = otlp.int_prefix(names.EPOCH)
_STARTS_IS = otlp.int_prefix(names.STARTS)
_DROPS_IS = otlp.int_prefix(names.DROPS)
_BEFORE_IS = otlp.int_prefix(names.BALANCE_BEFORE)
_AFTER_IS = otlp.int_prefix(names.BALANCE_AFTER)
_MOVED_IS = otlp.int_prefix(names.PLAN_MOVED)
_USED = {flag: otlp.attribute(names.USED, value=bool(flag)) for flag in (0, 1)}
_PROMPT_IS = otlp.int_prefix(names.PROMPT_TOKENS)
_FIRST_IS = otlp.int_prefix(names.FIRST_TOKEN)
_END = otlp.INT_SUFFIX


class _Fragments:
    """Attributes of rows as text; what repeats in a batch is spelled once.

    Texts that may be absent begin with a comma, so that they join without a list.
    """

    def __init__(self, batch: RowBatch, formats: Sequence[str]) -> None:
        self._batch = batch
        self._formats = formats
        self._sources: dict[int, str] = {NO_NAME: ""}
        self._reasons: dict[int, str] = {NO_NAME: ""}
        self._forms: dict[int, str] = {0: ""}
        self._codes = {code: otlp.attribute(names.CODE, text) for code, text in CODE_NAMES.items()}

    def attributes(self, row: tuple[int, ...]) -> str:
        """Spell the attributes of one row of `ROW`, joined."""
        kind, code, source, form, layer, index = row[:6]
        nbytes, queue_ns, wire_ns, verify_ns, activate_ns = row[13:18]
        reason, used, attempt = row[18:]
        text = self._codes[code]
        if kind in _CONTROL:
            return text + self._control(row)
        if kind == _STEP:
            text += f",{_TOKENS_IS}{index}{_END}"
        elif kind == _LAYER:
            text += f",{_LAYER_IS}{layer}{_END},{_TOKENS_IS}{index}{_END}"
        else:
            text += f"{self._source(source)},{_LAYER_IS}{layer}{_END},{_INDEX_IS}{index}{_END}"
            text += f"{self._form(form)}{self._reason(reason)}"
        if nbytes:
            text += f",{_NBYTES_IS}{nbytes}{_END}"
        if kind == _TRANSFER:
            text += f",{_QUEUE_IS}{queue_ns}{_END},{_WIRE_IS}{wire_ns}{_END}"
            text += f",{_VERIFY_IS}{verify_ns}{_END},{_ACTIVATE_IS}{activate_ns}{_END}"
            text += f",{_USED[1]}" if used else ""
            text += f",{_ATTEMPT_IS}{attempt}{_END}" if attempt else ""
        return text

    def _judged(self, row: tuple[int, ...]) -> str:
        before, after, moves = f"{row[16]}{_END}", f"{row[17]}{_END}", f"{row[20]}{_END}"
        return f",{_BEFORE_IS}{before},{_AFTER_IS}{after},{_MOVED_IS}{moves}"

    def _control(self, row: tuple[int, ...]) -> str:
        kind, _, store, form, layer, index = row[:6]
        nbytes, queue_ns, wire_ns, verify_ns, reason, used = *row[13:17], *row[18:20]
        block = f",{_LAYER_IS}{layer}{_END},{_INDEX_IS}{index}{_END}{self._form(form)}"
        moved = f",{_NBYTES_IS}{nbytes}{_END}" if nbytes else ""
        why = self._reason(reason)
        if kind == _PLAN:
            asked = f",{_STARTS_IS}{queue_ns}{_END},{_DROPS_IS}{wire_ns}{_END}"
            judged = self._judged(row) if verify_ns else ""
            return f",{_EPOCH_IS}{index}{_END}{why}{moved}{asked}{judged}"
        if kind == _USE:
            return f"{block}{why}{moved},{_USED[min(used, 1)]}"
        if kind == _REQUEST:
            return self._request(row)
        target = otlp.attribute(names.TARGET, name_at(self._batch.names, store))
        if kind == _SCALE:
            return f",{target}{why},{_EPOCH_IS}{index}{_END}"
        bound = name_at(self._batch.names, queue_ns - 1) if queue_ns > 0 else ""
        return f",{target}{block}{why},{otlp.attribute(names.BOUND, bound)}"

    def _request(self, row: tuple[int, ...]) -> str:
        worker, tokens, first_ns, prompt, attempt = row[2], row[5], row[14], row[15], row[20]
        by = f",{otlp.attribute(names.WORKER, name_at(self._batch.names, worker))}"
        text = "" if worker == NO_NAME else by
        text += f",{_TOKENS_IS}{tokens}{_END},{_PROMPT_IS}{prompt}{_END}"
        text += f",{_FIRST_IS}{first_ns}{_END}" if first_ns else ""
        return text + (f",{_ATTEMPT_IS}{attempt}{_END}" if attempt else "")

    def _source(self, index: int) -> str:
        text = self._sources.get(index)
        if text is None:
            source = name_at(self._batch.names, index)
            tier = otlp.attribute(names.SOURCE_TIER, self._batch.tier_of(source))
            text = self._sources[index] = f",{otlp.attribute(names.SOURCE, source)},{tier}"
        return text

    def _reason(self, index: int) -> str:
        text = self._reasons.get(index)
        if text is None:
            reason = otlp.attribute(names.REASON, name_at(self._batch.names, index))
            text = self._reasons[index] = f",{reason}"
        return text

    def _form(self, code: int) -> str:
        text = self._forms.get(code)
        if text is None:
            form = str(self._formats[code]) if code < len(self._formats) else f"code {code}"
            text = self._forms[code] = f",{otlp.attribute(names.FORMAT, form)}"
        return text


_CONTROL = frozenset(int(kind) for kind in ControlKind)


def _keep(rows: Rows, *, max_rows: int) -> Rows:
    """Rows that become spans: whole ones, and of too many those that are missed least."""
    kind = rows["kind"]
    failed = rows["code"] != Code.OK
    whole = np.isin(kind, KINDS) & (rows["code"] <= max(Code)) & (rows["row_id"] != 0)
    for spare in (Kind.LAYER, ControlKind.USE, Kind.DISPATCH):
        excess = int(whole.sum()) - max_rows
        if excess <= 0:
            break
        victims = np.flatnonzero(whole & (kind == spare) & ~failed)
        whole[victims[:excess]] = False
    return rows if whole.all() else rows[whole]
