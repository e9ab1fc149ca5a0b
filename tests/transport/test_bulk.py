"""Copies and hashes of whole posts: compiled code and Python's calls agree to the byte."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hotset.transport import bulk
from hotset.transport.bulk import NO_HASH, Bulk, Part
from hotset.transport.header import checksum, combine, digest
from hotset.transport.slab import Slab

ROOM = 3 << 20


@pytest.fixture(scope="module")
def slabs() -> tuple[Slab, Slab]:
    """One to copy from, with random bytes, and one to copy to."""
    here, there = (
        Slab(capacity_bytes=ROOM + 4096, slot_payload_bytes=ROOM, name=name, incarnation=1)
        for name in ("here", "there")
    )
    there.memory.write(0, random.Random(5).randbytes(ROOM))
    return here, there


@pytest.fixture(params=["compiled", "plain"])
def kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Have the compiled code, and use it for small parts too, or do without."""
    if request.param == "compiled":
        assert bulk.KERNELS.load(), "numba and xxhash are dependencies: it must be there"
        monkeypatch.setattr(bulk, "WORTH_BYTES", 0)
    else:
        monkeypatch.setattr(bulk, "WORTH_BYTES", 1 << 60)
    return request.param


@pytest.mark.usefixtures("kernels")
@settings(max_examples=15)
@given(data=st.data())
def test_every_part_is_copied_and_hashed(slabs: tuple[Slab, Slab], data: st.DataObject) -> None:
    here, there = slabs
    size = st.integers(1, 60_000)
    sizes = data.draw(st.lists(size, min_size=1, max_size=6))
    parts, at = [], data.draw(st.integers(0, 1000))
    for nbytes in sizes:
        skip = data.draw(st.sampled_from([0, min(64, nbytes), NO_HASH]))
        parts.append(Part(at, data.draw(st.integers(0, ROOM - nbytes)), nbytes, skip))
        at += nbytes + data.draw(st.integers(0, 100))
    digests, took_ns = Bulk(here).copy_and_hash(parts, far=there.base_address)
    again, _ = Bulk(here).copy_and_hash(parts)
    assert took_ns >= 0
    for part, found, second in zip(parts, digests, again, strict=True):
        came = bytes(here.memory.read(part.local, part.nbytes))
        assert came == bytes(there.memory.read(part.remote, part.nbytes))
        wanted = 0 if part.skip == NO_HASH else digest(came[part.skip :])
        assert (found, second) == (wanted, wanted)


@pytest.mark.usefixtures("kernels")
def test_digests_of_chunks_make_the_checksum(slabs: tuple[Slab, Slab]) -> None:
    here, there = slabs
    chunk = 1 << 20
    parts = [Part(at, at, min(chunk, ROOM - 5 - at)) for at in range(0, ROOM - 5, chunk)]
    digests, _ = Bulk(here).copy_and_hash(parts, far=there.base_address)
    assert combine(digests) == checksum(there.memory.read(0, ROOM - 5))


def test_without_compiled_code_reads_go_on(
    slabs: tuple[Slab, Slab], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bulk, "KERNELS", absent := bulk.Kernels())
    monkeypatch.setitem(__import__("sys").modules, "hotset.transport.bulk_jit", None)
    monkeypatch.delattr("hotset.transport.bulk_jit", raising=False)
    assert not absent.load()
    here, there = slabs
    [found], _ = Bulk(here).copy_and_hash([Part(0, 0, ROOM)], far=there.base_address)
    assert found == digest(there.memory.read(0, ROOM))
