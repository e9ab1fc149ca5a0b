"""Compiles loops with numba, if it is there, and knows when a kept result is stale.

Decides nothing. The planner's kernels and the scanner of traces go through it. numba keeps compiled
code on disk by the date of the function's own file and does not see that a function which it has
built in from another file has changed. Here the stamp of a kept result is a digest of the function,
of the constants and tuples that it names, and of every compiled function that it calls, however
deep.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import CodeType

try:
    from numba import njit as _njit
except ImportError:  # results are the same without it
    _njit = None

COMPILED = _njit is not None
_F = TypeVar("_F", bound="Callable[..., Any]")


def compiled(function: _F) -> _F:
    """Compile on first use; numba keeps the result on disk beside the source."""
    if _njit is None:
        return function
    dispatcher = _njit(cache=True, nogil=True, error_model="numpy")(function)
    function.__dict__["lineage"] = digest = lineage(function)
    kept: Any = getattr(getattr(dispatcher, "_cache", None), "_cache_file", None)
    if hasattr(kept, "_source_stamp"):
        kept._source_stamp = (kept._source_stamp, digest)  # noqa: SLF001 - numba has no door for it
    return dispatcher  # type: ignore[no-any-return]


def lineage(function: Callable[..., Any]) -> str:
    """Digest of a function and of all that numba builds into it."""
    parts = [*_code(function.__code__)]
    known = function.__globals__
    types = [str(hint).split(".")[-1] for hint in function.__annotations__.values()]
    for name in sorted({*_names(function.__code__), *types}):
        value: Any = known.get(name)
        source = getattr(value, "py_func", None)
        if source is not None:
            parts.append(f"{name}={source.__dict__.get('lineage', '')}")
        elif isinstance(value, int | float | str):
            parts.append(f"{name}={value!r}")
        elif hasattr(value, "_fields"):
            parts.append(f"{name}={value._fields}")
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def _code(code: CodeType) -> list[str]:
    """Bytes and constants of a code object and of those inside it."""
    parts = [code.co_code.hex(), repr(code.co_names), repr(code.co_varnames)]
    for constant in code.co_consts:
        inner = hasattr(constant, "co_code")
        parts += _code(constant) if inner else [repr(constant)]
    return parts


def _names(code: CodeType) -> set[str]:
    """Global names that a code object and those inside it use."""
    found = set(code.co_names)
    for constant in code.co_consts:
        if hasattr(constant, "co_code"):
            found |= _names(constant)
    return found
