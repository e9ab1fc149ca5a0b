"""The first four frames of every connection: each side shows the other that it knows the token.

    client                                    listener
    HELLO  version, purpose, wanted store,
           nonce                       ->
                                       <-     CHALLENGE  store, nonce, proof, refusal
    ANSWER proof                       ->
                                       <-     VERDICT  refusal ("" is a welcome)

Decides whether a connection is one of this cluster and leads to the incarnation that was meant; it
must not know what the connection is for. A proof is an HMAC over both first messages and the role,
so it cannot be replayed, reflected, or moved to a connection with another purpose or store. A side
without a token shows none and asks for none. This authenticates the ends; it encrypts nothing and
does not protect from somebody who can alter packets on the way: use a private network or a tunnel.

Invariants: what a stranger sends is bounded in size and time and never raises anything but typed
errors; secrets are compared in constant time; a store that came back under another incarnation is
a PeerGoneError, never mistaken for its former self.
"""

from __future__ import annotations

import hmac
import secrets
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, TypeVar

import msgspec

from hotset.errors import UNREADABLE, PeerGoneError, TransportError
from hotset.transport.token import mac
from hotset.transport.wire import receive_frame, send_frame

if TYPE_CHECKING:
    import socket

VERSION: Final = 1
TIMEOUT_NS: Final = 3_000_000_000
MOST_BYTES: Final = 2048
MOST_NAME: Final = 512
_NONCE_BYTES: Final = 32
_OTHER: Final = "another store"
_TOKEN: Final = "the token"  # noqa: S105 - a reason, not a secret
_SPEECH: Final = "another version or purpose"

_T = TypeVar("_T", bound="msgspec.Struct")


@dataclass(frozen=True, slots=True, kw_only=True)
class Identity:
    """One life of one store; `incarnation` 0 and name '' mean any, on the client's side."""

    name: str = ""
    incarnation: int = 0


ANY: Final = Identity()


class _Hello(msgspec.Struct, frozen=True, array_like=True, tag="hotset-hello"):
    version: int
    purpose: str
    name: str
    incarnation: int
    nonce: bytes


class _Challenge(msgspec.Struct, frozen=True, array_like=True, tag="hotset-challenge"):
    name: str
    incarnation: int
    nonce: bytes
    proof: bytes
    refusal: str


class _Answer(msgspec.Struct, frozen=True, array_like=True, tag="hotset-answer"):
    proof: bytes


class _Verdict(msgspec.Struct, frozen=True, array_like=True, tag="hotset-verdict"):
    refusal: str


# Made at import: msgspec crashes when two threads meet a type for the first time.
for _kind in (_Hello, _Challenge, _Answer, _Verdict):
    msgspec.msgpack.Decoder(_kind)


def greet(
    sock: socket.socket, *, purpose: str, token: bytes, wanted: Identity, deadline_ns: int
) -> Identity:
    """Introduce the client; returns who listens.

    Raises PeerGoneError when that is not `wanted`, TransportError when a token or the version does
    not fit, TransferTimeout.
    """
    hello = msgspec.msgpack.encode(
        _Hello(VERSION, purpose, wanted.name, wanted.incarnation, secrets.token_bytes(_NONCE_BYTES))
    )
    send_frame(sock, hello, deadline_ns=deadline_ns)
    frame = _receive(sock, deadline_ns)
    challenge = _decode(frame, _Challenge)
    found = Identity(name=challenge.name, incarnation=challenge.incarnation)
    bare = msgspec.structs.replace(challenge, proof=b"")
    seen = msgspec.msgpack.encode(bare)
    if token and not hmac.compare_digest(challenge.proof, mac(token, b"listener", hello, seen)):
        raise _distrust(f"store {found.name!r} does not prove that it knows the cluster's token")
    if challenge.refusal:
        raise _refused(challenge.refusal, wanted, found)
    if wanted not in {ANY, found}:
        raise _refused(_OTHER, wanted, found)
    answer = _Answer(mac(token, b"client", hello, seen) if token else b"")
    send_frame(sock, msgspec.msgpack.encode(answer), deadline_ns=deadline_ns)
    verdict = _decode(_receive(sock, deadline_ns), _Verdict)
    if verdict.refusal:
        raise _refused(verdict.refusal, wanted, found)
    return found


def welcome(
    sock: socket.socket, *, purpose: str, token: bytes, identity: Identity, deadline_ns: int
) -> None:
    """Take a client in. Raises TransportError when it is not of this cluster; then hang up."""
    hello = _receive(sock, deadline_ns)
    asked = _decode(hello, _Hello)
    refusal = ""
    if (asked.version, asked.purpose) != (VERSION, purpose):
        refusal = _SPEECH
    elif (asked.name, asked.incarnation) not in {
        (identity.name, identity.incarnation),
        (ANY.name, ANY.incarnation),
    }:
        refusal = _OTHER
    nonce = secrets.token_bytes(_NONCE_BYTES)
    bare = _Challenge(identity.name, identity.incarnation, nonce, b"", refusal)
    seen = msgspec.msgpack.encode(bare)
    proof = mac(token, b"listener", hello, seen) if token else b""
    challenge = msgspec.structs.replace(bare, proof=proof)
    send_frame(sock, msgspec.msgpack.encode(challenge), deadline_ns=deadline_ns)
    if refusal:
        raise _distrust(f"a client wanted {refusal}")
    answer = _decode(_receive(sock, deadline_ns), _Answer)
    trusted = not token or hmac.compare_digest(answer.proof, mac(token, b"client", hello, seen))
    verdict = _Verdict("" if trusted else _TOKEN)
    send_frame(sock, msgspec.msgpack.encode(verdict), deadline_ns=deadline_ns)
    if not trusted:
        raise _distrust("a client does not prove that it knows the cluster's token")


def _receive(sock: socket.socket, deadline_ns: int) -> bytes:
    frame = receive_frame(sock, most_bytes=MOST_BYTES, deadline_ns=deadline_ns)
    if not frame:
        raise PeerGoneError(
            "the other side hung up during the handshake",
            remedy="try again; check that it is a store with room for another connection",
        )
    return frame


def _decode(frame: bytes, kind: type[_T]) -> _T:
    try:
        return msgspec.msgpack.decode(frame, type=kind)
    except UNREADABLE as error:
        raise TransportError(
            f"the other side does not speak hotset's handshake ({error})",
            remedy="check address and version of the other end",
        ) from error


def _distrust(what: str) -> TransportError:
    return TransportError(what, remedy="start every process of the cluster with the same token")


def _refused(reason: str, wanted: Identity, found: Identity) -> TransportError:
    if reason == _OTHER:
        return PeerGoneError(
            f"{wanted.name}:{wanted.incarnation} is gone, its address is that of "
            f"{found.name}:{found.incarnation}",
            remedy="use the newer store",
        )
    if reason == _TOKEN:
        return _distrust(f"store {found.name!r} refuses this process's token")
    return TransportError(
        f"store {found.name!r} speaks {reason}", remedy="run one version of hotset in a cluster"
    )
