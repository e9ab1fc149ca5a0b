"""The entropy code of exponents: optimal lengths, the same streams by both ways, damage is seen."""

from __future__ import annotations

import heapq

import numpy as np
import pytest
import torch
from format_layouts import make_layout, make_payload
from hypothesis import given, settings
from hypothesis import strategies as st

from hotset.blocks import formats_huffman as huffman
from hotset.blocks.formats_jit import COMPILED
from hotset.blocks.formats_lossless import DENSE, LosslessCodec
from hotset.errors import FormatError

RELAXED = settings(max_examples=60)
FEW = settings(max_examples=12)  # a step of torch for each of 4,096 weights


def histogram(values: dict[int, int]) -> np.ndarray:
    counts = np.zeros(256, dtype=np.int64)
    for symbol, count in values.items():
        counts[symbol] = count
    return counts


HISTOGRAMS = st.dictionaries(st.integers(0, 255), st.integers(1, 10**9), min_size=1).map(histogram)


@RELAXED
@given(HISTOGRAMS)
def test_lengths_make_a_code_that_is_no_longer_than_it_may_be(counts: np.ndarray) -> None:
    lengths = huffman.code_lengths(counts)
    assert ((lengths > 0) == (counts > 0)).all()
    assert huffman.is_code(lengths)
    codes = huffman.codes_of(lengths)
    words = [f"{codes[s]:011b}"[::-1][: lengths[s]] for s in np.flatnonzero(lengths)]
    assert not any(a != b and b.startswith(a) for a in words for b in words)


@RELAXED
@given(st.dictionaries(st.integers(0, 255), st.integers(1, 64), min_size=2, max_size=32))
def test_lengths_are_huffmans_where_none_is_too_long(values: dict[int, int]) -> None:
    heap = [(count, 0) for count in values.values()]
    heapq.heapify(heap)
    total, deepest = 0, 0
    while len(heap) > 1:
        first, second = heapq.heappop(heap), heapq.heappop(heap)
        deepest = max(first[1], second[1]) + 1
        total += first[0] + second[0]
        heapq.heappush(heap, (first[0] + second[0], deepest))
    lengths = huffman.code_lengths(histogram(values))
    cost = sum(count * int(lengths[symbol]) for symbol, count in values.items())
    assert cost >= total
    if deepest <= huffman.LONGEST:
        assert cost == total


@FEW
@given(st.integers(1, 3 * huffman.RUN + 5), st.integers(1, 256), st.integers(0, 2**32))
def test_both_ways_make_and_read_the_same_streams(count: int, symbols: int, seed: int) -> None:
    random = np.random.default_rng(seed)
    exponents = (random.geometric(0.4, count) % symbols).astype(np.uint8)
    lengths = huffman.code_lengths(np.bincount(exponents, minlength=256))
    starts, bits = huffman.encode_anywhere(torch.from_numpy(exponents), lengths)
    padded = torch.cat((bits, torch.zeros(huffman.SPARE, dtype=torch.uint8)))
    back = huffman.decode_anywhere(padded, starts, lengths, count=count)
    assert back is not None
    assert (back.numpy() == exponents).all()
    if not COMPILED:
        pytest.skip("numba is not installed")
    codes = huffman.codes_of(lengths)
    made = np.zeros(2 * count + 64, dtype=np.uint8)
    where = np.zeros(huffman.stream_count(count) + 1, dtype=np.int64)
    huffman.encode_streams(exponents, codes, lengths, where, made)
    assert (where == starts.numpy()).all()
    assert (made[: bits.numel()] == bits.numpy()).all()
    out = np.zeros(count, dtype=np.uint16)
    rest = np.zeros(count, dtype=np.uint8)
    assert huffman.decode_streams(padded.numpy(), where, codes, lengths, rest, out)
    assert (out >> 7 == exponents).all()


@FEW
@given(st.integers(1, 5 * huffman.RUN), st.integers(0, 2**32), st.data())
def test_damaged_streams_are_read_within_bounds(count: int, seed: int, data: st.DataObject) -> None:
    random = np.random.default_rng(seed)
    exponents = (random.geometric(0.4, count) % 40).astype(np.uint8)
    lengths = huffman.code_lengths(np.bincount(exponents, minlength=256))
    starts, bits = huffman.encode_anywhere(torch.from_numpy(exponents), lengths)
    padded = torch.cat((bits, torch.zeros(huffman.SPARE, dtype=torch.uint8)))
    noise = random.integers(0, 256, padded.numel()).astype(np.uint8)
    padded = torch.from_numpy(noise) if data.draw(st.booleans()) else padded.zero_()
    back = huffman.decode_anywhere(padded, starts, lengths, count=count)
    assert back is None or back.numel() == count
    if COMPILED:
        out, rest = np.zeros(count, dtype=np.uint16), np.zeros(count, dtype=np.uint8)
        codes = huffman.codes_of(lengths)
        good = huffman.decode_streams(padded.numpy(), starts.numpy(), codes, lengths, rest, out)
        assert good == (back is not None)
        assert back is None or (out >> 7 == back.numpy()).all()


def test_parts_that_do_not_fit_are_refused_although_the_slot_was_verified() -> None:
    layout = make_layout(hidden=64, inter=64)
    dense = LosslessCodec(dense=True)
    block = torch.zeros(dense.nbytes(layout), dtype=torch.uint8)
    used = dense.encode(make_payload(layout, seed=1, spread=0.2), layout, block)
    assert dense.header(block[:used], layout).mode == DENSE
    out = torch.empty(layout.nbytes, dtype=torch.uint8)
    body = 64
    for at in (body, body + 64 + 127, body + 64 + 256 + layout.nbytes // 2 + 4):
        wrong = block[:used].clone()
        wrong[at] += 1
        with pytest.raises(FormatError, match=r"parts it names|damaged"):
            dense.decode(wrong, layout, out, verified=True)
