"""One process of the soak: three stores, each read by and reading its namesakes elsewhere.

Its readers take random copies of random peers with random deadlines, and cancel some. Its keeper
meanwhile gives its own slots to other blocks. What a store holds is written to a board, a file
that peers map and read without a lock: it may be torn or stale, as a directory may be. A key tells
the seed and the length of a block, so each block that is DONE is compared with what it must be,
byte by byte. Counts stand in a mapped file too and outlive a kill.
"""

from __future__ import annotations

import ctypes
import gc
import inspect
import mmap
import os
import random
import threading
import time
import traceback
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from hotset.errors import HotsetError, QuarantineFull
from hotset.transport.base import Expect, ReadItem, Status
from hotset.transport.bulk import KERNELS
from hotset.transport.engine import Engine
from hotset.transport.header import checksum
from hotset.transport.records import Ring
from hotset.transport.slab import Slab, SlotState
from tests.transport.stores import Shape, backend_for

if TYPE_CHECKING:
    from hotset.transport.base import PeerInfo
    from hotset.transport.slab import Slot
    from hotset.transport.ticket import Ticket

SLOT_BYTES: Final = 8 << 20
SMALLEST: Final = 4 << 10
BLOCKS: Final = 6
READ_KIB: Final = BLOCKS * SLOT_BYTES >> 10  # of a mapped peer; of one that came late, less
ROOM: Final = 12
MOST_ITEMS: Final = 6
FORMAT: Final = 3
POOL_BYTES: Final = 32 << 20
ROW: Final = np.dtype(
    [("offset", "<i8"), ("seed", "<u8"), ("nbytes", "<i8"), ("checksum", "<u8"),
     ("generation", "<i8"), ("incarnation", "<i8")]
)  # fmt: skip
STATUSES: Final = tuple(status.value for status in Status)
COUNTS: Final = (*STATUSES, "corrupt", "late", "refused", "full", "reuses", "bytes", "latest_us")
PRIORITIES: Final = "priority" in inspect.signature(Engine.read).parameters


@cache
def _pool() -> np.ndarray[Any, Any]:
    return np.random.default_rng(20_26).integers(0, 256, POOL_BYTES, dtype=np.uint8)


def content(seed: int, nbytes: int) -> np.ndarray[Any, Any]:
    """The bytes of a block: a stretch of one random pool, another one for each seed."""
    begin = seed * 4_099 % (POOL_BYTES - SLOT_BYTES)
    return _pool()[begin : begin + nbytes]


def _key(seed: int, nbytes: int) -> bytes:
    return seed.to_bytes(8, "little") + nbytes.to_bytes(8, "little")


def mapped(path: Path, dtype: Any, count: int) -> np.ndarray[Any, Any]:
    """A shared array in a file; made when it is not there. It is never unmapped."""
    size = np.dtype(dtype).itemsize * count
    handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        if os.fstat(handle).st_size < size:
            os.ftruncate(handle, size)
        return np.frombuffer(mmap.mmap(handle, size), dtype=dtype)
    finally:
        os.close(handle)


@dataclass(slots=True)
class _Peer:
    board: np.ndarray[Any, Any]
    stale: bool = False  # its process has ended and no newer one has been announced


