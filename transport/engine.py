"""The engine of a store: takes reads from any thread, ends each one exactly once.

Signatures; the owner thread follows.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from hotset.transport.base import Backend, FileItem, PeerInfo, ReadItem
    from hotset.transport.pacing import Pacer
    from hotset.transport.records import Ring
    from hotset.transport.slab import Slab
    from hotset.transport.storage import StorageReader
    from hotset.transport.ticket import Ticket


class Engine:
    """Moves blocks into one slab: from peers through a backend, from files through a reader."""

    def __init__(  # noqa: PLR0913 - the collaborators of a store, all by keyword
        self,
        *,
        slab: Slab,
        backend: Backend | None,
        ring: Ring,
        name: str,
        incarnation: int,
        storage: StorageReader | None = None,
        pacer: Pacer | None = None,
        max_quarantined: int = 64,
        time_scale: float = 1.0,
        describe: Callable[[bytes], tuple[int, int]] | None = None,
    ) -> None:
        """Keep the parts; nothing runs before `start`."""

    def start(self) -> None:
        """Start the owner thread and register the slab on it."""
        raise NotImplementedError

    def info(self) -> PeerInfo:
        """Return what peers need to read this store; known after `start`."""
        raise NotImplementedError

    def connect(self, peer: PeerInfo) -> None:
        """Make a peer readable; runs on the owner thread. Raises TransportError."""
        raise NotImplementedError

    def disconnect(self, name: str) -> None:
        """Forget a peer; runs on the owner thread."""
        raise NotImplementedError

    def read(  # noqa: PLR0913 - what a transfer record needs
        self,
        peer: str,
        items: Sequence[ReadItem],
        *,
        deadline_ns: int,
        trace: tuple[int, int] = (0, 0),
        parent: int = 0,
        reason: str = "",
    ) -> Ticket:
        """Read slots of `peer` into FILLING slots here, many in one backend transfer.

        `deadline_ns` is `time.monotonic_ns()` time. Each item that is DONE is READY and arrives
        pinned once on behalf of the caller, who unpins it. Raises QuarantineFull.
        """
        raise NotImplementedError

    def read_files(
        self,
        items: Sequence[FileItem],
        *,
        deadline_ns: int,
        trace: tuple[int, int] = (0, 0),
        parent: int = 0,
        reason: str = "",
    ) -> Ticket:
        """Read ranges of files into FILLING slots here; ends and pins are as in `read`."""
        raise NotImplementedError

    def close(self, *, timeout_ns: int = 5_000_000_000) -> bool:
        """Cancel what runs and wait until nothing is in flight; True when all has ended."""
        raise NotImplementedError
