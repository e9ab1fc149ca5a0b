"""One face for the two Python bindings of UCX: `ucxx`, and `ucp` of ucx-py where that is installed.

Moves messages between endpoints: the first frames through UCX's ordered stream, all others and
blocks as tagged messages, which land where their receive was posted. It must not know stores,
tokens or slots.

The low level of both packages is used, not their asyncio layer: `ucxx` waits there by spinning, and
its context switches remote memory access on, which over TCP lets whoever connects read any address
of the process. Here a context has tags, streams and wake-up only.

Endpoints have UCX's peer error handling, which takes shared memory and CMA away: peers of one host
are met over TCP. Tagged messages that do not fit one packet go by rendezvous: UCX gives such a
receive back when its endpoint breaks or is closed, and nothing lands in it afterwards (one that was
sent eagerly, in pieces, would be waited for for ever).

Invariants: one thread makes and uses everything; an operation keeps its buffer alive until it is
done (UCX does not); nothing here blocks but `close` of an endpoint, for a bounded time.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import secrets
import sys
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any, Final, TypeAlias

from hotset.errors import DependencyError
from hotset.transport.nixl_agent import NIXL_MODULES, UCX_DEFAULTS

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

_APART: Final = "use NIXL and ucx in processes of their own"
REMEDY: Final = "pip install ucxx-cu12"
CONFIG: Final = {
    "RNDV_THRESH": "4k",  # UCX never ends a receive whose eager message broke off in the middle
    "TCP_CM_REUSEADDR": "y",  # a store that restarts gets its port back
    "TCP_PUT_ENABLE": "n",  # a put names an address; without it late bytes find no receive
}
"""Forced, because the ends of reads depend on it: whatever the environment says."""
_QUIET: Final = {"UCX_WARN_UNUSED_ENV_VARS": "n"}  # ucxx itself sets one that UCX does not know
TAGS: Final = 1 << 62
_CLOSE_NS: Final = 1_000_000_000


class Operation(ABC):
    """A send or receive under way."""

    @abstractmethod
    def done(self) -> bool:
        """Whether it has ended, either way; the buffer is free then."""

    @abstractmethod
    def error(self) -> str:
        """Why it failed, '' when it did not; after `done`."""


class Bindings(ABC):
    """A UCX context with one worker. Every call by the thread that made it."""

    name: str
    fd: int
    """Readable when there may be something to progress, once `arm` has returned True."""

    def __init__(self) -> None:
        """Start to count tags somewhere, so that nobody guesses them."""
        self._tag = secrets.randbelow(TAGS)

    def take_tags(self, count: int = 1) -> int:
        """Take `count` tags in a row for receives here; returns the first. None is taken twice."""
        if self._tag + count > TAGS:
            self._tag = 0
        first, self._tag = self._tag, self._tag + count
        return first

    @abstractmethod
    def progress(self) -> None:
        """Move on whatever can move; the GIL is released meanwhile."""

    @abstractmethod
    def arm(self) -> bool:
        """Get ready to sleep on `fd`; False when there is something to progress."""

    @abstractmethod
    def listen(self, port: int, met: Callable[[Any], None]) -> int:
        """Accept on `port` (0: any); `met` gets each new endpoint. Returns the port."""

    @abstractmethod
    def dial(self, host: str, port: int) -> Any:
        """Start to connect; the endpoint may be used at once. Raises Exception."""

    @abstractmethod
    def alive(self, endpoint: Any) -> bool:
        """False once UCX has found the other side gone."""

    @abstractmethod
    def close_endpoint(self, endpoint: Any) -> None:
        """Close by force; what is under way on it ends in an error.

        ucxx keeps a worker for ever after this when a stream receive was pending.
        """

    @abstractmethod
    def send_stream(self, endpoint: Any, data: bytes) -> Operation:
        """Send bytes on the endpoint's stream."""

    @abstractmethod
    def receive_stream(self, endpoint: Any, into: bytearray) -> Operation:
        """Fill `into` from the endpoint's stream."""

    @abstractmethod
    def send(self, endpoint: Any, buffer: Any, tag: int) -> Operation:
        """Send a buffer (host, or device through __cuda_array_interface__)."""

    @abstractmethod
    def receive(self, endpoint: Any, buffer: Any, tag: int) -> Operation:
        """Receive exactly a buffer's length; ends in an error when the endpoint closes."""

    @abstractmethod
    def close(self) -> None:
        """Stop listening and drop worker and context; all endpoints are closed."""


