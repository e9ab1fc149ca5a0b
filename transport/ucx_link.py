"""What the two ends of a UCX connection say to each other, and whether they believe it.

    reader                                   source
    Hello      wanted store, nonce, tag ->
                                        <-   Challenge  store, nonce, tag, proof, or a refusal
    Answer     proof                    ->
    Get        tag, ranges              ->
                                        <-   one tagged message per range, tags counting up
                                        <-   Refusal    and nothing more

The first three frames use the endpoint's stream, because tags are a worker's, not an endpoint's.
Each side names a tag of its own for what follows.

A proof is an HMAC over both first messages and the role: it cannot be replayed, reflected or moved
to a connection with another store. This authenticates the ends of a connection, and encrypts
nothing. The functions here are pure; framing needs only a stream.

Invariants: a frame over the bound ends the connection before anything of its size is allocated;
whatever arrives raises nothing but TransportError; another incarnation is a PeerGoneError.
"""

from __future__ import annotations

import hmac
import secrets
import struct
from collections import deque
from typing import TYPE_CHECKING, Any, Final, TypeVar

import msgspec

from hotset.errors import UNREADABLE, PeerGoneError, TransportError
from hotset.transport.token import mac

if TYPE_CHECKING:
    from hotset.transport.ucx_bindings import Bindings, Operation

VERSION: Final = 1
MOST_RANGES: Final = 1024  # of one Get
MOST_STRANGER_BYTES: Final = 4096
MOST_BYTES: Final = 64 << 10
_LENGTH: Final = struct.Struct("<I")
_NONCE_BYTES: Final = 32
_RETRY: Final = "ask the store for its description anew"

_T = TypeVar("_T", bound=msgspec.Struct)


class Hello(msgspec.Struct, frozen=True, array_like=True, tag="hello"):
    """Who is wanted."""

    version: int
    name: str
    incarnation: int
    nonce: bytes
    tag: int


class Challenge(msgspec.Struct, frozen=True, array_like=True, tag="challenge"):
    """Who answers; with a `refusal` nothing more follows."""

    name: str
    incarnation: int
    nonce: bytes
    tag: int
    proof: bytes
    refusal: str


class Answer(msgspec.Struct, frozen=True, array_like=True, tag="answer"):
    """The reader's proof."""

    proof: bytes


class Get(msgspec.Struct, frozen=True, array_like=True, tag="get"):
    """Send `ranges` (offset, nbytes) of the slab; the first as `tag`, the next as `tag` + 1."""

    tag: int
    ranges: list[tuple[int, int]]


class Refusal(msgspec.Struct, frozen=True, array_like=True, tag="refusal"):
    """Why the source hangs up."""

    reason: str


# Made at import: msgspec crashes when two threads meet a type for the first time.
for _kind in (Hello, Challenge, Answer, Get, Refusal):
    msgspec.msgpack.Decoder(_kind)


def hello(*, name: str, incarnation: int, tag: int = 0) -> bytes:
    """The reader's first frame."""
    nonce = secrets.token_bytes(_NONCE_BYTES)
    return msgspec.msgpack.encode(Hello(VERSION, name, incarnation, nonce, tag))


def challenge(
    said: bytes, *, name: str, incarnation: int, token: bytes, tag: int = 0
) -> tuple[bytes, str]:
    """The source's answer to a Hello, and '' or why it hangs up then. Raises TransportError."""
    asked = decode(said, Hello)
    refusal = ""
    if asked.version != VERSION:
        refusal = f"version {VERSION}, not {asked.version}"
    elif (asked.name, asked.incarnation) != (name, incarnation):
        refusal = "another store"
    bare = Challenge(name, incarnation, secrets.token_bytes(_NONCE_BYTES), tag, b"", refusal)
    proof = _proof(token, b"ucx source", said, msgspec.msgpack.encode(bare))
    return msgspec.msgpack.encode(msgspec.structs.replace(bare, proof=proof)), refusal


