"""Copies and hashes many parts of a slab in one call that holds no GIL.

Two threads that copy and hash by turns through Python's own calls take the GIL back after each, and
wait for one another. Here a whole post is one call of compiled code (`bulk_jit.py`), which hashes
each part while it is in a core's cache. Whoever starts a process that reads large blocks asks for
it (`KERNELS.want`): loading takes half a second, and would hold up the read that it is for. Until
then, and where it cannot be had, Python's calls do the same. It must not know peers, queues or what
the bytes mean.

Invariant: both ways give the same bytes and digests; a part lies in the slab, which the caller has
seen to.
"""

from __future__ import annotations

import ctypes
import logging
import threading
import time
from typing import TYPE_CHECKING, Final, NamedTuple

import numpy as np

from hotset.transport.header import digest

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from typing import Any

    from hotset.transport.slab import Slab

WORTH_BYTES: Final = 2 << 20  # of one call: for less, the call costs more than the GIL
NO_HASH: Final = -1

_log = logging.getLogger(__name__)


class Part(NamedTuple):
    """Bytes to copy and hash: offsets here and there, and how many in front are not hashed."""

    local: int
    remote: int
    nbytes: int
    skip: int = 0


class Kernels:
    """The compiled code, once it is there."""

    def __init__(self) -> None:
        """Load nothing yet."""
        self.copy_and_hash: Callable[..., int] | None = None
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None

    def want(self) -> None:
        """Have it loaded in the background; it takes half a second, once."""
        with self._lock:
            if self._thread is None:
                self._thread = threading.Thread(target=self._load, daemon=True, name="bulk-load")
                self._thread.start()

    def load(self) -> bool:
        """Wait until it is there; False when it cannot be had."""
        self.want()
        if self._thread is not None:
            self._thread.join()
        return self.copy_and_hash is not None

    def _load(self) -> None:
        try:
            from hotset.transport import bulk_jit
        except Exception as error:  # noqa: BLE001 - whatever is missing, reads go on without it
            _log.info("large reads are copied by Python's own calls: %s", error)
            return
        self.copy_and_hash = bulk_jit.copy_and_hash


KERNELS: Final = Kernels()


class Bulk:
    """Copies into one slab and hashes there; any thread may call."""

    def __init__(self, slab: Slab) -> None:
        """Keep the slab."""
        self._slab = slab

    def copy_and_hash(self, parts: Sequence[Part], *, far: int = 0) -> tuple[list[int], int]:
        """Copy parts of memory mapped at address `far`, and hash them: digests, ns of hashing.

        `far` 0: they are here, only hash them.
        """
        compiled = KERNELS.copy_and_hash
        large = sum(part.nbytes for part in parts) >= WORTH_BYTES
        if compiled is None or not large or self._slab.device != "cpu":
            return self._run_plain(parts, far)
        rows = np.array(parts, dtype=np.int64)
        digests: np.ndarray[Any, np.dtype[np.uint64]] = np.zeros(len(parts), np.uint64)
        took_ns = compiled(rows, self._slab.base_address, far, digests)
        return digests.tolist(), took_ns

    def _run_plain(self, parts: Sequence[Part], far: int) -> tuple[list[int], int]:
        memory, near = self._slab.memory, self._slab.base_address
        digests = []
        hashing = 0
        for local, remote, nbytes, skip in parts:
            if far:
                ctypes.memmove(near + local, far + remote, nbytes)
            if skip == NO_HASH:
                digests.append(0)
                continue
            begin = time.monotonic_ns()
            digests.append(digest(memory.read(local + skip, nbytes - skip)))
            hashing += time.monotonic_ns() - begin
        return digests, hashing
