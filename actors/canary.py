"""The live check at a worker: real steps, computed again at full precision in the background.

Decides which requests' steps are computed again and tells the controller what came of it; what
follows is the guardrail's business. A request's tokens and the logits of its steps are kept as it
is served. One thread of low priority runs the same tokens through the full-precision experts in one
pass and compares the distributions after the same tokens: paired KL(full || served), and whether
the top choice changed.

Blocks come over the normal path (a resident full copy, a peer, a pool, storage) into one slot that
the worker's residency policy does not count, so nothing that is hot is evicted; they are read at
background priority. `policies.live_share` bounds the time that is taken.

Must not know Ray, nor why a block has its format. Invariants: the token path never waits for this
thread; every slot taken is given back; pairs are reported only for passes that were whole.
"""

from __future__ import annotations

import contextlib
import inspect
import os
import threading
import time
from dataclasses import dataclass, field
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch.nn import functional

from hotset.actors.fetcher import Landing, Want
from hotset.blocks.divergence import paired_kl
from hotset.blocks.routing import combine, count_experts, group_rows
from hotset.errors import HotsetError, TransportError
from hotset.policies.types import BlockId, DriftMeasured, Format, Reason

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from hotset.actors.cache import HotCache
    from hotset.actors.fetcher import Fetcher
    from hotset.actors.weights import WeightViews
    from hotset.blocks.checkpoint import Catalog
    from hotset.blocks.experts import ExpertsModule, ExpertWeights
    from hotset.blocks.hf import ExpertRunner
    from hotset.blocks.routing import Reference
    from hotset.policies.live_share import LiveShare
    from hotset.transport.slab import Slab

_NICE = 10
_LOOK_S = 0.005  # between two looks at the load, or at the slab for a slot
_SLOT_S = 10.0  # patience with a slab that has no slot free
_MOST_ENDED = 8  # requests that have ended and wait to be checked


class Compute(Protocol):
    """One expert on rows, as the token path runs it."""

    def __call__(
        self, module: ExpertsModule, rows: torch.Tensor, weights: ExpertWeights
    ) -> torch.Tensor:
        """Give the expert's output [n, H] for `rows` [n, H]."""


class FullExperts:
    """An `ExpertRunner` that computes with full-precision blocks, wherever they are."""

    def __init__(  # noqa: PLR0913 - a worker's parts, by name
        self,
        *,
        catalog: Catalog,
        cache: HotCache,
        fetcher: Fetcher,
        slab: Slab,
        views: WeightViews,
        compute: Compute,
        reference: Reference,
    ) -> None:
        """All parts belong to one worker; `compute` and `reference` are the token path's."""
        self._catalog, self._cache, self._fetcher, self._slab = catalog, cache, fetcher, slab
        self._views, self._compute, self._reference = views, compute, reference
        self.rest: Callable[[], None] = lambda: None
        """Called before each block; waits while there is load."""
        self.waited_ns = 0
        """Time spent on waiting for blocks and for load to pass."""

    def run(
        self,
        layer: int,
        module: ExpertsModule,
        hidden: torch.Tensor,
        top_k_index: torch.Tensor,
        top_k_weights: torch.Tensor,
    ) -> torch.Tensor:
        """As `ExpertRunner.run`."""
        experts, _ = count_experts(top_k_index, num_experts=self._catalog.num_experts)
        outputs: dict[int, torch.Tensor] = {}
        for expert in experts:
            rows = hidden[group_rows(top_k_index, expert, reference=self._reference).tokens]
            with self._full(BlockId(layer, expert)) as weights:
                outputs[expert] = self._compute(module, rows, weights)
        return combine(hidden, top_k_index, top_k_weights, outputs, reference=self._reference)

    @contextlib.contextmanager
    def _full(self, block: BlockId) -> Iterator[ExpertWeights]:
        """The block at full precision, pinned while in use. Raises TransportError."""
        began_ns = time.monotonic_ns()
        self.rest()
        held = self._cache.hold(block.layer, block.index)
        if held is not None:
            try:
                if held.format is Format.BF16:
                    self.waited_ns += time.monotonic_ns() - began_ns
                    yield self._views.full(held.slot)
                    return
            finally:
                self._cache.done(held)
        landing = self._fetch(block)
        self.waited_ns += time.monotonic_ns() - began_ns
        slot = landing.slot
        if slot is None:
            raise TransportError(
                f"block {block} came from no source ({landing.error})",
                remedy="the live check tries again with the next request",
            )
        try:
            yield self._views.full(slot)
        finally:
            self._slab.retire(slot)
            self._slab.unpin(slot)

    def _fetch(self, block: BlockId) -> Landing:
        """Read the block into a slot that nobody else uses."""
        nbytes = self._catalog.block_nbytes
        deadline, pace = time.monotonic() + _SLOT_S, threading.Event()
        while (slot := self._slab.allocate(nbytes)) is None:
            if time.monotonic() > deadline:
                raise TransportError(
                    f"no slot for block {block}", remedy="the live check tries again later"
                )
            pace.wait(_LOOK_S)
        ended: SimpleQueue[Landing] = SimpleQueue()
        want = Want(
            block=block, format=Format.BF16, slot=slot, nbytes=nbytes, on_end=ended.put,
            reason=Reason.CHECK, plain=True,
        )  # fmt: skip
        self._fetcher.start([want])
        return ended.get()  # a fetch ends exactly once, whatever happens


