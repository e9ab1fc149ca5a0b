"""How far a slot has come that travels in pieces: what is to do, what has landed, what is hashed.

Bookkeeping of offsets; it touches no slot. Pieces land in any order and from several sources. Each
chunk of the payload is hashed as soon as all of it is here, so hashing follows the bytes while they
are in a cache, on whichever thread moved them.

Invariant: every byte is to do, under way or landed, and lands once.
"""

from __future__ import annotations

from collections import deque
from types import MappingProxyType
from typing import TYPE_CHECKING, Final

from hotset.transport.header import CHUNK_BYTES, HEADER_BYTES, combine

if TYPE_CHECKING:
    from collections.abc import Mapping

    from hotset.transport.header import Seen

_NONE: Final[Mapping[int, int]] = MappingProxyType({})


class Pieces:
    """Progress of a slot that travels in pieces. Offsets count from the slot's header.

    `bare`: the payload travels alone, and headers are looked at in a scratch cell. Then `known`
    says for each source how many bytes of the slot it has, and `seen` what the header said.
    `arrived` is the end of what is here in order. `ready` are chunks to hash: any thread may pop
    one, and then answers in `digests`.
    """

    __slots__ = (
        "_missing", "arrived", "bare", "digests", "end", "hashing", "islands", "known", "ready",
        "seen", "todo",
    )  # fmt: skip

    def __init__(self, *, end: int, bare: bool) -> None:
        """Everything is to do; `end` counts header and payload."""
        begin = HEADER_BYTES if bare else 0
        payload = end - HEADER_BYTES
        self.end = end
        self.bare = bare
        self.todo = [(begin, end)]
        self.arrived = begin
        self.islands: dict[int, int] = {}
        self.hashing = False
        self.known: dict[str, int] = {}
        self.seen: Seen | None = None
        self._missing = [
            min(CHUNK_BYTES, payload - at) for at in range(0, max(1, payload), CHUNK_BYTES)
        ]
        self.digests: list[int | None] = [None] * len(self._missing)
        self.ready: deque[int] = deque() if payload else deque([0])

    @property
    def complete(self) -> bool:
        """Whether every byte is here and hashed."""
        return self.arrived == self.end and None not in self.digests

    @property
    def checksum(self) -> int:
        """That of the payload, once it is complete."""
        return combine([digest for digest in self.digests if digest is not None])

    @property
    def left(self) -> int:
        """Bytes that no post carries yet."""
        return sum(end - begin for begin, end in self.todo)

    def available(self, source: str) -> int:
        """Bytes at the front of `todo` that `source` has."""
        if not self.todo:
            return 0
        begin, end = self.todo[0]
        return max(0, min(end, self.known.get(source, 0) if self.bare else end) - begin)

    def take(self, nbytes: int) -> tuple[int, int]:
        """Take up to `nbytes` from the front: (begin, end); whole chunks where there is one."""
        begin, end = self.todo[0]
        cut = min(end, begin + nbytes)
        if cut < end:
            whole = cut - (cut - HEADER_BYTES) % CHUNK_BYTES
            cut = whole if whole > begin else cut
        if cut == end:
            del self.todo[0]
        else:
            self.todo[0] = (cut, end)
        return begin, cut

    def give_back(self, begin: int, end: int) -> None:
        """A piece did not arrive; it goes first."""
        self.todo.append((begin, end))
        self.todo.sort()

    def landed(self, begin: int, end: int, digests: Mapping[int, int] = _NONE) -> None:
        """Note a piece; `arrived` grows when it is the next in order.

        `digests` are those of chunks of it that have been hashed already.
        """
        self.islands[begin] = end
        while self.arrived in self.islands:
            self.arrived = self.islands.pop(self.arrived)
        missing = self._missing
        at = max(begin, HEADER_BYTES)
        while at < end:
            chunk = (at - HEADER_BYTES) // CHUNK_BYTES
            upto = min(end, self.chunk(chunk)[1])
            missing[chunk] -= upto - at
            if missing[chunk] == 0 and chunk in digests:
                self.digests[chunk] = digests[chunk]
            elif missing[chunk] == 0:
                self.ready.append(chunk)
            at = upto

    def chunk(self, number: int) -> tuple[int, int]:
        """(begin, end) of a chunk."""
        begin = HEADER_BYTES + number * CHUNK_BYTES
        return begin, min(self.end, begin + CHUNK_BYTES)

    def chunks_touched(self, begin: int, end: int) -> range:
        """Numbers of the chunks that a piece has bytes of; the header counts to the first."""
        first = max(0, begin - HEADER_BYTES) // CHUNK_BYTES
        return range(first, max(first + 1, -(-(end - HEADER_BYTES) // CHUNK_BYTES)))

    def chunks_within(self, begin: int, end: int) -> range:
        """Numbers of the chunks that lie in a piece with every byte."""
        first = -(-(begin - HEADER_BYTES) // CHUNK_BYTES) if begin > HEADER_BYTES else 0
        last = len(self.digests) if end == self.end else (end - HEADER_BYTES) // CHUNK_BYTES
        return range(first, max(first, last))
