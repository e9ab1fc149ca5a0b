"""Keeps threads that shall work at the same time off each other's cores.

In a virtual machine Linux may take an idle core, whose host has halted it, for one that the host
has given to somebody else. Then it wakes a thread on the waker's core, where that one waits until
the waker pauses or the next balancing comes, milliseconds later. Two threads that shall copy at the
same time then take turns: reads of 64 MiB took 1.4 times as long. A hint in time costs 3 us
(`Aside`); threads of one pool divide the cores once (`keep_to_share`).

It knows no transfers. Where the system has no such call, nothing happens.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import threading
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from collections.abc import Callable


def _find_getcpu() -> Callable[[], int] | None:
    if not hasattr(os, "sched_setaffinity"):
        return None
    libc: Any = ctypes.CDLL(None)
    found: Callable[[], int] | None = getattr(libc, "sched_getcpu", None)
    return found


_getcpu: Final = _find_getcpu()


class Aside:
    """One thread, as those see it who wake it and work beside it.

    Not thread-safe but for `here`: callers take turns.
    """

    def __init__(self) -> None:
        """Know no thread yet."""
        self._tid = 0
        self._allowed: set[int] = set()
        self._off = -1
        self._waker: tuple[int, set[int]] | None = None

    def here(self) -> None:
        """On the thread itself, before it works: this is the one."""
        if self._tid == 0 and _getcpu is not None:
            self._allowed = os.sched_getaffinity(0)
            self._tid = threading.get_native_id()

    def part(self) -> None:
        """On the waker's thread, before it wakes the other: stay here, and keep that one off.

        Each time one of them waits for the GIL it could come back beside the other.
        """
        if self._tid == 0 or _getcpu is None or len(self._allowed) < 2 or self._waker is not None:
            return
        core = _getcpu()
        try:
            if core != self._off:
                os.sched_setaffinity(self._tid, self._allowed - {core})
            before = os.sched_getaffinity(0)
            os.sched_setaffinity(0, {core})
        except OSError:  # the thread has ended, or the cores are not ours any more
            self._tid = 0
            return
        self._off = core
        self._waker = threading.get_native_id(), before

    def rejoin(self) -> None:
        """When both have done: let the one who woke go where it may, whoever calls this."""
        if self._waker is None:
            return
        tid, before = self._waker
        self._waker = None
        with contextlib.suppress(OSError):  # that thread has ended
            os.sched_setaffinity(tid, before)


def keep_to_share(number: int, of: int) -> None:
    """On thread `number` of a pool of so many: keep to every so manieth core of those allowed.

    Where there are fewer cores than threads, several threads keep to the same one.
    """
    if not hasattr(os, "sched_setaffinity"):
        return
    cores = sorted(os.sched_getaffinity(0))
    shares = min(of, len(cores))
    with contextlib.suppress(OSError):  # the cores are not ours any more
        os.sched_setaffinity(threading.get_native_id(), cores[number % shares :: shares])
