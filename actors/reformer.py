"""Changes formats of a worker's copies: demote in place, compress, unpack, promote.

One background thread encodes and decodes; the cache swaps the copy. What the controller commands is
answered in any case (landed, or failed with a reason); what the worker does by itself (a block that
came in full although its plan is cheaper) is dropped when the block is gone by then.

Must not know policy, Ray or how a plan was made. Invariants: a lossy copy is made from full
precision only, never from another lossy one; the cheap copy stays until the full one has landed.
"""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import torch

from hotset.actors.cache import Held, Lost
from hotset.blocks.formats import codec
from hotset.errors import CheckpointError
from hotset.policies.types import LOSSLESS, BlockId, Format, Reason
from hotset.transport.inbox import Inbox

if TYPE_CHECKING:
    from collections.abc import Callable
    from concurrent.futures import Future

    from hotset.actors.cache import Delivery, HotCache
    from hotset.actors.fetcher import Landing
    from hotset.actors.formatchoice import FormatChoice
    from hotset.actors.store import Store
    from hotset.actors.weights import WeightViews
    from hotset.blocks.checkpoint import Catalog

_MOST_WAITING = 256
"""Most own changes that wait for the thread; more are forgotten until the block comes again."""
_LEAST_SAVING = 0.95
"""A compressed copy of more than this share of the full bytes is not kept."""


class Reformer:
    """Formats of the copies in one cache."""

    def __init__(
        self,
        *,
        catalog: Catalog,
        store: Store,
        cache: HotCache,
        choice: FormatChoice,
        views: WeightViews,
    ) -> None:
        """All parts belong to one worker."""
        self._catalog = catalog
        self._store = store
        self._cache = cache
        self._choice = choice
        self._views = views
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="encode")
        self._waiting: set[BlockId] = set()
        self._lock = threading.Lock()

    # --- the controller's commands --------------------------------------------------------------

    def demote(self, block: BlockId, form: Format) -> None:
        """Hold a block in `form`, encoded here from the full copy, which is fetched if missing."""
        self._choice.demote(block, form)
        self._submit(self._carry_out, block, form)

    def promote(self, block: BlockId) -> None:
        """Go back to full precision; the cheap copy serves until the full one is here."""
        self._choice.keep_full(block)
        if not self._cache.upgrade(block, reason=Reason.PROMOTE):
            held = self._cache.hold(block.layer, block.index)
            room = held is not None and held.format not in LOSSLESS
            if held is not None:
                self._cache.done(held)
            reason = Reason.VETO_MEMORY if room else Reason.STALE
            self._store.report_failure(block, Format.BF16, reason=reason)

    def distrust(self) -> None:
        """The plan has broken the quality budget: make and fetch no cheap copy by it any more."""
        self._choice.distrust()

    def refused(self, block: BlockId) -> None:
        """The controller refused a cheap copy of this block: it is wanted in full from now on."""
        self._choice.keep_full(block)

    # --- by itself ------------------------------------------------------------------------------

    def arrived(self, landing: Landing) -> None:
        """A block has landed: bring it into its format if it came in another lossless one."""
        self._want(landing.block, landing.format)

    def released(self, held: Held) -> None:
        """A copy was given back: what could not be swapped while it was held can be now."""
        self._want(BlockId(held.layer, held.expert), held.format)

    def _want(self, block: BlockId, form: Format) -> None:
        if form not in LOSSLESS or form is self._choice.target(block):
            return
        with self._lock:
            if block in self._waiting or len(self._waiting) >= _MOST_WAITING:
                return
            self._waiting.add(block)
        self._submit(self._settle, block)

    def _submit(self, work: Callable[..., None], *arguments: Any) -> None:
        self._thread.submit(work, *arguments).add_done_callback(_show)

    def unpacked(self, held: Held, payload: torch.Tensor) -> bool:
        """Keep the full form of a compressed copy that was just decoded; takes the hold back."""
        block = BlockId(held.layer, held.expert)
        if self._choice.target(block) is not Format.BF16:
            self._cache.done(held)
            return False
        data = _host(payload, self._catalog.block_nbytes)
        return self._cache.replace(held, Format.BF16, data, reason=Reason.PROMOTE)

    # --- the thread -----------------------------------------------------------------------------

    def _settle(self, block: BlockId) -> None:
        with self._lock:
            self._waiting.discard(block)
        held = self._cache.hold(block.layer, block.index)
        if held is None:
            return
        target = self._choice.target(block)
        if held.format is target or held.format not in LOSSLESS:
            self._cache.done(held)
            return
        self._remake(held, target)

    def _carry_out(self, block: BlockId, form: Format) -> None:
        held = self._cache.hold(block.layer, block.index) or self._fetch(block)
        if held is None:
            return  # the cache has reported it
        if held.format is form:
            self._cache.done(held)
            return
        if held.format not in LOSSLESS:
            self._cache.done(held)
            self._store.report_failure(block, form, reason=Reason.STALE)
            return
        if not self._remake(held, form):
            self._store.report_failure(block, form, reason=Reason.STALE)

    def _fetch(self, block: BlockId) -> Held | None:
        inbox: Inbox[Delivery] = Inbox()
        self._cache.fetch(
            block.layer, [block.index], inbox=inbox, trace=(0, 0), parent=0, reason=Reason.DEMOTE
        )
        arrival = inbox.get()  # a fetch delivers exactly once, whatever happens
        return None if isinstance(arrival, Lost) else arrival

    def _remake(self, held: Held, form: Format) -> bool:
        """Swap a lossless copy for one in `form`; takes the hold back."""
        layout = self._catalog.layout
        if held.format is Format.BF16:
            full = self._store.slab.torch_view(held.slot, layout.nbytes)
        else:
            full = self._views.decoded(held)
        if form is Format.BF16:
            return self._cache.replace(
                held, form, _host(full, layout.nbytes), reason=Reason.PROMOTE
            )
        coder = codec(form)
        made = torch.zeros(coder.nbytes(layout), dtype=torch.uint8, device=full.device)
        try:
            used = coder.encode(full, layout, made)
        except CheckpointError:  # weights that no format takes
            used = 0
        if not used or (form in LOSSLESS and used > _LEAST_SAVING * layout.nbytes):
            self._choice.keep_full(BlockId(held.layer, held.expert))
            self._cache.done(held)
            return False
        return self._cache.replace(held, form, _host(made, used))


def _show(work: Future[None]) -> None:
    """Raise what the thread's work raised: a bug of ours, which the executor then logs."""
    work.result()


def _host(payload: torch.Tensor, nbytes: int) -> memoryview:
    return memoryview(payload[:nbytes].cpu().numpy().data)
