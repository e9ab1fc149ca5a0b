"""How two stores meet without a controller: ask for a description, or offer a copy.

A store's `Exchange` listens beside its engine. After the handshake a client may ask for the store's
signed description, or hand over an offer: opaque bytes for the layer above (`offers.py`), which
answers with opaque bytes. Frames are MessagePack. It moves no blocks and must not know backends.

**Writing is offering.** Nobody writes into another's memory: the owner of a copy offers it, the
destination pulls it into a slot of its own and says how that ended. So a deadline on the offering
side ends the wait and nothing else: what lands late lands in a slot that its owner took for it,
and is believed only if header and generation are those of the offer.

Invariants: every call ends by its deadline with a value or a typed error; a description is returned
only if it proves the cluster's token, is that of the store that answered, and is no older
incarnation than the one already known; requests are bounded in size, clients in number.
"""

from __future__ import annotations

import logging
import time
from typing import TYPE_CHECKING, Final

import msgspec

from hotset.errors import UNREADABLE, HotsetError, PeerGoneError, TransportError
from hotset.transport.base import PeerInfo, refuse_older
from hotset.transport.handshake import ANY, Identity, greet
from hotset.transport.listener import Listener
from hotset.transport.token import check, sign
from hotset.transport.wire import dial, receive_frame, send_frame

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable

PURPOSE: Final = "exchange"
MOST_BYTES: Final = 1 << 20
MOST_CLIENTS: Final = 64
IDLE_NS: Final = 30_000_000_000
_ANSWER_NS: Final = 5_000_000_000
_log = logging.getLogger(__name__)


class _Ask(msgspec.Struct, frozen=True, array_like=True, tag="ask"):
    """Ask for the store's description."""


class _Offer(msgspec.Struct, frozen=True, array_like=True, tag="offer"):
    message: bytes


class _Info(msgspec.Struct, frozen=True, array_like=True, tag="info"):
    info: PeerInfo


class _Answer(msgspec.Struct, frozen=True, array_like=True, tag="answer"):
    message: bytes


class _Trouble(msgspec.Struct, frozen=True, array_like=True, tag="trouble"):
    what: str
    remedy: str


_Request = _Ask | _Offer
_Reply = _Info | _Answer | _Trouble
# Made at import: msgspec crashes when two threads meet a type for the first time.
_REQUEST: Final = msgspec.msgpack.Decoder(_Request)
_REPLY: Final = msgspec.msgpack.Decoder(_Reply)


class Exchange:
    """A store's door for other stores. Thread-safe; handlers run on a thread for each client."""

    def __init__(
        self,
        engine_info: Callable[[], PeerInfo],
        *,
        token: bytes = b"",
        host: str = "127.0.0.1",
        port: int = 0,
        on_offer: Callable[[bytes], bytes] | None = None,
    ) -> None:
        """Listen at once; the engine must have started. Raises ConfigError, TransportError."""
        info = engine_info()
        self._engine_info = engine_info
        self._token = token
        self._on_offer = on_offer
        self._listener = Listener(
            host=host,
            port=port,
            token=token,
            identity=Identity(name=info.name, incarnation=info.incarnation),
            purpose=PURPOSE,
            serve=self._serve,
            most=MOST_CLIENTS,
        )

    @property
    def address(self) -> tuple[str, int]:
        """Host and port to reach this store at."""
        return self._listener.address

    def close(self) -> bool:
        """Hang up on all clients; True when no handler is left running after two seconds."""
        return self._listener.close()

    def _serve(self, sock: socket.socket) -> None:
        while True:
            frame = receive_frame(
                sock, most_bytes=MOST_BYTES, deadline_ns=time.monotonic_ns() + IDLE_NS
            )
            if not frame:
                return
            body = msgspec.msgpack.encode(self._answer(frame))
            send_frame(sock, body, deadline_ns=time.monotonic_ns() + _ANSWER_NS)

    def _answer(self, frame: bytes) -> _Reply:
        try:
            request = _REQUEST.decode(frame)
        except UNREADABLE as error:
            return _Trouble(f"a request makes no sense ({error})", "run one version of hotset")
        try:
            return self._reply(request)
        except HotsetError as error:
            return _Trouble(error.what, error.remedy)

    def _reply(self, request: _Request) -> _Reply:
        if isinstance(request, _Ask):
            return _Info(sign(self._engine_info(), self._token))
        if self._on_offer is None:
            return _Trouble("this store takes no offers", "offer the copy to another store")
        try:
            return _Answer(self._on_offer(request.message))
        except HotsetError:
            raise
        except Exception:  # noqa: BLE001 - the layer above; told to the client and logged
            _log.exception("the handler of an offer failed")
            return _Trouble("the handler of the offer failed", "see the log of that store")


