"""The token path: one MoE layer of one request, from router choice to combined rows.

For each expert that the router chose: compute here if it is resident; else move the tokens to a
worker that has it or the weights to here, whichever measures cheaper now. Blocks compute in the
order in which they arrive; their rows are added up in the reference's order, so arrival order,
place of compute and company never change a bit. Nothing here waits for the controller.

Must not know Ray: peers are behind the `Peers` protocol.
"""

from __future__ import annotations

import threading
import time
from collections import Counter
from dataclasses import dataclass
from functools import partial
from queue import Empty
from typing import TYPE_CHECKING, Any, Literal

from hotset.actors.cache import Delivery, Held, Lost
from hotset.actors.context import Context
from hotset.actors.dispatch import Dispatched, Dispatcher
from hotset.actors.kinds import ControlKind
from hotset.actors.tracecontext import signed
from hotset.blocks.experts import run_expert, run_expert_tiled, view_weights
from hotset.blocks.formats import codec
from hotset.blocks.routing import Groups, combine, count_experts
from hotset.errors import TransferTimeout, TransportError
from hotset.policies.choose import Move, move_tokens_or_weights
from hotset.policies.linkload import LinkLoad
from hotset.policies.types import FORMAT_CODES, BlockId, Format, Reason, Tier
from hotset.transport.inbox import Inbox
from hotset.transport.records import NO_NAME, Kind

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch

    from hotset.actors.assembly import Counters
    from hotset.actors.cache import HotCache
    from hotset.actors.context import RowIds
    from hotset.actors.directory import Directory
    from hotset.actors.dispatch import Peers
    from hotset.actors.formatchoice import FormatChoice
    from hotset.actors.reformer import Reformer
    from hotset.actors.tracecontext import TraceContext
    from hotset.actors.weights import WeightViews
    from hotset.blocks.checkpoint import Catalog
    from hotset.blocks.experts import ExpertsModule
    from hotset.blocks.routing import Reference
    from hotset.policies.residency import LayerPlan
    from hotset.policies.standin import StandInPurse
    from hotset.transport.records import Ring

_PATIENCE_NS = 60_000_000_000
_LAYER_SAMPLE = 16  # one step in this many gets a row for each layer


@dataclass(frozen=True, slots=True, kw_only=True)
class PathConfig:
    """How this worker computes. `move` forces one way for experiments and tests."""

    reference: Reference = "eager"
    numerics: Literal["exact", "tiled"] = "exact"
    move: Literal["auto", "weights", "tokens"] = "auto"