Opener: TypeAlias = "Callable[[Mapping[str, str]], Bindings]"
"""Makes a context with UCX's options, named without `UCX_`. Raises Exception."""


class _UcxxOperation(Operation):
    def __init__(self, request: Any, buffer: Any) -> None:
        self._request = request
        self._buffer = buffer

    def done(self) -> bool:
        return bool(self._request.completed)

    def error(self) -> str:
        try:
            self._request.check_error()
        except Exception as error:  # noqa: BLE001 - ucxx's errors share no root but Exception
            return str(error) or type(error).__name__
        return ""


class _Ucxx(Bindings):
    name = "ucxx"

    def __init__(self, config: Mapping[str, str]) -> None:
        super().__init__()
        ucx = importlib.import_module("ucxx._lib.libucxx")
        self._ucx = ucx
        self._array = importlib.import_module("ucxx._lib.arr").Array
        features = (ucx.Feature.TAG, ucx.Feature.STREAM, ucx.Feature.WAKEUP)
        self._context = ucx.UCXContext(dict(config), features)
        self._worker = ucx.UCXWorker(
            self._context, enable_delayed_submission=False, enable_python_future=False
        )
        self._worker.init_blocking_progress_mode()
        self.fd = int(self._worker.epoll_file_descriptor)
        self._listener: Any = None

    def progress(self) -> None:
        self._worker.progress()

    def arm(self) -> bool:
        return bool(self._worker.arm())

    def listen(self, port: int, met: Callable[[Any], None]) -> int:
        def accept(request: int) -> None:  # an endpoint made by ucxx keeps the listener for ever
            met(self._listener.create_endpoint_from_conn_request(request, True))

        self._listener = self._ucx.UCXListener.create(self._worker, port, accept)
        return int(self._listener.port)

    def dial(self, host: str, port: int) -> Any:
        return self._ucx.UCXEndpoint.create(self._worker, host, port, endpoint_error_handling=True)

    def alive(self, endpoint: Any) -> bool:
        return bool(endpoint.alive)

    def close_endpoint(self, endpoint: Any) -> None:
        endpoint.close_blocking(period=_CLOSE_NS, max_attempts=1)
        endpoint.remove_close_callback()

    def send_stream(self, endpoint: Any, data: bytes) -> Operation:
        array = self._array(data)
        return _UcxxOperation(endpoint.stream_send(array), array)

    def receive_stream(self, endpoint: Any, into: bytearray) -> Operation:
        array = self._array(into)
        return _UcxxOperation(endpoint.stream_recv(array), array)

    def send(self, endpoint: Any, buffer: Any, tag: int) -> Operation:
        array = self._array(buffer)
        return _UcxxOperation(endpoint.tag_send(array, self._ucx.UCXXTag(tag)), array)

    def receive(self, endpoint: Any, buffer: Any, tag: int) -> Operation:
        array = self._array(buffer)
        return _UcxxOperation(endpoint.tag_recv(array, self._ucx.UCXXTag(tag)), array)

    def close(self) -> None:
        self._listener = None
        self._worker.progress()
        self._worker = None
        self._context = None


class _UcpOperation(Operation):
    """ucx-py answers None when an operation ended at once, else it calls back."""

    def __init__(self, buffer: Any) -> None:
        self._buffer = buffer
        self._ended = False
        self._error = ""

    def start(self, post: Callable[..., Any], *args: Any, **more: Any) -> _UcpOperation:
        try:
            request = post(*args, cb_func=self._called, **more)
        except Exception as error:  # noqa: BLE001 - of the other binding it is the request's error
            self._called(None, error)
        else:
            self._ended = self._ended or request is None
        return self

    def _called(self, request: object, error: Exception | None) -> None:  # noqa: ARG002 - ucx-py's
        self._error = "" if error is None else str(error) or type(error).__name__
        self._ended = True

    def done(self) -> bool:
        return self._ended

    def error(self) -> str:
        return self._error


