"""Kernels that encode groups of 64 weights, for one CPU thread: `int4`, `nf4`, `int3`, `int2`.

Decides nothing: makes the same bytes as the torch code of `formats_group`, which serves every other
device. Must not know layouts, headers or torch. Arrays are flat and contiguous. Every sum has a
fixed order, so that all processors make the same block.

A group is four vectors of 16 float32; a trial of a scale is some forty instructions on them, which
LLVM cuts to what the processor has. Levels that are not evenly spaced are found by binary search,
and with AVX-512 both the search and the level are a permute of one register (VPERMPS).
"""

# ruff: noqa: ARG001, FBT001, PLR0913, PLR0917 - numba has no keyword-only arguments

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from hotset.blocks.formats_decode import GROUP
from hotset.blocks.formats_jit import (
    COMPILED,
    PERMUTES,
    as_float,
    bits_of,
    compiled,
    emitted,
    float_of,
    rounded,
    widened,
)

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Floats = NDArray[np.float32]

LEAST_SCALE = 2.0**-126  # of a group; smaller ones are 0

if COMPILED:
    from llvmlite import ir
    from numba import types

    _LANES = 16
    _WHOLE, _BYTE, _REAL = ir.IntType(32), ir.IntType(8), ir.FloatType()
    _REALS = ir.VectorType(_REAL, _LANES)
    _WHOLES = ir.VectorType(_WHOLE, _LANES)

    def _every(value: int) -> Any:
        return ir.Constant(_WHOLES, [value] * _LANES)

    def _pointer(target: Any, builder: Any, kind: Any, array: Any) -> Any:
        return target.make_array(kind)(target, builder, array).data

    def _splat(builder: Any, value: Any) -> Any:
        """A float32 in every lane."""
        none = ir.Constant(_REALS, ir.Undefined)
        first = builder.insert_element(none, value, ir.Constant(_WHOLE, 0))
        return builder.shuffle_vector(first, none, _every(0))

    def _reals(builder: Any, address: Any, part: int) -> Any:
        """16 float32 from `address` on, the `part`-th time."""
        place = builder.gep(address, [ir.Constant(ir.IntType(64), _LANES * part)])
        return builder.load(builder.bitcast(place, _REALS.as_pointer()), align=4)

    def _total(builder: Any, parts: Any) -> Any:
        """Sum of four vectors: one onto the other, then halves onto halves."""
        total = parts[0]
        for part in parts[1:]:
            total = builder.fadd(total, part)
        for width in (8, 4, 2, 1):
            none = ir.Constant(total.type, ir.Undefined)
            low, high = (
                builder.shuffle_vector(
                    total, none,
                    ir.Constant(ir.VectorType(_WHOLE, width), list(range(start, start + width))),
                )
                for start in (0, width)
            )  # fmt: skip
            total = builder.fadd(low, high)
        return builder.extract_element(total, ir.Constant(_WHOLE, 0))

    class _Even:
        """Levels one apart: the code is a distance from the first middle."""

        def __init__(self, builder: Any, levels: Any, middles: Any, last: Any) -> None:
            lowest, middle = (
                builder.load(builder.bitcast(at, _REAL.as_pointer())) for at in (levels, middles)
            )
            self.builder = builder
            self.lowest, self.middle = _splat(builder, lowest), _splat(builder, middle)
            self.last = _splat(builder, builder.sitofp(last, _REAL))
            self.none = ir.Constant(_REALS, [0.0] * _LANES)
            self.ceil = builder.module.declare_intrinsic(
                "llvm.ceil.v16f32", fnty=ir.FunctionType(_REALS, [_REALS])
            )

        def found(self, scaled: Any) -> Any:
            """Codes as float32."""
            builder = self.builder
            code = builder.call(self.ceil, [builder.fsub(scaled, self.middle)])
            code = builder.select(builder.fcmp_ordered(">", code, self.none), code, self.none)
            return builder.select(builder.fcmp_ordered("<", code, self.last), code, self.last)

        def level(self, found: Any) -> Any:
            """Levels of what `found` gave."""
            return self.builder.fadd(self.lowest, found)

        def codes(self, found: Any) -> Any:
            """Codes as whole numbers."""
            return self.builder.fptosi(found, _WHOLES)

    class _Searched:
        """16 levels anywhere: the code is how many of the 15 middles are below."""

        def __init__(self, builder: Any, levels: Any, middles: Any, _last: Any) -> None:
            self.builder = builder
            self.levels, self.middles = (_reals(builder, at, 0) for at in (levels, middles))
            if PERMUTES:
                self.permute = builder.module.declare_intrinsic(
                    "llvm.x86.avx512.permvar.sf.512",
                    fnty=ir.FunctionType(_REALS, [_REALS, _WHOLES]),
                )

        def _one(self, table: Any, index: int) -> Any:
            return self.builder.shuffle_vector(
                table, ir.Constant(_REALS, ir.Undefined), _every(index)
            )

        def found(self, scaled: Any) -> Any:
            """Codes as whole numbers."""
            builder = self.builder
            code = _every(0)
            if PERMUTES:
                for step in (8, 4, 2, 1):
                    at = builder.add(code, _every(step - 1))
                    middle = builder.call(self.permute, [self.middles, at])
                    over = builder.fcmp_ordered(">", scaled, middle)
                    code = builder.select(over, builder.add(code, _every(step)), code)
                return code
            for index in range(15):
                over = builder.fcmp_ordered(">", scaled, self._one(self.middles, index))
                code = builder.select(over, _every(index + 1), code)
            return code

        def level(self, found: Any) -> Any:
            """Levels of what `found` gave."""
            builder = self.builder
            if PERMUTES:
                return builder.call(self.permute, [self.levels, found])
            level = self._one(self.levels, 0)
            for index in range(1, 16):
                over = builder.icmp_unsigned(">=", found, _every(index))
                level = builder.select(over, self._one(self.levels, index), level)
            return level

        def codes(self, found: Any) -> Any:
            """As they are."""
            return found

    def _packed(builder: Any, codes: Any, bits: int) -> list[tuple[int, Any]]:
        """Bytes of a group from four vectors of codes: (place, vector of bytes)."""

        def joined(parts: Any) -> Any:
            """Parts above each other, each moved up by its number of bits."""
            whole = parts[0][0]
            for part, shift in parts[1:]:
                whole = builder.or_(whole, builder.shl(part, _every(shift)))
            return whole

        def short(whole: Any) -> Any:
            return builder.trunc(whole, ir.VectorType(_BYTE, _LANES))

        if bits == 4:
            return [(16 * at, short(joined([(codes[at], 0), (codes[at + 2], 4)]))) for at in (0, 1)]
        low = [(builder.and_(code, _every(3)), 2 * place) for place, code in enumerate(codes)]
        found = [(0, short(joined(low)))]
        if bits == 3:
            high = [(builder.lshr(code, _every(2)), 2 * place) for place, code in enumerate(codes)]
            both = short(joined(high))
            halves = [
                builder.shuffle_vector(
                    both, ir.Constant(both.type, ir.Undefined),
                    ir.Constant(ir.VectorType(_WHOLE, 8), list(range(start, start + 8))),
                )
                for start in (0, 8)
            ]  # fmt: skip
            ones = ir.Constant(ir.VectorType(_BYTE, 8), [1] * 8)
            found.append((16, builder.or_(halves[0], builder.shl(halves[1], ones))))
        return found

    def _errors_of(kind: Any) -> Any:
        """Make the function that judges a trial, for one kind of levels."""

        @emitted
        def error(
            _context: Any, row: Any, levels: Any, middles: Any, last: Any, scale: Any,
            inverse: Any, unit: Any,
        ) -> Any:  # fmt: skip
            real = types.float32
            signature = real(row, levels, middles, types.int64, real, real, real)

            def emit(target: Any, builder: Any, signature: Any, args: Any) -> Any:
                rows, low, mid = (
                    _pointer(target, builder, signature.args[i], args[i]) for i in range(3)
                )
                way = kind(builder, low, mid, args[3])
                scales, inverses, units = (_splat(builder, one) for one in args[4:7])
                squares = []
                for part in range(4):
                    weight = _reals(builder, rows, part)
                    level = way.level(way.found(builder.fmul(weight, inverses)))
                    miss = builder.fsub(builder.fmul(level, scales), weight)
                    miss = builder.fmul(miss, units)
                    squares.append(builder.fmul(miss, miss))
                return _total(builder, squares)

            return signature, emit

        return error

    def _writer_of(kind: Any, bits: int) -> Any:
        """Make the function that writes a group's bytes, for one kind of levels."""

        @emitted
        def write(
            _context: Any, row: Any, levels: Any, middles: Any, last: Any, inverse: Any,
            packed: Any, at: Any,
        ) -> Any:  # fmt: skip
            signature = types.void(
                row, levels, middles, types.int64, types.float32, packed, types.int64
            )

            def emit(target: Any, builder: Any, signature: Any, args: Any) -> Any:
                rows, low, mid, goal = (
                    _pointer(target, builder, signature.args[i], args[i]) for i in (0, 1, 2, 5)
                )
                way = kind(builder, low, mid, args[3])
                inverses = _splat(builder, args[4])
                codes = [
                    way.codes(way.found(builder.fmul(_reals(builder, rows, part), inverses)))
                    for part in range(4)
                ]
                for place, values in _packed(builder, codes, bits):
                    to = builder.add(args[6], ir.Constant(ir.IntType(64), place))
                    address = builder.bitcast(builder.gep(goal, [to]), values.type.as_pointer())
                    builder.store(values, address, align=1)
                return target.get_dummy_value()

            return signature, emit

        return write

    _even_error, _searched_error = _errors_of(_Even), _errors_of(_Searched)
    _even4, _even3, _even2 = (_writer_of(_Even, bits) for bits in (4, 3, 2))
    _searched4 = _writer_of(_Searched, 4)


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
def _fill(weights: Any, start: int, row: Floats) -> None:
    """Take 64 weights from `start` on as float32; beyond the last one there are zeros."""
    if start + GROUP <= weights.size:
        source = weights[start : start + GROUP]
        for i in range(GROUP):
            row[i] = as_float(source[i])
        return
    row[:] = 0
    for i in range(weights.size - start):
        row[i] = as_float(weights[start + i])


