"""`bf16z`: the same weights in fewer bytes. Never changes a bit.

Trained weights use few of the 256 exponents, so the exponent is what can be made smaller; sign and
mantissa are noise. A bfloat16 payload is cut into a plane of sign and mantissa (one byte a weight)
and its exponents. Modes:

| mode | exponents | size |
|---|---|---|
| 0 raw | the payload as it is | 1: for other types, and when nothing is gained |
| 1 window | 4 bits: distance from the lowest of 16 neighbouring exponents; weights outside are listed | about 3/4 |
| 2 dense | one byte a weight, compressed by zstd | about 2/3, decodes slower |

The planes follow ZipNN (Hershcovitch et al., 2024) and the fixed window NeuZip's and DFloat11's
finding that exponents carry under 3 bits (Hao et al., 2024; Zhang et al., 2025).

Body of mode 1: u32 number of listed weights, u8 lowest exponent, 59 zero bytes; sign and mantissa
[n]; 4-bit exponents [n rounded up to 128, / 2], where byte j of a run of 128 weights has weight j
low and j + 64 high; positions u32, bits u16 of the listed weights. Body of mode 2: u64 bytes of
the compressed plane, 56 zero bytes; sign and mantissa [n]; the compressed plane. Each part starts
on a cache line; numbers are little endian.

Must not know where a payload is. Invariant: a body is never longer than the payload.
"""  # noqa: E501 - the table's row

from __future__ import annotations

import importlib
import struct
from typing import TYPE_CHECKING, Any

import torch
from torch.nn import functional

from hotset.blocks import formats_decode, formats_encode
from hotset.blocks.formats_base import BodyCodec, aligned, as_bits, check_finite
from hotset.blocks.formats_decode import RUN
from hotset.blocks.formats_encode import WINDOW
from hotset.blocks.formats_jit import COMPILED
from hotset.errors import DependencyError, FormatError
from hotset.policies.types import Format

if TYPE_CHECKING:
    from hotset.blocks.checkpoint import BlockLayout

RAW, LISTED, DENSE = 0, 1, 2
_HEAD_NBYTES = 64
_LEVEL = 1  # zstd: higher levels search for repeats, and exponents have none


class LosslessCodec(BodyCodec):
    """bf16z. `dense` spends time for fewer bytes and needs the extra `formats`."""

    name = Format.BF16Z

    def __init__(self, *, dense: bool = False) -> None:
        """Both forms are decoded by any instance."""
        self.dense = dense

    def body_nbytes(self, layout: BlockLayout) -> int:
        """As `BodyCodec.body_nbytes`: the payload's own size; `stored_nbytes` gives the true."""
        return layout.nbytes

    def encode_body(
        self, src: torch.Tensor, layout: BlockLayout, body: torch.Tensor
    ) -> tuple[int, int]:
        """As `BodyCodec.encode_body`."""
        check_finite(src, layout)
        payload = src[: layout.nbytes]
        if layout.dtype == "bfloat16":
            make = _encode_dense if self.dense else _encode_window
            used = make(payload.view(torch.int16), body)
            if used:
                return (DENSE if self.dense else LISTED), used
        body.copy_(payload)
        return RAW, layout.nbytes

    def decode_body(
        self, body: torch.Tensor, layout: BlockLayout, out: torch.Tensor, *, mode: int
    ) -> None:
        """As `BodyCodec.decode_body`."""
        if mode == RAW:
            out.copy_(body)
        elif mode == LISTED:
            _decode_window(body, out.view(torch.int16))
        elif mode == DENSE:
            _decode_dense(body, out.view(torch.int16))
        else:
            raise FormatError(f"mode {mode} of bf16z is unknown", remedy="upgrade hotset")
        del layout


