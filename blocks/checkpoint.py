"""Checkpoint to blocks: which byte ranges of which files are expert `index` of layer `layer`.

Reads `config.json` and the headers of the safetensors files, never their data, and imports torch
only for families outside the table of `naming`. Must not know where blocks are, nor Ray.

Invariants: all blocks of a catalog have one layout and one size; a part's range lies inside its
file; `ranges(block)` read back to back are the block's payload in the layout's order
(gate | up | down, or gate_up | down, then biases).

The digest is xxh3-128 over `config.json`, and name, size, header and 16 sampled pages of every
file. To hash all data would mean to read the whole checkpoint. Training changes nearly every value,
so the sample tells models of one shape apart; an edit of a few values can stay unseen.
"""

from __future__ import annotations

import json
import math
import os
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import xxhash

from hotset.blocks.naming import ROLE_ORDER, naming_for, no_experts
from hotset.blocks.tensors import open_shards
from hotset.errors import CheckpointError
from hotset.policies.types import BlockId

if TYPE_CHECKING:
    from collections.abc import Iterable

    from hotset.blocks.naming import Place
    from hotset.blocks.tensors import Shard, TensorRange

DTYPES = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}
"""Types of expert weights that are served, by safetensors name -> torch name."""
_SAMPLES = 16  # of each file, for the digest
_SAMPLE_BYTES = 4096
_COMPLETE = (("gate", "up", "down"), ("gate_up", "down"))
_BIASES = ((), ("gate_up_bias", "down_bias"))


@dataclass(frozen=True, slots=True, kw_only=True)
class FileSpan:
    """`nbytes` at `offset` of the file at `path`."""

    path: str
    offset: int
    nbytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """One tensor's share of a block: where it is on disk, and its shape there."""

    role: str
    path: str
    offset: int
    nbytes: int
    shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Field:
    """One tensor of a block's payload, `offset` bytes from its start."""

    role: str
    offset: int
    nbytes: int
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockLayout:
    """How a full-precision payload is read: the same for every block of a model.

    Roles: `gate_up` [2I, H], `down` [H, I], perhaps `gate_up_bias` [2I] and `down_bias` [H].
    `transposed` weights are [H, 2I] and [I, H], the form of gpt-oss. `dtype` is torch's name.
    """

    fields: tuple[Field, ...]
    dtype: str
    transposed: bool
    nbytes: int

    def field(self, role: str) -> Field | None:
        """Find the field of that role, or None."""
        return next((f for f in self.fields if f.role == role), None)


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockSpec:
    """A block on disk: its parts in the order of the payload."""

    block: BlockId
    parts: tuple[Part, ...]
    nbytes: int
    layout: BlockLayout


