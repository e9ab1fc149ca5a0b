"""A run that is being read: journal bytes, trace files and status in; moments and series out.

One data model for a recorded run, a run whose folder is still growing, and a live controller: all
give frames of the journal, a spec, and perhaps trace files. Commands are those of the same brain,
fed with the same events. Must not know Ray, aiohttp, or who polls.

Invariant: a frame is taken once and in order; what is shown of a moment depends on nothing that was
written after it, except the names of stores and blocks.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple, Protocol

import msgspec
import numpy as np

from hotset.actors.control import ControlSpec, make_brain
from hotset.actors.frames import HEADER, MAX_FRAME_BYTES
from hotset.actors.messages import unpack_event
from hotset.dashboards.page.moment import Happening, Moment, happening, moment_at
from hotset.dashboards.page.spans import Traces
from hotset.dashboards.page.timeline import FORMATS, NOWHERE, Timeline
from hotset.policies.types import (
    CopyDropped,
    CopyLanded,
    Event,
    Format,
    RouterCounts,
    StoreJoined,
    TransferFailed,
)

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from hotset.dashboards.page.timeline import Cells
    from hotset.dashboards.status import Status
    from hotset.policies.brain import ClusterBrain
    from hotset.policies.types import BlockId

DECIDES_UP_TO = 200_000
"""Stores times blocks above which the brain is not asked again: its replay would take minutes."""


class Holding(NamedTuple):
    """A copy of a block: where, how far from compute, in which format."""

    store: str
    tier: str
    format: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Why:
    """Where a block is at a moment and everything that led there, oldest first."""

    block: str
    copies: tuple[Holding, ...]
    story: tuple[Happening, ...]
    told: int
    summary: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Series:
    """Time series over the run: `edges_ns` has one entry more than each series.

    `stall` is the share of each bin in which a device's compute waited; `moved` bytes that came.
    """

    edges_ns: tuple[int, ...]
    stall: dict[str, tuple[float, ...]]
    moved: tuple[int, ...]


class Source(Protocol):
    """Where a run's news come from."""

    run: Run
    live: bool

    def poll(self) -> bool:
        """Take in what is new; True when there was something. May block for a second."""
        ...


@dataclass(slots=True)
class Run:
    """A run as read so far. `guessed` says that its spec was not recorded."""

    spec: ControlSpec
    timeline: Timeline
    traces: Traces = field(default_factory=Traces)
    status: Status | None = None
    guessed: bool = False
    brain: ClusterBrain | None = None
    _tail: bytes = b""

    @classmethod
    def of(cls, spec: ControlSpec, *, guessed: bool = False) -> Run:
        """An empty run of a spec."""
        timeline = Timeline(layers=spec.layers, experts=spec.num_experts)
        return cls(spec=spec, timeline=timeline, guessed=guessed, brain=make_brain(spec))

    def take(self, data: bytes) -> int:
        """Take in the next bytes of the journal; returns how many frames they completed."""
        payloads, self._tail = split(self._tail + data)
        for payload in payloads:
            self.feed(unpack_event(msgspec.msgpack.decode(payload)))
        return len(payloads)

    def feed(self, event: Event) -> None:
        """Take in one event."""
        if self.brain and len(self.timeline.stores) * self.timeline.blocks > DECIDES_UP_TO:
            self.brain = None
        self.timeline.feed(event, self.brain.handle(event) if self.brain else ())

    def moment(
        self, *, at_ns: int | None, now_ns: int, live: bool, plan_epoch: int | None = None
    ) -> tuple[Moment, Cells]:
        """The run at a moment, None for its newest; `now_ns` counts when the run is live."""
        latest_ns = max(self.timeline.to_ns, self.traces.to_ns)
        newest = at_ns is None or at_ns >= latest_ns
        shown_ns = latest_ns if at_ns is None else min(max(self.timeline.from_ns, at_ns), latest_ns)
        return moment_at(
            self.timeline,
            self.traces,
            at_ns=shown_ns,
            now_ns=now_ns if live and newest else shown_ns,
            live=live and newest,
            status=self.status,
            plan_epoch=plan_epoch,
        )

    def series(self, *, bins: int = 300) -> Series:
        """Stall and moved bytes over the whole run."""
        start_ns = self.timeline.from_ns
        end_ns = max(self.timeline.to_ns, self.traces.to_ns, start_ns + bins)
        edges = np.linspace(0, end_ns - start_ns, bins + 1).astype(np.int64) + start_ns
        stall = self.traces.stalled_by_device(edges)
        return Series(
            edges_ns=tuple(edges.tolist()),
            stall={name: tuple(np.round(share, 4).tolist()) for name, share in stall.items()},
            moved=tuple(self.traces.moved_bytes(edges).tolist()),
        )

    def why(self, block: BlockId, *, at_ns: int | None = None, most: int = 200) -> Why | None:
        """Story of a block up to a moment; None when the checkpoint has no such block."""
        timeline = self.timeline
        flat = timeline.flat(block)
        if flat == NOWHERE:
            return None
        at_ns = timeline.to_ns if at_ns is None else at_ns
        cells = timeline.cells_at(at_ns)[:, flat]
        copies = tuple(
            Holding(store.name, store.tier.name.lower(), form.value)
            for number, store in enumerate(timeline.stores)
            for place, form in enumerate(FORMATS)
            if cells[number] >> place & 1
        )
        records = timeline.story(flat, at_ns=at_ns).tolist()
        story = tuple(happening(timeline, record) for record in records[-most:])
        return Why(
            block=str(block),
            copies=copies,
            story=story,
            told=len(records),
            summary=_summary(block, copies, story),
        )


