"""The simplest complete runner: reads each expert from the checkpoint's files when it is needed.

No cache, no slots, one buffer per thread. It is the executable specification of the token path and
the yardstick of tests; a worker does the same with copies that are already near.
"""

from __future__ import annotations

import os
import threading
from typing import TYPE_CHECKING

import torch

from hotset.blocks.experts import run_expert, run_expert_tiled, view_weights
from hotset.blocks.routing import Reference, combine, experts_hit, group_rows
from hotset.errors import CheckpointError
from hotset.policies.types import BlockId

if TYPE_CHECKING:
    from hotset.blocks.checkpoint import Catalog, FileSpan
    from hotset.blocks.experts import ExpertsModule


class BlockReader:
    """Reads blocks by byte range into the caller's buffer; threads may share one reader."""

    def __init__(self, catalog: Catalog) -> None:
        """Open nothing yet."""
        self.catalog = catalog
        self._files: dict[str, int] = {}
        self._lock = threading.Lock()

    def read(self, block: BlockId, out: torch.Tensor) -> None:
        """Fill `out` (u8 on the CPU, at least the block's size) with the block's payload.

        Raises CheckpointError when a file ends early or cannot be read.
        """
        view = memoryview(out.numpy().data)  # a buffer of bytes, not a tensor of weights
        place = 0
        for span in self.catalog.ranges(block):
            self._fill(view[place : place + span.nbytes], span)
            place += span.nbytes

    def close(self) -> None:
        """Close the files."""
        with self._lock:
            files, self._files = self._files, {}
        for file in files.values():
            os.close(file)

    def _file(self, path: str) -> int:
        with self._lock:
            if path not in self._files:
                self._files[path] = os.open(path, os.O_RDONLY)
            return self._files[path]

    def _fill(self, view: memoryview, span: FileSpan) -> None:
        done = 0
        try:
            file = self._file(span.path)
            while done < span.nbytes:
                got = os.preadv(file, [view[done:]], span.offset + done)
                if got == 0:
                    raise CheckpointError(
                        f"{span.path} ended at {span.offset + done} of {span.offset + span.nbytes}",
                        remedy="the file was truncated while in use; restore it",
                    )
                done += got
        except OSError as error:
            raise CheckpointError(
                f"{span.path} cannot be read ({error.strerror})",
                remedy="check that the checkpoint is still there",
            ) from error


class LocalRunner:
    """Runs every expert from the files. `reference` names the bits, `tiled` the numerics."""

    def __init__(
        self, catalog: Catalog, *, reference: Reference = "eager", tiled: bool = False
    ) -> None:
        """Compute on the device of the hidden states."""
        self.reader = BlockReader(catalog)
        self.reference: Reference = reference
        self.tiled = tiled
        self._catalog = catalog
        self._local = threading.local()

    def run(
        self,
        layer: int,
        module: ExpertsModule,
        hidden: torch.Tensor,
        top_k_index: torch.Tensor,
        top_k_weights: torch.Tensor,
    ) -> torch.Tensor:
        """As `ExpertRunner.run`."""
        compute = run_expert_tiled if self.tiled else run_expert
        outputs = {}
        for expert in experts_hit(top_k_index, num_experts=self._catalog.num_experts):
            payload = self._payload(BlockId(layer, expert)).to(hidden.device)
            weights = view_weights(payload, self._catalog.layout)
            group = group_rows(top_k_index, expert, reference=self.reference)
            outputs[expert] = compute(module, hidden[group.tokens], weights)
        return combine(hidden, top_k_index, top_k_weights, outputs, reference=self.reference)

    def _payload(self, block: BlockId) -> torch.Tensor:
        buffer: torch.Tensor | None = getattr(self._local, "buffer", None)
        if buffer is None:
            buffer = torch.empty(self._catalog.block_nbytes, dtype=torch.uint8)
            self._local.buffer = buffer
        self.reader.read(block, buffer)
        return buffer