@dataclass(frozen=True, slots=True, kw_only=True)
class Catalog:
    """Every block of a checkpoint. Small, picklable, and opened without reading weights."""

    path: str
    digest: str
    model_type: str
    num_experts: int
    top_k: int
    layers: tuple[int, ...]
    blocks: dict[BlockId, BlockSpec]
    layout: BlockLayout
    dense_bytes: int
    expert_bytes: int
    dtype: str

    @property
    def block_nbytes(self) -> int:
        """Bytes of one block's payload at full precision."""
        return self.layout.nbytes

    @classmethod
    def open(cls, path: str | Path) -> Catalog:
        """Read the headers of the checkpoint in directory `path`.

        Raises CheckpointError, with the file and a remedy, for a missing directory, config, shard
        or expert tensor, a truncated file, a type that is not served, experts of different sizes,
        an unknown architecture, and a model without MoE layers.
        """
        directory = Path(path)
        raw = _config(directory)
        config = json.loads(raw)
        _refuse_quantised(directory, config)
        shards = open_shards(directory)
        naming = naming_for(str(directory), config)
        parts, dense_bytes = _collect(shards, naming.place)
        if not parts:
            raise no_experts(str(directory), str(config.get("model_type")))
        layout = _layout(next(iter(parts.values())), transposed=naming.transposed)
        specs = {block: _spec(block, parts[block], layout=layout) for block in sorted(parts)}
        return cls(
            path=str(directory),
            digest=_digest(raw, shards),
            model_type=str(config["model_type"]),
            num_experts=_experts_per_layer(directory, specs, config),
            top_k=int(_first(config, "num_experts_per_tok", "experts_per_token", "top_k") or 1),
            layers=tuple(sorted({block.layer for block in specs})),
            blocks=specs,
            layout=layout,
            dense_bytes=dense_bytes,
            expert_bytes=layout.nbytes * len(specs),
            dtype=layout.dtype,
        )

    def key(self, block: BlockId) -> bytes:
        """16 bytes that name a block of this version: layer u32, index u32, 8 of the digest."""
        tail = bytes.fromhex(self.digest)[:8]
        return block.layer.to_bytes(4, "little") + block.index.to_bytes(4, "little") + tail

    @staticmethod
    def describe(key: bytes) -> tuple[int, int]:
        """(layer, index) of a key."""
        return int.from_bytes(key[:4], "little"), int.from_bytes(key[4:8], "little")

    def ranges(self, block: BlockId) -> tuple[FileSpan, ...]:
        """Byte ranges that, read back to back, are the block's payload; neighbours are merged."""
        spans: list[FileSpan] = []
        for part in self.blocks[block].parts:
            last = spans[-1] if spans else None
            if last and last.path == part.path and last.offset + last.nbytes == part.offset:
                spans[-1] = FileSpan(
                    path=last.path, offset=last.offset, nbytes=last.nbytes + part.nbytes
                )
                continue
            spans.append(FileSpan(path=part.path, offset=part.offset, nbytes=part.nbytes))
        return tuple(spans)


def _config(directory: Path) -> bytes:
    if not directory.is_dir():
        raise CheckpointError(
            f"{directory} is no directory",
            remedy="give the directory of a checkpoint with config.json and safetensors files",
        )
    file = directory / "config.json"
    try:
        raw = file.read_bytes()
        json.loads(raw)["model_type"]
    except FileNotFoundError as error:
        raise CheckpointError(
            f"{file} is missing", remedy="give a complete Hugging Face checkpoint directory"
        ) from error
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{file} is not JSON with a model_type", remedy="download it again"
        ) from error
    return raw


def _refuse_quantised(directory: Path, config: dict[str, Any]) -> None:
    quantisation = config.get("quantization_config")
    if quantisation:
        raise CheckpointError(
            f"{directory} is quantised ({quantisation.get('quant_method', 'unknown method')})",
            remedy="give a checkpoint in bfloat16, float16 or float32; FP8 and MXFP4 ones must be "
            "dequantised and saved first",
        )


def _first(config: dict[str, Any], *names: str) -> int | None:
    return next((int(config[n]) for n in names if isinstance(config.get(n), int)), None)


def _collect(shards: Iterable[Shard], place: Any) -> tuple[dict[BlockId, dict[str, Part]], int]:
    """Sort tensors into blocks; the second value is the bytes of all the others."""
    blocks: dict[BlockId, dict[str, Part]] = defaultdict(dict)
    dense_bytes = 0
    for shard in shards:
        for tensor in shard.tensors:
            found: Place | None = place(tensor.name)
            if found is None:
                dense_bytes += tensor.nbytes
                continue
            _check_dtype(shard.path, tensor)
            for index, part in _parts(shard.path, tensor, found):
                blocks[BlockId(found.layer, index)][found.role] = part
    return dict(blocks), dense_bytes


def _check_dtype(path: str, tensor: TensorRange) -> None:
    if tensor.dtype not in DTYPES:
        raise CheckpointError(
            f"tensor {tensor.name} in {path} has type {tensor.dtype}",
            remedy="give a checkpoint whose experts are BF16, F16 or F32; FP8 and MXFP4 ones must "
            "be dequantised and saved first",
        )


def _parts(path: str, tensor: TensorRange, place: Place) -> Iterable[tuple[int, Part]]:
    """Yield one part for a tensor of one expert; cut a stacked one along its first dimension."""
    whole = place.expert is not None
    count = 1 if whole else tensor.shape[0]
    nbytes = tensor.nbytes // count
    shape = tensor.shape if whole else tensor.shape[1:]
    for number in range(count):
        yield (
            place.expert if place.expert is not None else number,
            Part(
                role=place.role,
                path=path,
                offset=tensor.offset + number * nbytes,
                nbytes=nbytes,
                shape=shape,
                dtype=DTYPES[tensor.dtype],
            ),
        )