@dataclass(slots=True, kw_only=True, eq=False)
class _Followed:
    """A request as it is served: its tokens, and logits [V] after some of them."""

    began_ns: int
    ids: list[int] = field(default_factory=list)
    places: list[int] = field(default_factory=list)
    logits: list[torch.Tensor] = field(default_factory=list)

    def take(self) -> _Followed:
        """What is kept so far, to be checked; goes on empty."""
        taken = _Followed(
            began_ns=self.began_ns,
            ids=self.ids[: self.places[-1] + 1],
            places=self.places,
            logits=self.logits,
        )
        self.places, self.logits = [], []
        return taken


class Canary:
    """An `ExpertRunner` around the token path's: passes its steps on, and follows requests."""

    def __init__(  # noqa: PLR0913 - a worker's parts, by name
        self,
        model: Any,
        *,
        served: ExpertRunner,
        full: FullExperts,
        share: LiveShare,
        store: str,
        requests: Callable[[], int],
        waiting: Callable[[], bool],
    ) -> None:
        """`served` runs the steps of requests; `requests`, `waiting` tell the load."""
        self._model, self._served, self._full, self.share = model, served, full, share
        self._store, self._requests, self._waiting = store, requests, waiting
        self._keeps_some = "logits_to_keep" in inspect.signature(model.forward).parameters
        self._followed: dict[int, _Followed] = {}
        self._ended: list[_Followed] = []
        self._found: list[DriftMeasured] = []
        self.pairs = 0
        """Tokens that were computed again."""
        self.given_up = 0
        """Tokens that were kept and could not be."""
        self._lock = threading.Lock()
        self._wake = threading.Event()
        self._stop = False
        full.rest = self._rest
        self._thread = threading.Thread(target=self._loop, name="canary", daemon=True)
        self._thread.start()

    # --- threads of requests --------------------------------------------------------------------

    @property
    def mine(self) -> bool:
        """Whether this is the thread that computes again: its steps are nobody's request."""
        return threading.current_thread() is self._thread

    def run(
        self,
        layer: int,
        module: ExpertsModule,
        hidden: torch.Tensor,
        top_k_index: torch.Tensor,
        top_k_weights: torch.Tensor,
    ) -> torch.Tensor:
        """As `ExpertRunner.run`."""
        runner = self._full if self.mine else self._served
        return runner.run(layer, module, hidden, top_k_index, top_k_weights)

    def step(self, request: int, ids: torch.Tensor) -> None:
        """A step of a request begins: `ids` [1, n] are its new tokens."""
        fresh: list[int] = ids[0].tolist()
        with self._lock:
            one = self._followed.get(request)
            if one is None:
                one = self._followed[request] = _Followed(began_ns=time.time_ns())
            one.ids += fresh

    def stepped(self, request: int, logits: torch.Tensor, *, step_ns: int) -> None:
        """A step has ended with `logits` [1, n, V]; the last row says what comes next."""
        self.share.served(step_ns)
        with self._lock:
            one = self._followed.get(request)
            kept = sum(len(each.places) for each in (*self._followed.values(), *self._ended))
            if one is None or not self.share.keeps(kept=kept, position=len(one.ids)):
                return
            one.places.append(len(one.ids) - 1)
            one.logits.append(logits[0, -1].detach().clone())
            ripe = bool(self._ended) or len(one.places) >= self.share.bounds.least
        if ripe:
            self._wake.set()

    def ended(self, request: int) -> None:
        """A request has ended; what is kept of it is still checked."""
        with self._lock:
            one = self._followed.pop(request, None)
            if one is None or not one.places:
                return
            self._ended.append(one.take())
            while len(self._ended) > _MOST_ENDED:
                least = min(self._ended, key=lambda each: len(each.places))
                self._ended.remove(least)
                self.given_up += len(least.places)
        self._wake.set()

    def take_events(self) -> list[DriftMeasured]:
        """What was measured since the last call."""
        with self._lock:
            found, self._found = self._found, []
            return found

    def close(self) -> None:
        """Stop; a pass that runs ends first."""
        self._stop = True
        self._wake.set()
        self._thread.join(timeout=10)

    # --- the thread that computes again ---------------------------------------------------------

    def _loop(self) -> None:
        with contextlib.suppress(OSError, AttributeError):  # a system without priorities of threads
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICE)
        torch.set_grad_enabled(mode=False)  # it is a thread's own
        while not self._stop:
            self._wake.wait()
            self._wake.clear()
            while not self._stop and self.share.may_begin():
                one = self._next()
                if one is None:
                    break
                self._check(one)

    def _next(self) -> _Followed | None:
        """The request with most to compare: one that has ended, or one that goes on."""
        with self._lock:
            running = [
                each
                for each in self._followed.values()
                if len(each.places) >= self.share.bounds.least
            ]
            choice = max((*self._ended, *running), key=lambda each: len(each.places), default=None)
            if choice is None:
                return None
            if choice in running:
                return choice.take()
            self._ended.remove(choice)
            return choice

    def _check(self, one: _Followed) -> None:
        """Compute one request's tokens again and compare."""
        began_ns, waited_ns = time.monotonic_ns(), self._full.waited_ns
        try:
            kl, flips = self._compare(one)
        except HotsetError:  # a source died: nothing is known, and the next one may work
            self.given_up += len(one.places)
            return
        finally:
            waited_ns = self._full.waited_ns - waited_ns
            spent_ns = time.monotonic_ns() - began_ns - waited_ns
            self.share.spent(spent_ns)
        self.pairs += len(kl)
        event = DriftMeasured(
            now_ns=time.time_ns(), store=self._store, since_ns=one.began_ns,
            kl=tuple(kl), flips=tuple(flips), spent_ns=spent_ns,
        )  # fmt: skip
        with self._lock:
            self._found.append(event)

    def _compare(self, one: _Followed) -> tuple[list[float], list[bool]]:
        device = one.logits[0].device
        ids = torch.tensor([one.ids], device=device)
        places = torch.tensor(one.places, device=device)
        with torch.inference_mode():
            if self._keeps_some:
                again = self._model(input_ids=ids, use_cache=False, logits_to_keep=places).logits[0]
            else:
                again = self._model(input_ids=ids, use_cache=False).logits[0, places]
            full = functional.log_softmax(again.float(), dim=-1)
            served = functional.log_softmax(torch.stack(one.logits).float(), dim=-1)
            kl = paired_kl(full, served)
            flips = full.argmax(dim=-1) != served.argmax(dim=-1)
        return kl.tolist(), flips.tolist()

    def _rest(self) -> None:
        """Wait while there is load."""
        pace = threading.Event()
        while not self._stop and self.share.must_wait(
            requests=self._requests(), waiting=self._waiting(), now_ns=time.monotonic_ns()
        ):
            pace.wait(_LOOK_S)
