"""What a run's journal says, in columns: where every copy was at any moment, and why.

Takes in the controller's events in order, and the commands that the same brain gives on them.
Decides nothing, reads no files, must not know how a page looks.

A cell is 16 bits for one (store, block): bit `FORMAT_CODES[format] - 1` for each format that has a
copy there, and `ASKED` while a transfer was asked for that has not ended. Storage holds every
block and has no cells.

Invariants: `cells_at(t)` is what applying all changes up to t to empty cells gives, whichever
checkpoint it starts from; times never fall (a late event counts as now).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import IntEnum
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from hotset.policies.types import (
    FORMAT_CODES,
    BlockId,
    CancelTransfer,
    ChangeFormat,
    Command,
    Concurrency,
    CopyDropped,
    CopyLanded,
    DropCopy,
    Event,
    Format,
    PublishEpoch,
    Reason,
    RouterCounts,
    StartTransfer,
    StoreDraining,
    StoreJoined,
    StoreLost,
    TransferFailed,
    Veto,
)

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from numpy.typing import NDArray

    from hotset.policies.types import StoreInfo

    Cells = NDArray[np.uint16]
    Changes = np.ndarray[Any, np.dtype[Any]]

ASKED = 0x8000
"""Bit of a cell: a transfer to this store was asked for and has not been reported on."""
_NOT_ASKED = 0xFFFF ^ ASKED
MOST_CHECKPOINTS = 32
REASONS = tuple(Reason)
_REASON_NUMBERS = {reason: number for number, reason in enumerate(REASONS)}
FORMATS = tuple(Format)


class What(IntEnum):
    """What happened to a cell, or to a whole store (block is NOWHERE then)."""

    LANDED = 1
    DROPPED = 2
    FAILED = 3
    ASKED = 4
    DROP_ASKED = 5
    VETOED = 6
    JOINED = 7
    LOST = 8
    DRAINING = 9
    CANCEL_ASKED = 10
    CHANGE_ASKED = 11


NOWHERE = -1
CHANGE = np.dtype(
    [
        ("at_ns", "<i8"),
        ("store", "<i4"),
        ("block", "<i4"),  # flat, or NOWHERE
        ("what", "u1"),
        ("form", "u1"),  # a code of FORMAT_CODES, or 0
        ("reason", "u1"),  # place in REASONS
        ("note", "<i4"),  # index into notes: source, cause or bound
    ]
)


class Plan(NamedTuple):
    """A published epoch and where its commands stand among the changes: [first, last)."""

    at_ns: int
    epoch: int
    reason: str
    cause: str
    first: int
    last: int


class Counts(NamedTuple):
    """One report of routed tokens: flat blocks and tokens of each."""

    at_ns: int
    blocks: NDArray[np.int64]
    tokens: NDArray[np.int64]
    passed: int


class Column:
    """A growing array of records."""

    def __init__(self, kind: np.dtype[Any]) -> None:
        """Empty."""
        self._data = np.zeros(256, kind)
        self._size = 0

    def __len__(self) -> int:
        """Records so far."""
        return self._size

    def append(self, record: tuple[int, ...]) -> None:
        """Add one record."""
        if self._size == len(self._data):
            self._data = np.concatenate((self._data, np.zeros_like(self._data)))
        self._data[self._size] = record
        self._size += 1

    @property
    def table(self) -> Changes:
        """All records; a view."""
        return self._data[: self._size]


@dataclass(slots=True)
class Timeline:
    """A run as its journal tells it. Layers and experts are those of the checkpoint.

    `sizes` are bytes of a block by code of its format, as copies had them; `beats` are the times of
    all events; `unknown` counts what named a block or store that is not there.
    """

    layers: Sequence[int]
    experts: int
    stores: list[StoreInfo] = field(default_factory=list)
    changes: Column = field(default_factory=lambda: Column(CHANGE))
    notes: list[str] = field(default_factory=lambda: [""])
    plans: list[Plan] = field(default_factory=list)
    counts: list[Counts] = field(default_factory=list)
    from_ns: int = 0
    to_ns: int = 0
    requests: list[tuple[int, str, int]] = field(default_factory=list)
    unknown: int = 0
    sizes: dict[int, int] = field(default_factory=dict)
    _numbers: dict[str, int] = field(default_factory=dict)
    _note_numbers: dict[str, int] = field(default_factory=lambda: {"": 0})
    _rows: dict[int, int] = field(default_factory=dict)
    _cells: Cells = field(default_factory=lambda: np.zeros((0, 0), np.uint16))
    _kept: list[tuple[int, Cells]] = field(default_factory=list)
    _stride: int = 1024
    beats: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        """Number the layers."""
        self._rows = {layer: row for row, layer in enumerate(self.layers)}
        self._cells = np.zeros((0, self.blocks), np.uint16)

    @property
    def blocks(self) -> int:
        """Number of blocks."""
        return len(self.layers) * self.experts

    def flat(self, block: BlockId) -> int:
        """Place of a block in cells, or NOWHERE when the checkpoint has no such block."""
        row = self._rows.get(block.layer, NOWHERE)
        if row < 0 or not 0 <= block.index < self.experts:
            return NOWHERE
        return row * self.experts + block.index

    def block(self, flat: int) -> BlockId:
        """The block at a place."""
        return BlockId(self.layers[flat // self.experts], flat % self.experts)

    def number(self, store: str) -> int:
        """Number of a store by name, NOWHERE when it never joined."""
        return self._numbers.get(store, NOWHERE)

    # --- taking in ------------------------------------------------------------------------------

    def feed(self, event: Event, commands: Iterable[Command] = ()) -> None:
        """Take in the next event of the journal and what the brain said to it."""
        self.to_ns = max(self.to_ns, event.now_ns)
        self.from_ns = self.from_ns or event.now_ns
        self.beats.append(self.to_ns)
        match event:
            case StoreJoined():
                self._joined(event)
            case StoreLost():
                self._add(event.store, None, What.LOST, reason=Reason.LOST)
            case StoreDraining():
                self._add(event.store, None, What.DRAINING, reason=Reason.DRAIN)
            case RouterCounts():
                self._count(event)
            case Concurrency():
                self.requests.append((self.to_ns, event.store, event.requests))
            case CopyLanded():
                copy, note = event.copy, event.source
                self.sizes[FORMAT_CODES[copy.format]] = copy.nbytes
                self._add(copy.store, copy.block, What.LANDED, copy.format, event.reason, note)
            case CopyDropped():
                self._add(event.store, event.block, What.DROPPED, event.format, event.reason)
            case TransferFailed():
                self._add(event.store, event.block, What.FAILED, event.format, event.reason)
            case _:
                pass  # a Tick says that time has passed
        self._command(list(commands))

    def _joined(self, event: StoreJoined) -> None:
        name = event.store.name
        if name not in self._numbers:
            self._numbers[name] = len(self.stores)
            self.stores.append(event.store)
            self._cells = np.concatenate((self._cells, np.zeros((1, self.blocks), np.uint16)))
        self.stores[self._numbers[name]] = event.store
        self._add(name, None, What.JOINED, reason=Reason.JOINED)
        for copy in event.copies:
            self.sizes[FORMAT_CODES[copy.format]] = copy.nbytes
            self._add(name, copy.block, What.LANDED, copy.format, Reason.JOINED, name)

    def _count(self, event: RouterCounts) -> None:
        known = [(flat, n) for block, n in event.counts if (flat := self.flat(block)) >= 0]
        blocks = np.array([flat for flat, _ in known], np.int64)
        tokens = np.array([n for _, n in known], np.int64)
        self.counts.append(Counts(self.to_ns, blocks, tokens, event.tokens))

    def _command(self, commands: list[Command]) -> None:
        first = len(self.changes)
        published: list[PublishEpoch] = []
        for one in commands:
            match one:
                case StartTransfer():
                    note = f"{one.cause}; from {', '.join(one.sources)}"
                    self._add(one.store, one.block, What.ASKED, one.format, one.reason, note)
                case DropCopy():
                    self._add(
                        one.store, one.block, What.DROP_ASKED, one.format, one.reason, one.cause
                    )
                case CancelTransfer():
                    self._add(
                        one.store, one.block, What.CANCEL_ASKED, one.format, one.reason, one.cause
                    )
                case ChangeFormat():
                    note = f"into {one.into.value}; {one.cause}"
                    self._add(one.store, one.block, What.CHANGE_ASKED, one.format, one.reason, note)
                case Veto():
                    self._add(one.store, one.block, What.VETOED, one.format, one.reason, one.bound)
                case PublishEpoch():
                    published.append(one)
                case _:
                    pass  # WakeAt
        last = len(self.changes)
        for one in published:
            self.plans.append(Plan(self.to_ns, one.epoch, one.reason.value, one.cause, first, last))

    def _add(  # noqa: PLR0913, PLR0917 - the columns of one record, internal
        self,
        store: str,
        block: BlockId | None,
        what: What,
        form: Format | None = None,
        reason: Reason = Reason.DEMAND,
        note: str = "",
    ) -> None:
        number = self._numbers.get(store, NOWHERE)
        flat = NOWHERE if block is None else self.flat(block)
        if number < 0 or (block is not None and flat < 0):
            self.unknown += 1
            return
        code = FORMAT_CODES[form] if form else 0
        place = self._note_numbers.setdefault(note, len(self.notes))
        if place == len(self.notes):
            self.notes.append(note)
        record = (self.to_ns, number, flat, int(what), code, _REASON_NUMBERS[reason], place)
        self.changes.append(record)
        _apply(self._cells, record)
        if len(self.changes) % self._stride == 0:
            self._keep()

    def _keep(self) -> None:
        self._kept.append((len(self.changes), self._cells.copy()))
        if len(self._kept) > MOST_CHECKPOINTS:
            self._stride *= 2
            self._kept = [kept for kept in self._kept if kept[0] % self._stride == 0]

    # --- asking ---------------------------------------------------------------------------------

    def place_at(self, at_ns: int) -> int:
        """Number of changes up to and including a moment."""
        return int(np.searchsorted(self.changes.table["at_ns"], at_ns, side="right"))

    def cells_at(self, at_ns: int) -> Cells:
        """Cells [stores, blocks] at a moment; stores that had not joined are empty."""
        return self.cells_after(self.place_at(at_ns))

    def cells_after(self, place: int) -> Cells:
        """Cells after the first `place` changes."""
        if place >= len(self.changes):
            return self._cells.copy()
        cells = np.zeros_like(self._cells)
        start = 0
        for count, kept in reversed(self._kept):
            if count <= place:
                start = count
                cells[: len(kept)] = kept
                break
        for record in self.changes.table[start:place].tolist():
            _apply(cells, record)
        return cells

    def present_at(self, at_ns: int) -> list[str]:
        """State of each store at a moment: `absent`, `ready`, `draining` or `lost`."""
        states = ["absent"] * len(self.stores)
        table = self.changes.table[: self.place_at(at_ns)]
        words = {What.JOINED: "ready", What.LOST: "lost", What.DRAINING: "draining"}
        for record in table[table["block"] == NOWHERE].tolist():
            states[record[1]] = words[What(record[3])]
        return states

    def requests_at(self, at_ns: int) -> int:
        """Requests in flight by the workers' last reports before a moment."""
        last = {store: count for when_ns, store, count in self.requests if when_ns <= at_ns}
        return sum(last.values())

    def story(self, flat: int, *, at_ns: int) -> Changes:
        """Changes of one block up to a moment, oldest first."""
        table = self.changes.table[: self.place_at(at_ns)]
        found: Changes = table[table["block"] == flat]
        return found


def _apply(cells: Cells, record: tuple[int, ...]) -> None:
    _, store, flat, what, code, _, _ = record
    if what in {What.JOINED, What.LOST}:
        cells[store] = 0
    elif what == What.LANDED:
        cells[store, flat] = cells[store, flat] & _NOT_ASKED | 1 << (code - 1)
    elif what == What.DROPPED:
        cells[store, flat] &= 0xFFFF ^ 1 << (code - 1)
    elif what == What.FAILED:
        cells[store, flat] &= _NOT_ASKED
    elif what == What.ASKED:
        cells[store, flat] |= ASKED
