"""Recorded routing in `.npz` files: reading with every doubt refused, and writing.

A trace holds `experts` [tokens, layers, k] (integers) and `seq` [tokens], the sequence of each
token; tokens of one sequence are contiguous. Optional: `num_experts`, `weights` (same shape). The
form of ESFT's statistics, `<domain>_topk` with `<domain>_lens`, is read, too. Must not know
policies.

A member is read and checked in pieces of a few MB while it is copied into place, so that a large
file is in memory once. Invariant: what is returned has ids in 0..num_experts - 1, k distinct
experts at most, and at least one token.
"""

from __future__ import annotations

import zipfile
import zlib
from dataclasses import dataclass
from typing import IO, TYPE_CHECKING

import numpy as np

from hotset.errors import ConfigError

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

_PIECE_BYTES = 4 << 20
_MOST_EXPERTS = 1 << 16
_ESFT = ("_topk", "_lens")


@dataclass(frozen=True, slots=True, kw_only=True)
class RouterTrace:
    """`experts` [tokens, L, k] uint16 and `seq` [tokens]; ids lie in 0..num_experts - 1."""

    name: str
    experts: NDArray[np.uint16]
    seq: NDArray[np.int64]
    num_experts: int

    @property
    def tokens(self) -> int:
        """Tokens of all sequences."""
        return int(self.experts.shape[0])

    @property
    def layers(self) -> int:
        """MoE layers."""
        return int(self.experts.shape[1])

    @property
    def top_k(self) -> int:
        """Experts by token and layer."""
        return int(self.experts.shape[2])

    def head(self, tokens: int | None) -> RouterTrace:
        """Return the first tokens only; None: all."""
        if tokens is None or tokens >= self.tokens:
            return self
        return RouterTrace(
            name=self.name,
            experts=self.experts[:tokens],
            seq=self.seq[:tokens],
            num_experts=self.num_experts,
        )


def read_trace(path: Path) -> RouterTrace:
    """Read a trace. Raises ConfigError with one line that says what is wrong with the file."""
    try:
        with zipfile.ZipFile(path) as archive:
            names = {name.removesuffix(".npy") for name in archive.namelist()}
            if "experts" in names:
                return _read_plain(path, archive, names)
            domains = sorted(
                name.removesuffix("_topk")
                for name in names
                if name.endswith("_topk") and f"{name.removesuffix('_topk')}_lens" in names
            )
            if domains:
                return _read_esft(path, archive, domains)
    except OSError as error:
        raise _refuse(path, error.strerror or "it cannot be read") from None
    except (zipfile.BadZipFile, zlib.error, EOFError, ValueError) as error:
        raise _refuse(path, f"it is damaged or no .npz file ({error})") from None
    raise _refuse(path, f"it has no array `experts` (it has {', '.join(sorted(names)) or 'none'})")


def write_trace(
    path: Path,
    *,
    experts: NDArray[np.integer],
    seq: NDArray[np.integer],
    num_experts: int,
) -> None:
    """Write a trace that `read_trace` accepts."""
    dtype = np.uint8 if num_experts <= 1 << 8 else np.uint16
    np.savez_compressed(
        path,
        experts=experts.astype(dtype),
        seq=seq.astype(np.int32),
        num_experts=np.int64(num_experts),
    )


def _refuse(path: Path, why: str) -> ConfigError:
    return ConfigError(
        f"router trace {path}: {why}",
        remedy="give a .npz file with experts [tokens, layers, k] and seq [tokens]",
    )


def _read_plain(path: Path, archive: zipfile.ZipFile, names: set[str]) -> RouterTrace:
    stated = _scalar(path, archive) if "num_experts" in names else None
    experts = _ids(path, archive, "experts", limit=stated)
    if "weights" in names:
        _check_weights(path, archive, shape=experts.shape)
    if "seq" in names:
        seq = _sequences(path, archive, tokens=len(experts))
    else:
        seq = np.zeros(len(experts), dtype=np.int64)
    return _checked(path, experts, seq, stated)


def _read_esft(path: Path, archive: zipfile.ZipFile, domains: list[str]) -> RouterTrace:
    parts: list[NDArray[np.uint16]] = []
    lengths: list[NDArray[np.int64]] = []
    for domain in domains:
        part = _ids(path, archive, f"{domain}_topk", limit=None)
        if parts and part.shape[1:] != parts[0].shape[1:]:
            raise _refuse(path, f"{domain}_topk has another shape than {domains[0]}_topk")
        with archive.open(f"{domain}_lens.npy") as stream:
            shape, dtype = _header(path, stream, f"{domain}_lens")
            length = _whole(path, stream, f"{domain}_lens", shape=shape, dtype=dtype)
        if length.ndim != 1 or (length < 0).any() or int(length.sum()) != len(part):
            raise _refuse(path, f"{domain}_lens does not add up to the {len(part)} tokens")
        parts.append(part)
        lengths.append(length)
    each = np.concatenate(lengths)
    return _checked(path, np.concatenate(parts), np.repeat(np.arange(len(each)), each), None)


def _checked(
    path: Path, experts: NDArray[np.uint16], seq: NDArray[np.int64], stated: int | None
) -> RouterTrace:
    num_experts = stated if stated is not None else int(experts.max()) + 1
    if experts.shape[2] > num_experts:
        raise _refuse(path, f"k = {experts.shape[2]} exceeds the {num_experts} experts")
    return RouterTrace(name=path.stem, experts=experts, seq=seq, num_experts=num_experts)


