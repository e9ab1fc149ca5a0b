"""Encodes blocks at a pool, once, so that every reader's link carries fewer bytes.

Lossy copies that the controller asks for are made from full ones; lossless ones replace the full
copy where that makes reading faster. The first block is encoded and decoded to see whether it
does; `policies.wire` compares. Imports torch: pools that encode nothing do without this module.

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

_ROUNDS = 3


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

    def pack(self, full: memoryview) -> memoryview | None:
        """The block compressed without loss, None where that does not pay on this link."""
        if self._link is None or self._pays is False:
            return None
        packed = self.encode(full, Format.BF16Z)
        if self._pays is None:
            self._pays = self._judge(full, packed, link=self._link)
        return packed if self._pays and len(packed) < len(full) else None

    def _judge(self, full: memoryview, packed: memoryview, *, link: LinkProfile) -> bool:
        source = torch.frombuffer(packed, dtype=torch.uint8)
        out = torch.empty(len(full), dtype=torch.uint8)
        times = []
        for _ in range(_ROUNDS + 1):  # the first may compile
            began_ns = time.perf_counter_ns()
            codec(Format.BF16Z).decode(source, self._layout, out, verified=True)
            times.append(time.perf_counter_ns() - began_ns)
        return packing_pays(
            full_nbytes=len(full),
            packed_nbytes=len(packed),
            decode_ns=int(statistics.median(times[1:])),
            link_bytes_per_s=link.bandwidth_bytes_per_s,
        )
