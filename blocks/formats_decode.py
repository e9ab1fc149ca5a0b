"""Kernels that decode, for one CPU thread: bfloat16 payloads in host memory.

Decides nothing: gives the same bits as the torch code of `formats_channel`, `formats_group` and
`formats_lossless`, which serves every other device and type and is what these are tested against.
Must not know layouts, headers or torch. Arrays are flat and contiguous; bfloat16 is passed as its
bits (u16).

Loops over a row run from 0 over a slice: with other ranges numba allows for negative indices, and
LLVM then leaves the loop scalar (1.4 instead of 16 GB/s).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from hotset.blocks.formats_jit import (
    PERMUTES,
    bits_of,
    compiled,
    float_of,
    permute2,
    permute3,
    permute4,
    rounded,
    widened,
)

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Bits = NDArray[np.uint16]
    Bytes = NDArray[np.uint8]

GROUP = 64  # weights that share a scale
RUN = 128  # weights whose 4-bit exponents share 64 bytes


@compiled
def all_finite(weights: Any) -> bool:
    """Tell whether no bfloat16 is NaN or infinite."""
    most = np.uint16(0)
    for i in range(weights.size):
        most = max(most, np.uint16(weights[i] & np.uint16(0x7F80)))
    return bool(most < 0x7F80)


@compiled
def decode_int8(values: Any, scales: Any, out: Bits) -> None:
    """`out` [R * C] = values [R * C] times scales [R]."""
    width = values.size // scales.size
    for row in range(scales.size):
        scale = widened(scales[row])
        source = values[row * width : (row + 1) * width]
        goal = out[row * width : (row + 1) * width]
        for i in range(width):
            goal[i] = rounded(np.float32(source[i]) * scale)


@compiled
def decode_int8_columns(values: Any, scales: Any, out: Bits) -> None:
    """`out` [R * C] = values [R * C] times scales [C]."""
    width = scales.size
    for row in range(values.size // width):
        source = values[row * width : (row + 1) * width]
        goal = out[row * width : (row + 1) * width]
        for i in range(width):
            goal[i] = rounded(np.float32(source[i]) * widened(scales[i]))


@compiled
def _from_e4m3(code: Any) -> Any:
    """Float32 of an e4m3 code. Below 2**-6 the exponent is fixed: 1.m - 1 instead of 0.m."""
    field = np.uint32(code & np.uint8(0x7F)) << np.uint32(20)
    small = float_of(field + np.uint32(121 << 23)) - np.float32(2.0**-6)
    usual = float_of(field + np.uint32(120 << 23))
    size = small if field < np.uint32(1 << 23) else usual
    return float_of(bits_of(size) | np.uint32(code & np.uint8(0x80)) << np.uint32(24))


@compiled
def decode_fp8(values: Any, scales: Any, out: Bits) -> None:
    """`out` [R * C] = e4m3 values [R * C] times scales [R]."""
    width = values.size // scales.size
    for row in range(scales.size):
        scale = widened(scales[row])
        source = values[row * width : (row + 1) * width]
        goal = out[row * width : (row + 1) * width]
        for i in range(width):
            goal[i] = rounded(_from_e4m3(source[i]) * scale)


@compiled
def decode_fp8_columns(values: Any, scales: Any, out: Bits) -> None:
    """`out` [R * C] = e4m3 values [R * C] times scales [C]."""
    width = scales.size
    for row in range(values.size // width):
        source = values[row * width : (row + 1) * width]
        goal = out[row * width : (row + 1) * width]
        for i in range(width):
            goal[i] = rounded(_from_e4m3(source[i]) * widened(scales[i]))


@compiled
def _table(levels: Any, scale: Any, table: Bits) -> None:
    """Fill the first places of `table` with the levels of one group."""
    for level in range(levels.size):
        table[level] = rounded(levels[level] * scale)


@compiled
def decode4(packed: Bytes, scales: Any, levels: Any, out: Bits) -> int:
    """4 bits, 16 levels: whole groups; gives how many weights were written."""
    table = np.zeros(32, np.uint16)
    groups = out.size // GROUP
    for group in range(groups):
        if PERMUTES:
            permute4(packed, group * 32, levels, widened(scales[group]), out, group * GROUP)
        else:
            _table(levels, widened(scales[group]), table)
            for j in range(32):
                code = packed[group * 32 + j]
                out[group * GROUP + j] = table[code & np.uint8(15)]
                out[group * GROUP + 32 + j] = table[code >> np.uint8(4)]
    return groups * GROUP


@compiled
def decode3(packed: Bytes, scales: Any, levels: Any, out: Bits) -> int:
    """3 bits, as `decode4`; the levels are filled up to 16."""
    table = np.zeros(32, np.uint16)
    groups = out.size // GROUP
    for group in range(groups):
        if PERMUTES:
            permute3(packed, group * 24, levels, widened(scales[group]), out, group * GROUP)
        else:
            _table(levels, widened(scales[group]), table)
            low, high = group * 24, group * 24 + 16
            for i in range(GROUP):
                two = packed[low + i % 16] >> np.uint8(2 * (i // 16)) & np.uint8(3)
                one = packed[high + i % 8] >> np.uint8(i // 8) & np.uint8(1)
                out[group * GROUP + i] = table[two | one << np.uint8(2)]
    return groups * GROUP


@compiled
def decode2(packed: Bytes, scales: Any, levels: Any, out: Bits) -> int:
    """2 bits, as `decode3`."""
    table = np.zeros(32, np.uint16)
    groups = out.size // GROUP
    for group in range(groups):
        if PERMUTES:
            permute2(packed, group * 16, levels, widened(scales[group]), out, group * GROUP)
        else:
            _table(levels, widened(scales[group]), table)
            for i in range(GROUP):
                code = packed[group * 16 + i % 16] >> np.uint8(2 * (i // 16)) & np.uint8(3)
                out[group * GROUP + i] = table[code]
    return groups * GROUP


@compiled
def decode_window(rest: Bytes, packed: Bytes, low: int, out: Bits) -> int:
    """Join sign and mantissa [n] and 4-bit exponents from `low`; gives how many were written."""
    runs = out.size // RUN
    base = np.uint16(low)
    for run in range(runs):
        for j in range(64):
            i = run * RUN + j
            pair = np.uint16(packed[run * 64 + j])
            first, second = np.uint16(rest[i]), np.uint16(rest[i + 64])
            out[i] = (
                (first & np.uint16(0x80)) << np.uint16(8)
                | (base + (pair & np.uint16(15))) << np.uint16(7)
                | (first & np.uint16(0x7F))
            )
            out[i + 64] = (
                (second & np.uint16(0x80)) << np.uint16(8)
                | (base + (pair >> np.uint16(4))) << np.uint16(7)
                | (second & np.uint16(0x7F))
            )
    return runs * RUN


@compiled
def join_planes(rest: Bytes, exponent: Bytes, out: Bits) -> None:
    """Join sign and mantissa [n] and exponents [n]."""
    for i in range(out.size):
        sign, power = np.uint16(rest[i]), np.uint16(exponent[i])
        out[i] = (
            (sign & np.uint16(0x80)) << np.uint16(8)
            | power << np.uint16(7)
            | (sign & np.uint16(0x7F))
        )
