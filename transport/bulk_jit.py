"""The compiled half of `bulk.py`: loops over parts of memory, without the GIL.

Imported when large parts are to be copied, because numba costs 0.4 s and 70 MB. Hash and copy are
those of the libraries that Python uses as well, found by their symbols; importing this raises
ImportError or AttributeError where one is missing. It must not know slots, peers or threads.
"""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING, Any

import numpy as np
import xxhash._xxhash
from llvmlite import binding
from numba import config, njit, types

if TYPE_CHECKING:
    from collections.abc import Callable

if config.DISABLE_JIT:
    raise ImportError("numba is told not to compile")


def _external(name: str, library: ctypes.CDLL, result: Any, *arguments: Any) -> Any:
    """Make a function of a loaded library callable; the code kept on disk knows it by name."""
    address = ctypes.cast(getattr(library, name), ctypes.c_void_p).value
    binding.add_symbol(f"hotset_{name}", address)
    return types.ExternalFunction(f"hotset_{name}", result(*arguments))


_libc = ctypes.CDLL(None)
_xxhash = ctypes.CDLL(xxhash._xxhash.__file__)  # noqa: SLF001 - the library that Python calls
_HASH = "XXH3_64bits_dispatch"  # for what the processor has; the other is three times slower
_xxh3 = _external(_HASH, _xxhash, types.uint64, types.uintp, types.uintp)
_copy = _external("memmove", _libc, types.uintp, types.uintp, types.uintp, types.uintp)
_clock = _external("clock_gettime", _libc, types.intc, types.intc, types.uintp)
_MONOTONIC = 1


_Array = np.ndarray[Any, np.dtype[np.int64]]
_ROWS = types.int64[:, ::1]


def _compiled(signature: Any) -> Any:
    """Compile now, or load what numba has kept on disk beside the source."""
    return njit(signature, nogil=True, cache=True)


def _read_clock(stamp: _Array) -> int:
    _clock(_MONOTONIC, stamp.ctypes.data)
    return int(stamp[0] * 1_000_000_000 + stamp[1])


_now_ns = _compiled(types.int64(types.int64[::1]))(_read_clock)


def _copy_and_hash(
    rows: _Array, near: int, far: int, digests: np.ndarray[Any, np.dtype[np.uint64]]
) -> int:
    """Copy each part from `far` to `near`, then hash it; returns the ns that hashing took.

    `rows` int64 [parts, 4]: offset here, offset there, bytes, bytes in front that are not hashed
    (-1: hash nothing). `near` and `far` are addresses, `far` 0 to hash only. `digests` uint64
    [parts].
    """
    stamp = np.zeros(2, np.int64)
    hashing = 0
    for i in range(rows.shape[0]):
        at, size, skip = near + rows[i, 0], rows[i, 2], rows[i, 3]
        if far:
            _copy(at, far + rows[i, 1], size)
        if skip >= 0:
            begin = _now_ns(stamp)
            digests[i] = _xxh3(at + skip, size - skip)
            hashing += _now_ns(stamp) - begin
    return hashing


_SIGNATURE = types.int64(_ROWS, types.int64, types.int64, types.uint64[::1])
copy_and_hash: Callable[[_Array, int, int, np.ndarray[Any, np.dtype[np.uint64]]], int]
copy_and_hash = _compiled(_SIGNATURE)(_copy_and_hash)
