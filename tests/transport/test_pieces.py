"""Pieces in any order: every byte once, every chunk hashed once, the checksum of the whole."""

from __future__ import annotations

import random

import pytest
import xxhash
from hypothesis import given
from hypothesis import strategies as st

from hotset.transport.header import CHUNK_BYTES, HEADER_BYTES, checksum
from hotset.transport.pieces import Pieces

SIZES = st.one_of(
    st.integers(0, 3000),
    st.integers(CHUNK_BYTES - 2, CHUNK_BYTES + 2),
    st.integers(2 * CHUNK_BYTES, 4 * CHUNK_BYTES),
)


def test_short_payloads_have_a_plain_hash_and_long_ones_that_of_their_chunks() -> None:
    data = random.Random(1).randbytes(2 * CHUNK_BYTES + 5)
    assert checksum(data[:CHUNK_BYTES]) == xxhash.xxh3_64_intdigest(data[:CHUNK_BYTES])
    chunks = b"".join(
        xxhash.xxh3_64_intdigest(data[at : at + CHUNK_BYTES]).to_bytes(8, "little")
        for at in range(0, len(data), CHUNK_BYTES)
    )
    assert checksum(data) == xxhash.xxh3_64_intdigest(chunks)
    swapped = data[CHUNK_BYTES : 2 * CHUNK_BYTES] + data[:CHUNK_BYTES] + data[2 * CHUNK_BYTES :]
    assert checksum(swapped) != checksum(data)


@given(size=SIZES, bare=st.booleans(), seed=st.integers(0, 2**32), step=st.integers(1, 3))
def test_pieces_in_any_order_sum_up_to_the_payload(
    *, size: int, bare: bool, seed: int, step: int
) -> None:
    chance = random.Random(seed)
    data = chance.randbytes(size)
    pieces = Pieces(end=HEADER_BYTES + size, bare=bare)
    taken = []
    while pieces.todo:
        begin, end = pieces.take(chance.randint(1, step * CHUNK_BYTES))
        if begin == end:
            break
        taken.append((begin, end))
        if chance.random() < 0.2:  # it did not arrive
            pieces.give_back(*taken.pop())
    assert sum(end - begin for begin, end in taken) == pieces.end - (HEADER_BYTES if bare else 0)
    chance.shuffle(taken)
    for begin, end in taken:
        ahead = {}
        for number in pieces.chunks_within(begin, end):
            at, upto = pieces.chunk(number)
            assert begin <= at <= upto <= end
            ahead[number] = checksum(data[at - HEADER_BYTES : upto - HEADER_BYTES])
        pieces.landed(begin, end, ahead if chance.random() < 0.5 else {})
        while pieces.ready:
            number = pieces.ready.popleft()
            assert pieces.digests[number] is None
            at, upto = pieces.chunk(number)
            pieces.digests[number] = checksum(data[at - HEADER_BYTES : upto - HEADER_BYTES])
    for number in list(pieces.ready):  # a payload of nothing has one chunk of nothing
        pieces.digests[number] = checksum(b"")
    if size or not bare:
        assert pieces.complete
        assert pieces.checksum == checksum(data)


@pytest.mark.parametrize("nbytes", [1, CHUNK_BYTES, CHUNK_BYTES + 1, 5 * CHUNK_BYTES])
def test_a_piece_ends_with_a_chunk_where_there_is_one(nbytes: int) -> None:
    pieces = Pieces(end=HEADER_BYTES + 10 * CHUNK_BYTES, bare=False)
    begin, end = pieces.take(nbytes)
    assert begin == 0
    assert 0 < end <= nbytes
    assert end == nbytes or (end - HEADER_BYTES) % CHUNK_BYTES == 0


def test_a_chunk_that_came_with_its_hash_is_offered_to_nobody() -> None:
    """Another thread may be emptying `ready` at that moment."""
    pieces = Pieces(end=HEADER_BYTES + 2 * CHUNK_BYTES, bare=False)
    pieces.landed(0, HEADER_BYTES + CHUNK_BYTES, {0: 7})
    assert not pieces.ready
    pieces.landed(HEADER_BYTES + CHUNK_BYTES, pieces.end)
    assert list(pieces.ready) == [1]
    assert pieces.digests == [7, None]
