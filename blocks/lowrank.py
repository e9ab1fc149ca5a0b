"""`lowrank`: an expert as its layer's shared base plus a low-rank difference.

A base is one full-precision payload for each layer, the mean of its experts. A block holds two
factors for each matrix, whose product is added to the base's matrix on decoding. It pays where
experts are variations of one another (upcycled from a dense model, or fine-tuned from copies) and
nowhere else, which `lowrank_measure` finds out before a codec of this kind can exist:
`codec("lowrank")` is unknown until `install` was called with the bases of the checkpoint.

Body: u64 xxh3-64 of the base, u32 rank, 52 zero bytes; then for each field in the layout's order
its factors `left` [m, r] and `right` [r, n] in the model's type (a bias: its own bytes), each on a
cache line. The factors come from a randomised range finder with two power iterations (Halko,
Martinsson and Tropp 2011) whose draws have a fixed seed, so equal payloads give equal blocks.

Must not know where a payload is. Invariants: a block is decoded with the base that it was encoded
against and with no other; the base for encoding is the nearest of those installed.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import xxhash

from hotset.blocks import formats
from hotset.blocks.experts import layout_dtype
from hotset.blocks.formats_base import (
    BodyCodec,
    aligned,
    check_finite,
    field_values,
    is_matrix,
)
from hotset.errors import CheckpointError, FormatError
from hotset.policies.types import FORMAT_CODES, Format

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

    from hotset.blocks.checkpoint import BlockLayout, Field

_HEAD = struct.Struct("<QI52x")
_SEED = 20260101
_SPARE = 8  # columns drawn beyond the rank
_POWERS = 2
_PROBES = 4096  # values by which the nearest base is found
_METADATA = "hotset lowrank 1"


@dataclass(frozen=True, slots=True, kw_only=True)
class Bases:
    """The bases of a checkpoint: by layer a full-precision payload (u8), and the rank in use."""

    checkpoint: str
    rank: int
    payloads: Mapping[int, torch.Tensor]

    def __post_init__(self) -> None:
        """Refuse what cannot be, with the field's name."""
        if self.rank < 1 or not self.payloads:
            raise ValueError("rank must be positive and payloads must not be empty")


