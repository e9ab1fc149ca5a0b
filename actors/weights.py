"""From a copy in a slot to weights that compute can read, for every format.

`bf16` and `int8` are read where they lie (int8 for a few rows only: beyond that one decoding costs
less than its slower product). All other formats are decoded into a scratch buffer of the thread,
which holds the last block that was decoded until the next one. Decoding is timed, since links are
compared with it. Must not know where a copy came from or whether it may be used.

Invariant: views are used before the thread asks for the next block's.
"""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING

import torch

from hotset.blocks.experts import view_weights
from hotset.blocks.formats import codec
from hotset.policies.types import Format

if TYPE_CHECKING:
    from hotset.actors.cache import Held
    from hotset.actors.directory import Directory
    from hotset.blocks.checkpoint import Catalog
    from hotset.blocks.experts import ExpertWeights
    from hotset.transport.slab import Slab, Slot

_DIRECT_ROWS = 4
"""Most rows for which torch's int8 product beats decoding (measured: 1.1 ms against 1.4 at 4 rows,
3.7 against 1.6 at 16)."""


class WeightViews:
    """Weights of held copies in one slab; any thread may ask, each has its own scratch."""

    def __init__(self, *, catalog: Catalog, slab: Slab, directory: Directory) -> None:
        """All three belong to one worker."""
        self._catalog = catalog
        self._slab = slab
        self._directory = directory
        self._views: dict[int, ExpertWeights] = {}
        self._local = threading.local()
        self._payload_nbytes: dict[Format, int] = {}

    def of(self, held: Held, *, rows: int = 1) -> ExpertWeights:
        """Weights of a held copy, for a product with `rows` rows."""
        layout = self._catalog.layout
        if held.format is Format.BF16:
            return self.full(held.slot)
        coder = codec(held.format)
        if coder.direct and rows <= _DIRECT_ROWS:
            return coder.views(self._payload(held), layout)
        self.decoded(held)
        decoded: ExpertWeights = self._local.views
        return decoded

    def full(self, slot: Slot) -> ExpertWeights:
        """Weights of a full-precision copy, where they lie."""
        # Slots do not move and all blocks have one layout: views are made once per slot.
        views = self._views.get(slot.offset)
        if views is None:
            layout = self._catalog.layout
            payload = self._slab.torch_view(slot, layout.nbytes)
            views = self._views[slot.offset] = view_weights(payload, layout)
        return views

    def decoded(self, held: Held) -> torch.Tensor:
        """Full-precision bytes of a held copy, in this thread's scratch."""
        layout = self._catalog.layout
        scratch: torch.Tensor | None = getattr(self._local, "scratch", None)
        if scratch is None:
            device = self._slab.torch_view(held.slot, 1).device
            scratch = torch.empty(layout.nbytes, dtype=torch.uint8, device=device)
            self._local.scratch = scratch
            self._local.views = view_weights(scratch, layout)
        began_ns = time.monotonic_ns()
        # The slot's checksum was verified when it landed, or the copy was made here.
        codec(held.format).decode(self._payload(held), layout, scratch, verified=True)
        self._directory.decoding(held.format).observe(
            layout.nbytes, elapsed_ns=time.monotonic_ns() - began_ns
        )
        return scratch

    def _payload(self, held: Held) -> torch.Tensor:
        most = self._payload_nbytes.get(held.format)
        if most is None:
            most = codec(held.format).nbytes(self._catalog.layout)
            self._payload_nbytes[held.format] = most
        return self._slab.torch_view(held.slot, min(held.slot.nbytes, most))
