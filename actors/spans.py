"""Rows become spans in a file of OTLP JSON lines, and sums for metrics.

Moves nothing but telemetry and decides only what is kept when there is too much. Must not know Ray,
actors or placement: the Telemetry actor hands batches in and publishes what `Aggregate` says.

**One trace a run.** Every span of a run, on all nodes, carries the run's trace id
(`run_trace_id(run)`); the trace id of the request stands in `hotset.request.trace_id`. A step may
wait for a transfer that another request caused, and the transfer's row may arrive later or be lost;
with one trace id a `waited_on` link needs only the transfer's row id, which the WAIT row has. So
every link can be written at once and resolves in any order of arrival.

Invariants: rows handed in + rows that rings lost = `written` + `dropped`; a span's id is its row's
id; one line of the file is one batch, so a crash tears at most the last line; WAIT and STEP rows,
transfers and failures are never dropped to save time.
"""

from __future__ import annotations

import hashlib
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
from hotset.policies.types import Format
from hotset.transport.records import NO_NAME, Code, Kind

if TYPE_CHECKING:
    import os
    from collections.abc import Sequence

    from hotset.actors.batches import Rows

__all__ = ["Aggregate", "Flow", "RowBatch", "SpanWriter", "aggregate", "run_trace_id"]

FORMAT_NAMES = ("", *Format)
"""Names of the codes in rows: the place in the append-only enum, from 1; 0 is no format."""

_MAX_WAITING_STEPS = 1 << 16
_NAMES = {
    int(Kind.TRANSFER): names.SPAN_TRANSFER.name,
    int(Kind.STEP): names.SPAN_STEP.name,
    int(Kind.LAYER): names.SPAN_LAYER.name,
    int(Kind.WAIT): names.SPAN_WAIT.name,
    int(Kind.DISPATCH): names.SPAN_DISPATCH.name,
}


def run_trace_id(run: str) -> int:
    """Trace id (128 bits, not 0) of all spans of a run, from the run's id on any node."""
    return int.from_bytes(hashlib.blake2b(run.encode(), digest_size=16).digest(), "big") or 1


class SpanWriter:
    """Appends batches to one file, `trace-<node>.jsonl` by convention. One thread only."""

    def __init__(  # noqa: PLR0913 - what every line of the file repeats
        self,
        path: str | os.PathLike[str],
        *,
        node: str,
        run: str,
        emulated: Sequence[str] = (),
        formats: Sequence[str] = FORMAT_NAMES,
        max_rows: int = 100_000,
    ) -> None:
        """Open for appending and create the folder.

        `formats[code]` names a row's `format`. Of a batch of more than `max_rows` rows, sampled
        layers and then dispatches that went well are dropped and counted.
        """
        self._node = node
        self._run = run
        self._emulated = tuple(emulated)
        self._formats = tuple(formats)
        self._max_rows = max_rows
        self._trace = f"{run_trace_id(run):032x}"
        self._link = otlp.link_fragment(run_trace_id(run))
        self._waits: dict[int, dict[int, None]] = {}  # step -> transfers it waited for, in order
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
        table = batch.table()
        kept = _keep(table, max_rows=self._max_rows)
        self._remember_waits(kept)
        lost = batch.dropped + len(table) - len(kept)
        if lost or len(kept):
            resource: dict[names.Attribute, otlp.AttributeValue] = {
                **self._resource(batch.store),
                names.TIER: batch.tier.name.lower(),
            }
            self._append(self._encode(batch, kept), resource=resource, lost=lost)
        return len(kept)

    def plan(self, *, epoch: int, reason: str, start_ns: int, end_ns: int, row_id: int) -> None:
        """Append a `hotset.plan` span of the controller."""
        text = otlp.span_text(
            names.SPAN_PLAN.name,
            trace=self._trace,
            span_id=row_id,
            parent=0,
            start_ns=start_ns,
            end_ns=end_ns,
            attributes=f"{otlp.attribute(names.EPOCH, epoch)},"
            f"{otlp.attribute(names.REASON, reason)}",
        )
        self._append([text], resource=self._resource("controller"), lost=0)

    def close(self) -> None:
        """Close the file. Idempotent."""
        self._file.close()

    def _resource(self, store: str) -> dict[names.Attribute, otlp.AttributeValue]:
        resource: dict[names.Attribute, otlp.AttributeValue] = {
            names.SERVICE_NAME: names.SCOPE,
            names.SERVICE_INSTANCE: store,
            names.HOST_NAME: self._node,
            names.RUN: self._run,
            names.STORE: store,
        }
        if self._emulated:
            resource[names.EMULATED] = self._emulated
        return resource

    def _append(
        self,
        spans: Sequence[str],
        *,
        resource: dict[names.Attribute, otlp.AttributeValue],
        lost: int,
    ) -> None:
        scope: dict[names.Attribute, otlp.AttributeValue] = {names.DROPPED: lost} if lost else {}
        self._file.write(otlp.line(spans, resource=resource, scope=scope))
        self._file.flush()
        self._written += len(spans)
        self._dropped += lost

    def _remember_waits(self, rows: Rows) -> None:
        """Keep, by step, the transfers waited for: a step's row comes after its waits."""
        linked = rows[(rows["kind"] == Kind.WAIT) & (rows["waits_for"] != 0)]
        for step, transfer in zip(
            linked["parent"].tolist(), linked["waits_for"].tolist(), strict=True
        ):
            if step:
                self._waits.setdefault(step, {})[transfer] = None
        while len(self._waits) > _MAX_WAITING_STEPS:  # steps whose rows were lost
            del self._waits[next(iter(self._waits))]

    def _encode(self, batch: RowBatch, rows: Rows) -> list[str]:
        fragments = _Fragments(batch, self._formats)
        before, after = self._link
        texts: list[str] = []
        for row in rows.tolist():
            kind, code, *_ = row
            start_ns, end_ns, row_id, waits_for, parent = row[6:11]
            linked = {waits_for: None} if waits_for else {}
            if kind == _STEP:
                linked |= self._waits.pop(row_id, {})
            texts.append(
                otlp.span_text(
                    _NAMES[kind],
                    trace=self._trace,
                    span_id=row_id,
                    parent=parent,
                    start_ns=start_ns,
                    end_ns=max(start_ns, end_ns),  # the wall clock may step back
                    attributes=fragments.attributes(row),
                    links=",".join([f"{before}{one:016x}{after}" for one in linked]),
                    error="" if code == _OK else CODE_NAMES[code],
                )
            )
        return texts


