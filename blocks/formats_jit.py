"""What the kernels of the formats are compiled with: numba, and the steps that NumPy cannot say.

Decides nothing about formats. Without numba `COMPILED` is false and torch code does the same. Must
not know layouts, headers or torch.

A group's levels times its scale fit one AVX-512 register as bfloat16, so a decoded weight is one
lane of VPERMW: 32 weights an instruction (`permute4`, `permute3`, `permute2`). Without AVX-512 BW
`PERMUTES` is false and the caller reads its table from memory.

numba keeps compiled code on disk by the date of the function's own file. What is here is built into
kernels of other files, so the source of this file is part of their stamp.
"""

# ruff: noqa: ARG001, PLR0913, PLR0917 - an intrinsic names, by place, what only its code reads

from __future__ import annotations

import hashlib
import inspect
import os
import sys
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Callable

try:
    from llvmlite import binding, ir
    from numba import njit, types
    from numba.extending import intrinsic
except ImportError:  # torch code does the same
    COMPILED = False
else:
    COMPILED = True

_F = TypeVar("_F", bound="Callable[..., Any]")
_STAMP = hashlib.sha256(inspect.getsource(sys.modules[__name__]).encode()).hexdigest()


def compiled(function: _F) -> _F:
    """Compile on first use; numba keeps the result on disk beside the source."""
    if not COMPILED:
        return function
    dispatcher: Any = njit(cache=True, nogil=True, error_model="numpy")(function)
    kept: Any = getattr(getattr(dispatcher, "_cache", None), "_cache_file", None)
    if hasattr(kept, "_source_stamp"):
        kept._source_stamp = (kept._source_stamp, _STAMP)  # noqa: SLF001 - numba has no door for it
    wrapped: _F = dispatcher
    return wrapped


def _has_permute() -> bool:
    """Tell whether numba compiles for a processor with VPERMW."""
    if not COMPILED or os.environ.get("NUMBA_CPU_NAME") or os.environ.get("NUMBA_CPU_FEATURES"):
        return False
    return bool(binding.get_host_cpu_features().get("avx512bw"))


PERMUTES = _has_permute()

