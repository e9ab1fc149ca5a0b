"""Kernels that encode, for one CPU thread: float32 weights, or bfloat16 bits for `bf16z`.

Decides nothing: makes the same bytes as the torch code of `formats_channel`, `formats_group` and
`formats_lossless`, which serves every other device. Must not know layouts, headers or torch. Arrays
are flat and contiguous. Every sum has a fixed order, so that all processors make the same block.
"""

# ruff: noqa: FBT001, PLR0913, PLR0917 - numba has no keyword-only arguments

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from hotset.blocks.formats_decode import GROUP, RUN
from hotset.blocks.formats_jit import (
    bits_of,
    code_of,
    compiled,
    float_of,
    level_of,
    rounded,
    sum_of_group,
    widened,
)

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Bytes = NDArray[np.uint8]
    Floats = NDArray[np.float32]

WINDOW = 16  # neighbouring exponents that 4 bits tell apart
SMALLEST = 1e-30  # size of the largest weight of an all-zero channel
LEAST_SCALE = 2.0**-126  # of a group; smaller ones are 0


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
def _outermost(row: Floats) -> Any:
    """Largest weight of a group by size, its sign turned."""
    high, low = np.int32(0), np.uint32(0)
    for i in range(row.size):
        bits = bits_of(row[i])
        high = max(high, np.int32(bits))
        low = max(low, bits)
    above = float_of(np.uint32(high))
    below = float_of(low & np.uint32(0x7FFFFFFF)) if low >> np.uint32(31) else np.float32(0)
    return -above if above >= below else below


@compiled
def _least_or_zero(scale: Any) -> Any:
    return scale if np.abs(scale) >= np.float32(LEAST_SCALE) else np.float32(0)


@compiled
def _scale_of(outermost: Any, factor: Any, limit: Any, narrow: bool) -> Any:
    """One trial's scale; below the smallest normal float32 it is 0, as its inverse overflows."""
    scale = outermost * factor
    if narrow:
        scale = widened(rounded(scale))
    return _least_or_zero(min(max(scale, -limit), limit))


@compiled
def _inverse(scale: Any) -> Any:
    return np.float32(0) if scale == 0 else np.float32(1) / scale


@compiled
def encode_even_groups(
    weights: Any,
    lowest: Any,
    middle: Any,
    last: Any,
    factors: Floats,
    limit: Any,
    narrow: bool,
    codes: Any,
    scales: Any,
) -> None:
    """Codes u8 [G * 64] and scales [G] of float32 weights [G * 64]: the best of `factors`.

    Levels are `lowest`, one more, ... : the code is a distance from the first `middle`. Errors are
    compared in units of the outermost weight, so that no square overflows.
    """
    squares = np.zeros(GROUP, np.float32)
    for group in range(scales.size):
        row = weights[group * GROUP : (group + 1) * GROUP]
        goal = codes[group * GROUP : (group + 1) * GROUP]
        outermost = _outermost(row)
        unit = _inverse(_least_or_zero(outermost))
        best, chosen = np.float32(np.inf), np.float32(0)
        for trial in range(factors.size):
            scale = _scale_of(outermost, factors[trial], limit, narrow)
            inverse = _inverse(scale)
            for i in range(GROUP):
                code = min(max(np.ceil(row[i] * inverse - middle), np.float32(0)), last)
                miss = ((lowest + code) * scale - row[i]) * unit
                squares[i] = miss * miss
            error = sum_of_group(squares)
            if error < best:
                best, chosen = error, scale
        scales[group] = chosen
        inverse = _inverse(chosen)
        for i in range(GROUP):
            code = min(max(np.ceil(row[i] * inverse - middle), np.float32(0)), last)
            goal[i] = np.uint8(code)


@compiled
def encode_groups(
    weights: Any,
    levels: Any,
    middles: Any,
    factors: Floats,
    limit: Any,
    narrow: bool,
    codes: Any,
    scales: Any,
) -> None:
    """As `encode_even_groups`, for any levels (a tuple) and the middles between them."""
    squares = np.zeros(GROUP, np.float32)
    for group in range(scales.size):
        row = weights[group * GROUP : (group + 1) * GROUP]
        goal = codes[group * GROUP : (group + 1) * GROUP]
        outermost = _outermost(row)
        unit = _inverse(_least_or_zero(outermost))
        best, chosen = np.float32(np.inf), np.float32(0)
        for trial in range(factors.size):
            scale = _scale_of(outermost, factors[trial], limit, narrow)
            inverse = _inverse(scale)
            for i in range(GROUP):
                level = level_of(row[i] * inverse, levels, middles)
                miss = (level * scale - row[i]) * unit
                squares[i] = miss * miss
            error = sum_of_group(squares)
            if error < best:
                best, chosen = error, scale
        scales[group] = chosen
        inverse = _inverse(chosen)
        for i in range(GROUP):
            goal[i] = code_of(row[i] * inverse, middles)


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
