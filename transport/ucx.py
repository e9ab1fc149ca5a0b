"""Moves spans between processes with UCX's two-sided messages, behind the one-sided contract.

Each store runs one thread that owns UCX, answers range requests of its readers (`ucx_serve.py`) and
carries out its own reads (`ucx_read.py`); it sleeps on UCX's file descriptor. The engine's owner
only leaves orders for it and looks at results, so no call here waits for the network. It must not
know which binding of UCX is installed (`ucx_bindings.py`) nor what is said (`ucx_link.py`).

UCX listens on all interfaces, whatever `host` is advertised; a store that advertises a loopback
address without naming devices in UCX_NET_DEVICES uses the loopback device alone. Like every
authentication by a token, this does not encrypt: use a private network or a tunnel.

Invariants: one thread calls UCX; a source serves its registered slab and nothing else; a read in
flight is never recalled unless its connection is closed with it.
"""

from __future__ import annotations

import ipaddress
import logging
import os
import select
import threading
from collections import deque
from functools import partial
from typing import TYPE_CHECKING, Any, Final

import msgspec

from hotset.errors import HotsetError, PeerGoneError, TransportError
from hotset.transport.base import (
    Backend,
    PeerInfo,
    PostState,
    Span,
    describe_store,
    other_backend,
    outside,
    refuse_older,
    refuse_outside,
    registered_twice,
    require_own,
    unpack_metadata,
)
from hotset.transport.listener import check_host
from hotset.transport.nixl_lane import merge
from hotset.transport.ucx_bindings import CONFIG, choose, why_not
from hotset.transport.ucx_read import Read, Reads
from hotset.transport.ucx_serve import Server

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from hotset.transport.slab import Slab
    from hotset.transport.ucx_bindings import Bindings, Opener

START_S: Final = 15.0
CLOSE_S: Final = 10.0
IDLE_MS: Final = 1000  # UCX may miss an event; its keepalive needs to be called now and then
BUSY_MS: Final = 20
_log = logging.getLogger(__name__)
_still_running: list[object] = []
"""Threads that did not end in time: what they use stays alive."""


class _Door(msgspec.Struct, frozen=True, array_like=True, tag="ucx 1"):
    """Where a store takes readers in."""

    host: str
    port: int


# Made at import: msgspec crashes when two threads meet a type for the first time.
_DOOR: Final = msgspec.msgpack.Decoder(_Door)


class UcxBackend(Backend):
    """One UCX worker for one slab. Called by one thread at a time."""

    name = "ucx"

    def __init__(self, *, host: str = "127.0.0.1", port: int = 0, token: bytes = b"") -> None:
        """Load nothing yet. `host` is what peers dial; `port` 0 is any.

        Raises ConfigError for a host that cannot be dialled, or is not loopback without a token.
        """
        check_host(host, token=token)
        self._host = host
        self._port = port
        self._token = token
        self._slab: Slab | None = None
        self._thread: _Thread | None = None
        self._peers: dict[str, PeerInfo] = {}
        self._reads: dict[int, Read] = {}
        self._next = 1

    @staticmethod
    def available() -> str:
        """'' when a binding of UCX can be used here, else the reason with its remedy."""
        return why_not()

    def register(self, slab: Slab) -> None:
        """Start UCX and listen. Raises DependencyError, TransportError."""
        if self._slab is not None:
            raise registered_twice()
        opener = choose()
        thread = _Thread(
            slab, opener, config=_config(self._host), token=self._token, port=self._port
        )
        self._port = thread.begin()
        self._thread, self._slab = thread, slab

    def info(self, *, name: str, incarnation: int) -> PeerInfo:
        """Describe this side to peers. Raises TransportError before `register`."""
        slab = require_own(self._slab, name=name, incarnation=incarnation)
        return describe_store(
            slab, backend=self.name, metadata=msgspec.msgpack.encode(_Door(self._host, self._port))
        )

    def connect(self, peer: PeerInfo) -> None:
        """Start to connect; whether that works out is told by the first read."""
        known = self._peers.get(peer.name)
        if known == peer:
            return
        if peer.backend != self.name:
            raise other_backend(peer, self.name)
        refuse_older(peer, known)
        door = unpack_metadata(_DOOR, peer)
        self._order(lambda thread: thread.reads.connect(peer, door.host, door.port))
        self._peers[peer.name] = peer

    def disconnect(self, name: str) -> None:
        """Forget a peer; reads in flight from it go on."""
        if self._peers.pop(name, None) is not None:
            self._order(lambda thread: thread.reads.disconnect(name))

    def post(self, peer: str, spans: Sequence[Span], *, lane: int = 0) -> int:  # noqa: ARG002 - one lane
        """Leave an order for one read."""
        info, slab = self._peers.get(peer), self._slab
        if info is None or slab is None:
            raise PeerGoneError(f"store {peer!r} is not connected", remedy="connect it first")
        refuse_outside(spans, peer=peer, local=slab.nbytes, remote=info.nbytes)
        if not spans or any(span.nbytes < 1 for span in spans):  # UCX has no empty message
            raise outside(peer, local=slab.nbytes, remote=info.nbytes)
        read = Read(peer, merge(spans))
        self._order(lambda thread: thread.reads.start(read))
        handle, self._next = self._next, self._next + 1
        self._reads[handle] = read
        return handle

    def poll(self, handle: int) -> tuple[PostState, str]:
        """State of a posted read."""
        read = self._reads[handle]
        return read.state, read.error if read.state is PostState.ERROR else ""

    def release(self, handle: int) -> None:
        """Free a finished handle."""
        read = self._reads.pop(handle)
        assert read.state is not PostState.PENDING, "released in flight"  # noqa: S101 - our own bug

    def abort(self, handle: int) -> None:
        """Close the read's connection as soon as nobody waits for any read on it."""
        read = self._reads[handle]
        if read.state is PostState.PENDING:
            self._order(lambda thread: thread.reads.abandon(read))

    def close(self) -> None:
        """Hang up and end the thread; reads by peers end in errors there."""
        thread, self._thread = self._thread, None
        if thread is not None and not thread.end():
            _log.warning("the UCX thread of a store did not end within %.0f s", CLOSE_S)
            _still_running.append((thread, self._slab))

    def _order(self, order: Callable[[_Thread], None]) -> None:
        if self._thread is None or self._thread.broken:
            raise TransportError(
                f"UCX is not running ({self._thread.broken if self._thread else 'closed'})",
                remedy="restart the store as a new incarnation",
            )
        self._thread.order(order)


