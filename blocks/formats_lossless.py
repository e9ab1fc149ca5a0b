"""`bf16z`: the same weights in fewer bytes. Never changes a bit.

Trained weights use few of the 256 exponents, so the exponent is what can be made smaller; sign and
mantissa are noise. A bfloat16 payload is cut into a plane of sign and mantissa (one byte a weight)
and its exponents. Modes:

| mode | exponents | size |
|---|---|---|
| 0 raw | the payload as it is | 1: for other types, and when nothing is gained |
| 1 window | 4 bits: distance from the lowest of 16 neighbouring exponents; weights outside are listed | about 3/4 |
| 2 zstd | one byte a weight, compressed by zstd; read, no longer made | about 2/3 |
| 3 dense | Huffman code in streams of 4,096 weights (`formats_huffman`) | about 2/3 |

The planes follow ZipNN (Hershcovitch et al., 2024) and the fixed window NeuZip's and DFloat11's
finding that exponents carry under 3 bits (Hao et al., 2024; Zhang et al., 2025).

Body of mode 1: u32 number of listed weights, u8 lowest exponent, 59 zero bytes; sign and mantissa
[n]; 4-bit exponents [n rounded up to 128, / 2], where byte j of a run of 128 weights has weight j
low and j + 64 high; positions u32, bits u16 of the listed weights. Body of mode 2: u64 bytes of
the compressed plane, 56 zero bytes; sign and mantissa [n]; the compressed plane. Body of mode 3:
u32 bytes of the streams, 60 zero bytes; code lengths u8 [256]; sign and mantissa [n]; where each
stream starts and the last one ends, u32 [streams + 1]; the streams, and 8 zero bytes behind them.
Each part starts on a cache line; numbers are little endian.

Must not know where a payload is. Invariant: a body is never longer than the payload.
"""  # noqa: E501 - the table's row

from __future__ import annotations

import importlib
import struct
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.nn import functional

from hotset.blocks import formats_decode, formats_encode, formats_huffman
from hotset.blocks.formats_base import BodyCodec, aligned, as_bits, check_finite
from hotset.blocks.formats_decode import RUN
from hotset.blocks.formats_encode import WINDOW
from hotset.blocks.formats_jit import COMPILED
from hotset.errors import DependencyError, FormatError
from hotset.policies.types import Format

if TYPE_CHECKING:
    from hotset.blocks.checkpoint import BlockLayout

RAW, LISTED, ZSTD, DENSE = 0, 1, 2, 3
_HEAD_NBYTES = 64


class LosslessCodec(BodyCodec):
    """bf16z. `dense` spends time for fewer bytes."""

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
        elif mode == ZSTD:
            _decode_zstd(body, out.view(torch.int16))
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
    """Fill `body` with mode 3; gives the bytes used, or 0 when it does not fit."""
    count = bits.numel()
    if not count:
        return 0
    counts = _count_exponents(bits)
    lengths = formats_huffman.code_lengths(counts.numpy())
    streams = formats_huffman.stream_count(count)
    parts = _dense_parts(count, streams)
    # No stream wastes more than 7 bits, so this is enough room.
    most = int((counts * torch.from_numpy(lengths)).sum()) // 8 + streams
    if parts[-1] + aligned(most + formats_huffman.SPARE) > body.numel():
        return 0
    body[count + parts[1] : parts[2]] = 0
    rest = body[parts[1] : parts[1] + count]
    starts = body[parts[2] : parts[2] + 4 * (streams + 1)].view(torch.int32)
    plane, exponent = _planes(bits)
    rest.copy_(plane)
    if _fast(bits):
        where = np.zeros(streams + 1, dtype=np.int64)
        target = body[parts[3] :].numpy()
        codes = formats_huffman.codes_of(lengths)
        formats_huffman.encode_streams(exponent.numpy(), codes, lengths, where, target)
        starts.copy_(torch.from_numpy(where))
    else:
        found, made = formats_huffman.encode_anywhere(exponent, lengths)
        starts.copy_(found)
        body[parts[3] : parts[3] + made.numel()].copy_(made)
    used = int(starts[-1])
    end = parts[3] + aligned(used + formats_huffman.SPARE)
    body[parts[2] + 4 * (streams + 1) : parts[3]] = 0
    body[parts[3] + used : end] = 0
    body[:_HEAD_NBYTES] = _head(struct.pack("<I", used))
    body[_HEAD_NBYTES : _HEAD_NBYTES + 256].copy_(torch.from_numpy(lengths))
    return end


def _dense_parts(count: int, streams: int) -> tuple[int, int, int, int]:
    """Where code lengths, sign and mantissa, starts and streams of mode 3 begin."""
    rest = _HEAD_NBYTES + 256
    starts = rest + aligned(count)
    return _HEAD_NBYTES, rest, starts, starts + aligned(4 * (streams + 1))


def _decode_dense(body: torch.Tensor, out: torch.Tensor) -> None:
    count = out.numel()
    streams = formats_huffman.stream_count(count)
    parts = _dense_parts(count, streams)
    (used,) = struct.unpack_from("<I", body[:4].cpu().numpy().tobytes())
    lengths = body[parts[0] : parts[0] + 256].cpu().numpy().copy()
    starts = body[parts[2] : parts[2] + 4 * (streams + 1)].view(torch.int32).long()
    whole = parts[3] + aligned(used + formats_huffman.SPARE) == body.numel()
    rising = bool((starts[1:] >= starts[:-1]).all()) and int(starts[0]) == 0
    if not (whole and rising and int(starts[-1]) == used and formats_huffman.is_code(lengths)):
        raise FormatError("a bf16z body does not have the parts it names", remedy="encode it again")
    rest, bits = body[parts[1] : parts[1] + count], body[parts[3] :]
    if _fast(out):
        codes = formats_huffman.codes_of(lengths)
        good = formats_huffman.decode_streams(
            bits.numpy(), starts.numpy(), codes, lengths, rest.numpy(), as_bits(out)
        )
    else:
        exponent = formats_huffman.decode_anywhere(bits, starts, lengths, count=count)
        good = exponent is not None
        if exponent is not None:
            _join(rest, exponent, out)
    if not good:
        raise FormatError("the streams of a bf16z body are damaged", remedy="encode it again")


def _decode_zstd(body: torch.Tensor, out: torch.Tensor) -> None:
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
            "a bf16z block of an earlier version needs the package zstandard",
            remedy="pip install 'hotset[formats]', or encode the block again",
        ) from error
