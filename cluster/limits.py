"""A real memory limit for a process, from the kernel: a memory cgroup (version 1 or 2).

The kernel then reclaims page cache and mapped files of the process and ends it when its own memory
does not fit. Used by benchmarks, so that every contender lives under the same rule.
"""

from __future__ import annotations

import contextlib
import secrets
from pathlib import Path
from typing import TYPE_CHECKING

from hotset.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Iterator

_V1 = Path("/sys/fs/cgroup/memory")
_V2 = Path("/sys/fs/cgroup")


def _make(limit_bytes: int) -> Path:
    v1 = _V1.exists()
    group = (_V1 if v1 else _V2) / f"hotset-{secrets.token_hex(4)}"
    group.mkdir()
    knob = group / ("memory.limit_in_bytes" if v1 else "memory.max")
    knob.write_text(str(limit_bytes))
    return group


@contextlib.contextmanager
def memory_limit(limit_bytes: int) -> Iterator[str]:
    """Make a cgroup with this limit; yields what `join` wants. Raises ConfigError where it cannot.

    Processes that join before they allocate are held to the limit from there on.
    """
    try:
        group = _make(limit_bytes)
    except OSError as error:
        raise ConfigError(
            f"cannot make a memory cgroup ({error.strerror})",
            remedy="run as root on a host with the memory controller, or leave the limit out",
        ) from None
    try:
        yield str(group)
    finally:
        with contextlib.suppress(OSError):  # a process may still be ending; the group is empty then
            group.rmdir()


def peak_bytes(group: str) -> int:
    """Most memory that the cgroup has held, page cache included."""
    for name in ("memory.max_usage_in_bytes", "memory.peak"):
        path = Path(group) / name
        if path.exists():
            return int(path.read_text())
    return 0