if COMPILED:

    def emitted(function: Callable[..., Any]) -> Any:
        """Let `function` emit the code of each call, which passes all but the first argument."""
        return intrinsic(function)

    @emitted
    def bits_of(_context: Any, value: Any) -> Any:
        """Bits of a float32."""

        def emit(_target: Any, builder: Any, _signature: Any, args: Any) -> Any:
            return builder.bitcast(args[0], ir.IntType(32))

        return types.uint32(types.float32), emit

    @emitted
    def float_of(_context: Any, value: Any) -> Any:
        """Float32 with these bits."""

        def emit(_target: Any, builder: Any, _signature: Any, args: Any) -> Any:
            return builder.bitcast(args[0], ir.FloatType())

        return types.float32(types.uint32), emit

    @emitted
    def as_float(_context: Any, value: Any) -> Any:
        """Float32 of a float32, or of a bfloat16's bits."""

        def emit(_target: Any, builder: Any, signature: Any, args: Any) -> Any:
            if signature.args[0] == types.float32:
                return args[0]
            whole = ir.IntType(32)
            wide = builder.shl(builder.zext(args[0], whole), ir.Constant(whole, 16))
            return builder.bitcast(wide, ir.FloatType())

        return types.float32(value), emit

    def _vector(values: Any, lane: Any) -> Any:
        return ir.Constant(ir.VectorType(lane, len(values)), list(values))

    def _load(builder: Any, address: Any, count: Any) -> Any:
        kind = ir.VectorType(ir.IntType(8), count)
        return builder.load(builder.bitcast(address, kind.as_pointer()), align=1)

    def _spread(builder: Any, loaded: Any, have: Any) -> Any:
        """Repeat a vector of `have` bytes to 32 lanes of 16 bits."""
        lanes = _vector([lane % have for lane in range(32)], ir.IntType(32))
        wide = builder.shuffle_vector(loaded, ir.Constant(loaded.type, ir.Undefined), lanes)
        return builder.zext(wide, ir.VectorType(ir.IntType(16), 32))

    def _shifted(builder: Any, wide: Any, shifts: Any, mask: Any) -> Any:
        half = ir.IntType(16)
        moved = builder.lshr(wide, _vector(shifts, half))
        return builder.and_(moved, _vector([mask] * 32, half))

    def _codes(builder: Any, address: Any, bits: Any) -> Any:
        """The 64 codes of a group, as two vectors of 32 lanes."""
        if bits == 4:
            wide = _spread(builder, _load(builder, address, 32), 32)
            return [_shifted(builder, wide, [place] * 32, 15) for place in (0, 4)]
        wide = _spread(builder, _load(builder, address, 16), 16)
        low = [_shifted(builder, wide, [first] * 16 + [first + 2] * 16, 3) for first in (0, 4)]
        if bits == 2:
            return low
        after = builder.gep(address, [ir.Constant(ir.IntType(64), 16)])
        wide = _spread(builder, _load(builder, after, 8), 8)
        half = ir.IntType(16)
        found = []
        for part, first in zip(low, (0, 4), strict=True):
            shifts = [first + lane // 8 for lane in range(32)]
            high = builder.shl(_shifted(builder, wide, shifts, 1), _vector([2] * 32, half))
            found.append(builder.or_(part, high))
        return found

    def _scaled_levels(builder: Any, address: Any, scale: Any) -> Any:
        """32 lanes of bfloat16: the 16 levels at `address` times `scale`, then again.

        They never leave the registers: a table in memory would be read back only after all stores
        before it have reached the cache.
        """
        kind, whole = ir.VectorType(ir.FloatType(), 16), ir.IntType(32)
        levels = builder.load(builder.bitcast(address, kind.as_pointer()), align=4)
        none = ir.Constant(kind, ir.Undefined)
        first = builder.insert_element(none, scale, ir.Constant(whole, 0))
        scales = builder.shuffle_vector(first, none, _vector([0] * 16, whole))
        bits = builder.bitcast(builder.fmul(levels, scales), ir.VectorType(whole, 16))
        half = _vector([16] * 16, whole)
        odd = builder.and_(builder.lshr(bits, half), _vector([1] * 16, whole))
        raised = builder.add(builder.add(bits, _vector([0x7FFF] * 16, whole)), odd)
        short = builder.trunc(builder.lshr(raised, half), ir.VectorType(ir.IntType(16), 16))
        lanes = _vector([lane % 16 for lane in range(32)], whole)
        return builder.shuffle_vector(short, ir.Constant(short.type, ir.Undefined), lanes)

    def _permuting(bits: int) -> Any:
        """Make the function that writes the 64 weights of a group from 16 levels and its scale."""

        @emitted
        def permute(
            _context: Any, packed: Any, at: Any, levels: Any, scale: Any, out: Any, to: Any
        ) -> Any:
            signature = types.void(packed, types.int64, levels, types.float32, out, types.int64)

            def emit(target: Any, builder: Any, signature: Any, args: Any) -> Any:
                arrays = [
                    target.make_array(signature.args[i])(target, builder, args[i]).data
                    for i in (0, 2, 4)
                ]
                lanes = ir.VectorType(ir.IntType(16), 32)
                permvar = builder.module.declare_intrinsic(
                    "llvm.x86.avx512.permvar.hi.512", fnty=ir.FunctionType(lanes, [lanes, lanes])
                )
                source = builder.gep(arrays[0], [args[1]])
                table = _scaled_levels(builder, arrays[1], args[3])
                for half, codes in enumerate(_codes(builder, source, bits)):
                    place = builder.add(args[5], ir.Constant(ir.IntType(64), 32 * half))
                    goal = builder.bitcast(builder.gep(arrays[2], [place]), lanes.as_pointer())
                    builder.store(builder.call(permvar, [table, codes]), goal, align=2)
                return target.get_dummy_value()

            return signature, emit

        return permute

    permute4, permute3, permute2 = (_permuting(bits) for bits in (4, 3, 2))


@compiled
def rounded(value: Any) -> Any:
    """Bits of the bfloat16 nearest to a float32, ties to even, as torch rounds."""
    bits = bits_of(value)
    odd = bits >> np.uint32(16) & np.uint32(1)
    return np.uint16(np.uint32(bits + np.uint32(0x7FFF) + odd) >> np.uint32(16))


@compiled
def widened(half: Any) -> Any:
    """Float32 of a bfloat16's bits."""
    return float_of(np.uint32(half) << np.uint32(16))