def _ordered(parts: dict[str, Part]) -> list[Part]:
    return [parts[role] for role in ROLE_ORDER if role in parts]


def _layout(parts: dict[str, Part], *, transposed: bool) -> BlockLayout:
    """Payload of a block; `gate` and `up` are joined to one matrix [2I, H]."""
    fields: list[Field] = []
    offset = 0
    for part in _ordered(parts):
        if part.role == "up" and fields and fields[-1].role == "gate_up":
            joined = fields[-1]
            fields[-1] = Field(
                role="gate_up",
                offset=joined.offset,
                nbytes=joined.nbytes + part.nbytes,
                shape=(joined.shape[0] + part.shape[0], *joined.shape[1:]),
            )
        else:
            role = "gate_up" if part.role == "gate" else part.role
            fields.append(Field(role=role, offset=offset, nbytes=part.nbytes, shape=part.shape))
        offset += part.nbytes
    dtype = next(iter(parts.values())).dtype
    return BlockLayout(fields=tuple(fields), dtype=dtype, transposed=transposed, nbytes=offset)


def _spec(block: BlockId, parts: dict[str, Part], *, layout: BlockLayout) -> BlockSpec:
    """Check that a block is complete and of the common layout."""
    ordered = _ordered(parts)
    weights = tuple(p.role for p in ordered if not p.role.endswith("_bias"))
    biases = tuple(p.role for p in ordered if p.role.endswith("_bias"))
    if weights not in _COMPLETE or biases not in _BIASES:
        raise CheckpointError(
            f"expert {block.index} of layer {block.layer} is incomplete: found only "
            f"{', '.join(p.role for p in ordered)} (first in {ordered[0].path})",
            remedy="download the missing shards, or save the model again",
        )
    if _layout(parts, transposed=layout.transposed) != layout or any(
        p.dtype != layout.dtype or p.nbytes != _nbytes(p) for p in ordered
    ):
        raise CheckpointError(
            f"expert {block.index} of layer {block.layer} in {ordered[0].path} differs in shape or "
            "type from the other experts",
            remedy="use a model whose experts all have one size",
        )
    return BlockSpec(block=block, parts=tuple(ordered), nbytes=layout.nbytes, layout=layout)


def _nbytes(part: Part) -> int:
    return math.prod(part.shape) * (4 if part.dtype == "float32" else 2)


def _experts_per_layer(
    directory: Path, specs: dict[BlockId, BlockSpec], config: dict[str, Any]
) -> int:
    """Count the experts, the same in each layer and as the config says."""
    count = 1 + max(block.index for block in specs)
    stated = _first(config, "num_experts", "num_local_experts", "n_routed_experts")
    expected = max(count, stated or 0)
    for layer in sorted({block.layer for block in specs}):
        for index in range(expected):
            if BlockId(layer, index) not in specs:
                raise CheckpointError(
                    f"{directory}: layer {layer} has no tensors of expert {index} (of {expected})",
                    remedy="download the missing shards, or save the model again",
                )
    return count


def _digest(config: bytes, shards: Iterable[Shard]) -> str:
    state = xxhash.xxh3_128(config)
    for shard in sorted(shards, key=lambda s: s.path):
        name = Path(shard.path).name.encode()
        state.update(b"\0%s\0%d\0" % (name, shard.nbytes))
        state.update(shard.header)
        state.update(_sample(shard))
    return str(state.hexdigest())


def _sample(shard: Shard) -> bytes:
    """Pages of the data at even distances, the last one included."""
    start = 8 + len(shard.header)
    room = max(0, shard.nbytes - start - _SAMPLE_BYTES)
    places = {start + room * index // (_SAMPLES - 1) for index in range(_SAMPLES)}
    with Path(shard.path).open("rb") as file:
        return b"".join(os.pread(file.fileno(), _SAMPLE_BYTES, place) for place in sorted(places))
