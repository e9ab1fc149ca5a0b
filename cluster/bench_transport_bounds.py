"""Bounds of the transport benchmark: memory copies, a plain socket, and storage beside preadv.

Each does the job of some backend without hotset: same sizes, same kind of memory, blocks taken in
turns from a working set beyond L2. Copies and the socket move no header and verify nothing.
"""

from __future__ import annotations

import ctypes
import itertools
import os
import socket
import struct
import threading
import time
from typing import TYPE_CHECKING, Any, Final

from hotset.cluster.bench_transport_stores import FORMAT, READ_S, make_slab, time_engine, timed
from hotset.errors import TransportError
from hotset.transport.base import Expect, FileItem, FileRange
from hotset.transport.engine import Engine
from hotset.transport.memory import HostMemory
from hotset.transport.records import Ring
from hotset.transport.storage import StorageReader

if TYPE_CHECKING:
    from collections.abc import Iterator

    from hotset.cluster.bench_transport_case import Case
    from hotset.cluster.bench_transport_stores import Visit
    from hotset.transport.slab import Slot

SOCKET_BUFFER_BYTES: Final = 4 << 20
FILE_OFFSET: Final = 1704  # as in safetensors files, where nothing is aligned
_REQUEST: Final = struct.Struct("<QQ")


def region_bytes(cases: tuple[Case, ...]) -> int:
    """Memory that one side needs for the largest of the cases."""
    return max(case.slots * case.nbytes for case in cases)


def _turns(case: Case) -> Iterator[list[int]]:
    """Offsets of the blocks of one read after the other, without end."""
    offsets = itertools.cycle(range(0, case.slots * case.nbytes, case.nbytes))
    while True:
        yield list(itertools.islice(offsets, case.batch))


class Copies:
    """memmove and torch's `copy_` between two regions of one process. One thread."""

    def __init__(self, *, nbytes: int, torch: bool) -> None:
        """Reserve both regions; torch is imported when it is asked for."""
        self._from = HostMemory(nbytes, name="bench-from")
        self._to = HostMemory(nbytes, name="bench-to")
        if torch:
            import torch as package

            package.set_num_threads(1)
        self._turns: Iterator[list[int]] = iter(())
        self._nbytes = 0

    def hello(self) -> str:
        """Say that the memory is there."""
        return "ready"

    def build(self, case: Case) -> None:
        """Take blocks of another size."""
        self._turns, self._nbytes = _turns(case), case.nbytes

    def run(self, lane: str, visit: Visit) -> list[int]:
        """Take one turn."""
        return timed(self._tensors if lane == "torch" else self._memmove, visit)

    def _memmove(self) -> int:
        offsets, nbytes, copy = next(self._turns), self._nbytes, ctypes.memmove
        source, target = self._from.address, self._to.address
        begin = time.perf_counter_ns()
        for offset in offsets:
            copy(target + offset, source + offset, nbytes)
        return time.perf_counter_ns() - begin

    def _tensors(self) -> int:
        pairs = [
            (self._to.torch_view(at, self._nbytes), self._from.torch_view(at, self._nbytes))
            for at in next(self._turns)
        ]
        begin = time.perf_counter_ns()
        for target, source in pairs:
            target.copy_(source)
        return time.perf_counter_ns() - begin

    def close(self) -> None:
        """Nothing to end; the process does."""


def _tune(link: socket.socket) -> None:
    link.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    link.settimeout(READ_S)


def _give_buffers(link: socket.socket) -> None:
    """Before connecting or listening, so that the window can grow to them."""
    for kind in (socket.SO_SNDBUF, socket.SO_RCVBUF):
        link.setsockopt(socket.SOL_SOCKET, kind, SOCKET_BUFFER_BYTES)


class SocketSource:
    """Answers (offset, length) with those bytes of its region, straight out of it."""

    def __init__(self, *, nbytes: int) -> None:
        """Listen on loopback for one reader."""
        self._memory = HostMemory(nbytes, name="bench-socket")
        self._door = socket.socket()
        _give_buffers(self._door)
        self._door.bind(("127.0.0.1", 0))
        self._door.listen(1)
        threading.Thread(target=self._serve, daemon=True, name="bench-socket").start()

    def hello(self) -> int:
        """Tell the port."""
        port: int = self._door.getsockname()[1]
        return port

    def _serve(self) -> None:
        link, _ = self._door.accept()
        _tune(link)
        link.settimeout(None)
        with link:
            while len(request := link.recv(_REQUEST.size, socket.MSG_WAITALL)) == _REQUEST.size:
                offset, nbytes = _REQUEST.unpack(request)
                link.sendall(self._memory.view(offset, nbytes))

    def close(self) -> None:
        """Stop listening."""
        self._door.close()