_OK, _STEP, _LAYER, _TRANSFER, _DISPATCH = (
    int(Code.OK), int(Kind.STEP), int(Kind.LAYER), int(Kind.TRANSFER), int(Kind.DISPATCH),
)  # fmt: skip
_LAYER_IS = otlp.int_prefix(names.LAYER)
_INDEX_IS = otlp.int_prefix(names.INDEX)
_TOKENS_IS = otlp.int_prefix(names.TOKENS)
_NBYTES_IS = otlp.int_prefix(names.NBYTES)
_QUEUE_IS = otlp.int_prefix(names.QUEUE)
_WIRE_IS = otlp.int_prefix(names.WIRE)
_VERIFY_IS = otlp.int_prefix(names.VERIFY)
_ACTIVATE_IS = otlp.int_prefix(names.ACTIVATE)
_ATTEMPT_IS = otlp.int_prefix(names.ATTEMPT)
_USED = otlp.attribute(names.USED, value=True)
_REQUEST_IS = f'{{"key":"{names.REQUEST.name}","value":{{"stringValue":"'
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
        trace_hi, trace_lo, nbytes, queue_ns, wire_ns, verify_ns, activate_ns = row[11:18]
        reason, used, attempt = row[18:]
        text = self._codes[code]
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
            text += f",{_USED}" if used else ""
            text += f",{_ATTEMPT_IS}{attempt}{_END}" if attempt else ""
        if trace_hi or trace_lo:
            text += f",{_REQUEST_IS}{trace_hi:016x}{trace_lo:016x}{_END}"
        return text

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


def _keep(rows: Rows, *, max_rows: int) -> Rows:
    """Rows that become spans: whole ones, and of too many all but layers and dispatches."""
    kind = rows["kind"]
    failed = rows["code"] != Code.OK
    whole = (kind >= min(Kind)) & (kind <= max(Kind)) & (rows["code"] <= max(Code))
    whole &= rows["row_id"] != 0
    for spare in (Kind.LAYER, Kind.DISPATCH):
        excess = int(whole.sum()) - max_rows
        if excess <= 0:
            break
        victims = np.flatnonzero(whole & (kind == spare) & ~failed)
        whole[victims[:excess]] = False
    return rows if whole.all() else rows[whole]