def _scalar(path: Path, archive: zipfile.ZipFile) -> int:
    with archive.open("num_experts.npy") as stream:
        shape, dtype = _header(path, stream, "num_experts")
        if shape not in {(), (1,)}:
            raise _refuse(path, f"num_experts has shape {shape}, not one number")
        value = int(_whole(path, stream, "num_experts", shape=shape, dtype=dtype).reshape(-1)[0])
    if not 1 <= value <= _MOST_EXPERTS:
        raise _refuse(path, f"num_experts is {value}, not in 1..{_MOST_EXPERTS}")
    return value


def _sequences(path: Path, archive: zipfile.ZipFile, *, tokens: int) -> NDArray[np.int64]:
    with archive.open("seq.npy") as stream:
        shape, dtype = _header(path, stream, "seq")
        if shape != (tokens,):
            raise _refuse(path, f"seq has shape {shape}, not ({tokens},) as experts demands")
        seq = _whole(path, stream, "seq", shape=shape, dtype=dtype)
    starts = np.flatnonzero(np.diff(seq)) + 1
    first = seq[np.concatenate([[0], starts])]
    if len(np.unique(first)) != len(first):
        raise _refuse(path, "the tokens of a sequence in seq are not contiguous")
    return seq


def _header(
    path: Path, stream: IO[bytes], name: str
) -> tuple[tuple[int, ...], np.dtype[np.generic]]:
    version = np.lib.format.read_magic(stream)
    read = (
        np.lib.format.read_array_header_1_0
        if version == (1, 0)
        else np.lib.format.read_array_header_2_0
    )
    shape, column_first, dtype = read(stream)
    kinds, said = ("f", "floats") if name == "weights" else ("iu", "integers")
    if dtype.kind not in kinds:
        raise _refuse(path, f"{name} has type {dtype}, not {said}")
    if column_first and len(shape) > 1:
        raise _refuse(path, f"{name} is stored by column; store it by row")
    return shape, dtype


def _whole(
    path: Path,
    stream: IO[bytes],
    name: str,
    *,
    shape: tuple[int, ...],
    dtype: np.dtype[np.generic],
) -> NDArray[np.int64]:
    count = int(np.prod(shape, dtype=np.int64))
    data = stream.read(count * dtype.itemsize)
    if len(data) != count * dtype.itemsize:
        raise _refuse(path, f"{name} ends after {len(data)} of {count * dtype.itemsize} bytes")
    values: NDArray[np.int64] = np.frombuffer(data, dtype=dtype).astype(np.int64).reshape(shape)
    return values


def _ids(
    path: Path, archive: zipfile.ZipFile, name: str, *, limit: int | None
) -> NDArray[np.uint16]:
    """Expert ids [tokens, L, k], checked piece by piece while they are copied into place."""
    with archive.open(f"{name}.npy") as stream:
        shape, dtype = _header(path, stream, name)
        if len(shape) != 3 or 0 in shape:
            raise _refuse(path, f"{name} has shape {shape}, not [tokens, layers, k]")
        tokens, layers, top_k = shape
        row_bytes = layers * top_k * dtype.itemsize
        ids = np.empty(shape, dtype=np.uint16)
        rows_each = max(1, _PIECE_BYTES // row_bytes)
        for start in range(0, tokens, rows_each):
            rows = min(rows_each, tokens - start)
            data = stream.read(rows * row_bytes)
            if len(data) != rows * row_bytes:
                whole = start + len(data) // row_bytes
                raise _refuse(path, f"{name} ends after {whole} of {tokens} tokens")
            piece = np.frombuffer(data, dtype=dtype).reshape(rows, layers, top_k)
            _check_piece(path, piece, start=start, limit=limit)
            ids[start : start + rows] = piece
    return ids


def _check_piece(path: Path, piece: NDArray[np.generic], *, start: int, limit: int | None) -> None:
    low, high = int(piece.min()), int(piece.max())
    most = _MOST_EXPERTS if limit is None else limit
    if low >= 0 and high < most:
        return
    bad = low if low < 0 else high
    token = start + int(np.argwhere(piece == bad)[0][0])
    raise _refuse(path, f"expert {bad} of token {token} is not in 0..{most - 1}")


def _check_weights(path: Path, archive: zipfile.ZipFile, *, shape: tuple[int, ...]) -> None:
    """Nothing reads the weights yet; a trace whose weights are broken is not trusted at all."""
    with archive.open("weights.npy") as stream:
        found, dtype = _header(path, stream, "weights")
        if found != shape:
            raise _refuse(path, f"weights has shape {found}, experts has {shape}")
        row_bytes = shape[1] * shape[2] * dtype.itemsize
        rows_each = max(1, _PIECE_BYTES // row_bytes)
        for start in range(0, shape[0], rows_each):
            size = min(rows_each, shape[0] - start) * row_bytes
            data = stream.read(size)
            if len(data) != size:
                whole = start + len(data) // row_bytes
                raise _refuse(path, f"weights ends after {whole} of {shape[0]} tokens")
            bad = ~np.isfinite(np.frombuffer(data, dtype=dtype))
            if bad.any():
                token = start + int(bad.argmax()) * dtype.itemsize // row_bytes
                raise _refuse(path, f"weights of token {token} are not finite (NaN or infinite)")