class TokenPath:
    """An `ExpertRunner` over a hot cache and peers."""

    def __init__(  # noqa: PLR0913 - the parts of one worker, by keyword
        self,
        *,
        catalog: Catalog,
        views: WeightViews,
        cache: HotCache,
        choice: FormatChoice,
        reformer: Reformer,
        purse: StandInPurse | None,
        directory: Directory,
        peers: Peers,
        ring: Ring,
        counters: Counters,
        row_ids: RowIds,
        config: PathConfig,
    ) -> None:
        """All parts belong to one worker. `purse` pays for stand-ins; None: they cost nothing."""
        self._catalog = catalog
        self._views = views
        self._cache = cache
        self._choice = choice
        self._reformer = reformer
        self._purse = purse
        self._purse_lock = threading.Lock()
        self._directory = directory
        self._dispatcher = Dispatcher(peers=peers, directory=directory, ring=ring, row_ids=row_ids)
        self._ring = ring
        self._counters = counters
        self._row_ids = row_ids
        self.config = config
        self.compute_expert = run_expert_tiled if config.numerics == "tiled" else run_expert
        self.weights = views.of
        self._local = threading.local()
        self._link = LinkLoad()
        self._routed: Counter[BlockId] = Counter()
        self._routed_lock = threading.Lock()

    # --- the request's thread -------------------------------------------------------------------

    @property
    def context(self) -> Context:
        """This thread's request."""
        found: Context | None = getattr(self._local, "context", None)
        if found is None:
            found = self._local.context = Context()
        return found

    def begin_request(self, request: int, *, trace: tuple[int, int], parent: int = 0) -> Context:
        """Start a request on this thread; `parent` is its span."""
        self._local.context = Context(request=request, trace=trace, parent=parent)
        return self.context

    def begin_step(self, tokens: int) -> None:
        """A forward pass starts."""
        context = self.context
        context.step += 1
        context.step_row = self._row_ids.take()
        context.step_start_ns = time.time_ns()
        context.tokens = tokens
        if self._purse is not None:
            with self._purse_lock:
                self._purse.earn(tokens)

    def end_step(self) -> None:
        """A forward pass has ended."""
        context = self.context
        end_ns = time.time_ns()
        self._link.step(step_ns=end_ns - context.step_start_ns, tokens=context.tokens)
        self._ring.append(
            Kind.STEP,
            index=context.tokens,
            start_ns=context.step_start_ns,
            end_ns=end_ns,
            row_id=context.step_row,
            parent=context.parent,
            trace_hi=context.trace[0],
            trace_lo=context.trace[1],
        )

    def run(
        self,
        layer: int,
        module: ExpertsModule,
        hidden: torch.Tensor,
        top_k_index: torch.Tensor,
        top_k_weights: torch.Tensor,
    ) -> torch.Tensor:
        """As `blocks.hf.ExpertRunner.run`: [n, H], [n, K], [n, K] -> [n, H]."""
        context = self.context
        start_ns = time.time_ns()
        self._measure(context, start_ns)
        experts, counts = count_experts(top_k_index, num_experts=self._catalog.num_experts)
        inbox: Inbox[Delivery | Dispatched] = Inbox()
        ready, plan = self._cache.begin(
            layer, experts, counts,
            step=context.step, request=context.request, inbox=inbox,  # type: ignore[arg-type] # a queue of more kinds
            may_stand_in=partial(self._may_stand_in, top_k_index, top_k_weights),
        )  # fmt: skip
        groups = Groups(top_k_index, reference=self.config.reference)
        outputs: dict[int, torch.Tensor] = {}
        try:
            rows = dict(zip(experts, counts, strict=True))
            self._send_off(layer, plan, rows=rows, hidden=hidden, groups=groups, inbox=inbox)
            while ready:
                held = ready.pop(0)
                outputs[held.expert] = self._expert(module, hidden, groups, held)
                if held.stands_in:
                    self._stood_in(held)
                self._hit("stand-in" if held.stands_in else "hbm", 1)
            while len(outputs) < len(experts):
                self._arrive(
                    self._wait(inbox, layer=layer),
                    module=module,
                    hidden=hidden,
                    groups=groups,
                    outputs=outputs,
                    inbox=inbox,
                )
        except BaseException:
            self._cache.abandon(inbox, ready)  # type: ignore[arg-type] # as above
            raise
        result = combine(
            hidden, top_k_index, top_k_weights, outputs, reference=self.config.reference
        )
        self._note(layer, experts, counts, start_ns=start_ns)
        return result

    # --- for peers ------------------------------------------------------------------------------

    def compute_for_peer(
        self,
        layer: int,
        module: ExpertsModule,
        parts: Sequence[tuple[int, torch.Tensor]],
        *,
        asked: TraceContext | None = None,
    ) -> dict[int, torch.Tensor | None]:
        """Run a peer's rows through the experts that are here; None for those that are not.

        Each part is one request's rows for one expert, so the bits are those of the request alone.
        `asked` is the context of the peer's dispatch.
        """
        start_ns = time.time_ns()
        outputs: dict[int, torch.Tensor | None] = {}
        for expert, rows in parts:
            held = self._cache.hold(layer, expert)
            if held is None:
                outputs[expert] = None
                continue
            try:
                weights = self._views.of(held, rows=rows.shape[0])
                outputs[expert] = self.compute_expert(module, rows, weights)
            finally:
                self._cache.done(held)
        trace, parent = (asked.trace, asked.span_id) if asked else ((0, 0), 0)
        self._ring.append(
            Kind.LAYER,
            layer=layer,
            index=sum(rows.shape[0] for _, rows in parts),
            start_ns=start_ns,
            end_ns=time.time_ns(),
            row_id=self._row_ids.take(),
            parent=parent,
            trace_hi=trace[0],
            trace_lo=trace[1],
        )
        return outputs

    @property
    def prefetching(self) -> bool:
        """Whether the trial lets prefetches start."""
        return self._link.trial.on

    def routed_since_last(self) -> tuple[tuple[BlockId, int], ...]:
        """Tokens routed to each block since the last call."""
        with self._routed_lock:
            counts, self._routed = self._routed, Counter()
        return tuple(sorted(counts.items()))

    # --- inside ---------------------------------------------------------------------------------

    def _measure(self, context: Context, start_ns: int) -> None:
        """Learn from the time since the layer before, and tell the policy when prefetches pay."""
        if context.layer_start_ns:
            self._link.observe(
                layer_ns=start_ns - context.layer_start_ns,
                stall_ns=context.stall_ns - context.layer_stall_ns,
                fetches=context.fetches,
                started=context.started,
                tokens=context.layer_tokens,
            )
        context.layer_tokens = context.tokens
        context.layer_start_ns = start_ns
        context.layer_stall_ns = context.stall_ns
        fetch_ns = self._directory.cheapest_ns(self._catalog.block_nbytes)
        self._cache.steer(self._link.bar(fetch_ns=fetch_ns), missed_ns=self._link.missed_ns)

    def _arrive(  # noqa: PLR0913 - one arrival of one layer
        self,
        arrival: Delivery | Dispatched,
        *,
        module: ExpertsModule,
        hidden: torch.Tensor,
        groups: Groups,
        outputs: dict[int, torch.Tensor],
        inbox: Inbox[Any],
    ) -> None:
        """Use what has come: compute with weights, or take rows."""
        if isinstance(arrival, Dispatched):
            self._take(arrival, outputs, inbox=inbox)
        elif isinstance(arrival, Lost):
            raise TransportError(
                f"block {arrival.layer}.{arrival.expert} came from no source ({arrival.error})",
                remedy="check that the checkpoint's files are still readable",
            )
        else:
            outputs[arrival.expert] = self._expert(module, hidden, groups, arrival)
            self._hit(self._tier(arrival.source), 1)

    def _send_off(  # noqa: PLR0913 - one layer of one step
        self,
        layer: int,
        plan: LayerPlan,
        *,
        rows: dict[int, int],
        hidden: torch.Tensor,
        groups: Groups,
        inbox: Inbox[Any],
    ) -> None:
        """Start what brings the missing experts' outputs: tokens out, or weights in."""
        context = self.context
        fetch: list[int] = []
        dispatch: dict[str, list[int]] = {}
        for expert in plan.missing:
            store = self._choose(layer, expert, rows=rows[expert], hidden=hidden)
            if store is None:
                fetch.append(expert)
            else:
                dispatch.setdefault(store, []).append(expert)
        if fetch:
            self._cache.fetch(
                layer, fetch, inbox=inbox, trace=context.trace, parent=context.step_row
            )
        context.fetches = len(fetch)
        context.started = len(fetch) + len(plan.prefetch)
        if plan.prefetch:
            self._cache.prefetch(plan.prefetch, trace=context.trace, parent=context.step_row)
        for store, experts in dispatch.items():
            parts = [(expert, hidden[groups.of(expert).tokens]) for expert in experts]
            self._dispatcher.send(store, layer, parts, context=context, inbox=inbox)

    def _choose(self, layer: int, expert: int, *, rows: int, hidden: torch.Tensor) -> str | None:
        """The worker to send the tokens to, or None to fetch the weights."""
        if self.config.move == "weights":
            return None
        copies = self._directory.copies(BlockId(layer, expert))
        holders = [
            copy.store
            for copy in copies
            if self._directory.tier(copy.store) is Tier.HBM
            and self._choice.accepts(copy.block, copy.format)
        ]
        if not holders:
            return None
        nbytes = 2 * rows * hidden.shape[-1] * hidden.element_size()
        best = self._directory.plan.pick(BlockId(layer, expert), holders, rows=rows) or min(
            holders, key=lambda s: (self._directory.dispatch(s).estimate_ns(nbytes), s)
        )
        if self.config.move == "tokens":
            return best
        form = self._choice.fetched(BlockId(layer, expert))
        size = codec(form).nbytes(self._catalog.layout)
        sources = self._directory.sources(
            BlockId(layer, expert), fmt=form, nbytes=size, look_again=False
        )
        chances = self._cache.use_chances(layer, expert)
        choice = move_tokens_or_weights(
            rows,
            dispatch_ns=self._directory.dispatch(best).estimate_ns(nbytes),
            fetch_ns=sources[0].cost_ns,
            reuse_probability=chances.reuse,
            victim_probability=chances.victim,
        )
        return best if choice.move is Move.TOKENS else None

    def _take(
        self, arrival: Dispatched, outputs: dict[int, torch.Tensor], *, inbox: Inbox[Any]
    ) -> None:
        """Use a peer's answer; fetch what it no longer had."""
        gone = []
        for expert, rows in arrival.outputs.items():
            if rows is None:
                gone.append(expert)
            else:
                outputs[expert] = rows
        self._hit("peer", len(arrival.outputs) - len(gone))
        if gone:
            context = self.context
            self._cache.fetch(
                arrival.layer, gone, inbox=inbox, trace=context.trace, parent=context.step_row
            )

    def _wait(self, inbox: Inbox[Any], *, layer: int) -> Any:
        try:
            return inbox.get_nowait()
        except Empty:
            pass
        start_ns = time.time_ns()
        try:
            arrival = inbox.get(_PATIENCE_NS)
        except Empty:
            raise TransferTimeout(
                f"nothing arrived for layer {layer} within {_PATIENCE_NS // 10**9} s",
                remedy="look at `hotset status` for stores that hang",
            ) from None
        self._stalled(arrival, layer=layer, start_ns=start_ns, end_ns=time.time_ns())
        return arrival

    def _stalled(self, arrival: Any, *, layer: int, start_ns: int, end_ns: int) -> None:
        context = self.context
        context.stall_ns += end_ns - start_ns
        self._counters.stall_ns += end_ns - start_ns
        held = isinstance(arrival, Held)
        dispatched = isinstance(arrival, Dispatched)
        cause = arrival.trace if held else context.trace
        self._ring.append(
            Kind.WAIT,
            source=self._ring.name(arrival.source) if held else NO_NAME,
            format_code=FORMAT_CODES[arrival.format] if held else 0,
            layer=layer,
            index=arrival.expert if held else -1,
            start_ns=start_ns,
            end_ns=end_ns,
            row_id=self._row_ids.take(),
            waits_for=arrival.transfer_id if held else arrival.row_id if dispatched else 0,
            parent=context.step_row,
            trace_hi=context.trace[0],
            trace_lo=context.trace[1],
            queue_ns=signed(cause[0]),
            wire_ns=signed(cause[1]),
            reason=self._ring.name(arrival.reason.value if held else "dispatch"),
        )

    def _expert(
        self, module: ExpertsModule, hidden: torch.Tensor, groups: Groups, held: Held
    ) -> torch.Tensor:
        kept = False
        try:
            rows = hidden[groups.of(held.expert).tokens]
            if held.format is Format.BF16Z:
                full = self._views.decoded(held)
                outputs = self.compute_expert(
                    module, rows, view_weights(full, self._catalog.layout)
                )
                kept = True  # what was decoded for this use serves the next ones too
                self._reformer.unpacked(held, full)
                return outputs
            return self.compute_expert(module, rows, self._views.of(held, rows=rows.shape[0]))
        finally:
            if not kept:
                self._cache.done(held)
                self._reformer.released(held)

    def _stood_in(self, held: Held) -> None:
        context, now_ns = self.context, time.time_ns()
        self._ring.append(
            int(ControlKind.USE),
            layer=held.layer,
            index=held.expert,
            format_code=FORMAT_CODES[held.format],
            start_ns=now_ns,
            end_ns=now_ns,
            row_id=self._row_ids.take(),
            parent=context.step_row,
            trace_hi=context.trace[0],
            trace_lo=context.trace[1],
            reason=self._ring.name(Reason.STAND_IN.value),
            used=1,
        )

    def _may_stand_in(
        self, index: torch.Tensor, weights: torch.Tensor, block: BlockId, form: Format
    ) -> bool:
        """Whether these tokens may use a cheap copy while the full one is on its way."""
        if self._purse is None:
            return True
        chosen = weights[index == block.index].tolist()
        with self._purse_lock:
            self._purse.see(block.layer, weights.flatten().tolist())
            return self._purse.allow(block, form, chosen)

    def _tier(self, source: str) -> str:
        tier = self._directory.tier(source)
        if tier is None:
            return "storage"
        return "peer" if tier is Tier.HBM else tier.name.lower()

    def _hit(self, tier: str, count: int) -> None:
        if count:
            hits = self._counters.hits
            hits[tier] = hits.get(tier, 0) + count
            self._counters.queries += count

    def _note(self, layer: int, experts: list[int], counts: list[int], *, start_ns: int) -> None:
        with self._routed_lock:
            for expert, count in zip(experts, counts, strict=True):
                self._routed[BlockId(layer, expert)] += count
        context = self.context
        if context.step % _LAYER_SAMPLE == 1:
            self._ring.append(
                Kind.LAYER,
                layer=layer,
                index=context.tokens,
                start_ns=start_ns,
                end_ns=time.time_ns(),
                row_id=self._row_ids.take(),
                parent=context.step_row,
                trace_hi=context.trace[0],
                trace_lo=context.trace[1],
            )
