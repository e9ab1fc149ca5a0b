"""Fetching blocks into a store's slots, from the best source that still has them.

One call may want many blocks: those with the same best source travel in one transfer. A block
whose copy is stale or whose peer is gone goes on to the next peer inside the engine; after the last
of them, or a deadline, it comes back here and goes on in a fresh slot (the old one is free, or in
quarantine). Storage has every block, so a fetch fails only when the checkpoint's files fail or the
store has no slot left.

Knows catalog, directory and engine; must not know policy, compute or Ray.
"""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

from hotset.actors.observe import LinkSums
from hotset.errors import HotsetError
from hotset.policies.schedule import service_of
from hotset.policies.types import FORMAT_CODES, LOSSLESS, STORAGE, BlockId, Format, Reason
from hotset.transport.base import (
    Expect,
    FileItem,
    FileRange,
    Priority,
    ReadItem,
    Replica,
    Status,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from hotset.actors.directory import Directory, Source
    from hotset.blocks.checkpoint import Catalog
    from hotset.transport.base import ItemResult, Outcome
    from hotset.transport.engine import Engine
    from hotset.transport.slab import Slab, Slot

# A transfer gets 2 s and a tenth of the rate that its link has shown (numbers: peers that stop
# never report an error, so only the deadline ends the wait).
_DEADLINE_FLOOR_NS = 2_000_000_000
_DEADLINE_FACTOR = 10
# Small blocks share a transfer; a larger batch would make its first block wait for its last.
_BATCH_BYTES = 4 << 20
_MOST_READS = 64  # blocks after which what was read before counts half


@dataclass(frozen=True, slots=True, kw_only=True)
class Landing:
    """How the fetch of one block ended: `slot` is READY and pinned once, or None with `error`.

    `no_slot`: it failed only because the store had no slot left for the next source.
    """

    block: BlockId
    format: Format
    slot: Slot | None
    nbytes: int
    checksum: int
    generation: int
    source: str
    transfer_id: int
    reason: Reason
    error: str = ""
    no_slot: bool = False
    trace: tuple[int, int] = (0, 0)  # in which the transfer's span stands


@dataclass(slots=True, kw_only=True)
class Want:
    """One block on its way: its slot now, and the sources not yet tried."""

    block: BlockId
    format: Format
    slot: Slot
    nbytes: int
    on_end: Callable[[Landing], None]
    reason: Reason
    trace: tuple[int, int] = (0, 0)
    parent: int = 0
    allow: frozenset[str] | None = None
    plain: bool = False  # in this very format, not in another lossless one
    sources: list[Source] = field(default_factory=list)


class ReadSums(NamedTuple):
    """Reads of one source in one format: their blocks and time; older ones count for less."""

    blocks: float = 0.0
    ns: float = 0.0


class Fetcher:
    """Starts reads, follows them through their sources, reports each block's end once."""

    def __init__(
        self, *, catalog: Catalog, slab: Slab, engine: Engine, directory: Directory
    ) -> None:
        """All four belong to the same store."""
        self._catalog = catalog
        self._slab = slab
        self._engine = engine
        self._directory = directory
        self._checksums: dict[BlockId, int] = {}
        self.bytes_by_link: dict[str, int] = {}
        self.uses: dict[str, LinkSums] = {}
        self.reads: dict[tuple[str, Format], ReadSums] = {}
        self._uses_lock = threading.Lock()
        self._posted_ns: dict[int, int] = {}  # of transfers in flight, by id

    def start(self, wants: Sequence[Want]) -> None:
        """Send the blocks on their way; every `on_end` is called exactly once, on any thread."""
        groups: dict[str, list[Want]] = {}
        for want in wants:
            if not want.sources:
                want.sources = self._directory.sources(
                    want.block, fmt=want.format, nbytes=want.nbytes, allow=want.allow
                )
                if want.plain:
                    want.sources = [
                        s for s in want.sources if s.copy is None or s.copy.format is want.format
                    ]
                if want.format not in LOSSLESS:
                    want.sources = [s for s in want.sources if s.copy is not None]
            if want.sources:
                groups.setdefault(want.sources[0].store, []).append(want)
            else:
                self._slab.fail(want.slot)
                self._end(want, None, source="", transfer_id=0, error="no source has it")
        for store, group in groups.items():
            size = max(1, _BATCH_BYTES // _wire_nbytes(group[0]))
            for first in range(0, len(group), size):
                self._post(store, group[first : first + size])

    @property
    def oldest_ns(self) -> int:
        """Age of the oldest transfer in flight, 0 when there is none."""
        posted = list(self._posted_ns.values())
        return time.monotonic_ns() - min(posted) if posted else 0

    def _post(self, store: str, group: list[Want]) -> None:
        nbytes = sum(_wire_nbytes(want) for want in group)
        estimate = self._directory.cost(store).estimate_ns(nbytes)
        deadline = time.monotonic_ns() + _DEADLINE_FLOOR_NS + _DEADLINE_FACTOR * estimate
        first = group[0]
        priority = Priority(service_of(first.reason))  # one order here and in the brain's windows
        try:
            if store == STORAGE:
                ticket = self._engine.read_files(
                    [self._file_item(want) for want in group],
                    deadline_ns=deadline, trace=first.trace, parent=first.parent,
                    reason=first.reason.value, priority=priority,
                )  # fmt: skip
            else:
                ticket = self._engine.read(
                    store, [self._read_item(want) for want in group],
                    deadline_ns=deadline, trace=first.trace, parent=first.parent,
                    reason=first.reason.value, priority=priority,
                )  # fmt: skip
        except HotsetError as error:
            for want in group:
                self._slab.fail(want.slot)
                self._next_source(want, transfer_id=0, error=str(error))
            return
        self._posted_ns[ticket.transfer_id] = time.monotonic_ns()
        ticket.add_callback(lambda outcome: self._landed(store, group, outcome))

    def _landed(self, store: str, group: list[Want], outcome: Outcome) -> None:
        self._posted_ns.pop(outcome.transfer_id, None)
        if outcome.status is Status.DONE and not any(item.lost for item in outcome.items):
            busy_ns = outcome.wire_ns + outcome.verify_ns
            self._directory.cost(store).observe(nbytes=outcome.nbytes, elapsed_ns=busy_ns)
            self._note_use(store, outcome, demand=group[0].reason is Reason.DEMAND)
            self._note_reads(store, group, busy_ns=busy_ns)
        for offset, (want, item) in enumerate(zip(group, outcome.items, strict=True)):
            transfer_id = outcome.transfer_id + offset
            self._learn(want, item)
            if item.status is Status.DONE:
                self._count(item.source, _wire_nbytes(want))
                if _wire_format(want) is Format.BF16:
                    self._checksums.setdefault(want.block, item.checksum)
                trace = group[0].trace  # one span context for all that travels together
                self._end(want, item, source=item.source, transfer_id=transfer_id, trace=trace)
            else:
                error = item.error or item.status.value
                self._next_source(want, transfer_id=transfer_id, error=error)

    def _note_use(self, store: str, outcome: Outcome, *, demand: bool) -> None:
        with self._uses_lock:  # the owner's thread, or whoever asked for a read that has ended
            old = self.uses.get(store, LinkSums(0, 0, 0))
            self.uses[store] = LinkSums(
                busy_ns=old.busy_ns + outcome.wire_ns,
                demand_ns=old.demand_ns + (outcome.wire_ns if demand else 0),
                nbytes=old.nbytes + outcome.nbytes,
            )

    def _note_reads(self, store: str, group: list[Want], *, busy_ns: int) -> None:
        forms = {_wire_format(want) for want in group}
        if len(forms) > 1:
            return  # their times cannot be told apart
        key = (store, forms.pop())
        with self._uses_lock:
            old = self.reads.get(key, ReadSums())
            fade = 0.5 if old.blocks > _MOST_READS else 1.0
            self.reads[key] = ReadSums(
                blocks=old.blocks * fade + len(group), ns=old.ns * fade + busy_ns
            )

    def _learn(self, want: Want, item: ItemResult) -> None:
        """Forget the sources that failed; `want.sources` begins with the last that was tried."""
        ends = [loss.status for loss in item.lost] + [item.status]
        for source, status in zip(want.sources, ends, strict=False):
            if source.copy is None:
                continue
            if status is Status.STALE:
                self._directory.forget(source.copy)
            elif status in {Status.FAILED, Status.TIMED_OUT}:
                self._directory.forget_store(source.store, incarnation=source.copy.incarnation)
        want.sources = want.sources[len(item.lost) :]

    def _next_source(self, want: Want, *, transfer_id: int, error: str) -> None:
        want.sources = want.sources[1:]
        slot = self._slab.allocate(want.nbytes) if want.sources else None
        if slot is None:
            no_slot = bool(want.sources)
            self._end(want, None, source="", transfer_id=transfer_id, error=error, no_slot=no_slot)
            return
        want.slot = slot
        self._post(want.sources[0].store, [want])

    def _end(  # noqa: PLR0913 - the parts of a landing, by keyword
        self,
        want: Want,
        item: ItemResult | None,
        *,
        source: str,
        transfer_id: int,
        error: str = "",
        no_slot: bool = False,
        trace: tuple[int, int] = (0, 0),
    ) -> None:
        want.on_end(
            Landing(
                block=want.block,
                format=want.format if item is None else _wire_format(want),
                slot=None if item is None else item.dest,
                nbytes=want.nbytes if item is None else _wire_nbytes(want),
                checksum=0 if item is None else item.checksum,
                generation=0 if item is None else item.generation,
                source=source,
                transfer_id=transfer_id,
                reason=want.reason,
                error=error,
                no_slot=no_slot,
                trace=trace,
            )
        )

    def _count(self, store: str, nbytes: int) -> None:
        # Called on the engine's owner thread only, so a plain dict is enough.
        self.bytes_by_link[store] = self.bytes_by_link.get(store, 0) + nbytes

    def _read_item(self, want: Want) -> ReadItem:
        copy = want.sources[0].copy
        assert copy is not None  # noqa: S101 - storage goes through read_files
        expect = Expect(
            key=self._catalog.key(want.block),
            format_code=FORMAT_CODES[copy.format],
            nbytes=copy.nbytes,
            generation=copy.generation,
            checksum=copy.checksum,
            incarnation=copy.incarnation,
        )
        return ReadItem(
            remote_offset=copy.offset, dest=want.slot, expect=expect, others=_peers_after(want)
        )

    def _file_item(self, want: Want) -> FileItem:
        return FileItem(
            ranges=tuple(
                FileRange(path=span.path, offset=span.offset, nbytes=span.nbytes)
                for span in self._catalog.ranges(want.block)
            ),
            dest=want.slot,
            expect=Expect(
                key=self._catalog.key(want.block),
                format_code=FORMAT_CODES[want.format],
                nbytes=self._catalog.block_nbytes,
                checksum=self._checksums.get(want.block),
            ),
        )


def _wire_format(want: Want) -> Format:
    """Format in which the source that is tried now sends the block."""
    copy = want.sources[0].copy if want.sources else None
    return want.format if copy is None else copy.format


def _wire_nbytes(want: Want) -> int:
    copy = want.sources[0].copy if want.sources else None
    return want.nbytes if copy is None else copy.nbytes


def _peers_after(want: Want) -> tuple[Replica, ...]:
    """Further peers with the same bytes, up to where storage or another format stands."""
    others: list[Replica] = []
    first = want.sources[0].copy
    for source in want.sources[1:]:
        if source.copy is None or first is None or source.copy.format is not first.format:
            break
        others.append(
            Replica(
                peer=source.store,
                remote_offset=source.copy.offset,
                generation=source.copy.generation,
                incarnation=source.copy.incarnation,
            )
        )
    return tuple(others)