def _summary(block: BlockId, copies: Sequence[Holding], story: Sequence[Happening]) -> str:
    """One paragraph: where it is, and what brought the copy that is nearest to compute."""
    said = f"Expert {block.index} of layer {block.layer} is "
    if not copies:
        gone = next((one for one in reversed(story) if one.what == "dropped"), None)
        last = f" Its last copy was dropped at {gone.store} ({gone.reason})." if gone else ""
        return f"{said}in storage only.{last}"
    ranks = {"hbm": 0, "compressed": 1, "host": 2, "cxl": 3}
    ordered = sorted(copies, key=lambda one: ranks.get(one.tier, 9))
    said += "; ".join(f"at {one.store} ({one.tier}) in {one.format}" for one in ordered) + "."
    near = ordered[0]
    for place in range(len(story) - 1, -1, -1):
        one = story[place]
        if one.what != "landed" or (one.store, one.format) != (near.store, near.format):
            continue
        said += f" The copy at {near.store} came from {one.note}, because of {one.reason}"
        asked = next(
            (
                earlier
                for earlier in reversed(story[:place])
                if earlier.what == "fetch asked for" and earlier.store == near.store
            ),
            None,
        )
        if asked and asked.reason == one.reason:
            said += f" (asked for by the controller: {asked.note})"
        return said + "."
    return said


def split(data: bytes) -> tuple[list[bytes], bytes]:
    """Whole payloads at the start of journal bytes, and what is left for the next call."""
    payloads = []
    place = 0
    while len(data) - place >= HEADER.size:
        length, _ = HEADER.unpack_from(data, place)
        end = place + HEADER.size + length
        if length > MAX_FRAME_BYTES or end > len(data):
            break
        payloads.append(data[place + HEADER.size : end])
        place = end
    return payloads, data[place:]


def guess_spec(events: Iterator[Event], *, run: str, run_dir: str) -> ControlSpec | None:
    """A spec with what a journal shows of it; None when it names no block.

    Blocks that no event names are missing, and floors are not known.
    """
    layers: set[int] = set()
    experts = nbytes = reduced = 0
    for event in events:
        for block, form, size in _named(event):
            layers.add(block.layer)
            experts = max(experts, block.index + 1)
            if form is Format.BF16:
                nbytes = max(nbytes, size)
            else:
                reduced = max(reduced, size)
    if not layers:
        return None
    return ControlSpec(
        run=run, run_dir=run_dir, model="", digest="", layers=tuple(sorted(layers)),
        num_experts=experts, nbytes=nbytes, reduced_nbytes=reduced or nbytes // 2,
    )  # fmt: skip


def _named(event: Event) -> Iterator[tuple[BlockId, Format, int]]:
    match event:
        case CopyLanded():
            yield event.copy.block, event.copy.format, event.copy.nbytes
        case CopyDropped() | TransferFailed():
            yield event.block, event.format, 0
        case StoreJoined():
            for copy in event.copies:
                yield copy.block, copy.format, copy.nbytes
        case RouterCounts():
            for block, _ in event.counts:
                yield block, Format.BF16, 0
        case _:
            pass


__all__ = ["Holding", "Run", "Series", "Source", "Why", "guess_spec", "split"]