class LowRankCodec(BodyCodec):
    """Differences to the nearest of some bases."""

    name = Format.LOWRANK

    def __init__(self, bases: Bases) -> None:
        """The bases stay as they are; on another device than the CPU they are copied once."""
        self.rank = bases.rank
        self._bases = {
            int(xxhash.xxh3_64_intdigest(payload.numpy().data)): payload
            for _, payload in sorted(bases.payloads.items())
        }
        self._moved: dict[tuple[int, torch.device], torch.Tensor] = {}

    @property
    def bases(self) -> int:
        """How many bases there are."""
        return len(self._bases)

    def body_nbytes(self, layout: BlockLayout) -> int:
        """As `BodyCodec.body_nbytes`: exact."""
        return list(self._places(layout))[-1].end

    def encode_body(
        self, src: torch.Tensor, layout: BlockLayout, body: torch.Tensor
    ) -> tuple[int, int]:
        """As `BodyCodec.encode_body`."""
        check_finite(src, layout)
        key = self._nearest(src, layout)
        base = self._base(key, src.device)
        body.zero_()
        head = torch.frombuffer(bytearray(_HEAD.pack(key, self.rank)), dtype=torch.uint8)
        body[: _HEAD.size].copy_(head)
        for place in self._places(layout):
            values = field_values(src, layout, place.field)
            if not is_matrix(place.field):
                body[place.start : place.start + place.field.nbytes].copy_(
                    values.reshape(-1).view(torch.uint8)
                )
                continue
            change = values.float() - field_values(base, layout, place.field).float()
            left, right = factors(change, rank=self.rank)
            stored_left, stored_right = place.views(body, layout)
            stored_left.copy_(left)
            stored_right.copy_(right)
        return 0, body.numel()

    def decode_body(
        self, body: torch.Tensor, layout: BlockLayout, out: torch.Tensor, *, mode: int
    ) -> None:
        """As `BodyCodec.decode_body`."""
        del mode
        key, rank = _HEAD.unpack(body[: _HEAD.size].cpu().numpy().tobytes())
        if rank != self.rank:
            raise FormatError(
                f"the block has rank {rank}, the bases here go with rank {self.rank}",
                remedy="use the bases that were written with the sensitivity file",
            )
        base = self._base(key, body.device)
        for place in self._places(layout):
            target = field_values(out, layout, place.field)
            if not is_matrix(place.field):
                raw = body[place.start : place.start + place.field.nbytes]
                target.copy_(raw.view(layout_dtype(layout)).view(place.field.shape))
                continue
            left, right = place.views(body, layout)
            # One product with one rounding at its end: the sum is kept in float32 by the kernel.
            torch.addmm(field_values(base, layout, place.field), left, right, out=target)

    def _places(self, layout: BlockLayout) -> Iterator[_Place]:
        start = _HEAD.size
        for field in layout.fields:
            place = _Place(field=field, start=start, rank=self.rank, dtype=layout_dtype(layout))
            start = place.end
            yield place

    def _nearest(self, src: torch.Tensor, layout: BlockLayout) -> int:
        values = src[: layout.nbytes].view(layout_dtype(layout))
        step = max(1, values.numel() // _PROBES)
        probe = values[::step].float()

        def distance(key: int) -> float:
            base = self._base(key, src.device).view(layout_dtype(layout))
            return float((base[::step].float() - probe).square().sum())

        return min(self._bases, key=distance)

    def _base(self, key: int, device: torch.device) -> torch.Tensor:
        found = self._bases.get(key)
        if found is None:
            raise FormatError(
                "the block was encoded against a base that is not here",
                remedy="use the bases that were written with the sensitivity file",
            )
        if found.device == device:
            return found
        moved = self._moved.get((key, device))
        if moved is None:
            moved = self._moved[key, device] = found.to(device)
        return moved


@dataclass(frozen=True, slots=True, kw_only=True)
class _Place:
    """Where a field's factors (or a bias) are in a body."""

    field: Field
    start: int
    rank: int
    dtype: torch.dtype

    @property
    def _middle(self) -> int:
        return self.start + aligned(self.field.shape[0] * self.rank * self.dtype.itemsize)

    @property
    def end(self) -> int:
        """Where the next field starts."""
        if not is_matrix(self.field):
            return self.start + aligned(self.field.nbytes)
        return self._middle + aligned(self.field.shape[1] * self.rank * self.dtype.itemsize)

    def views(self, body: torch.Tensor, layout: BlockLayout) -> tuple[torch.Tensor, torch.Tensor]:
        """The factors `left` [m, r] and `right` [r, n] in a body."""
        kind = layout_dtype(layout)
        rows, columns = self.field.shape
        left = body[self.start : self.start + rows * self.rank * kind.itemsize]
        right = body[self._middle : self._middle + columns * self.rank * kind.itemsize]
        return left.view(kind).view(rows, self.rank), right.view(kind).view(self.rank, columns)


def factors(matrix: torch.Tensor, *, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Give left [m, r] and right [r, n] whose product is nearest to float32 `matrix` [m, n].

    The singular values are shared by both factors, so that neither leaves the range of its type.
    """
    left, values, right = leading(matrix, rank=rank)
    root = values.sqrt()
    wide = min(rank, len(values))
    padded_left = matrix.new_zeros(matrix.shape[0], rank)
    padded_right = matrix.new_zeros(rank, matrix.shape[1])
    padded_left[:, :wide] = left * root
    padded_right[:wide] = root.unsqueeze(1) * right
    return padded_left, padded_right


def leading(matrix: torch.Tensor, *, rank: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Leading singular vectors and values of `matrix` [m, n]: [m, k], [k], [k, n], k <= rank."""
    most = min(matrix.shape)
    draws = min(most, rank + _SPARE)
    random = torch.Generator().manual_seed(_SEED)
    start = torch.randn(matrix.shape[1], draws, generator=random).to(matrix.device)
    found, _ = torch.linalg.qr(matrix @ start)
    for _ in range(_POWERS):
        found, _ = torch.linalg.qr(matrix.t() @ found)
        found, _ = torch.linalg.qr(matrix @ found)
    small, values, right = torch.linalg.svd(found.t() @ matrix, full_matrices=False)
    keep = min(rank, most)
    return (found @ small)[:, :keep], values[:keep], right[:keep]


def install(bases: Bases) -> LowRankCodec:
    """Make `codec("lowrank")` known in this process; a later call replaces the bases."""
    made = LowRankCodec(bases)
    formats.CODECS[Format.LOWRANK] = made
    formats.CODECS_BY_CODE[FORMAT_CODES[Format.LOWRANK]] = made
    return made


def uninstall() -> None:
    """Forget the bases."""
    formats.CODECS.pop(Format.LOWRANK, None)
    formats.CODECS_BY_CODE.pop(FORMAT_CODES[Format.LOWRANK], None)


def write_bases(bases: Bases, path: str | Path) -> None:
    """Write a safetensors file. Raises CheckpointError when it cannot be written."""
    from safetensors.torch import save_file

    metadata = {
        "format": _METADATA, "checkpoint": bases.checkpoint, "rank": str(bases.rank),
    }  # fmt: skip
    tensors = {f"layer.{layer}": payload for layer, payload in bases.payloads.items()}
    try:
        save_file(tensors, str(path), metadata=metadata)
    except OSError as error:
        raise CheckpointError(
            f"{path} cannot be written ({error})", remedy="choose another path"
        ) from error


def read_bases(path: str | Path, *, checkpoint: str) -> Bases:
    """Read the bases of the checkpoint with digest `checkpoint`. Raises CheckpointError."""
    from safetensors import SafetensorError, safe_open

    remedy = "make them again with hotset calibrate"
    try:
        with safe_open(str(path), framework="pt") as file:
            metadata = file.metadata() or {}
            payloads = {
                int(name.removeprefix("layer.")): file.get_tensor(name).clone()
                for name in file.keys()  # noqa: SIM118 - not a mapping
            }
    except (OSError, SafetensorError, ValueError) as error:
        raise CheckpointError(f"{path} holds no bases ({error})", remedy=remedy) from error
    if metadata.get("format") != _METADATA or not metadata.get("rank", "").isdigit():
        raise CheckpointError(f"{path} holds no bases of this version", remedy=remedy)
    if metadata.get("checkpoint") != checkpoint:
        raise CheckpointError(
            f"{path} holds bases of checkpoint {metadata.get('checkpoint')}, not of {checkpoint}",
            remedy=remedy,
        )
    return Bases(checkpoint=checkpoint, rank=int(metadata["rank"]), payloads=payloads)
