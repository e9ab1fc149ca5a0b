"""Blocks copied and hashed by turns: the same verdicts as of blocks hashed at the end."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest

from hotset.transport.base import Status
from hotset.transport.header import CHUNK_BYTES, HEADER_BYTES, Header, checksum, inspect, pack
from hotset.transport.shm import ShmBackend
from tests.transport.peer import FORMAT, Source, Store, build, fill
from tests.transport.worlds import deadline

if TYPE_CHECKING:
    from collections.abc import Iterator

    from hotset.transport.base import ReadItem
    from hotset.transport.slab import Slot

SIZES = [
    100,
    CHUNK_BYTES - HEADER_BYTES,
    CHUNK_BYTES - HEADER_BYTES + 1,
    CHUNK_BYTES // 4,
    CHUNK_BYTES // 4 + 1,
    CHUNK_BYTES,
    CHUNK_BYTES + 1,
    200,
    2 * CHUNK_BYTES - HEADER_BYTES,
    2 * CHUNK_BYTES + 12_345,
]


class Pair:
    """Two stores of one process; one maps the other."""

    def __init__(self) -> None:
        shape: dict[str, Any] = {"blocks": 0, "nbytes": max(SIZES), "room": len(SIZES)}
        self.source = build(name="fused", incarnation=2, backend=ShmBackend(), **shape)
        self.sink = build(name="sink", incarnation=1, backend=ShmBackend(), **shape)
        self.sink.engine.connect(self.source.engine.info())
        self.slots = [self._slot(self.source, nbytes) for nbytes in SIZES]
        self.copies = [fill(self.source.slab, s, seed=1 + i) for i, s in enumerate(self.slots)]

    @staticmethod
    def _slot(store: Store, nbytes: int) -> Slot:
        slot = store.slab.allocate(nbytes)
        assert slot is not None
        return slot

    def items(self) -> list[ReadItem]:
        return [copy.item(self._slot(self.sink, copy.nbytes)) for copy in self.copies]

    def close(self) -> None:
        for store in (self.sink, self.source):
            assert store.engine.close()
            store.slab.check_integrity()


@pytest.fixture
def pair() -> Iterator[Pair]:
    made = Pair()
    yield made
    made.close()


def _payload(pair: Pair, index: int) -> memoryview:
    return pair.source.slab.payload(pair.slots[index])


def test_all_sizes_land_as_they_are(pair: Pair) -> None:
    outcome = pair.sink.engine.read("fused", pair.items(), deadline_ns=deadline()).wait()
    assert outcome.status is Status.DONE
    for index, result in enumerate(outcome.items):
        assert pair.sink.slab.payload(result.dest) == _payload(pair, index)
        assert result.checksum == pair.copies[index].checksum
    assert outcome.verify_ns > 0
    assert outcome.wire_ns > 0


@pytest.mark.parametrize("place", ["first", "boundary", "last"])
@pytest.mark.parametrize("index", range(len(SIZES)), ids=[f"{size}-bytes" for size in SIZES])
def test_a_flipped_byte_anywhere_fails_its_block_alone(pair: Pair, index: int, place: str) -> None:
    last = SIZES[index] - 1
    at = {"first": 0, "boundary": min(last, CHUNK_BYTES - HEADER_BYTES), "last": last}[place]
    _payload(pair, index)[at] ^= 1
    outcome = pair.sink.engine.read("fused", pair.items(), deadline_ns=deadline()).wait()
    statuses = [result.status for result in outcome.items]
    assert statuses == [Status.STALE if i == index else Status.DONE for i in range(len(SIZES))]
    assert "checksum" in outcome.items[index].error


def test_a_long_block_that_is_gone_is_stale(pair: Pair) -> None:
    pair.source.slab.retire(pair.slots[-1])
    outcome = pair.sink.engine.read("fused", pair.items(), deadline_ns=deadline()).wait()
    assert [r.status for r in outcome.items[:-1]] == [Status.DONE] * (len(SIZES) - 1)
    assert outcome.items[-1].error == "the slot is void"


def _expect_of(copy: Source, pair: Pair) -> tuple[Header, ReadItem]:
    header = pair.source.slab.header(pair.slots[0])
    item = copy.item(pair.slots[0])
    assert header is not None
    return header, item


@pytest.mark.parametrize(
    ("change", "differs"),
    [
        ({"key": bytes(16)}, "key"),
        ({"format_code": FORMAT + 1}, "format"),
        ({"nbytes": 99}, "nbytes"),
        ({"generation": 999}, "generation"),
        ({"checksum": 5}, "checksum"),
        ({"incarnation": 77}, "incarnation"),
    ],
)
def test_inspection_names_what_differs(pair: Pair, change: dict[str, Any], differs: str) -> None:
    header, item = _expect_of(pair.copies[0], pair)
    seen = inspect(header.pack(), item.expect)
    assert seen == ("", header.checksum, header.epoch)
    assert differs in inspect(replace(header, **change).pack(), item.expect).differs
    nothing = replace(item.expect, generation=None, checksum=None, incarnation=None)
    assert not inspect(header.pack(), nothing).differs


def test_inspection_believes_no_damaged_header() -> None:
    raw = pack(
        key=bytes(16), format_code=1, nbytes=3, generation=1, checksum=checksum(b"abc"),
        incarnation=1,
    )  # fmt: skip
    from hotset.transport.base import Expect

    expect = Expect(key=bytes(16), format_code=1, nbytes=3)
    assert not inspect(raw, expect).differs
    for at in range(HEADER_BYTES):
        damaged = bytearray(raw)
        damaged[at] ^= 0x40
        assert inspect(damaged, expect).differs == "the slot is void", at
