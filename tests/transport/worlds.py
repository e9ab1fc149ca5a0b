"""Two stores that read each other, over loopback, or between processes over any backend."""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING, Any

from hotset.transport.loopback import LoopbackBackend, LoopbackNetwork
from tests.transport.peer import BACKENDS, PeerProcess, Source, Store, _obey, build

if TYPE_CHECKING:
    from collections.abc import Callable

    from hotset.transport.base import Outcome, PeerInfo
    from hotset.transport.slab import Slot

BLOCKS = 24
NBYTES = 70_000


def deadline(seconds: float = 20.0) -> int:
    """A `deadline_ns` that many seconds ahead."""
    return time.monotonic_ns() + int(seconds * 1e9)


def until(condition: Callable[[], bool], *, seconds: float = 10.0) -> bool:
    """Whether `condition` comes true before the deadline."""
    end = time.monotonic() + seconds
    tick = threading.Event()
    while not condition():
        if time.monotonic() > end:
            return False
        tick.wait(0.002)
    return True


class World:
    """A source with filled slots and a sink with an engine; `obey` acts on the source."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self.network = LoopbackNetwork()
        shape: dict[str, Any] = {"blocks": BLOCKS, "nbytes": NBYTES, "room": 4}
        self.peer: PeerProcess | None = None
        self._source: Store | None = None
        if kind in BACKENDS:
            self.peer = PeerProcess(name="source", incarnation=5, backend=kind, **shape)
            self.info: PeerInfo = self.peer.info
            self.copies: list[Source] = self.peer.copies
        else:
            backend = LoopbackBackend(self.network)
            self._source = build(name="source", incarnation=5, backend=backend, **shape)
            self.info, self.copies = self._source.engine.info(), self._source.copies
        backend_here = BACKENDS[kind]() if kind in BACKENDS else LoopbackBackend(self.network)
        self.sink = build(
            name="sink", incarnation=9, backend=backend_here, blocks=4, nbytes=NBYTES, room=40,
            describe=lambda key: (3, key[0]),
        )  # fmt: skip
        self.sink.engine.connect(self.info)

    def obey(self, order: str, argument: Any = None) -> Any:
        if self.peer is not None:
            return self.peer.call(order, argument)
        assert self._source is not None
        return _obey(self._source, order, argument)

    def slot(self) -> Slot:
        slot = self.sink.slab.allocate(NBYTES)
        assert slot is not None
        return slot

    def read(self, *copies: Source, seconds: float = 20.0, **changes: Any) -> Outcome:
        items = [copy.item(self.slot(), **changes) for copy in copies]
        ticket = self.sink.engine.read("source", items, deadline_ns=deadline(seconds))
        return ticket.wait(timeout_ns=int((seconds + 10) * 1e9))

    def drop(self, outcome: Outcome) -> None:
        """Free what landed and check that nothing else is held."""
        for result in outcome.items:
            if result.status.value == "done":
                self.sink.slab.unpin(result.dest)
                self.sink.slab.retire(result.dest)
        self.sink.slab.check_integrity()

    def close(self) -> None:
        assert self.sink.engine.close()
        self.sink.slab.check_integrity()
        if self.peer is not None:
            self.peer.close()
        if self._source is not None:
            assert self._source.engine.close()
