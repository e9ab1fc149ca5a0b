"""Whether S7 pays for a checkpoint: shared base plus low-rank difference, against int4, by numbers.

Decides what is offered: a layer's experts may be kept as differences where some rank has at most
the error of `int4` at no more bytes than `int4`, the base included. Error is that of the weights:
norm of the difference over norm of the weights, which for random inputs is that of each product.
Must not know how the format is used.

Experts are read once for the base and the cosines, one at a time; factors are taken of a few of
them. Invariants: nothing is offered that was not measured on this checkpoint; the verdict has the
figures that led to it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from hotset.blocks.experts import layout_dtype
from hotset.blocks.formats import codec
from hotset.blocks.formats_base import field_values, is_matrix
from hotset.blocks.local import BlockReader
from hotset.blocks.lowrank import Bases, LowRankCodec, leading
from hotset.blocks.sensitivity import rounded
from hotset.policies.types import BlockId, Format

if TYPE_CHECKING:
    from hotset.blocks.checkpoint import Catalog

_SAMPLED = 4  # experts of a layer whose differences are factored
RANKS = (2, 4, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256)


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerFinding:
    """One layer. `rank` is the smallest that is as good as int4 for fewer bytes; 0: there is none.

    `cosine` is the mean over pairs of experts. `error` is that of the largest rank that takes no
    more bytes than int4 (`equal_rank`), or of `rank` where there is one.
    """

    layer: int
    cosine: float
    int4_error: float
    equal_rank: int
    rank: int
    error: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """All layers, and what is offered. `rank` serves every offered layer; 0: nothing is offered.

    `nbytes` is a block's part of its layer's base included.
    """

    layers: tuple[LayerFinding, ...]
    rank: int
    nbytes: int
    int4_nbytes: int
    full_nbytes: int

    @property
    def offered(self) -> tuple[int, ...]:
        """Layers whose experts may be kept as differences."""
        return tuple(one.layer for one in self.layers if one.rank)

    def render(self) -> str:
        """The figures and the verdict, as lines of text."""
        lines = ["base and low-rank difference against int4: error of the weights at equal bytes"]
        for one in self.layers:
            verdict = (
                f"rank {one.rank} has error {one.error:.3g}: offered"
                if one.rank
                else f"rank {one.equal_rank} has error {one.error:.3g}, "
                f"{one.error / one.int4_error:.1f} times int4's: refused"
            )
            lines.append(
                f"  layer {one.layer:3} cosine between experts {one.cosine:+.3f}, "
                f"int4 {one.int4_error:.3g}; {verdict}"
            )
        if self.rank:
            share, int4 = self.nbytes / self.full_nbytes, self.int4_nbytes / self.full_nbytes
            lines.append(
                f"lowrank is offered for {len(self.offered)} of {len(self.layers)} layers: rank "
                f"{self.rank}, {share:.3f} of the bytes, base included (int4 {int4:.3f})"
            )
        else:
            lines.append("lowrank is not offered: experts are no variations of one another here")
        return "\n".join(lines)


def measure(catalog: Catalog) -> tuple[Finding, Bases | None]:
    """Measure a checkpoint; gives the finding, and the bases where something is offered."""
    reader = BlockReader(catalog)
    try:
        layers, bases = [], {}
        for layer in catalog.layers:
            found, base = _layer(catalog, reader, layer)
            layers.append(found)
            if found.rank:
                bases[layer] = base
    finally:
        reader.close()
    rank = max((one.rank for one in layers), default=0)
    int4 = codec(Format.INT4).nbytes(catalog.layout)
    nbytes = _nbytes(catalog, rank) + catalog.block_nbytes // catalog.num_experts if rank else 0
    finding = Finding(
        layers=tuple(layers), rank=rank, nbytes=nbytes, int4_nbytes=int4,
        full_nbytes=catalog.block_nbytes,
    )  # fmt: skip
    if not rank:
        return finding, None
    return finding, Bases(checkpoint=catalog.digest, rank=rank, payloads=bases)


def _layer(catalog: Catalog, reader: BlockReader, layer: int) -> tuple[LayerFinding, torch.Tensor]:
    experts = [block.index for block in sorted(catalog.blocks) if block.layer == layer]
    base, cosine = _base(catalog, reader, [BlockId(layer, expert) for expert in experts])
    ranks = [rank for rank in RANKS if _pays(catalog, rank, experts=len(experts))]
    equal = max(ranks, default=0)
    step = max(1, len(experts) // _SAMPLED)
    sampled = []
    for expert in experts[::step][:_SAMPLED]:
        payload = torch.empty(catalog.block_nbytes, dtype=torch.uint8)
        reader.read(BlockId(layer, expert), payload)
        sampled.append(payload)
    int4 = _error(
        catalog, sampled, [rounded(one, catalog.layout, form=Format.INT4) for one in sampled]
    )
    rank = min(_good(catalog, sampled, base, ranks=ranks, at_most=int4), default=0)
    error = 1.0
    if ranks:  # what the factors really give in the model's own type
        made = LowRankCodec(Bases(checkpoint="", rank=rank or equal, payloads={layer: base}))
        error = _error(catalog, sampled, [_round_trip(made, catalog, one) for one in sampled])
    return LayerFinding(
        layer=layer, cosine=cosine, int4_error=int4, equal_rank=equal,
        rank=rank if error <= int4 else 0, error=error,
    ), base  # fmt: skip


def _base(
    catalog: Catalog, reader: BlockReader, blocks: list[BlockId]
) -> tuple[torch.Tensor, float]:
    """The mean of the blocks as a payload, and the mean cosine over their pairs."""
    kind = layout_dtype(catalog.layout)
    payload = torch.empty(catalog.block_nbytes, dtype=torch.uint8)
    total = torch.zeros(catalog.block_nbytes // kind.itemsize)
    direction = torch.zeros_like(total)
    for block in blocks:
        reader.read(block, payload)
        values = payload.view(kind).float()
        total += values
        direction += values / values.norm().clamp_min(1e-30)
    count = len(blocks)
    cosine = (float(direction.square().sum()) - count) / max(1, count * (count - 1))
    return (total / count).to(kind).view(torch.uint8), cosine


def _good(
    catalog: Catalog,
    sampled: list[torch.Tensor],
    base: torch.Tensor,
    *,
    ranks: list[int],
    at_most: float,
) -> list[int]:
    """Ranks whose error, by the singular values that they leave out, is `at_most`."""
    left, size = dict.fromkeys(ranks, 0.0), 0.0
    for one in sampled if ranks else []:
        for field in filter(is_matrix, catalog.layout.fields):
            values = field_values(one, catalog.layout, field).float()
            size += float(values.square().sum())
            change = values - field_values(base, catalog.layout, field).float()
            squares = leading(change, rank=max(ranks))[1].double().square()
            whole = float(change.square().sum())
            for rank in ranks:
                left[rank] += max(0.0, whole - float(squares[:rank].sum()))
    return [rank for rank in ranks if left[rank] <= at_most**2 * size]


def _error(catalog: Catalog, exact: list[torch.Tensor], other: list[torch.Tensor]) -> float:
    """Norm of the difference over norm of the weights, all matrices of all blocks together."""
    away, size = 0.0, 0.0
    for one, rough in zip(exact, other, strict=True):
        for field in filter(is_matrix, catalog.layout.fields):
            values = field_values(one, catalog.layout, field).float()
            away += float((field_values(rough, catalog.layout, field) - values).square().sum())
            size += float(values.square().sum())
    return math.sqrt(away / size) if size else 0.0


def _round_trip(made: LowRankCodec, catalog: Catalog, payload: torch.Tensor) -> torch.Tensor:
    block = torch.zeros(made.nbytes(catalog.layout), dtype=torch.uint8)
    made.encode(payload, catalog.layout, block)
    out = torch.empty(catalog.block_nbytes, dtype=torch.uint8)
    made.decode(block, catalog.layout, out, verified=True)
    return out


def _pays(catalog: Catalog, rank: int, *, experts: int) -> bool:
    """Whether blocks of this rank take no more bytes than int4, each with its part of the base."""
    nbytes = _nbytes(catalog, rank) + catalog.block_nbytes // experts
    return nbytes <= codec(Format.INT4).nbytes(catalog.layout)


def _nbytes(catalog: Catalog, rank: int) -> int:
    empty = torch.zeros(catalog.block_nbytes, dtype=torch.uint8)
    made = LowRankCodec(Bases(checkpoint="", rank=rank, payloads={0: empty}))
    return made.nbytes(catalog.layout)
