"""Tokens on their way to peers: which worker could take them, the call, and what it cost.

Decides the best holder by measured round trips; whether tokens or weights move is the token path's
decision. Must not know Ray: peers are behind the `Peers` protocol.

Invariant: every dispatch puts exactly one answer into its inbox, whatever happens.
"""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from hotset.actors.tracecontext import TraceContext
from hotset.errors import TransportError
from hotset.transport.records import Code, Kind

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch

    from hotset.actors.context import Context, RowIds
    from hotset.actors.directory import Directory
    from hotset.transport.inbox import Inbox
    from hotset.transport.records import Ring

_DISPATCH_S = 2.0


class Peers(Protocol):
    """Workers that take tokens."""

    def compute(
        self,
        store: str,
        *,
        layer: int,
        parts: Sequence[tuple[int, torch.Tensor]],
        timeout_s: float,
        asked: TraceContext,
    ) -> dict[int, torch.Tensor | None]:
        """Outputs by expert; None where the peer no longer holds it. Raises TransportError.

        `asked` is the context of the dispatch.
        """


class Dispatched(NamedTuple):
    """A peer's answer (or its absence) for the experts that were sent to it."""

    store: str
    layer: int
    outputs: dict[int, torch.Tensor | None]
    row_id: int


class Dispatcher:
    """Sends tokens to peers on a few threads of its own."""

    def __init__(self, *, peers: Peers, directory: Directory, ring: Ring, row_ids: RowIds) -> None:
        """All parts belong to one worker."""
        self._peers = peers
        self._directory = directory
        self._ring = ring
        self._row_ids = row_ids
        self._senders = ThreadPoolExecutor(max_workers=4, thread_name_prefix="dispatch")

    def send(
        self,
        store: str,
        layer: int,
        parts: list[tuple[int, torch.Tensor]],
        *,
        context: Context,
        inbox: Inbox[Any],
    ) -> None:
        """Ask `store` to compute; its `Dispatched` comes to `inbox`."""
        self._senders.submit(self._dispatch, store, layer, parts, context, inbox)

    def _dispatch(
        self,
        store: str,
        layer: int,
        parts: list[tuple[int, torch.Tensor]],
        context: Context,
        inbox: Inbox[Any],
    ) -> None:
        began_ns, wall_ns = time.monotonic_ns(), time.time_ns()
        row_id = self._row_ids.take()
        nbytes = 2 * sum(rows.numel() * rows.element_size() for _, rows in parts)
        code = Code.OK
        try:
            outputs = self._peers.compute(
                store, layer=layer, parts=parts, timeout_s=_DISPATCH_S,
                asked=TraceContext(context.trace, row_id),
            )  # fmt: skip
            elapsed_ns = time.monotonic_ns() - began_ns
            self._directory.dispatch(store).observe(nbytes, elapsed_ns=elapsed_ns)
        except TransportError:
            code = Code.FAILED
            outputs = dict.fromkeys((expert for expert, _ in parts), None)
            self._directory.dispatch(store).observe(nbytes, elapsed_ns=int(_DISPATCH_S * 1e9))
        self._ring.append(
            Kind.DISPATCH,
            code=code,
            source=self._ring.name(store),
            layer=layer,
            index=parts[0][0],
            start_ns=wall_ns,
            end_ns=time.time_ns(),
            row_id=row_id,
            parent=context.step_row,
            trace_hi=context.trace[0],
            trace_lo=context.trace[1],
            nbytes=nbytes,
        )
        inbox.put(Dispatched(store, layer, outputs, row_id))
