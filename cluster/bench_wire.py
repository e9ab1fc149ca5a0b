"""`hotset bench wire`: time per block over a paced link, by the format that crosses it.

One store holds blocks of the model in each format and is read over plain TCP, paced to each rate;
a block counts from the request until compute could read it, decoding included. Lossless formats
are compared with the checkpoint's bytes. Rates take turns within a round, formats within a rate, so
that what else the machine does hits all of them. Decides nothing; says what a live pool would do.
"""

from __future__ import annotations

import os
import platform
import statistics
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from hotset.blocks.checkpoint import Catalog
from hotset.blocks.formats import codec
from hotset.blocks.local import BlockReader
from hotset.errors import HotsetError
from hotset.policies.types import FORMAT_CODES, LOSSLESS, BlockId, Format
from hotset.policies.wire import packing_pays
from hotset.transport.base import Expect, LinkProfile, ReadItem, Status
from hotset.transport.engine import Engine
from hotset.transport.header import checksum
from hotset.transport.records import Ring
from hotset.transport.slab import Slab
from hotset.transport.slots import slot_stride
from hotset.transport.tcp import TcpBackend

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from hotset.transport.slab import Slot

FORMATS = (Format.BF16, Format.BF16Z, Format.INT8, Format.INT4)
_PATIENCE_NS = 60_000_000_000


@dataclass(frozen=True, slots=True, kw_only=True)
class WireRow:
    """One format over one link: medians of a block, in microseconds."""

    link_gb_per_s: float
    format: str
    wire_bytes: int
    block_us: float
    decode_us: float
    against_bf16: float
    bound_us: float
    same_bytes: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class WireFigures:
    """All rows, and for each link whether a live pool would pack."""

    model: str
    block_bytes: int
    blocks: int
    rounds: int
    rows: tuple[WireRow, ...]
    packs: dict[str, bool]
    machine: str


class _Store:
    """A slab and its engine on plain TCP."""

    def __init__(self, name: str, *, full: int, slots: int, link: LinkProfile | None) -> None:
        self.slab = Slab(
            capacity_bytes=slots * slot_stride(full), slot_payload_bytes=full, name=name,
            incarnation=1,
        )  # fmt: skip
        self.engine = Engine(
            slab=self.slab, backend=TcpBackend(), ring=Ring(), name=name, incarnation=1, link=link
        )
        self.engine.start()


@dataclass(frozen=True, slots=True)
class _Copy:
    offset: int
    expect: Expect


class _Link:
    """A source behind one paced link, and its reader."""

    def __init__(self, rate: float, *, catalog: Catalog, full: int, slots: int) -> None:
        profile = LinkProfile(
            bandwidth_bytes_per_s=int(rate * 1e9), latency_ns=20_000, emulated=True
        )
        self.rate = rate
        self._catalog = catalog
        self._full = full
        self.source = _Store(f"source-{rate:g}", full=full, slots=slots, link=profile)
        self.reader = _Store(f"reader-{rate:g}", full=full, slots=2, link=None)
        self.reader.engine.connect(self.source.engine.info())
        self.copies: dict[tuple[BlockId, Format], _Copy] = {}

    def put(self, block: BlockId, form: Format, payload: memoryview) -> None:
        slab = self.source.slab
        slot = slab.allocate(len(payload))
        assert slot is not None  # noqa: S101 - the slab was sized for them
        slab.write_payload(slot, payload)
        expect = Expect(
            key=self._catalog.key(block), format_code=FORMAT_CODES[form], nbytes=len(payload),
            checksum=checksum(payload), incarnation=1,
        )  # fmt: skip
        slab.publish(
            slot, key=expect.key, format_code=expect.format_code, nbytes=expect.nbytes,
            checksum=expect.checksum or 0,
        )  # fmt: skip
        self.copies[block, form] = _Copy(slot.offset, expect)

    def get(self, block: BlockId, form: Format) -> Slot:
        """Read one block. Raises HotsetError when it does not come."""
        copy, slab = self.copies[block, form], self.reader.slab
        dest = slab.allocate(self._full)
        assert dest is not None  # noqa: S101 - each is given back before the next
        ticket = self.reader.engine.read(
            f"source-{self.rate:g}",
            [ReadItem(remote_offset=copy.offset, dest=dest, expect=copy.expect)],
            deadline_ns=time.monotonic_ns() + _PATIENCE_NS,
        )
        outcome = ticket.wait()
        if outcome.status is not Status.DONE:
            raise HotsetError(
                f"block {block} did not come ({outcome.items[0].error})", remedy="try again"
            )
        return dest

    def give_back(self, slot: Slot) -> None:
        self.reader.slab.retire(slot)
        self.reader.slab.unpin(slot)

    def close(self) -> None:
        self.reader.engine.close()
        self.source.engine.close()


