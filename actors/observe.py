"""What a worker tells of its layers: their times, its load and links, and (asked for) its routing.

Stands between the model and the token path: passes every layer on, and notes when it began. Decides
nothing and must not know policy, Ray or the controller; `reports` makes the events.

A layer's time runs from its experts' start to the next one's, so it holds the dense part, less what
the request stalled. Only decode steps (one row) count, since a prefill says little about them.

Invariants: what is passed on and returned is untouched; recorded rows are those of whole passes; a
recording stops at its limit and says so.
"""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

import msgspec

from hotset.policies.types import Concurrency, LayerTimes, LinkUse, Pressure

if TYPE_CHECKING:
    from collections.abc import Mapping

    import torch

    from hotset.actors.tokenpath import TokenPath
    from hotset.blocks.experts import ExpertsModule
    from hotset.policies.types import Event

REPORT_NS = 1_000_000_000
"""Shortest time between two reports: they are journalled."""
MOST_ROWS = 1 << 22
"""Rows (tokens x layers) that a recording holds."""


class Routed(msgspec.Struct, frozen=True, kw_only=True):
    """Experts of one request: for each layer its tokens' choices, row-major uint16 [n, k]."""

    request: int
    top_k: int
    layers: tuple[bytes, ...]


class Recording(msgspec.Struct, frozen=True, kw_only=True):
    """All requests of one worker; `cut` when the limit was reached."""

    requests: tuple[Routed, ...]
    cut: bool


class _Began(NamedTuple):
    layer: int
    at_ns: int
    stall_ns: int
    rows: int


@dataclass(slots=True)
class _Sums:
    """Since the last report."""

    ns: dict[int, int] = field(default_factory=dict)
    visits: dict[int, int] = field(default_factory=dict)
    stall_ns: int = 0
    experts_ns: int = 0
    steps: int = 0
    tokens: int = 0


class LinkSums(NamedTuple):
    """Totals of one source, growing: time on the wire, that of demand, bytes."""

    busy_ns: int
    demand_ns: int
    nbytes: int


class Observer:
    """An `ExpertRunner` that passes on to the token path."""

    def __init__(self, path: TokenPath, *, layers: tuple[int, ...], record: bool = False) -> None:
        """`record` keeps every token's experts until `recording` is called."""
        self._path = path
        self._layers = layers
        self._began: dict[int, _Began] = {}
        self._sums = _Sums()
        self._lock = threading.Lock()
        self._record = record
        self._routed: dict[int, list[list[bytes]]] = {}
        self._top_k = 0
        self._rows = 0
        self._cut = False
        self._told_ns = time.monotonic_ns()
        self._links: dict[str, LinkSums] = {}

    # --- request threads ------------------------------------------------------------------------

    def run(
        self,
        layer: int,
        module: ExpertsModule,
        hidden: torch.Tensor,
        top_k_index: torch.Tensor,
        top_k_weights: torch.Tensor,
    ) -> torch.Tensor:
        """As `TokenPath.run`."""
        context = self._path.context
        rows = int(hidden.shape[0])
        began = _Began(layer, time.monotonic_ns(), context.stall_ns, rows)
        before = self._began.get(context.request)
        self._began[context.request] = began
        with self._lock:
            if before is not None and before.rows == 1:
                stalled_ns = began.stall_ns - before.stall_ns
                spent_ns = max(0, began.at_ns - before.at_ns - stalled_ns)
                sums = self._sums
                sums.ns[before.layer] = sums.ns.get(before.layer, 0) + spent_ns
                sums.visits[before.layer] = sums.visits.get(before.layer, 0) + 1
                sums.stall_ns += stalled_ns
            if layer == self._layers[0]:
                self._sums.steps += 1
                self._sums.tokens += rows
            if self._record:
                self._keep(context.request, layer, top_k_index)
        result = self._path.run(layer, module, hidden, top_k_index, top_k_weights)
        if rows == 1:
            stalled_ns = context.stall_ns - began.stall_ns
            with self._lock:
                self._sums.experts_ns += max(0, time.monotonic_ns() - began.at_ns - stalled_ns)
        return result

    def ended(self, request: int) -> None:
        """A request has ended."""
        self._began.pop(request, None)

    def _keep(self, request: int, layer: int, top_k_index: torch.Tensor) -> None:
        row = self._layers.index(layer)
        if row == 0 and self._rows >= MOST_ROWS:
            self._cut = True  # whole passes only
        if self._cut:
            return
        found = self._routed.setdefault(request, [[] for _ in self._layers])
        chosen = top_k_index.detach().cpu().numpy().astype("<u2")
        self._top_k = int(chosen.shape[1])
        self._rows += int(chosen.shape[0])
        found[row].append(chosen.tobytes())

    # --- others ---------------------------------------------------------------------------------

    def recording(self) -> Recording:
        """What was recorded so far; requests that are under way are cut to whole passes."""
        with self._lock:
            requests = tuple(
                Routed(
                    request=request,
                    top_k=self._top_k,
                    layers=tuple(b"".join(part[: len(layers[-1])]) for part in layers),
                )
                for request, layers in sorted(self._routed.items())
            )
            return Recording(requests=requests, cut=self._cut)

    def reports(
        self,
        store: str,
        *,
        requests: int,
        used_bytes: int,
        links: Mapping[str, LinkSums],
        last: bool = False,
    ) -> list[Event]:
        """Events since the last report; none within a second of it, and none while all rests.

        The `last` one does not wait for its second.
        """
        now_ns = time.monotonic_ns()
        span_ns = now_ns - self._told_ns
        with self._lock:
            busy = bool(self._sums.steps or self._sums.visits)
            early = span_ns < (1 if last else REPORT_NS)
            if early or not (busy or links != self._links):
                return []
            sums, self._sums = self._sums, _Sums()
        self._told_ns = now_ns
        wall_ns = time.time_ns()
        uses = tuple(
            use
            for source, total in sorted(links.items())
            if (use := self._use(source, total, span_ns=span_ns)).nbytes
        )
        self._links = dict(links)
        events: list[Event] = [
            Concurrency(
                now_ns=wall_ns, store=store, requests=requests, steps=sums.steps,
                tokens=sums.tokens,
            ),
            Pressure(now_ns=wall_ns, store=store, used_bytes=used_bytes, links=uses),
        ]  # fmt: skip
        if sums.visits:
            times = tuple(
                (layer, sums.ns[layer] // count) for layer, count in sorted(sums.visits.items())
            )
            steps = max(sums.visits.values())
            events.append(
                LayerTimes(
                    now_ns=wall_ns, store=store, steps=steps, times=times,
                    stall_ns=sums.stall_ns // steps, experts_ns=sums.experts_ns // steps,
                )
            )  # fmt: skip
        return events

    def _use(self, source: str, total: LinkSums, *, span_ns: int) -> LinkUse:
        before = self._links.get(source, LinkSums(0, 0, 0))
        # Transfers side by side on one link add up to more than the clock: it was busy, no more.
        return LinkUse(
            source=source,
            span_ns=span_ns,
            busy_ns=min(span_ns, total.busy_ns - before.busy_ns),
            demand_ns=min(span_ns, total.demand_ns - before.demand_ns),
            nbytes=total.nbytes - before.nbytes,
        )
