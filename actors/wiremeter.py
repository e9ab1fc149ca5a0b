"""What packed blocks would save a worker on each link: by its own links and its own decoder.

Decides nothing: `readings` go to the controller with the heartbeat, which tells each pool what its
readers measure (`policies.wire`). What packed reads take is expected from full ones until there
were some; what decoding takes is tried on one block of the checkpoint when the first link turns out
slow enough that packing could pay, tried again now and then while nothing is packed (a trial on a
busy machine may mislead), and measured with every packed block.

Must not know policy or Ray. Invariant: the thread that asks never waits for the trial.
"""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING

import torch

from hotset.actors.packing import decode_ns
from hotset.blocks.formats import codec
from hotset.blocks.local import BlockReader
from hotset.errors import HotsetError
from hotset.policies.types import Format, Tier
from hotset.policies.wire import Reading, expected_ns, packing_gain

if TYPE_CHECKING:
    from hotset.actors.directory import Directory
    from hotset.actors.fetcher import Fetcher
    from hotset.blocks.checkpoint import Catalog

_LEAST_READS = 8
"""Blocks read in one format before what they took is told."""
_LATENCY_NS = 100_000
"""What a read is taken to cost without its bytes until reads of two sizes have told."""
_FASTEST_BYTES_PER_S = 4_000_000_000
"""Beyond this rate nothing is tried: packing saves a third of the bytes at most, so a decoder would
have to make 12 GB/s of full bytes, more than memory copies."""
_TRY_AGAIN_S = 10.0


class WireMeter:
    """Gain of packing at each pool that one worker reads."""

    def __init__(
        self, *, catalog: Catalog, fetcher: Fetcher, directory: Directory, device: torch.device
    ) -> None:
        """`fetcher` counts the reads, `directory` has the costs; blocks are decoded on `device`."""
        self._catalog = catalog
        self._fetcher = fetcher
        self._directory = directory
        self._device = device
        self._sample: torch.Tensor | None = None  # the packed block that is tried
        self._trial: threading.Thread | None = None
        self._tried_s = 0.0

    def readings(self) -> tuple[Reading, ...]:
        """Gains that are known so far; the trial begins when one is missing for want of it."""
        found = []
        for source, sums in sorted(self._fetcher.uses.items()):
            if self._directory.tier(source) in {Tier.HOST, Tier.CXL}:
                gain = self._gain(source)
                if gain is not None:
                    found.append(Reading(source=source, nbytes=sums.nbytes, gain=gain))
        return tuple(found)

    def _gain(self, source: str) -> float | None:
        full_ns = self._read_ns(source, Format.BF16)
        if full_ns is None:
            return None
        full = self._catalog.block_nbytes
        if full * 1e9 > _FASTEST_BYTES_PER_S * (full_ns - _LATENCY_NS):
            return -1.0
        packed_ns = self._read_ns(source, Format.BF16Z)
        if packed_ns is None:
            self._try_soon()
            if self._sample is None:
                return None
            packed_ns = expected_ns(
                full_ns, full_nbytes=full, packed_nbytes=len(self._sample), latency_ns=_LATENCY_NS
            )
        decoding = self._directory.decoding(Format.BF16Z).estimate_ns(full)
        return packing_gain(full_ns=full_ns, packed_ns=packed_ns, decode_ns=decoding)

    def _read_ns(self, source: str, form: Format) -> float | None:
        """Mean time of a block's read; None before there were enough."""
        sums = self._fetcher.reads.get((source, form))
        return sums.ns / sums.blocks if sums and sums.blocks >= _LEAST_READS else None

    def _try_soon(self) -> None:
        """Begin a trial unless one runs, found nothing to decode, or began just now."""
        now_s = time.monotonic()
        if self._trial is not None and (
            self._trial.is_alive() or self._sample is None or now_s - self._tried_s < _TRY_AGAIN_S
        ):
            return
        self._tried_s = now_s
        self._trial = threading.Thread(target=self._try, name="decode-trial", daemon=True)
        self._trial.start()

    def _try(self) -> None:
        layout = self._catalog.layout
        sample = self._pack_first() if self._sample is None else self._sample
        if sample is None:
            return
        took_ns = decode_ns(sample.to(self._device), layout)
        self._directory.decoding(Format.BF16Z).observe(nbytes=layout.nbytes, elapsed_ns=took_ns)
        self._sample = sample

    def _pack_first(self) -> torch.Tensor | None:
        """The first block, packed; None when it cannot be read or packed, which is left alone."""
        layout, coder = self._catalog.layout, codec(Format.BF16Z)
        payload = torch.empty(layout.nbytes, dtype=torch.uint8)
        packed = torch.zeros(coder.nbytes(layout), dtype=torch.uint8)
        reader = BlockReader(self._catalog)
        try:
            reader.read(next(iter(self._catalog.blocks)), payload)
            return packed[: coder.encode(payload, layout, packed)].clone()
        except HotsetError:  # whoever serves the block meets the same error and reports it
            return None
        finally:
            reader.close()