class _Ucp(Bindings):
    """By ucx-py's sources (0.30 to 0.45); it cannot be installed from PyPI any more."""

    name = "ucp"

    def __init__(self, config: Mapping[str, str]) -> None:
        super().__init__()
        ucx = importlib.import_module("ucp._libs.ucx_api")
        self._ucx = ucx
        self._array = importlib.import_module("ucp._libs.arr").Array
        features = (ucx.Feature.TAG, ucx.Feature.STREAM, ucx.Feature.WAKEUP)
        self._context = ucx.UCXContext(dict(config), features)
        self._worker = ucx.UCXWorker(self._context)
        self.fd = int(self._worker.init_blocking_progress_mode())
        self._listener: Any = None

    def progress(self) -> None:
        self._worker.progress()
        self._worker.cancel_inflight_messages()  # of endpoints that were found broken

    def arm(self) -> bool:
        return bool(self._worker.arm())

    def listen(self, port: int, met: Callable[[Any], None]) -> int:
        def accept(request: int) -> None:
            met(self._ucx.UCXEndpoint.create_from_conn_request(self._worker, request, True))

        self._listener = self._ucx.UCXListener(worker=self._worker, port=port, cb_func=accept)
        return int(self._listener.port)

    def dial(self, host: str, port: int) -> Any:
        return self._ucx.UCXEndpoint.create(self._worker, host, port, True)

    def alive(self, endpoint: Any) -> bool:
        return bool(endpoint.initialized and endpoint.is_alive())

    def close_endpoint(self, endpoint: Any) -> None:
        endpoint.close()

    def send_stream(self, endpoint: Any, data: bytes) -> Operation:
        array = self._array(data)
        return _UcpOperation(array).start(self._ucx.stream_send_nb, endpoint, array, array.nbytes)

    def receive_stream(self, endpoint: Any, into: bytearray) -> Operation:
        array = self._array(into)
        return _UcpOperation(array).start(self._ucx.stream_recv_nb, endpoint, array, array.nbytes)

    def send(self, endpoint: Any, buffer: Any, tag: int) -> Operation:
        array = self._array(buffer)
        return _UcpOperation(array).start(self._ucx.tag_send_nb, endpoint, array, array.nbytes, tag)

    def receive(self, endpoint: Any, buffer: Any, tag: int) -> Operation:
        array = self._array(buffer)
        return _UcpOperation(array).start(
            self._ucx.tag_recv_nb, self._worker, array, array.nbytes, tag, ep=endpoint
        )

    def close(self) -> None:
        self._listener.close()
        self._worker.close()
        os.close(self.fd)
        self._context.close()


_KINDS: Final[tuple[tuple[str, Opener], ...]] = (("ucxx", _Ucxx), ("ucp", _Ucp))


def _nixl_is_here() -> bool:
    return any(name in sys.modules for name in NIXL_MODULES)


def why_not() -> str:
    """Why no binding of UCX can be used in this process; '' when one can. Imports nothing.

    NIXL's wheel brings a UCX of its own. With both loaded, the death of a peer crashes the process.
    """
    if _nixl_is_here():
        return f"NIXL is loaded in this process: {_APART}"
    if not any(importlib.util.find_spec(package) for package, _ in _KINDS):
        return f"no binding of UCX is installed: {REMEDY}"
    return ""


def choose() -> Opener:
    """Import the first binding that is installed and say how to open it.

    UCX's defaults are set first, because it reads its environment when it is loaded. Raises
    DependencyError when none can be imported.
    """
    if _nixl_is_here():
        raise DependencyError("NIXL is loaded in this process", remedy=_APART)
    for name, value in (UCX_DEFAULTS | _QUIET).items():
        os.environ.setdefault(name, value)
    reasons = []
    for package, kind in _KINDS:
        try:
            importlib.import_module(package)
        except ImportError as error:
            reasons.append(f"{package}: {error}")
        else:
            return kind
    raise DependencyError(f"no binding of UCX ({'; '.join(reasons)})", remedy=REMEDY)