@compiled
def encode_groups(
    weights: Any, levels: Any, middles: Any, last: int, bits: int, even: bool, factors: Floats,
    limit: Any, narrow: bool, packed: Any, scales: Any,
) -> None:  # fmt: skip
    """Codes [G * 8 * bits bytes] and scales [G] of weights [at most G * 64]: the best factor.

    Weights are float32 or bfloat16's bits; levels and middles are filled up to 16. `even` levels
    are one apart; others are 16. Errors are compared in units of the outermost weight, so that no
    square overflows.
    """
    row = np.zeros(GROUP, np.float32)
    for group in range(scales.size):
        _fill(weights, group * GROUP, row)
        outermost = _outermost(row)
        unit = _inverse(_least_or_zero(outermost))
        best, chosen = np.float32(np.inf), np.float32(0)
        for trial in range(factors.size):
            scale = _scale_of(outermost, factors[trial], limit, narrow)
            if even:
                error = _even_error(row, levels, middles, last, scale, _inverse(scale), unit)
            else:
                error = _searched_error(row, levels, middles, last, scale, _inverse(scale), unit)
            if error < best:
                best, chosen = error, scale
        scales[group] = chosen
        inverse, at = _inverse(chosen), group * 8 * bits
        if not even:
            _searched4(row, levels, middles, last, inverse, packed, at)
        elif bits == 4:
            _even4(row, levels, middles, last, inverse, packed, at)
        elif bits == 3:
            _even3(row, levels, middles, last, inverse, packed, at)
        else:
            _even2(row, levels, middles, last, inverse, packed, at)
