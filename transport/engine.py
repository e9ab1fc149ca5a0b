"""The engine of a store: takes reads from any thread, ends each one exactly once.

Moves blocks into one slab, from peers through a backend and from files through a reader. One owner
thread per engine calls the backend and decides what ends (`mover.py`); a second one hashes what has
landed of large batches while the owner moves the rest, or reads some of it itself. Callers submit
through a queue and wait on tickets; one that would only wait may take the owner's turn meanwhile
(`read_now`), which saves two changes of thread. It must not know what keys mean: `describe` turns
one into the two numbers of a transfer's row.

Invariants: a ticket ends once, at the latest at its deadline plus one turn of the owner; an item
that is DONE is READY and pinned once on behalf of the caller; nothing in flight is released or
destroyed, not even by `close`.
"""

from __future__ import annotations

import contextlib
import logging
import secrets
import threading
import time
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from dataclasses import replace
from functools import partial
from queue import Empty
from typing import TYPE_CHECKING, Any, Final, TypeVar

from hotset.errors import (
    ConfigError,
    InvalidTransition,
    QuarantineFull,
    TransferTimeout,
    TransportError,
)
from hotset.transport.base import FileItem, Outcome, PeerInfo, Priority, ReadItem
from hotset.transport.express import Begun, Request
from hotset.transport.inbox import Inbox
from hotset.transport.job import Job
from hotset.transport.links import STORAGE
from hotset.transport.mover import Mover
from hotset.transport.pacepage import PacePage
from hotset.transport.slab import SlotState
from hotset.transport.ticket import Ticket
from hotset.transport.token import check, sign

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from hotset.transport.arrivals import Check
    from hotset.transport.base import Backend, LinkProfile
    from hotset.transport.hands import Haul
    from hotset.transport.pacing import Pacer
    from hotset.transport.records import Ring
    from hotset.transport.slab import Slab
    from hotset.transport.storage import StorageReader

CALL_TIMEOUT_S: Final = 30.0

_T = TypeVar("_T")
_log = logging.getLogger(__name__)
_still_in_flight: list[object] = []
"""What could not be closed: kept alive so that collection destroys nothing in flight."""