def _planes(bits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Split bfloat16 bits (i16) into sign and mantissa (u8) and exponent (u8)."""
    if _fast(bits):
        rest = torch.empty(bits.shape, dtype=torch.uint8)
        exponent = torch.empty(bits.shape, dtype=torch.uint8)
        formats_encode.split_planes(as_bits(bits), rest.numpy(), exponent.numpy())
        return rest, exponent
    wide = bits.to(torch.int32)
    return ((wide >> 8 & 0x80) | (wide & 0x7F)).to(torch.uint8), (wide >> 7 & 0xFF).to(torch.uint8)


def _join(rest: torch.Tensor, exponent: torch.Tensor, out: torch.Tensor) -> None:
    """Undo `_planes`."""
    if _fast(out):
        formats_decode.join_planes(rest.numpy(), exponent.numpy(), as_bits(out))
        return
    wide = rest.to(torch.int32)
    bits = (wide & 0x80) << 8 | exponent.to(torch.int32) << 7 | (wide & 0x7F)
    out.copy_(bits.to(torch.int16))


def _fast(payload: torch.Tensor) -> bool:
    return COMPILED and payload.device.type == "cpu"


def lowest_exponent(counts: torch.Tensor) -> int:
    """Give the start of the window of 16 exponents that covers most weights, the first of equals.

    `counts` [256] are weights by exponent.
    """
    covered = counts.to(torch.int64).unfold(0, WINDOW, 1).sum(dim=1)
    return int(torch.nonzero(covered == covered.max())[0, 0])


def _encode_window(bits: torch.Tensor, body: torch.Tensor) -> int:
    """Fill `body` with mode 1; gives the bytes used, or 0 when it does not fit."""
    count = bits.numel()
    counts = _count_exponents(bits)
    low = lowest_exponent(counts)
    listed = count - int(counts[low : low + WINDOW].sum())
    parts = _window_parts(count, listed)
    if parts[-1] > body.numel():
        return 0
    body[:_HEAD_NBYTES] = _head(struct.pack("<IB", listed, low))
    body[parts[0] + count : parts[1]] = 0
    body[parts[2] : parts[-1]] = 0
    rest = body[parts[0] : parts[0] + count]
    packed = body[parts[1] : parts[1] + -(-count // RUN) * RUN // 2]
    body[parts[1] + packed.numel() : parts[2]] = 0
    positions = body[parts[2] : parts[2] + 4 * listed].view(torch.int32)
    values = body[parts[3] : parts[3] + 2 * listed].view(torch.int16)
    if _fast(bits):
        formats_encode.encode_window(
            as_bits(bits), low, rest.numpy(), packed.numpy(), positions.numpy(), as_bits(values)
        )
        return parts[-1]
    plane, exponent = _planes(bits)
    rest.copy_(plane)
    place = exponent.to(torch.int16) - low
    outside = torch.nonzero((place < 0) | (place >= WINDOW)).flatten()
    place[outside] = 0
    runs = functional.pad(place.to(torch.uint8), (0, -count % RUN)).view(-1, 2, RUN // 2)
    packed.copy_((runs[:, 0] | runs[:, 1] << 4).flatten())
    positions.copy_(outside)
    values.copy_(bits[outside])
    return parts[-1]


def _count_exponents(bits: torch.Tensor) -> torch.Tensor:
    """Count the weights of each exponent; gives [256] in host memory."""
    if _fast(bits):
        counts = torch.zeros(256, dtype=torch.int64)
        formats_encode.count_exponents(as_bits(bits), counts.numpy())
        return counts
    return torch.bincount(_planes(bits)[1], minlength=256).cpu()


def _window_parts(count: int, listed: int) -> tuple[int, int, int, int, int]:
    """Where the parts of mode 1 start, and where the last ends."""
    rest = _HEAD_NBYTES
    codes = rest + aligned(count)
    positions = codes + -(-count // RUN) * RUN // 2
    values = positions + aligned(4 * listed)
    return rest, codes, positions, values, values + aligned(2 * listed)


def _decode_window(body: torch.Tensor, out: torch.Tensor) -> None:
    count = out.numel()
    listed, low = struct.unpack_from("<IB", body[:8].cpu().numpy().tobytes())
    parts = _window_parts(count, listed)
    if parts[-1] != body.numel():
        raise FormatError("a bf16z body does not have the parts it names", remedy="encode it again")
    rest = body[parts[0] : parts[0] + count]
    packed = body[parts[1] : parts[1] + -(-count // RUN) * RUN // 2]
    done = 0
    if _fast(out):
        done = formats_decode.decode_window(rest.numpy(), packed.numpy(), low, as_bits(out))
    if done < count:
        pairs = packed[done // 2 :].view(-1, RUN // 2)
        place = torch.stack((pairs & 15, pairs >> 4), dim=1).flatten()[: count - done]
        _join(rest[done:], place + low, out[done:])
    positions = body[parts[2] : parts[2] + 4 * listed].view(torch.int32).long()
    out[positions] = body[parts[3] : parts[3] + 2 * listed].view(torch.int16)


def _encode_dense(bits: torch.Tensor, body: torch.Tensor) -> int:
    """Fill `body` with mode 2; gives the bytes used, or 0 when it does not fit."""
    rest, exponent = _planes(bits)
    plane = _zstd().ZstdCompressor(level=_LEVEL).compress(exponent.cpu().numpy())
    start = _HEAD_NBYTES + aligned(bits.numel())
    end = start + aligned(len(plane))
    if end > body.numel():
        return 0
    body[:end] = 0
    body[:_HEAD_NBYTES] = _head(struct.pack("<Q", len(plane)))
    body[_HEAD_NBYTES : _HEAD_NBYTES + bits.numel()] = rest
    body[start : start + len(plane)] = torch.frombuffer(bytearray(plane), dtype=torch.uint8)
    return end


def _decode_dense(body: torch.Tensor, out: torch.Tensor) -> None:
    count = out.numel()
    (length,) = struct.unpack_from("<Q", body[:8].cpu().numpy().tobytes())
    start = _HEAD_NBYTES + aligned(count)
    plane = body[start : start + length].cpu().numpy()
    zstd = _zstd()
    try:
        raw = zstd.ZstdDecompressor().decompress(plane, max_output_size=count)
    except zstd.ZstdError as error:
        raise FormatError("a bf16z plane is damaged", remedy="encode the block again") from error
    if len(raw) != count:
        raise FormatError("a bf16z plane has the wrong length", remedy="encode the block again")
    exponent = torch.frombuffer(bytearray(raw), dtype=torch.uint8).to(body.device)
    _join(body[_HEAD_NBYTES : _HEAD_NBYTES + count], exponent, out)


def _head(fields: bytes) -> torch.Tensor:
    return torch.frombuffer(bytearray(fields.ljust(_HEAD_NBYTES, b"\0")), dtype=torch.uint8)


def _zstd() -> Any:
    try:
        return importlib.import_module("zstandard")
    except ImportError as error:
        raise DependencyError(
            "the dense form of bf16z needs the package zstandard",
            remedy="pip install 'hotset[formats]', or use the other form",
        ) from error
