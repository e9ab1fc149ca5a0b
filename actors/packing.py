"""Encodes blocks at a pool, once, so that every reader's link carries fewer bytes.

Lossy copies that the controller asks for are made from full ones; lossless ones replace the full
copy where that makes reading faster: as readers have measured, and before they have, by the profile
of the link. Then the first block is encoded and decoded to see what that takes; `policies.wire`
compares. Imports torch: pools that encode nothing do without this module.

Must not know policy, Ray or engines.
"""

from __future__ import annotations

import statistics
import time
from typing import TYPE_CHECKING

import torch

from hotset.blocks.formats import codec
from hotset.policies.types import Format
from hotset.policies.wire import packing_pays

if TYPE_CHECKING:
    from hotset.blocks.checkpoint import BlockLayout
    from hotset.transport.base import LinkProfile

_LEAST_ROUNDS = 3
_MOST_ROUNDS = 33
_TRIAL_NS = 5_000_000
"""Small blocks are decoded often enough that a moment without the processor does not count."""


def decode_ns(source: torch.Tensor, layout: BlockLayout) -> int:
    """Time to decode a `bf16z` block: the median of some rounds after one that may compile."""
    out = torch.empty(layout.nbytes, dtype=torch.uint8, device=source.device)

    def once() -> int:
        began_ns = time.perf_counter_ns()
        codec(Format.BF16Z).decode(source, layout, out, verified=True)
        return time.perf_counter_ns() - began_ns

    once()
    times: list[int] = []
    while len(times) < _LEAST_ROUNDS or (len(times) < _MOST_ROUNDS and sum(times) < _TRIAL_NS):
        times.append(once())
    return int(statistics.median(times))


class Packer:
    """Encodes payloads of one layout. One thread at a time."""

    def __init__(self, layout: BlockLayout, *, link: LinkProfile | None) -> None:
        """`link` is the one that readers of this store have to take; None: nobody knows it."""
        self._layout = layout
        self._link = link
        self._pays: bool | None = None
        torch.set_num_threads(1)

    def encode(self, full: memoryview, form: Format) -> memoryview:
        """The block in `form`. Raises CheckpointError for weights that are not finite."""
        coder = codec(form)
        made = torch.zeros(coder.nbytes(self._layout), dtype=torch.uint8)
        used = coder.encode(torch.frombuffer(full, dtype=torch.uint8), self._layout, made)
        return memoryview(made[:used].numpy().data)

    def unpack(self, packed: memoryview, form: Format) -> memoryview:
        """The full block from a lossless form."""
        out = torch.empty(self._layout.nbytes, dtype=torch.uint8)
        source = torch.frombuffer(packed, dtype=torch.uint8)
        codec(form).decode(source, self._layout, out, verified=True)
        return memoryview(out.numpy().data)

    def pack(self, full: memoryview, *, wanted: bool | None = None) -> memoryview | None:
        """The block compressed without loss, None where that does not pay.

        `wanted` is what readers have measured; None: nobody has, the link's profile decides.
        """
        if wanted is False or (wanted is None and (self._link is None or self._pays is False)):
            return None
        packed = self.encode(full, Format.BF16Z)
        if wanted is None and self._link is not None and self._pays is None:
            self._pays = packing_pays(
                full_nbytes=len(full),
                packed_nbytes=len(packed),
                decode_ns=decode_ns(torch.frombuffer(packed, dtype=torch.uint8), self._layout),
                link_bytes_per_s=self._link.bandwidth_bytes_per_s,
            )
        return packed if (wanted or self._pays) and len(packed) < len(full) else None