class Engine:
    """Reads blocks into one store's slab."""

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
        link: LinkProfile | None = None,
        token: bytes = b"",
    ) -> None:
        """Keep the parts; nothing runs before `start`.

        `link` is the profile that peers read this store by; when it is emulated, they share it.
        `pacer` emulates this store's own end of every read. `storage` is closed with the engine.
        With a `token`, `info` is signed and only peers that know it are connected.
        """
        self.name = name
        self.incarnation = incarnation
        self._slab = slab
        self._backend = backend
        self._storage = storage
        self._link = link
        self._token = token
        self._page: PacePage | None = None
        self._max_quarantined = max_quarantined
        self._inbox: Inbox[Callable[[], Any]] = Inbox()
        self._to_verify: Inbox[Check | Haul | None] = Inbox()
        self._mover = Mover(
            slab=slab,
            backend=backend,
            ring=ring,
            storage=storage,
            pacer=pacer,
            time_scale=time_scale,
            describe=describe,
            verifier=self._to_verify,
            files_ended=lambda post: self._inbox.put(partial(self._mover.files_ended, post)),
        )
        self._owner = threading.Thread(target=self._run, name=f"hotset-{name}", daemon=True)
        self._verifier = threading.Thread(
            target=self._run_verifier, name=f"hotset-{name}-verify", daemon=True
        )
        self._info: PeerInfo | None = None
        self._door = threading.Lock()
        self._next_id = 1 + secrets.randbits(63)
        self._closed = ""
        self._stop = False
        self._turn_lock = threading.Lock()
        self._driver = 0  # ident of the thread that has taken the owner's turn
        self._fault: Exception | None = None  # what broke there

    # --- life -------------------------------------------------------------------------------------

    def start(self) -> None:
        """Start the threads and register the slab. Raises TransportError, DependencyError."""
        self._owner.start()
        self._verifier.start()
        self._info = sign(self._call(self._register), self._token)

    def info(self) -> PeerInfo:
        """Return what peers need to read this store; known after `start`."""
        if self._info is None:
            raise TransportError(f"engine {self.name!r} has not started", remedy="call start first")
        return self._info

    def connect(self, peer: PeerInfo) -> None:
        """Make a peer readable; runs on the owner thread. Raises TransportError.

        A peer that does not prove the cluster's token is refused.
        """
        check(peer, self._token)
        self._call(partial(self._mover.connect, peer))

    def disconnect(self, name: str) -> None:
        """Forget a peer; runs on the owner thread."""
        self._call(partial(self._mover.disconnect, name))

    def close(self, *, timeout_ns: int = 5_000_000_000) -> bool:
        """Cancel what runs and wait until nothing is in flight; True when all has ended.

        On False backend and slab are kept alive for good: leave by `os._exit`.
        """
        if self._stop:
            return self._closed == "closed"
        if self._owner.ident is None:  # never started
            return True
        with self._door:
            self._closed = self._closed or "closing"
        broken = self._closed != "closing" or not self._owner.is_alive()
        clean = not broken and self._call(self._wind_down, timeout_ns=timeout_ns)
        self._stop = True
        self._inbox.put(int)  # wakes the owner
        self._to_verify.put(None)
        if not clean:
            _still_in_flight.append((self._slab, self._backend, self._storage, self._mover))
            return False
        self._owner.join()
        self._verifier.join()
        if self._storage is not None:
            self._storage.close()
        if self._page is not None:
            self._page.close()
        self._closed = "closed"
        return True

    # --- reads ------------------------------------------------------------------------------------

    def read(  # noqa: PLR0913 - what a transfer record needs
        self,
        peer: str,
        items: Sequence[ReadItem],
        *,
        deadline_ns: int,
        trace: tuple[int, int] = (0, 0),
        parent: int = 0,
        reason: str = "",
        priority: Priority = Priority.IMMINENT,
    ) -> Ticket:
        """Read slots of `peer` into FILLING slots here, many in one backend transfer.

        `deadline_ns` is `time.monotonic_ns()` time. Each item that is DONE is READY and arrives
        pinned once on behalf of the caller, who unpins it; the slots of all others are taken back
        by the engine. Raises QuarantineFull, ConfigError, InvalidTransition, TransportError; then
        nothing was taken and the slots are still the caller's.
        """
        request = Request.now(deadline_ns, trace, parent, reason, priority)
        return self._submit(peer, items, request)

    def read_now(  # noqa: PLR0913 - as `read`
        self,
        peer: str,
        items: Sequence[ReadItem],
        *,
        deadline_ns: int,
        trace: tuple[int, int] = (0, 0),
        parent: int = 0,
        reason: str = "",
        priority: Priority = Priority.IMMINENT,
    ) -> Outcome:
        """Read as `read` does and wait for the end; the quickest way to one small block."""
        request = Request.now(deadline_ns, trace, parent, reason, priority)
        if not self._turn_lock.acquire(blocking=False):
            return self._submit(peer, items, request).wait()
        self._driver = threading.get_ident()
        try:
            begun = self._read_alone(peer, items, request)
            if isinstance(begun, Outcome):
                return begun
            ticket = begun or self._submit(peer, items, request, ring=False)
            self._drive(ticket)
        finally:
            self._driver = 0
            self._turn_lock.release()
        if not (self._mover.idle and self._inbox.empty()) or self._fault is not None:
            self._inbox.ring()
        return ticket.wait()

    def read_files(  # noqa: PLR0913 - as `read`
        self,
        items: Sequence[FileItem],
        *,
        deadline_ns: int,
        trace: tuple[int, int] = (0, 0),
        parent: int = 0,
        reason: str = "",
        priority: Priority = Priority.IMMINENT,
    ) -> Ticket:
        """Read ranges of files into FILLING slots here; ends, pins and errors are as in `read`."""
        for item in items:
            size = sum(part.nbytes for part in item.ranges)
            if size != item.expect.nbytes:
                raise ConfigError(
                    f"ranges of {size} bytes for a block of {item.expect.nbytes}",
                    remedy="build the ranges from the catalog of blocks",
                )
        request = Request.now(deadline_ns, trace, parent, reason, priority)
        return self._submit(STORAGE, items, request)

    @property
    def fault(self) -> str:
        """'' while peers can read this store, else why only a new process can mend that.

        Its own reads go on. Close it soon; `close` then returns False.
        """
        return "" if self._backend is None else self._backend.fault

    @property
    def in_flight(self) -> int:
        """Tickets that have not ended."""
        return len(self._mover.jobs)

    @property
    def quarantined(self) -> int:
        """Abandoned posts that the backend has not finished."""
        return len(self._mover.quarantine)

    @property
    def quarantined_bytes(self) -> int:
        """Payload bytes of the slots that abandoned posts hold."""
        posts = list(self._mover.quarantine.values())
        return sum(post.nbytes for post in posts)

    def _submit(
        self,
        peer: str,
        items: Sequence[ReadItem] | Sequence[FileItem],
        request: Request,
        *,
        ring: bool = True,
    ) -> Ticket:
        self._check(items)
        with self._door:  # a read is either before `close` in the queue, or refused
            job = self._job(peer, items, request, self._take_ids(len(items)))
            for item in items:
                if isinstance(item, ReadItem) and item.stream:  # before anybody is told of it
                    self._slab.show_progress(item.dest, item.expect, arrived=0)
            put = self._inbox.put if ring else self._inbox.put_quietly
            put(partial(self._mover.add, job))
        return job.ticket

    def _take_ids(self, count: int) -> int:
        """The first of `count` ids, one a row. With the door held; raises where it is closed."""
        self._check_open()
        first = self._next_id
        self._next_id += max(1, count)
        return first

    def _job(
        self,
        peer: str,
        items: Sequence[ReadItem] | Sequence[FileItem],
        request: Request,
        transfer_id: int,
    ) -> Job:
        return Job(
            ticket=Ticket(transfer_id=transfer_id, cancel=self._cancel),
            peer=peer,
            items=tuple(items),
            deadline_ns=request.deadline_ns,
            submitted_ns=request.submitted_ns,
            wall_ns=request.wall_ns,
            priority=request.priority,
            trace=request.trace,
            parent=request.parent,
            reason=request.reason,
        )

    def _read_alone(
        self, peer: str, items: Sequence[ReadItem], request: Request
    ) -> Outcome | Ticket | None:
        """Read a lone item at once, or as far as it comes; None where it must queue.

        With the turn's lock held.
        """
        if len(items) != 1 or self._fault is not None or not self._inbox.empty():
            return None
        self._check(items)
        with self._door:  # who closes now waits for this turn
            first = self._take_ids(1)
        try:
            begun = self._mover.read_alone(peer, items[0], request, first)
            if isinstance(begun, Begun):
                job = self._job(peer, items, request, first)
                self._mover.go_on(job, begun)
                return job.ticket
        except Exception as error:  # noqa: BLE001 - as in `_run`, which raises it
            self._fault = error
            return None
        return begun

    def _check_open(self) -> None:
        if self._closed or self._info is None:
            raise TransportError(
                f"engine {self.name!r} is {self._closed or 'not started'}",
                remedy="read through a running store",
            )

    def _check(self, items: Sequence[ReadItem] | Sequence[FileItem]) -> None:
        if len(self._mover.quarantine) >= self._max_quarantined:
            raise QuarantineFull(
                f"store {self.name!r} has {self.quarantined} abandoned transfers",
                remedy="restart the store as a new incarnation",
            )
        for item in items:
            if item.expect.nbytes > item.dest.nbytes:
                raise ConfigError(
                    f"a block of {item.expect.nbytes} bytes for a slot of {item.dest.nbytes}",
                    remedy="allocate the slot with the block's size",
                )
            if self._slab.state(item.dest) is not SlotState.FILLING:
                raise InvalidTransition(
                    f"store {self.name!r}: the slot at {item.dest.offset} is not FILLING",
                    remedy="allocate a slot for each read",
                )
            if isinstance(item, ReadItem) and item.follow and item.expect.checksum is None:
                raise ConfigError(
                    "a slot that is still filling has no checksum in its header",
                    remedy="say in `expect.checksum` what the bytes must sum up to",
                )

    def _cancel(self, ticket: Ticket) -> None:
        self._inbox.put(partial(self._mover.cancel, ticket))

    # --- the owner thread -------------------------------------------------------------------------

    def _register(self) -> PeerInfo:
        if self._link is not None and self._link.emulated:
            self._page = PacePage.create()
        pace = b"" if self._page is None else self._page.description
        if self._backend is None:
            return PeerInfo(
                name=self.name,
                incarnation=self.incarnation,
                backend="none",
                backend_metadata=b"",
                base_address=self._slab.base_address,
                nbytes=self._slab.nbytes,
                device=self._slab.device,
                link=self._link,
                pace=pace,
            )
        self._backend.notify = partial(self._inbox.put, int)  # calling int does nothing
        self._backend.register(self._slab)
        info = self._backend.info(name=self.name, incarnation=self.incarnation)
        return replace(info, link=self._link, pace=pace)

    def _call(self, action: Callable[..., _T], **kwargs: Any) -> _T:
        """Run `action` on the owner thread and return its result or raise its error.

        Raises TransferTimeout when the owner does not come to it.
        """
        if threading.get_ident() in {self._owner.ident, self._driver}:
            return action(**kwargs)
        if self._stop or not self._owner.is_alive():
            raise TransportError(
                f"engine {self.name!r} is not running", remedy="use it between start and close"
            )
        future: Future[_T] = Future()

        def carry_out() -> None:
            try:
                future.set_result(action(**kwargs))
            except Exception as error:  # noqa: BLE001 - raised again in the caller's thread
                future.set_exception(error)

        self._inbox.put(carry_out)
        limit = CALL_TIMEOUT_S + kwargs.get("timeout_ns", 0) / 1e9
        try:
            return future.result(timeout=limit)
        except FutureTimeoutError as error:
            raise TransferTimeout(
                f"the owner thread of {self.name!r} is busy for {limit:.0f} s",
                remedy="restart the store as a new incarnation",
            ) from error

    def _run(self) -> None:
        try:
            while not self._stop:
                with self._turn_lock:
                    wait_ns = self._turn()
                if wait_ns != 0:
                    self._inbox.wait(wait_ns)
        except Exception as error:  # noqa: BLE001 - a bug of ours; told, and everybody is woken
            _log.critical("the owner thread of store %s broke", self.name, exc_info=True)
            with self._door:
                self._closed = f"broken ({error!r})"
            self._end_as_broken()

    def _drive(self, ticket: Ticket) -> None:
        """Take the owner's turns until a ticket has ended or there is nothing to do at once.

        With the turn's lock held.
        """
        try:
            self._take_messages()
            while not ticket.done and self._turn() == 0:
                pass
        except Exception as error:  # noqa: BLE001 - as in `_run`, which raises it
            self._fault = error

    def _end_as_broken(self) -> None:
        """After a bug: end every ticket as FAILED, so that nobody waits for ever."""
        while True:
            self._mover.fail_all(f"the owner thread of {self.name!r} {self._closed}")
            if self._stop:
                return
            message = self._inbox.get()
            with contextlib.suppress(Exception):  # the first one has been told
                message()

    def _turn(self) -> int | None:
        """Do what was asked and what is due; returns as `Mover.step`. With the turn's lock held."""
        self._take_messages()
        return self._mover.step()

    def _take_messages(self) -> None:
        if self._fault is not None:
            raise self._fault
        inbox = self._inbox
        while not inbox.empty():
            inbox.get_nowait()()

    def _wind_down(self, *, timeout_ns: int) -> bool:
        deadline = time.monotonic_ns() + timeout_ns
        self._mover.give_up_all()
        while self._mover.quarantine and time.monotonic_ns() < deadline:
            wait_ns = self._mover.step()
            left_ns = min(1_000_000 if wait_ns is None else wait_ns, 1_000_000)
            with contextlib.suppress(Empty):
                self._inbox.get(left_ns)()
        if self._mover.quarantine:
            return False
        if self._backend is not None:
            self._backend.close()
        return not self.fault

    def _run_verifier(self) -> None:
        while (work := self._to_verify.get()) is not None:
            check = self._mover.carry_out(work)
            if check is not None:
                self._inbox.put(partial(self._mover.checked, check))