def _config(host: str) -> dict[str, str]:
    """UCX's options for this store: over loopback alone when that is all it advertises."""
    config = dict(CONFIG)
    try:
        is_loopback = ipaddress.ip_address(host).is_loopback
    except ValueError:
        is_loopback = host == "localhost"
    if is_loopback and "UCX_NET_DEVICES" not in os.environ:
        config["NET_DEVICES"] = "lo"
    return config


class _Thread:
    """The thread that owns UCX: sleeps, progresses, serves and reads."""

    def __init__(
        self,
        slab: Slab,
        opener: Opener,
        *,
        config: Mapping[str, str],
        token: bytes,
        port: int,
    ) -> None:
        self.broken = ""
        self.reads: Reads
        self._slab = slab
        self._open_bindings = partial(opener, config)
        self._token = token
        self._port = port
        self._error: Exception | None = None
        self._orders: deque[Callable[[_Thread], None]] = deque()
        self._bell = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._began = threading.Event()
        self._stop = False
        self._thread = threading.Thread(target=self._run, name=f"ucx-{slab.name}", daemon=True)

    def begin(self) -> int:
        """Start; returns the port. Raises TransportError."""
        self._thread.start()
        if not self._began.wait(START_S):
            _still_running.append((self, self._slab))
            raise TransportError(
                f"UCX does not start within {START_S:.0f} s",
                remedy="check UCX_TLS and UCX_NET_DEVICES, or use another backend",
            )
        if self._error is not None:
            raise TransportError(
                f"store {self._slab.name!r} cannot use UCX ({self._error})",
                remedy="check UCX_TLS, UCX_NET_DEVICES and the port, or use another backend",
            ) from self._error
        return self._port

    def order(self, order: Callable[[_Thread], None]) -> None:
        """Let the thread carry something out soon."""
        self._orders.append(order)
        os.eventfd_write(self._bell, 1)

    def end(self) -> bool:
        """Stop; whether the thread has ended."""
        self._stop = True
        os.eventfd_write(self._bell, 1)
        self._thread.join(CLOSE_S)
        if self._thread.is_alive():
            return False
        os.close(self._bell)
        return True

    def _run(self) -> None:
        try:
            bindings, server = self._open()
        except Exception as error:  # noqa: BLE001 - told by `begin` as a TransportError
            self._error = error
            self._began.set()
            return
        self._began.set()
        try:
            self._loop(bindings, server)
            self.reads.close()
            server.close()
        except Exception as error:  # noqa: BLE001 - told to every caller as a TransportError
            self.broken = repr(error)
            _log.critical("the UCX thread of store %s broke", self._slab.name, exc_info=True)
            _still_running.append((self, self._slab, bindings, server))
            return
        bindings.close()

    def _open(self) -> tuple[Bindings, Server]:
        slab = self._slab
        if slab.device != "cpu":
            import torch

            torch.cuda.set_device(slab.device)
        bindings = self._open_bindings()
        view: Callable[[int, int], Any] = slab.memory.view
        if slab.device != "cpu":
            view = slab.memory.torch_view  # carries __cuda_array_interface__
        server = Server(
            bindings,
            name=slab.name,
            incarnation=slab.incarnation,
            token=self._token,
            nbytes=slab.nbytes,
            view=view,
        )
        self.reads = Reads(bindings, token=self._token, view=view)
        self._port = server.listen(self._port)
        return bindings, server

    def _loop(self, bindings: Bindings, server: Server) -> None:
        poller = select.poll()
        poller.register(bindings.fd, select.POLLIN)
        poller.register(self._bell, select.POLLIN)
        while not self._stop:
            bindings.progress()
            acted = self._obey()
            acted |= server.step()
            acted |= self.reads.step()
            if acted or self._orders or not bindings.arm():
                continue
            busy = server.has_strangers or self.reads.is_busy
            poller.poll(BUSY_MS if busy else IDLE_MS)

    def _obey(self) -> bool:
        if not self._orders:
            return False
        try:
            os.eventfd_read(self._bell)
        except BlockingIOError:
            return True  # the order came before its bell
        while self._orders:
            try:
                self._orders.popleft()(self)
            except HotsetError as error:
                _log.warning("store %s: %s", self._slab.name, error)
        return True