def fetch_info(
    address: tuple[str, int],
    *,
    token: bytes = b"",
    timeout_ns: int = 5_000_000_000,
    known: PeerInfo | None = None,
) -> PeerInfo:
    """Ask the store at `address` for its description, proof included.

    `known` is the description that the caller has of the store it expects there, if any. Raises
    PeerGoneError when nobody listens or the answer is of an older incarnation than `known`,
    TransportError when a token does not fit, TransferTimeout.
    """
    reply, found = _call(address, _Ask(), token=token, timeout_ns=timeout_ns, wanted=ANY)
    if not isinstance(reply, _Info):
        raise _nonsense(address)
    info = reply.info
    check(info, token)
    if (info.name, info.incarnation) != (found.name, found.incarnation):
        raise _nonsense(address)
    if known is not None and known.name != info.name:
        raise PeerGoneError(
            f"{known.name}:{known.incarnation} is gone, its address is that of {info.name}",
            remedy="ask another store",
        )
    refuse_older(info, known)
    return info


def offer(
    address: tuple[str, int],
    message: bytes,
    *,
    token: bytes = b"",
    timeout_ns: int,
    wanted: Identity = ANY,
) -> bytes:
    """Hand an offer to the store at `address` and return its answer.

    `wanted` names the incarnation that may take it. Raises TransferTimeout when the answer has not
    come in time (the offer may still be taken), PeerGoneError, TransportError.
    """
    reply, _ = _call(address, _Offer(message), token=token, timeout_ns=timeout_ns, wanted=wanted)
    if not isinstance(reply, _Answer):
        raise _nonsense(address)
    return reply.message


def _call(
    address: tuple[str, int],
    request: _Request,
    *,
    token: bytes,
    timeout_ns: int,
    wanted: Identity,
) -> tuple[_Reply, Identity]:
    deadline_ns = time.monotonic_ns() + timeout_ns
    body = msgspec.msgpack.encode(request)
    if len(body) > MOST_BYTES:
        raise TransportError(
            f"an offer of {len(body)} bytes", remedy=f"send at most {MOST_BYTES} bytes"
        )
    sock = dial(address, deadline_ns=deadline_ns)
    with sock:
        found = greet(sock, purpose=PURPOSE, token=token, wanted=wanted, deadline_ns=deadline_ns)
        send_frame(sock, body, deadline_ns=deadline_ns)
        frame = receive_frame(sock, most_bytes=MOST_BYTES, deadline_ns=deadline_ns)
    if not frame:
        raise PeerGoneError(
            f"store {found.name!r} hung up instead of answering", remedy="try again or elsewhere"
        )
    try:
        reply = _REPLY.decode(frame)
    except UNREADABLE as error:
        raise _nonsense(address) from error
    if isinstance(reply, _Trouble):
        raise TransportError(f"store {found.name!r}: {reply.what}", remedy=reply.remedy)
    return reply, found


def _nonsense(address: tuple[str, int]) -> TransportError:
    return TransportError(
        f"the answer from {address[0]}:{address[1]} makes no sense",
        remedy="run one version of hotset in a cluster",
    )
