"""A store that does what it is ordered and says precisely what it saw: one end of a transfer.

It lives in a process of its own (`processes.py`), so either end may be killed or stopped, and the
one that survives can be watched from outside.

**Canaries.** Every slot that is free is filled with a pattern and published; whatever lands in it
later is seen. Destinations are painted too, so the first byte that lands and the last one that
has not are known: that is what "in the middle of a transfer" means here.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import numpy as np

from hotset.errors import HotsetError, TransferTimeout
from hotset.transport.base import FileItem, PeerInfo
from hotset.transport.bulk import KERNELS
from hotset.transport.engine import Engine
from hotset.transport.header import checksum
from hotset.transport.records import Ring
from hotset.transport.slab import Slab, SlotState
from hotset.transport.storage import StorageReader
from tests.transport.netlab import enter
from tests.transport.peer import FORMAT, Source, fill

if TYPE_CHECKING:
    from collections.abc import Callable

    from hotset.transport.base import Backend, Expect, FileRange
    from hotset.transport.slab import Slot
    from hotset.transport.ticket import Ticket

SLACK_NS: Final = 1_000_000_000  # a result comes within its deadline and this
DEST: Final = 0xDE57DE57DE57DE57
CANARY: Final = 0xCA11A4BE00000000
TCP: Final = {"UCX_TLS": "tcp", "UCX_NET_DEVICES": "lo"}
QUIET: Final = {"NIXL_LOG_LEVEL": "FATAL", "UCX_LOG_LEVEL": "fatal"}  # peers die on purpose here
KINDS: Final[dict[str, tuple[str, dict[str, str]]]] = {
    "shm": ("hotset.transport.shm:ShmBackend", {}),
    "nixl": ("hotset.transport.nixl:NixlBackend", {}),
    "nixl-tcp": ("hotset.transport.nixl:NixlBackend", TCP),
    "node": ("hotset.transport.node:NodeBackend", {}),
    "tcp": ("hotset.transport.tcp:TcpBackend", {}),
}


def missing(kind: str) -> str:
    """'' when the module of a backend is there, else what is not."""
    module = KINDS[kind][0].partition(":")[0]
    return "" if importlib.util.find_spec(module) else f"{module} is not there"


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """A store to start: `blocks` filled slots and `room` free ones of `nbytes`."""

    name: str
    incarnation: int
    kind: str
    blocks: int
    room: int
    nbytes: int
    environment: dict[str, str] = field(default_factory=dict)
    netns: str = ""
    address: str = ""


class Strike(NamedTuple):
    """A signal for a process (0: this one) when the bytes of a read begin to land."""

    number: int
    pid: int


class Begun(NamedTuple):
    """Whether bytes had landed, and whether the last one had not, when the strike was made."""

    landing: bool
    open: bool


class Report(NamedTuple):
    """How a read ended: each item's status, how late, its slot's state then, DONE but wrong."""

    statuses: list[str]
    errors: list[str]
    after_deadline_ns: int
    held: list[str]
    quarantined: int
    corrupt: int


def backend_for(shape: Shape) -> Backend:
    module, _, name = KINDS[shape.kind][0].partition(":")
    options = {"host": shape.address} if shape.address and shape.kind == "tcp" else {}
    if options:
        options["token"] = b"t" * 32  # type: ignore[assignment] # off loopback there must be one
    made: Backend = getattr(importlib.import_module(module), name)(**options)
    return made


def expected(seed: int, nbytes: int) -> np.ndarray[Any, Any]:
    """The bytes of a block."""
    return np.random.default_rng(seed).integers(0, 256, nbytes, dtype=np.uint8)


class Hands:
    """What a store's process does: one method for each order."""

    def __init__(self, shape: Shape) -> None:
        os.environ.update(QUIET | KINDS[shape.kind][1] | shape.environment)
        KERNELS.want()
        if shape.netns:
            enter(shape.netns)  # before any thread or socket
        backend = backend_for(shape)
        self.shape = shape
        self.slab = Slab(
            capacity_bytes=(shape.blocks + shape.room) * (shape.nbytes + 64),
            slot_payload_bytes=shape.nbytes,
            name=shape.name,
            incarnation=shape.incarnation,
        )
        self.engine = Engine(
            slab=self.slab, backend=backend, ring=Ring(), name=shape.name,
            incarnation=shape.incarnation, storage=StorageReader(),
        )  # fmt: skip
        self.engine.start()
        self.slots: list[Slot] = []
        for index in range(shape.blocks):
            slot = self.slab.allocate(shape.nbytes)
            assert slot is not None
            fill(self.slab, slot, seed=1 + index)
            self.slots.append(slot)
        self.canaries: dict[int, tuple[Slot, int]] = {}
        self.painted = 0
        self.ticket: Ticket | None = None
        self.wanted: list[tuple[Slot, int]] = []  # destination, seed
        self.deadline_ns = 0
        self.ended: list[int] = []
        self.truth: dict[int, np.ndarray[Any, Any]] = {}

    # --- as a source ------------------------------------------------------------------------------

    def describe(self) -> tuple[PeerInfo, list[Source]]:
        return self.engine.info(), [self._copy(slot) for slot in self.slots]

    def _copy(self, slot: Slot) -> Source:
        header = self.slab.header(slot)
        assert header is not None
        return Source(
            offset=slot.offset, key=header.key, nbytes=header.nbytes, checksum=header.checksum,
            generation=header.generation, incarnation=header.incarnation,
        )  # fmt: skip

    def fault(self) -> str:
        """'' while others can read this store."""
        return self.engine.fault

    def leave(self) -> None:
        """End as a store does that only a new process can mend."""
        os._exit(0)

    def reuse(self, seed: int) -> None:
        """Give every copy's memory to another block, the last one first."""
        old = self.slots
        for slot in reversed(old):
            self.slab.retire(slot)
        taken = [self.slab.allocate(self.shape.nbytes) for _ in range(self.slab.super_slots)]
        free = {slot.offset: slot for slot in taken if slot is not None}
        self.slots = [free.pop(slot.offset) for slot in old]
        for spare in free.values():
            self.slab.fail(spare)
        for index, slot in reversed(list(enumerate(self.slots))):
            fill(self.slab, slot, seed=seed + index)

    def free(self, seed: int) -> None:
        """Free every copy and write over its bytes, then fill the slots again."""
        for slot in reversed(self.slots):
            self.slab.retire(slot)
            self.slab.memory.write(slot.payload_offset, bytes(slot.nbytes))
        count, self.slots = len(self.slots), []
        for index in range(count):
            again = self.slab.allocate(self.shape.nbytes)
            assert again is not None
            fill(self.slab, again, seed=seed + index)
            self.slots.append(again)

    def flip(self, on: bool) -> None:  # noqa: FBT001 - an order from the pipe
        """Change the last byte of every copy under its valid header; twice changes it back."""
        del on
        for slot in reversed(self.slots):
            self.slab.payload(slot)[-1] ^= 0x01

    # --- as a destination -------------------------------------------------------------------------

    def connect(self, info: PeerInfo) -> str:
        """'' or the error's type and text."""
        try:
            self.engine.connect(info)
        except HotsetError as error:
            return f"{type(error).__name__}: {error}"
        return ""

    def disconnect(self, name: str) -> None:
        self.engine.disconnect(name)

    def read(self, peer: str, copies: list[Source], seconds: float, strike: Strike | None) -> Begun:
        """Begin to read all copies in one ticket; strike when the first byte lands."""
        slots = self._destinations(len(copies))
        items = [copy.item(slot) for copy, slot in zip(copies, slots, strict=True)]
        seeds = [int.from_bytes(copy.key, "little") for copy in copies]
        self._expect(slots, seeds, seconds)
        self.ticket = self.engine.read(peer, items, deadline_ns=self.deadline_ns)
        return self._watch(strike)

    def read_files(self, blocks: list[tuple[FileRange, Expect]], seconds: float) -> Begun:
        """Begin to read blocks from a file, one range each; keys tell seeds."""
        slots = self._destinations(len(blocks))
        items = [
            FileItem(ranges=(part,), dest=slot, expect=expect)
            for (part, expect), slot in zip(blocks, slots, strict=True)
        ]
        seeds = [int.from_bytes(expect.key, "little") for _, expect in blocks]
        self._expect(slots, seeds, seconds)
        self.ticket = self.engine.read_files(items, deadline_ns=self.deadline_ns)
        return self._watch(None)

    def _destinations(self, count: int) -> list[Slot]:
        for unit in list(self.canaries)[:count]:
            slot, _ = self.canaries.pop(unit)
            self.slab.retire(slot)
        taken = [self.slab.allocate(self.shape.nbytes) for _ in range(count)]
        slots = [slot for slot in taken if slot is not None]
        assert len(slots) == count, f"no room for {count} destinations: {self.holds()}"
        for slot in slots:
            self._words(slot)[:] = DEST
        return slots

    def _expect(self, slots: list[Slot], seeds: list[int], seconds: float) -> None:
        self.wanted = list(zip(slots, seeds, strict=True))
        self.ended = []
        self.deadline_ns = time.monotonic_ns() + int(seconds * 1e9)

    def _watch(self, strike: Strike | None) -> Begun:
        ticket, ended = self.ticket, self.ended
        assert ticket is not None
        ticket.add_callback(lambda _: ended.append(time.monotonic_ns()))
        return self._strike([slot for slot, _ in self.wanted], strike, over=lambda: ticket.done)

    def _strike(
        self, slots: list[Slot], strike: Strike | None, *, over: Callable[[], bool]
    ) -> Begun:
        """Wait until bytes land in painted slots, or it is over; then strike."""
        first = [self._words(slot)[:1] for slot in slots]
        last = [self._words(slot)[-1:] for slot in slots]
        while not over() and all(int(word[0]) == DEST for word in first):
            os.sched_yield()
        landing = any(int(word[0]) != DEST for word in first)
        is_open = not over() and any(int(word[0]) == DEST for word in last)
        if strike is not None:
            os.kill(strike.pid or os.getpid(), strike.number)
        return Begun(landing, is_open)

    def cancel(self) -> None:
        assert self.ticket is not None
        self.ticket.cancel()

    def wait(self) -> Report:
        """Wait for the end of the read, at most until its deadline and a little more."""
        ticket = self.ticket
        assert ticket is not None
        left = max(0, self.deadline_ns - time.monotonic_ns()) + 4 * SLACK_NS
        try:
            outcome = ticket.wait(timeout_ns=left)
        except TransferTimeout:
            return Report(["hung"], [], left, [], self.engine.quarantined, 0)
        held = [self.slab.state(slot).name for slot, _ in self.wanted]
        quarantined = self.engine.quarantined
        self._await(lambda: bool(self.ended))
        corrupt = 0
        for (slot, seed), result in zip(self.wanted, outcome.items, strict=True):
            if result.status.value == "done":
                corrupt += not np.array_equal(self._bytes(slot), self._truth(seed))
                self.slab.unpin(slot)
                self.slab.retire(slot)
        return Report(
            [result.status.value for result in outcome.items],
            sorted({result.error for result in outcome.items if result.error}),
            self.ended[0] - self.deadline_ns,
            held,
            quarantined,
            corrupt,
        )

    def settle(self, seconds: float) -> float:
        """Seconds until every abandoned transfer has ended and its slots are free; -1: not yet."""
        begin = time.monotonic()
        over = self._await(
            lambda: (
                self.engine.quarantined == 0
                and self.engine.in_flight == 0
                and all(self.slab.state(slot) is SlotState.FREE for slot, _ in self.wanted)
            ),
            seconds=seconds,
        )
        return time.monotonic() - begin if over else -1.0

    def holds(self) -> str:
        """What the slab and the engine hold, in a line."""
        states = Counter(state.name for state in self.slab._state[::2])
        engine = self.engine
        return f"{dict(states)}, {engine.in_flight} in flight, {engine.quarantined} quarantined"

    # --- canaries ---------------------------------------------------------------------------------

    def paint(self) -> int:
        """Reuse every free slot at once: fill it with a pattern and publish it."""
        while (slot := self.slab.allocate(self.shape.nbytes)) is not None:
            self.painted += 1
            word = CANARY | (self.painted & 0xFFFFFFFF)
            self._words(slot)[:] = word
            self.slab.publish(
                slot, key=word.to_bytes(16, "little"), format_code=FORMAT, nbytes=slot.nbytes,
                checksum=checksum(self.slab.payload(slot)),
            )  # fmt: skip
            self.canaries[slot.unit] = (slot, word)
        return len(self.canaries)

    def check(self) -> list[str]:
        """What is wrong: canaries that changed, or a slab that contradicts itself."""
        wrong = []
        for slot, word in self.canaries.values():
            header = self.slab.header(slot)
            if header is None or header.key != word.to_bytes(16, "little"):
                wrong.append(f"the header of the slot at {slot.offset} was overwritten")
            changed = np.flatnonzero(self._words(slot) != word)
            if len(changed):
                wrong.append(
                    f"{len(changed)} words of the slot at {slot.offset} were overwritten, "
                    f"first at {8 * int(changed[0])}"
                )
        try:
            self.slab.check_integrity()
        except AssertionError as error:
            wrong.append(str(error))
        return wrong

    def close(self) -> str:
        """'' or what prevents a clean end."""
        return "" if self.engine.close() else f"{self.engine.quarantined} transfers never ended"

    # --- inside -----------------------------------------------------------------------------------

    def _words(self, slot: Slot) -> np.ndarray[Any, Any]:
        return np.frombuffer(self.slab.payload(slot), dtype=np.uint64)

    def _bytes(self, slot: Slot) -> np.ndarray[Any, Any]:
        return np.frombuffer(self.slab.payload(slot), dtype=np.uint8)

    def _truth(self, seed: int) -> np.ndarray[Any, Any]:
        if seed not in self.truth:
            if len(self.truth) >= 8:
                self.truth.pop(next(iter(self.truth)))
            self.truth[seed] = expected(seed, self.shape.nbytes)
        return self.truth[seed]

    @staticmethod
    def _await(condition: Callable[[], bool], *, seconds: float = 5.0) -> bool:
        import threading

        end, tick = time.monotonic() + seconds, threading.Event()
        while not condition():
            if time.monotonic() > end:
                return False
            tick.wait(0.001)
        return True