def run_bench(
    model: Path, *, rates: Sequence[float], blocks: int, rounds: int, say: Callable[[str], None]
) -> WireFigures:
    """Measure every format over every rate (GB/s). Raises HotsetError."""
    torch.set_num_threads(1)
    catalog = Catalog.open(model)
    layout = catalog.layout
    chosen = list(catalog.blocks)[:blocks]
    full = max(codec(form).nbytes(layout) for form in FORMATS)
    links = [
        _Link(rate, catalog=catalog, full=full, slots=len(chosen) * len(FORMATS)) for rate in rates
    ]
    right = torch.empty(layout.nbytes, dtype=torch.uint8)
    truth: dict[BlockId, int] = {}
    reader = BlockReader(catalog)
    times: dict[tuple[float, Format], list[tuple[int, int]]] = {}
    same: dict[Format, bool] = dict.fromkeys(FORMATS, True)
    try:
        for block in chosen:
            reader.read(block, right)
            truth[block] = checksum(memoryview(right.numpy().data))
            for form in FORMATS:
                made = torch.zeros(codec(form).nbytes(layout), dtype=torch.uint8)
                used = codec(form).encode(right, layout, made)
                for link in links:
                    link.put(block, form, memoryview(made[:used].numpy().data))
        for number in range(rounds + 1):
            say(f"round {number} of {rounds}" + ("" if number else ", warm-up"))
            for link in links:
                for block in chosen:
                    for form in FORMATS:
                        read_ns, decode_ns, found = _one(link, block, form, catalog=catalog)
                        same[form] = same[form] and found == truth[block]
                        if number:
                            times.setdefault((link.rate, form), []).append((read_ns, decode_ns))
    finally:
        reader.close()
        for link in links:
            link.close()
    return _figures(model, catalog, links=links, times=times, same=same, rounds=rounds)


def _one(link: _Link, block: BlockId, form: Format, *, catalog: Catalog) -> tuple[int, int, int]:
    """Nanoseconds to read and to decode one block, and the hash of what came out."""
    layout = catalog.layout
    out = torch.empty(layout.nbytes, dtype=torch.uint8)
    out.zero_()  # a scratch slot has its pages
    began_ns = time.monotonic_ns()
    slot = link.get(block, form)
    landed_ns = time.monotonic_ns()
    payload = link.reader.slab.torch_view(slot, link.copies[block, form].expect.nbytes)
    if form is not Format.BF16:
        codec(form).decode(payload, layout, out, verified=True)
    ready_ns = time.monotonic_ns()
    whole = payload if form is Format.BF16 else out
    found = checksum(memoryview(whole.numpy().data))
    link.give_back(slot)
    return landed_ns - began_ns, ready_ns - landed_ns, found


def _figures(  # noqa: PLR0913 - the parts of the answer, by keyword
    model: Path,
    catalog: Catalog,
    *,
    links: list[_Link],
    times: dict[tuple[float, Format], list[tuple[int, int]]],
    same: dict[Format, bool],
    rounds: int,
) -> WireFigures:
    rows: list[WireRow] = []
    packs: dict[str, bool] = {}
    for link in links:
        whole: dict[Format, float] = {}
        for form in FORMATS:
            pairs = times[link.rate, form]
            whole[form] = statistics.median(read + decode for read, decode in pairs)
            decode_ns = statistics.median(decode for _, decode in pairs)
            sizes = [c.expect.nbytes for (_, one), c in link.copies.items() if one is form]
            nbytes = int(statistics.median(size for size in sizes if size is not None))
            rows.append(
                WireRow(
                    link_gb_per_s=link.rate,
                    format=str(form),
                    wire_bytes=nbytes,
                    block_us=whole[form] / 1e3,
                    decode_us=decode_ns / 1e3 if form is not Format.BF16 else 0.0,
                    against_bf16=whole[form] / whole[Format.BF16],
                    bound_us=nbytes / link.rate / 1e3,
                    same_bytes=form in LOSSLESS and same[form],
                )
            )
            if form is Format.BF16Z:
                packs[f"{link.rate:g}"] = packing_pays(
                    full_nbytes=catalog.block_nbytes, packed_nbytes=nbytes,
                    decode_ns=int(decode_ns), link_bytes_per_s=int(link.rate * 1e9),
                )  # fmt: skip
    return WireFigures(
        model=str(model),
        block_bytes=catalog.block_nbytes,
        blocks=len({block for block, _ in links[0].copies}),
        rounds=rounds,
        rows=tuple(rows),
        packs=packs,
        machine=f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, "
        f"Python {platform.python_version()}, torch {torch.__version__}, "
        f"load {os.getloadavg()[0]:.1f}",
    )