@dataclass(slots=True, kw_only=True)
class Lane:
    """One store of a member, its peers, and what became of its reads."""

    kind: str
    slab: Slab
    engine: Engine
    board: np.ndarray[Any, Any]
    counts: np.ndarray[Any, Any]
    rng: random.Random
    slots: list[Slot] = field(default_factory=list)
    peers: dict[str, _Peer] = field(default_factory=dict)
    stop: threading.Event = field(default_factory=threading.Event)
    error: str = ""

    def count(self, name: str, more: int = 1) -> None:
        self.counts[COUNTS.index(name)] += more

    # --- as a source ------------------------------------------------------------------------------

    def fill(self, index: int) -> None:
        """Put another block into a slot; the board tells of it afterwards."""
        seed = self.rng.getrandbits(40)
        nbytes = int(SMALLEST * (SLOT_BYTES / SMALLEST) ** self.rng.random())
        slot = self.slots[index]
        if self.slab.state(slot) is SlotState.READY:
            self.slab.retire(slot)
            taken = self.slab.allocate(SLOT_BYTES)
            while taken is None and not self.stop.wait(0.001):  # all in quarantine or in use
                taken = self.slab.allocate(SLOT_BYTES)
            if taken is None:
                return
            slot = self.slots[index] = taken
        data = content(seed, nbytes)
        self.slab.write_payload(slot, data.data)
        total = checksum(data.data)
        generation = self.slab.publish(
            slot, key=_key(seed, nbytes), format_code=FORMAT, nbytes=nbytes, checksum=total
        )
        self.board[index] = (
            slot.offset, seed, nbytes, total, generation, self.slab.incarnation,
        )  # fmt: skip

    def keep(self) -> None:
        """Reuse a random slot every now and then."""
        while not self.stop.wait(self.rng.uniform(0.01, 0.08)):
            self.fill(self.rng.randrange(BLOCKS))
            self.count("reuses")

    # --- as a reader ------------------------------------------------------------------------------

    def roam(self) -> None:
        """Read until told to stop."""
        while not self.stop.is_set():
            if not self.peers:
                self.stop.wait(0.01)
                continue
            self._read_one(*self.rng.choice(list(self.peers.items())))

    def _read_one(self, name: str, peer: _Peer) -> None:
        items: list[ReadItem] = []
        for row in self.rng.sample(range(BLOCKS), self.rng.randint(1, MOST_ITEMS)):
            offset, seed, nbytes, total, generation, incarnation = peer.board[row].item()
            if not SMALLEST <= nbytes <= SLOT_BYTES:
                continue  # the board is torn, or not written yet
            slot = self.slab.allocate(SLOT_BYTES)
            if slot is None:
                break
            expect = Expect(
                key=_key(seed, nbytes), format_code=FORMAT, nbytes=nbytes, generation=generation,
                checksum=total, incarnation=incarnation,
            )  # fmt: skip
            items.append(ReadItem(remote_offset=offset, dest=slot, expect=expect))
        if not items:
            self.stop.wait(0.002)
            return
        seconds = self.rng.choice((0.002, 0.02, 0.2, 2.0, 2.0, 2.0))
        deadline_ns = time.monotonic_ns() + int(seconds * 1e9)
        more: dict[str, Any] = {}
        if PRIORITIES:
            more["priority"] = _priority(self.rng)
        try:
            ticket = self.engine.read(name, items, deadline_ns=deadline_ns, **more)
        except HotsetError as error:
            for item in items:
                self.slab.fail(item.dest)
            self.count("full" if isinstance(error, QuarantineFull) else "refused")
            self.stop.wait(0.02)
            return
        self._end(ticket, items, deadline_ns)

    def _end(self, ticket: Ticket, items: list[ReadItem], deadline_ns: int) -> None:
        if self.rng.random() < 0.06:
            self.stop.wait(self.rng.uniform(0, 0.004))
            ticket.cancel()
        outcome = ticket.wait(timeout_ns=60_000_000_000)
        late_us = (time.monotonic_ns() - deadline_ns) // 1000
        latest = COUNTS.index("latest_us")
        self.counts[latest] = max(int(self.counts[latest]), late_us)
        for item, result in zip(items, outcome.items, strict=True):
            self.count(result.status.value)
            if result.status is not Status.DONE:
                continue
            seed, nbytes = (int.from_bytes(item.expect.key[at : at + 8], "little") for at in (0, 8))
            found = np.frombuffer(self.slab.payload(item.dest, nbytes), dtype=np.uint8)
            self.count("corrupt", int(not np.array_equal(found, content(seed, nbytes))))
            self.count("bytes", nbytes)
            self.slab.unpin(item.dest)
            self.slab.retire(item.dest)

    def guarded(self, work: Any) -> None:
        """Run a thread's work; what it raises is told at the end."""
        try:
            work()
        except Exception:  # noqa: BLE001 - told to the parent
            self.error = self.error or traceback.format_exc()


