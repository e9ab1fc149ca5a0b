"""The source's side of the TCP backend: answers range requests out of the registered slab.

    request  id u64, count u32, then per range: offset u64, nbytes u64        (little endian)
    reply    id u64, nbytes u64, status u32, then the ranges' bytes back to back, or why not

Moves bytes from a slab to a socket; it must not know slots, headers or what the bytes mean. Device
memory goes through a host copy of at most one piece. `sendmsg` out of the mapping is used because
`sendfile` from the slab's memfd was measured at less than half of its speed (it hands over single
pages).

Invariants: no byte outside of the slab is ever sent, whatever is asked; a bad request is answered
with a reason and costs nobody else; a reader that takes nothing for PATIENCE_S is hung up on.
"""

from __future__ import annotations

import itertools
import socket
import struct
from typing import TYPE_CHECKING, Final

import numpy as np

from hotset.errors import TransportError
from hotset.transport.wire import SEND_BYTES, patience, pieces, receive_exactly, send_views

if TYPE_CHECKING:
    from collections.abc import Sequence

    from hotset.transport.memory import Memory

REQUEST: Final = struct.Struct("<QI")
REPLY: Final = struct.Struct("<QQI")
RANGE_BYTES: Final = 16
MOST_RANGES: Final = 1 << 16
MOST_REASON_BYTES: Final = 1024
PATIENCE_S: Final = 10
OK: Final = 0
REFUSED: Final = 1


def pack_request(number: int, ranges: Sequence[tuple[int, int]]) -> bytes:
    """Make a request for (offset, nbytes) ranges of the peer's slab."""
    flat = itertools.chain.from_iterable(ranges)
    return struct.pack(f"<QI{2 * len(ranges)}Q", number, len(ranges), *flat)


def serve(sock: socket.socket, memory: Memory) -> None:
    """Answer requests until the reader leaves. Raises OSError, TransportError."""
    patience(sock, PATIENCE_S)
    while head := _next_request(sock):
        number, count = REQUEST.unpack(head)
        if count > MOST_RANGES:
            raise TransportError(
                f"a request of {count} ranges", remedy=f"ask for at most {MOST_RANGES} at once"
            )
        table = receive_exactly(sock, count * RANGE_BYTES) if count else b""
        if len(table) != count * RANGE_BYTES:
            return  # cut short by a reader that left
        _answer(sock, memory, number, np.frombuffer(table, dtype="<u8").reshape(-1, 2))


def _next_request(sock: socket.socket) -> bytes:
    """The fixed part of a request; b'' when the reader has left. An idle reader may stay."""
    while True:
        try:
            head = sock.recv(REQUEST.size, socket.MSG_WAITALL)
        except BlockingIOError:
            continue
        if head and len(head) < REQUEST.size:  # a signal, or the end
            head += receive_exactly(sock, REQUEST.size - len(head))
        return head if len(head) == REQUEST.size else b""


def _answer(
    sock: socket.socket,
    memory: Memory,
    number: int,
    table: np.ndarray[tuple[int, int], np.dtype[np.uint64]],
) -> None:
    size = np.uint64(memory.nbytes)
    offsets, lengths = table[:, 0], table[:, 1]
    if bool(((offsets > size) | (lengths > size - np.minimum(offsets, size))).any()):
        reason = f"a range lies outside of the slab of {memory.nbytes} bytes".encode()
        sock.sendall(REPLY.pack(number, len(reason), REFUSED) + reason)
        return
    ranges = [(offset, nbytes) for offset, nbytes in table.tolist()]
    head = REPLY.pack(number, sum(nbytes for _, nbytes in ranges), OK)
    for group in pieces(ranges, size=SEND_BYTES):
        send_views(sock, [head, *(memory.read(offset, nbytes) for offset, nbytes in group)])
        head = b""
    if head:  # nothing but empty ranges
        sock.sendall(head)
