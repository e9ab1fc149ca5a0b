"""A checkpoint whose experts are variations of one another: copies plus small differences."""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING

import torch

from hotset.blocks.checkpoint import Catalog
from hotset.blocks.experts import layout_dtype
from hotset.blocks.formats_base import field_values, is_matrix
from hotset.blocks.local import BlockReader
from hotset.policies.types import BlockId

if TYPE_CHECKING:
    from pathlib import Path

RANK = 4
CHANGE = 0.3  # norm of an expert's low-rank difference over that of its base
NOISE = 0.02  # the same of a difference of full rank, as from fine-tuning


def upcycle(source: Path, target: Path, *, seed: int = 0) -> Path:
    """Copy the checkpoint at `source`; each expert becomes its layer's first one, varied."""
    shutil.copytree(source, target)
    catalog = Catalog.open(target)
    random = torch.Generator().manual_seed(seed)
    reader = BlockReader(catalog)
    for layer in catalog.layers:
        first = torch.empty(catalog.block_nbytes, dtype=torch.uint8)
        reader.read(BlockId(layer, 0), first)
        for expert in range(catalog.num_experts):
            write(catalog, BlockId(layer, expert), varied(catalog, first, random))
    reader.close()
    return target


def varied(catalog: Catalog, first: torch.Tensor, random: torch.Generator) -> torch.Tensor:
    """The payload plus a difference of low rank and some noise."""
    payload = first.clone()
    for field in filter(is_matrix, catalog.layout.fields):
        matrix = field_values(payload, catalog.layout, field)
        rows, columns = field.shape
        low = torch.randn(rows, RANK, generator=random) @ torch.randn(
            RANK, columns, generator=random
        )
        noise = torch.randn(rows, columns, generator=random)
        size = matrix.float().norm()
        changed = matrix.float() + low * (CHANGE * size / low.norm())
        changed += noise * (NOISE * size / noise.norm())
        matrix.copy_(changed.to(layout_dtype(catalog.layout)))
    return payload


def write(catalog: Catalog, block: BlockId, payload: torch.Tensor) -> None:
    """Put a payload back where the block's bytes are in the checkpoint's files."""
    place = 0
    for span in catalog.ranges(block):
        with open(span.path, "r+b") as file:  # noqa: PTH123 - a span's path is a string
            file.seek(span.offset)
            file.write(payload[place : place + span.nbytes].numpy().tobytes())
        place += span.nbytes