def _priority(rng: random.Random) -> Any:
    from hotset.transport.base import Priority

    return rng.choice(list(Priority))


@dataclass(frozen=True, slots=True, kw_only=True)
class Station:
    """A member to start. `folder` holds the boards and the counts."""

    name: str
    incarnation: int
    kinds: tuple[str, ...]
    folder: str
    environment: dict[str, str]
    seed: int


class Member:
    """The lanes of one process and what its parent may order."""

    def __init__(self, station: Station) -> None:
        os.environ.update(station.environment)
        KERNELS.want()
        self.station = station
        self.folder = Path(station.folder)
        counts = mapped(
            self.folder / f"counts-{station.name}", np.int64, len(COUNTS) * len(station.kinds)
        ).reshape(len(station.kinds), len(COUNTS))
        self.lanes = [self._lane(kind, counts[index]) for index, kind in enumerate(station.kinds)]
        self.threads: list[threading.Thread] = []

    def _lane(self, kind: str, counts: np.ndarray[Any, Any]) -> Lane:
        name, incarnation = self.station.name, self.station.incarnation
        slab = Slab(
            capacity_bytes=(BLOCKS + ROOM) * (SLOT_BYTES + 64),
            slot_payload_bytes=SLOT_BYTES,
            name=name,
            incarnation=incarnation,
        )
        shape = Shape(
            name=name, incarnation=incarnation, kind=kind, blocks=0, room=0, nbytes=SLOT_BYTES
        )
        engine = Engine(
            slab=slab, backend=backend_for(shape), ring=Ring(), name=name, incarnation=incarnation
        )
        engine.start()
        board = mapped(self.folder / f"board-{kind}-{name}-{incarnation}", ROW, BLOCKS)
        rng = random.Random(f"{self.station.seed}-{name}-{incarnation}-{kind}")
        lane = Lane(kind=kind, slab=slab, engine=engine, board=board, counts=counts, rng=rng)
        for index in range(BLOCKS):
            slot = slab.allocate(SLOT_BYTES)
            assert slot is not None
            lane.slots.append(slot)
            lane.fill(index)
        return lane

    def describe(self) -> list[PeerInfo]:
        return [lane.engine.info() for lane in self.lanes]

    def meet(self, infos: list[PeerInfo]) -> list[str]:
        """Connect each lane to its namesake; the errors."""
        wrong = []
        for lane, info in zip(self.lanes, infos, strict=True):
            path = self.folder / f"board-{lane.kind}-{info.name}-{info.incarnation}"
            try:
                lane.engine.connect(info)
            except HotsetError as error:
                wrong.append(f"{lane.kind}: {error}")
                continue
            lane.peers[info.name] = _Peer(mapped(path, ROW, BLOCKS))
        return wrong

    def go(self) -> None:
        for lane in self.lanes:
            for work in (lane.keep, lane.roam):
                thread = threading.Thread(target=lane.guarded, args=(work,), daemon=True)
                thread.start()
                self.threads.append(thread)

    @staticmethod
    def trim() -> None:
        """Give back what malloc only keeps, so that what is left is in use."""
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)

    def rest(self) -> list[str]:
        """Stop reading; what is wrong once all that was abandoned has ended."""
        for lane in self.lanes:
            lane.stop.set()
        for thread in self.threads:
            thread.join(15)
        wrong = ["a reader hangs"] if any(thread.is_alive() for thread in self.threads) else []
        end, tick = time.monotonic() + 15, threading.Event()
        for lane in self.lanes:
            while lane.engine.quarantined and time.monotonic() < end:
                tick.wait(0.005)
            if lane.engine.quarantined:
                wrong.append(f"{lane.kind}: {lane.engine.quarantined} transfers never ended")
            if lane.error:
                wrong.append(f"{lane.kind}: {lane.error}")
            try:
                lane.slab.check_integrity()
            except AssertionError as error:
                wrong.append(f"{lane.kind}: {error}")
        return wrong

    def close(self) -> list[str]:
        return [f"{lane.kind} did not close" for lane in self.lanes if not lane.engine.close()]