def answer(said: bytes, heard: bytes, *, token: bytes) -> bytes:
    """The reader's answer to a Challenge.

    Raises PeerGoneError when another store or incarnation answers, TransportError when it does not
    know the token or refuses.
    """
    wanted, found = decode(said, Hello), decode(heard, Challenge)
    bare = msgspec.msgpack.encode(msgspec.structs.replace(found, proof=b""))
    if not hmac.compare_digest(found.proof, _proof(token, b"ucx source", said, bare)):
        raise TransportError(
            f"store {found.name!r} does not prove that it knows the cluster's token",
            remedy="start every process of the cluster with the same token",
        )
    if (found.name, found.incarnation) != (wanted.name, wanted.incarnation):
        raise PeerGoneError(
            f"{wanted.name}:{wanted.incarnation} is gone, its address is that of "
            f"{found.name}:{found.incarnation}",
            remedy="use the newer store",
        )
    if found.refusal:
        raise TransportError(f"store {found.name!r} refuses: {found.refusal}", remedy=_RETRY)
    return msgspec.msgpack.encode(Answer(_proof(token, b"ucx reader", said, bare)))


def is_trusted(said: bytes, challenged: bytes, heard: bytes, *, token: bytes) -> bool:
    """Whether an Answer proves that the reader knows the token. Raises TransportError."""
    made = decode(challenged, Challenge)
    bare = msgspec.msgpack.encode(msgspec.structs.replace(made, proof=b""))
    return hmac.compare_digest(
        decode(heard, Answer).proof, _proof(token, b"ucx reader", said, bare)
    )


def _proof(token: bytes, role: bytes, said: bytes, bare: bytes) -> bytes:
    return mac(token, role, said, bare) if token else b""


def decode(frame: bytes, kind: type[_T]) -> _T:
    """Read one frame. Raises TransportError when it is of another kind."""
    try:
        return msgspec.msgpack.decode(frame, type=kind)
    except UNREADABLE as error:
        raise TransportError(
            f"the other side does not speak hotset's protocol ({error})", remedy=_RETRY
        ) from error


class Frames:
    """Frames of one endpoint: 4 bytes of length and a body. Nothing here waits.

    No receive is pending between `next` returning a frame and the following call.
    """

    def __init__(self, bindings: Bindings, endpoint: Any) -> None:
        """Use the endpoint's stream, for a stranger."""
        self._bindings = bindings
        self._endpoint = endpoint
        self._most_bytes = MOST_STRANGER_BYTES
        self._to_tag: int | None = None
        self._own_tag = 0
        self._sending: deque[Operation] = deque()
        self._into = bytearray()
        self._is_length = True
        self._receiving: Operation | None = None

    def trust(self, *, own_tag: int, to_tag: int) -> None:
        """Use tagged messages from now on, and take larger frames."""
        self._most_bytes = MOST_BYTES
        self._own_tag, self._to_tag = own_tag, to_tag

    def send(self, frame: bytes) -> None:
        """Queue a frame. Raises TransportError when the connection is broken."""
        for part in (_LENGTH.pack(len(frame)), frame):
            try:
                made = (
                    self._bindings.send_stream(self._endpoint, part)
                    if self._to_tag is None
                    else self._bindings.send(self._endpoint, part, self._to_tag)
                )
            except Exception as error:  # the bindings' errors share no root but Exception
                raise _broke(str(error)) from error
            self._sending.append(made)

    def next(self) -> bytes | None:
        """Return the next frame that has arrived, if any. Raises TransportError when broken."""
        while self._sending and self._sending[0].done():
            _check(self._sending.popleft())
        if self._receiving is None:
            self._receiving = self._receive(_LENGTH.size)
        while self._receiving.done():
            _check(self._receiving)
            if not self._is_length:
                self._is_length, self._receiving = True, None
                return bytes(self._into)
            nbytes = _LENGTH.unpack(self._into)[0]
            if not 0 < nbytes <= self._most_bytes:
                raise TransportError(
                    f"a frame of {nbytes} bytes, more than {self._most_bytes}", remedy=_RETRY
                )
            self._is_length = False
            self._receiving = self._receive(nbytes)
        return None

    def _receive(self, nbytes: int) -> Operation:
        self._into = bytearray(nbytes)
        try:
            if self._to_tag is None:
                return self._bindings.receive_stream(self._endpoint, self._into)
            return self._bindings.receive(self._endpoint, self._into, self._own_tag)
        except Exception as error:  # as in send
            raise _broke(str(error)) from error


class BrokenError(TransportError):
    """The connection is no more; a PeerGoneError once it is known whose."""


def _broke(why: str) -> BrokenError:
    return BrokenError(f"the connection broke ({why})", remedy=_RETRY)


def _check(operation: Operation) -> None:
    error = operation.error()
    if error:
        raise _broke(error)
