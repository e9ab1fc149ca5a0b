"""A listening socket that survives whatever connects to it.

Accepts connections, lets `handshake.welcome` judge each, and hands the good ones to `serve`, each
on a thread of its own, because serving blocks in the kernel without the GIL. It must not know what
is served.

Invariants: without a token it binds to loopback only; strangers hold at most MOST_WAITING
connections for at most the handshake's time; clients hold at most `most`; `close` ends all threads;
no error of one connection reaches another.
"""

from __future__ import annotations

import contextlib
import ipaddress
import logging
import socket
import threading
import time
from typing import TYPE_CHECKING, Final

from hotset.errors import ConfigError, TransportError
from hotset.transport.handshake import TIMEOUT_NS, Identity, welcome
from hotset.transport.wire import tune

if TYPE_CHECKING:
    from collections.abc import Callable

MOST_WAITING: Final = 64
_CLOSE_S: Final = 2.0
_RETRY_S: Final = 0.1
_log = logging.getLogger(__name__)


def check_host(host: str, *, token: bytes) -> None:
    """Raise ConfigError for an address that cannot be advertised or needs a token."""
    if host in {"", "0.0.0.0", "::"}:  # noqa: S104 - refused here
        raise ConfigError(
            f"{host!r} is not an address that peers can connect to",
            remedy="name the address of this host's network",
        )
    if token:
        return
    try:
        loopback = ipaddress.ip_address(host).is_loopback
    except ValueError:
        loopback = host == "localhost"
    if not loopback:
        raise ConfigError(
            f"a store would listen on {host} for anybody who asks",
            remedy="give every process of the cluster the same token, or listen on 127.0.0.1",
        )


class Listener:
    """Accepts connections until it is closed."""

    def __init__(  # noqa: PLR0913 - what a listener has, all by keyword
        self,
        *,
        host: str,
        port: int,
        token: bytes,
        identity: Identity,
        purpose: str,
        serve: Callable[[socket.socket], None],
        most: int = 256,
    ) -> None:
        """Bind, listen and start. `port` 0 takes a free one. Raises ConfigError."""
        check_host(host, token=token)
        self._token = token
        self._identity = identity
        self._purpose = purpose
        self._serve = serve
        self._most = most
        self._lock = threading.Lock()
        self._waiting: set[socket.socket] = set()
        self._serving: set[socket.socket] = set()
        self._threads: set[threading.Thread] = set()
        self._stop = threading.Event()
        self.refused = 0
        self._sock = _listen(host, port)
        self.address: tuple[str, int] = (host, self._sock.getsockname()[1])
        self._acceptor = threading.Thread(
            target=self._accept, name=f"hotset-{purpose}-accept", daemon=True
        )
        self._acceptor.start()

    @property
    def connections(self) -> int:
        """Connections in service."""
        return len(self._serving)

    def close(self) -> bool:
        """Hang up on everybody; True when all threads have ended within two seconds."""
        self._stop.set()
        _shut(self._sock)  # wakes accept, which close alone does not
        self._acceptor.join(_CLOSE_S)
        self._sock.close()
        with self._lock:
            for sock in self._waiting | self._serving:
                _shut(sock)
            threads = list(self._threads)
        end = time.monotonic() + _CLOSE_S
        for thread in threads:
            thread.join(max(0.0, end - time.monotonic()))
        return not any(thread.is_alive() for thread in threads)

    def _accept(self) -> None:
        while not self._stop.is_set():
            try:
                sock, _ = self._sock.accept()
            except OSError as error:
                if not self._stop.is_set():  # out of file descriptors, or the client left again
                    _log.warning("a connection could not be accepted (%s)", error)
                    self._stop.wait(_RETRY_S)
                continue
            with self._lock:
                full = len(self._waiting) >= MOST_WAITING or self._stop.is_set()
                if not full:
                    self._waiting.add(sock)
            if full or not self._start(sock):
                self.refused += 1
                sock.close()

    def _start(self, sock: socket.socket) -> bool:
        thread = threading.Thread(
            target=self._run, args=(sock,), name=f"hotset-{self._purpose}-serve", daemon=True
        )
        with self._lock:
            self._threads.add(thread)
        try:
            thread.start()
        except RuntimeError as error:  # no more threads
            _log.warning("a connection could not be served (%s)", error)
            with self._lock:
                self._threads.discard(thread)
                self._waiting.discard(sock)
            return False
        return True

    def _run(self, sock: socket.socket) -> None:
        try:
            if self._admit(sock):
                self._serve(sock)
        except (OSError, TransportError) as error:
            _log.debug("a connection ended (%s)", error)
        except Exception:  # noqa: BLE001 - a bug of ours costs this connection, not the listener
            _log.exception("serving a connection failed")
        finally:
            with self._lock:
                self._waiting.discard(sock)
                self._serving.discard(sock)
                self._threads.discard(threading.current_thread())
                sock.close()

    def _admit(self, sock: socket.socket) -> bool:
        try:
            tune(sock)
            welcome(
                sock,
                purpose=self._purpose,
                token=self._token,
                identity=self._identity,
                deadline_ns=time.monotonic_ns() + TIMEOUT_NS,
            )
        except (OSError, TransportError) as error:
            _log.debug("a stranger was refused (%s)", error)
            self.refused += 1
            return False
        with self._lock:
            self._waiting.discard(sock)
            if len(self._serving) >= self._most or self._stop.is_set():
                self.refused += 1
                return False
            self._serving.add(sock)
        sock.settimeout(None)
        return True


def _listen(host: str, port: int) -> socket.socket:
    sock: socket.socket | None = None
    try:
        family, kind, protocol, _, where = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[
            0
        ]
        sock = socket.socket(family, kind, protocol)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        tune(sock)  # before listen: the window is agreed in the first packets
        sock.bind(where)
        sock.listen(MOST_WAITING)
    except OSError as error:
        if sock is not None:
            sock.close()
        raise ConfigError(
            f"cannot listen on {host}:{port} ({error.strerror or error})",
            remedy="name an address of this host and a free port, or port 0",
        ) from error
    return sock


def _shut(sock: socket.socket) -> None:
    with contextlib.suppress(OSError):  # never connected, or gone
        sock.shutdown(socket.SHUT_RDWR)
