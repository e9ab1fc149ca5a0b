"""A store in a process of its own: the other side of NIXL tests and measurements.

The parent talks to it over a pipe; every call has a deadline, so a hung peer fails a test.
"""

from __future__ import annotations

import multiprocessing as mp
import os
import signal
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from hotset.transport.base import Expect, PeerInfo, ReadItem, Replica
from hotset.transport.bulk import KERNELS
from hotset.transport.engine import Engine
from hotset.transport.header import checksum
from hotset.transport.nixl import NixlBackend
from hotset.transport.node import NodeBackend
from hotset.transport.records import Ring
from hotset.transport.shm import ShmBackend
from hotset.transport.slab import Slab, Slot
from hotset.transport.tcp import TcpBackend
from hotset.transport.ucx import UcxBackend

if TYPE_CHECKING:
    from multiprocessing.connection import Connection

    from hotset.transport.ticket import Ticket

CALL_TIMEOUT_S = 60.0
FORMAT = 7
_HOW = ("remote_offset", "others", "stripe", "follow", "stream")
BACKENDS = {
    "nixl": NixlBackend,
    "shm": ShmBackend,
    "node": NodeBackend,
    "tcp": TcpBackend,
    "ucx": UcxBackend,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """A READY copy in some store, as a directory would tell of it."""

    offset: int
    key: bytes
    nbytes: int
    checksum: int
    generation: int
    incarnation: int

    def item(self, dest: Slot, **changes: Any) -> ReadItem:
        """A read of this copy into `dest`; `changes` replace what is expected."""
        expect: dict[str, Any] = {
            "key": self.key,
            "format_code": FORMAT,
            "nbytes": self.nbytes,
            "generation": self.generation,
            "checksum": self.checksum,
            "incarnation": self.incarnation,
        }
        how = {name: changes.pop(name) for name in _HOW if name in changes}
        how.setdefault("remote_offset", self.offset)
        return ReadItem(dest=dest, expect=Expect(**(expect | changes)), **how)

    def replica(self, peer: str) -> Replica:
        """The same copy as another source of an item."""
        return Replica(
            peer=peer,
            remote_offset=self.offset,
            generation=self.generation,
            incarnation=self.incarnation,
        )


def fill(slab: Slab, slot: Slot, *, seed: int) -> Source:
    """Fill a slot with seeded bytes and publish it."""
    data = np.random.default_rng(seed).integers(0, 256, slot.nbytes, dtype=np.uint8)
    slab.write_payload(slot, data.data)
    key = seed.to_bytes(16, "little")
    total = checksum(data.data)
    generation = slab.publish(slot, key=key, format_code=FORMAT, nbytes=slot.nbytes, checksum=total)
    return Source(
        offset=slot.offset,
        key=key,
        nbytes=slot.nbytes,
        checksum=total,
        generation=generation,
        incarnation=slab.incarnation,
    )


@dataclass(slots=True)
class Store:
    """Slab, engine and the copies of one store."""

    slab: Slab
    engine: Engine
    ring: Ring
    slots: list[Slot]
    copies: list[Source]
    pulls: list[Ticket] = field(default_factory=list)
    landed: list[Slot] = field(default_factory=list)


def build(
    *, name: str, incarnation: int, backend: Any, blocks: int, nbytes: int, room: int, **more: Any
) -> Store:
    """A store with `blocks` filled slots of `nbytes` and `room` free ones."""
    slab = Slab(
        capacity_bytes=(blocks + room) * (nbytes + 128),
        slot_payload_bytes=nbytes,
        name=name,
        incarnation=incarnation,
    )
    ring = Ring()
    engine = Engine(
        slab=slab, backend=backend, ring=ring, name=name, incarnation=incarnation, **more
    )
    engine.start()
    slots = []
    for _ in range(blocks):
        slot = slab.allocate(nbytes)
        assert slot is not None
        slots.append(slot)
    copies = [fill(slab, slot, seed=1 + index) for index, slot in enumerate(slots)]
    return Store(slab, engine, ring, slots, copies)


def _serve(pipe: Connection, config: dict[str, Any], environment: dict[str, str]) -> None:
    os.environ.update(environment)
    KERNELS.want()
    store = build(backend=BACKENDS[config.pop("backend", "nixl")](), **config)
    pipe.send((store.engine.info(), store.copies))
    while True:
        order, argument = pipe.recv()
        if order == "quit":
            store.engine.close()
            pipe.send("ended")
            return
        pipe.send(_obey(store, order, argument))


def _obey(store: Store, order: str, argument: Any) -> Any:
    slab = store.slab
    if order == "retire":
        return slab.retire(store.slots[argument])
    if order == "refill":  # the slot's bytes are reused by another copy
        slab.retire(store.slots[argument])
        taken = [slab.allocate(store.slots[argument].nbytes) for _ in range(slab.super_slots)]
        free = [slot for slot in taken if slot is not None]
        slot = next(slot for slot in free if slot.offset == store.slots[argument].offset)
        for other in free:
            if other is not slot:
                slab.fail(other)
        store.slots[argument] = slot
        return fill(slab, slot, seed=1000 + argument)
    if order == "flip":  # silent corruption: a byte changes under a valid header
        payload = slab.payload(store.slots[argument])
        payload[-1] ^= 0xFF
        return True
    if order in {"pull", "drop", "ended"}:
        return _obey_pull(store, order, argument)
    if order == "read":  # the peer reads from us as we read from it
        info, copies = argument
        store.engine.connect(info)
        slots = [slab.allocate(copy.nbytes) for copy in copies]
        items = [copy.item(slot) for copy, slot in zip(copies, slots, strict=True) if slot]
        ticket = store.engine.read(
            info.name, items, deadline_ns=time.monotonic_ns() + 20_000_000_000
        )
        results = ticket.wait().items
        store.landed += [result.dest for result in results if result.status.value == "done"]
        return [(result.status.value, result.checksum) for result in results]
    raise ValueError(order)


def _obey_pull(store: Store, order: str, argument: Any) -> Any:
    slab = store.slab
    if order == "pull":  # begin to read one block; others may follow it
        info, copy, changes = argument
        for other in info:
            store.engine.connect(other)
        slot = slab.allocate(copy.nbytes)
        assert slot is not None
        ticket = store.engine.read(
            info[0].name,
            [copy.item(slot, **changes)],
            deadline_ns=time.monotonic_ns() + 20_000_000_000,
        )
        store.pulls.append(ticket)
        return slot.offset
    if order == "drop":  # what reads and pulls brought
        for slot in store.landed:
            slab.unpin(slot)
            slab.retire(slot)
        store.landed.clear()
        return True
    # "ended": how the pulls ended, and where their bytes came from
    results = [pull.wait().items[0] for pull in store.pulls]
    store.pulls.clear()
    store.landed += [r.dest for r in results if r.status.value == "done"]
    slab.check_integrity()
    return [(r.status.value, r.checksum, r.source, len(r.lost), r.error) for r in results]


class PeerProcess:
    """Starts a store in a spawned process and ends it again."""

    def __init__(self, *, environment: dict[str, str] | None = None, **config: Any) -> None:
        context = mp.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self.process = context.Process(
            target=_serve, args=(theirs, config, environment or {}), daemon=True
        )
        self.process.start()
        theirs.close()
        self.info: PeerInfo
        self.copies: list[Source]
        self.info, self.copies = self._answer()

    def _answer(self) -> Any:
        if not self._pipe.poll(CALL_TIMEOUT_S):
            raise TimeoutError("the peer process does not answer")
        return self._pipe.recv()

    def send(self, order: str, argument: Any = None) -> None:
        self._pipe.send((order, argument))

    def call(self, order: str, argument: Any = None) -> Any:
        self.send(order, argument)
        return self._answer()

    def answer(self) -> Any:
        return self._answer()

    def kill(self) -> None:
        assert self.process.pid is not None
        os.kill(self.process.pid, signal.SIGKILL)
        self.process.join(CALL_TIMEOUT_S)

    def freeze(self) -> None:
        assert self.process.pid is not None
        os.kill(self.process.pid, signal.SIGSTOP)
        end = time.monotonic() + CALL_TIMEOUT_S
        while not self._is_stopped():  # a running thread stops when it next leaves the kernel
            if time.monotonic() > end:
                raise TimeoutError("the peer process does not stop")
            os.sched_yield()

    def _is_stopped(self) -> bool:
        states = [
            stat.read_text(encoding="utf-8").rpartition(")")[2].split()[0]
            for stat in Path(f"/proc/{self.process.pid}/task").glob("*/stat")
        ]
        return set(states) == {"T"}

    def thaw(self) -> None:
        assert self.process.pid is not None
        os.kill(self.process.pid, signal.SIGCONT)

    def close(self) -> None:
        if self.process.is_alive():
            self.call("quit")
            self.process.join(CALL_TIMEOUT_S)
        assert not self.process.is_alive()
