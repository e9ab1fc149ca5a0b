"""Headers of safetensors files: where each tensor's bytes are. Never reads a tensor.

Must not know experts or models. Invariant: a `Shard` is returned only if the file on disk is as
long as its header says, so a byte range of it can be read without surprise.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING

from hotset.errors import CheckpointError

if TYPE_CHECKING:
    from pathlib import Path

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
_LONGEST_HEADER = 100_000_000  # the limit of the safetensors library
_COPY_AGAIN = "copy the checkpoint again, the file is damaged or its download was cut off"


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorRange:
    """One tensor of a shard. `offset` counts from the start of the file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Shard:
    """One safetensors file: its tensors, and the raw header for the digest."""

    path: str
    nbytes: int
    header: bytes
    tensors: tuple[TensorRange, ...]


def read_shard(path: Path) -> Shard:
    """Parse the header of one file. Raises CheckpointError when it is damaged or truncated."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or not 2 <= length <= min(_LONGEST_HEADER, size - 8):
                raise CheckpointError(
                    f"{path} is truncated or no safetensors file ({size} bytes)", remedy=_COPY_AGAIN
                )
            header = file.read(length)
        entries = json.loads(header)
        tensors = tuple(
            _tensor(name, entry, base=8 + length)
            for name, entry in entries.items()
            if name != "__metadata__"
        )
    except OSError as error:
        raise CheckpointError(
            f"{path} cannot be read ({error.strerror})", remedy="check the path and its permissions"
        ) from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"the header of {path} is not valid safetensors", remedy=_COPY_AGAIN
        ) from error
    expected = max((t.offset + t.nbytes for t in tensors), default=8 + length)
    if size != expected:
        state = "truncated" if size < expected else "longer than its header says"
        raise CheckpointError(
            f"{path} is {state}: {size} bytes instead of {expected}", remedy=_COPY_AGAIN
        )
    return Shard(path=str(path), nbytes=size, header=header, tensors=tensors)


def _tensor(name: str, entry: dict[str, object], *, base: int) -> TensorRange:
    begin, end = _numbers(entry["data_offsets"])
    return TensorRange(
        name=name,
        dtype=str(entry["dtype"]),
        shape=tuple(_numbers(entry["shape"])),
        offset=base + begin,
        nbytes=end - begin,
    )


def _numbers(value: object) -> list[int]:
    if not isinstance(value, list):
        raise TypeError
    return [int(number) for number in value]


def open_shards(directory: Path) -> tuple[Shard, ...]:
    """Parse the headers of a checkpoint's files: `model.safetensors`, or those of its index.

    Raises CheckpointError that names the file that is missing, truncated or not as indexed.
    """
    single = directory / SINGLE
    if single.is_file():
        return (read_shard(single),)
    index = directory / INDEX
    if not index.is_file():
        raise CheckpointError(
            f"{directory} holds neither {SINGLE} nor {INDEX}",
            remedy="give the directory of a checkpoint saved in safetensors format",
        )
    try:
        places: dict[str, str] = json.loads(index.read_bytes())["weight_map"]
        names = sorted(set(places.values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{index} has no valid weight_map", remedy=_COPY_AGAIN) from error
    missing = [name for name in names if not (directory / name).is_file()]
    if missing:
        raise CheckpointError(
            f"{directory / missing[0]} is missing ({len(missing)} of the {len(names)} shards in "
            f"{INDEX} are)",
            remedy="download the missing shards",
        )
    shards = tuple(read_shard(directory / name) for name in names)
    held = {tensor.name for shard in shards for tensor in shard.tensors}
    absent = sorted(places.keys() - held)
    if absent:
        raise CheckpointError(
            f"tensor {absent[0]} is in {INDEX} but in no shard", remedy=_COPY_AGAIN
        )
    return shards
