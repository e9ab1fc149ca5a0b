"""Kinds of rows that the control plane and a worker's cache add to those of transport.

Decides only how their facts stand in the fixed columns of `transport.records.ROW`; must not know
who writes or reads them. Numbers begin at 16, so that both enums may grow; they are append-only.

| kind | columns, beside start, end and id |
|---|---|
| PLAN | index: epoch; reason; nbytes: asked to move; queue_ns: transfers; wire_ns: drops |
| | of a plan for replicas too: verify_ns, activate_ns: balancedness before, after; attempt: moves |
| SCALE | source: the store; reason; index: epoch |
| VETO | source: the store; layer, index, format; reason; queue_ns: name of the bound, plus 1 |
| USE | layer, index, format; reason and nbytes of the transfer; waits_for: its id; used |
| REQUEST | source: worker; index: tokens; queue_ns: time to the first; wire_ns: prompt's tokens |

A WAIT names the trace of what it waited for in queue_ns and wire_ns (`tracecontext.signed` halves);
a USE stands in the trace of its transfer.
"""

from __future__ import annotations

from enum import IntEnum

from hotset.transport.records import Kind


class ControlKind(IntEnum):
    """What a row of the control plane, or of a cache, tells."""

    PLAN = 16
    SCALE = 17
    VETO = 18
    USE = 19
    REQUEST = 20


KINDS = (*(int(kind) for kind in Kind), *(int(kind) for kind in ControlKind))
"""Every kind of row that becomes a span."""
