"""Kernels that encode, for one CPU thread: float32 channels, or bfloat16 bits for `bf16z`.

Decides nothing: makes the same bytes as the torch code of `formats_channel` and `formats_lossless`,
which serves every other device. Must not know layouts, headers or torch. Arrays are flat and
contiguous.
"""

# ruff: noqa: FBT001, PLR0913, PLR0917 - numba has no keyword-only arguments

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from hotset.blocks.formats_decode import RUN
from hotset.blocks.formats_jit import bits_of, compiled, float_of, rounded, widened

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Bytes = NDArray[np.uint8]
    Floats = NDArray[np.float32]

WINDOW = 16  # neighbouring exponents that 4 bits tell apart
SMALLEST = 1e-30  # size of the largest weight of an all-zero channel


@compiled
def _channel_scale(row: Floats, factor: Any, limit: Any, narrow: bool) -> Any:
    """Scale of a row [C] of float32: the largest size times `factor`, at most `limit`."""
    most = np.uint32(0)
    for i in range(row.size):
        most = max(most, bits_of(row[i]) & np.uint32(0x7FFFFFFF))
    scale = min(max(float_of(most), np.float32(SMALLEST)) * factor, limit)
    return widened(rounded(scale)) if narrow else scale


@compiled
def encode_int8(
    weights: Any, factor: Any, limit: Any, narrow: bool, values: Any, scales: Any
) -> None:
    """Encode rows of float32 [R * C]; scales [R] of float32 are bfloat16's when `narrow`."""
    width = weights.size // scales.size
    for row in range(scales.size):
        source = weights[row * width : (row + 1) * width]
        goal = values[row * width : (row + 1) * width]
        scale = _channel_scale(source, factor, limit, narrow)
        scales[row] = scale
        for i in range(width):
            level = np.rint(source[i] / scale)
            goal[i] = np.int8(min(max(level, np.float32(-127)), np.float32(127)))


@compiled
def _to_e4m3(value: Any) -> Any:
    """Code of a float32, ties to even; beyond 448 it is 448."""
    size = min(np.abs(value), np.float32(448))
    bits = bits_of(size)
    odd = bits >> np.uint32(20) & np.uint32(1)
    usual = np.uint32(bits + np.uint32(0x7FFFF) + odd) >> np.uint32(20)
    usual = np.uint32(usual - np.uint32(120 << 3))
    small = np.uint32(np.rint(size * np.float32(512)))
    code = small if size < np.float32(2.0**-6) else usual
    return np.uint8(code | bits_of(value) >> np.uint32(24) & np.uint32(0x80))


@compiled
def encode_fp8(
    weights: Any, factor: Any, limit: Any, narrow: bool, values: Any, scales: Any
) -> None:
    """As `encode_int8`, with e4m3 values."""
    width = weights.size // scales.size
    for row in range(scales.size):
        source = weights[row * width : (row + 1) * width]
        goal = values[row * width : (row + 1) * width]
        scale = _channel_scale(source, factor, limit, narrow)
        scales[row] = scale
        for i in range(width):
            goal[i] = _to_e4m3(source[i] / scale)


@compiled
def count_exponents(weights: Any, counts: Any) -> None:
    """Add to `counts` [256] the weights by exponent."""
    for i in range(weights.size):
        counts[weights[i] >> np.uint16(7) & np.uint16(0xFF)] += 1


@compiled
def encode_window(
    weights: Any, low: int, rest: Bytes, packed: Bytes, positions: Any, bits: Any
) -> None:
    """Fill the parts of mode 1 from all weights; the lists have just the room they need."""
    listed = 0
    base = np.int32(low)
    for start in range(0, weights.size, RUN):
        count = min(RUN, weights.size - start)
        source, goal = weights[start : start + count], rest[start : start + count]
        outside = np.uint16(0)
        for i in range(count):
            weight = source[i]
            goal[i] = np.uint8(weight >> np.uint16(8) & np.uint16(0x80) | weight & np.uint16(0x7F))
            place = np.int32(weight >> np.uint16(7) & np.uint16(0xFF)) - base
            outside |= np.uint16(place < 0 or place >= WINDOW)
        codes = packed[start // 2 : start // 2 + RUN // 2]
        if count == RUN and not outside:
            for i in range(RUN // 2):
                first = np.int32(source[i] >> np.uint16(7) & np.uint16(0xFF)) - base
                second = np.int32(source[i + 64] >> np.uint16(7) & np.uint16(0xFF)) - base
                codes[i] = np.uint8(first | second << 4)
            continue
        codes[:] = 0
        for i in range(count):
            place = np.int32(source[i] >> np.uint16(7) & np.uint16(0xFF)) - base
            if place < 0 or place >= WINDOW:
                positions[listed], bits[listed] = start + i, source[i]
                listed += 1
            else:
                codes[i % 64] |= np.uint8(place << (4 * (i // 64)))


@compiled
def split_planes(weights: Any, rest: Bytes, exponent: Bytes) -> None:
    """Undo `join_planes`."""
    for i in range(weights.size):
        weight = weights[i]
        rest[i] = np.uint8(weight >> np.uint16(8) & np.uint16(0x80) | weight & np.uint16(0x7F))
        exponent[i] = np.uint8(weight >> np.uint16(7) & np.uint16(0xFF))