class SocketReader:
    """Receives into its region with `recv_into`. A batch is one request for adjacent bytes."""

    def __init__(self, *, nbytes: int, port: int) -> None:
        """Connect."""
        self._memory = HostMemory(nbytes, name="bench-socket")
        self._link = socket.socket()
        _give_buffers(self._link)
        _tune(self._link)
        self._link.connect(("127.0.0.1", port))
        self._turns: Iterator[list[int]] = iter(())
        self._total = self._room = 0

    def hello(self) -> str:
        """Say that it is connected."""
        return "ready"

    def build(self, case: Case) -> None:
        """Take blocks of another size."""
        self._turns, self._total = _turns(case), case.total
        self._room = case.slots * case.nbytes

    def run(self, _lane: str, visit: Visit) -> list[int]:
        """Take one turn."""
        return timed(self._receive, visit)

    def _receive(self) -> int:
        offset = min(next(self._turns)[0], self._room - self._total)  # a batch does not wrap
        view = self._memory.view(offset, self._total)
        begin = time.perf_counter_ns()
        self._link.sendall(_REQUEST.pack(offset, self._total))
        have = 0
        while have < self._total:
            count = self._link.recv_into(view[have:])
            if count == 0:
                raise TransportError("the socket was closed", remedy="run again")
            have += count
        return time.perf_counter_ns() - begin

    def close(self) -> None:
        """Hang up."""
        self._link.close()


class Storage:
    """Reads of one file: through an engine and its storage reader, and by one plain `preadv`."""

    def __init__(self, *, path: str, file_bytes: int, case: Case) -> None:
        """Open the file; both ways read into the same slab."""
        self._slab = make_slab("storage", case, slots=case.slots)
        self._engine = Engine(
            slab=self._slab,
            backend=None,
            ring=Ring(),
            name="storage",
            incarnation=1,
            storage=StorageReader(),
        )
        self._engine.start()
        self._path, self._file_bytes = path, file_bytes
        self._handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        self.build(case)

    def hello(self) -> str:
        """Say that the file is open."""
        return "ready"

    def build(self, case: Case) -> None:
        """Read this many blocks at once, side by side in the file."""
        last = self._file_bytes - case.total
        self._case = case
        self._starts = itertools.cycle(range(FILE_OFFSET, last + 1, case.total))

    def run(self, lane: str, visit: Visit) -> list[int]:
        """Take one turn of `storage/read-warm`, `preadv/read-cold` and so on."""
        backend, _, op = lane.partition("/")
        read = self._engine_read if backend == "storage" else self._preadv
        return timed(lambda: read(self._prepare(cold=op == "read-cold")), visit)

    def _prepare(self, *, cold: bool) -> int:
        """Choose where to read, and see to it that the page cache has all of it, or nothing."""
        start = next(self._starts)
        if cold:  # all of the file: a folio that the range covers in part would stay
            os.posix_fadvise(self._handle, 0, 0, os.POSIX_FADV_DONTNEED)
            return start
        slots = self._slots()
        self._fill(slots, start)
        self._free(slots)
        return start

    def _slots(self) -> list[Slot]:
        found = [self._slab.allocate(self._case.nbytes) for _ in range(self._case.batch)]
        slots = [slot for slot in found if slot is not None]
        assert len(slots) == self._case.batch  # noqa: S101 - the slab was made for this many
        return slots

    def _free(self, slots: list[Slot]) -> None:
        for slot in slots:
            self._slab.fail(slot)

    def _fill(self, slots: list[Slot], start: int) -> int:
        views: list[Any] = [self._slab.payload(slot) for slot in slots]
        done, total = 0, self._case.total
        begin = time.perf_counter_ns()
        while done < total:
            count = os.preadv(self._handle, views, start + done)
            if count == 0:
                raise TransportError(f"{self._path} is too short", remedy="delete it")
            done += count
            while views and count >= views[0].nbytes:
                count -= views.pop(0).nbytes
            if views:
                views[0] = views[0][count:]
        return time.perf_counter_ns() - begin

    def _preadv(self, start: int) -> int:
        slots = self._slots()
        elapsed = self._fill(slots, start)
        self._free(slots)
        return elapsed

    def _engine_read(self, start: int) -> int:
        nbytes = self._case.nbytes
        items = [
            FileItem(
                ranges=(FileRange(path=self._path, offset=start + index * nbytes, nbytes=nbytes),),
                dest=slot,
                expect=Expect(key=bytes(16), format_code=FORMAT, nbytes=nbytes),
            )
            for index, slot in enumerate(self._slots())
        ]
        deadline_ns = time.monotonic_ns() + READ_S * 10**9
        return time_engine(
            self._slab,
            lambda ready: self._engine.read_files(ready, deadline_ns=deadline_ns).wait(),
            items,
        )

    def close(self) -> None:
        """End the engine and close the file."""
        self._engine.close()
        os.close(self._handle)
