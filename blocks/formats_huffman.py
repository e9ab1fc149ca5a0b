"""Entropy code of exponents for the dense form of `bf16z`: Huffman in many short streams.

Exponents of trained weights carry some 2.6 bits. Code lengths are at most 11 bits (package-merge,
Larmore and Hirschberg 1990), codes are canonical, their bits stand lowest first. Each run of 4,096
weights is a stream of its own, which starts on a byte, so that streams are decoded side by side:
four at a time on a CPU, all of them at once with torch. One look at 11 bits gives up to four
symbols, as in the two-symbol tables of zstd.

Decides nothing about blocks: arrays in, arrays out. Must not know headers or layouts. Invariants:
equal counts give equal codes; what is decoded ends exactly where the next stream starts, or the
streams are called damaged; nothing outside the arrays is read, whatever the bits are.
"""

# ruff: noqa: ARG001, PLR0913, PLR0917 - an intrinsic names, by place, what only its code reads

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from hotset.blocks.formats_jit import COMPILED, compiled, emitted

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Bytes = NDArray[np.uint8]

RUN = 4096  # weights of a stream
LONGEST = 11  # bits of a code
SPARE = 8  # bytes behind the streams that a decoder may look at
_ENTRIES = 1 << LONGEST
_SIDE = 4  # streams that a CPU decodes side by side
_LOOKS = 5  # looks at one load of 57 bits or more
_MOST = 4 * _LOOKS  # symbols that one load may give

if COMPILED:
    from llvmlite import ir
    from numba import types

    def _at(target: Any, builder: Any, kind: Any, array: Any, place: Any, width: int) -> Any:
        data = target.make_array(kind)(target, builder, array).data
        address = builder.gep(data, [place])
        return builder.bitcast(address, ir.IntType(width).as_pointer())

    @emitted
    def _load64(_context: Any, array: Any, place: Any) -> Any:
        """8 bytes of an array of bytes as a u64."""

        def emit(target: Any, builder: Any, signature: Any, args: Any) -> Any:
            address = _at(target, builder, signature.args[0], args[0], args[1], 64)
            return builder.load(address, align=1)

        return types.uint64(array, types.int64), emit

    @emitted
    def _store32(_context: Any, array: Any, place: Any, value: Any) -> Any:
        """Write a u32 to an array of bytes."""

        def emit(target: Any, builder: Any, signature: Any, args: Any) -> Any:
            address = _at(target, builder, signature.args[0], args[0], args[1], 32)
            builder.store(args[2], address, align=1)
            return target.get_dummy_value()

        return types.void(array, types.int64, types.uint32), emit


def code_lengths(counts: NDArray[np.int64]) -> Bytes:
    """Bits of each of 256 symbols, at most LONGEST, 0 for those that do not occur."""
    used = [symbol for symbol in range(256) if counts[symbol]]
    lengths = np.zeros(256, dtype=np.uint8)
    if len(used) == 1:
        lengths[used[0]] = 1
        return lengths
    coins: list[tuple[int, tuple[int, ...]]] = sorted(
        (int(counts[symbol]), (symbol,)) for symbol in used
    )
    row = coins
    for _ in range(LONGEST - 1):
        pairs = [
            (row[at][0] + row[at + 1][0], row[at][1] + row[at + 1][1])
            for at in range(0, len(row) - 1, 2)
        ]
        row = sorted(coins + pairs)
    for _, symbols in row[: 2 * len(used) - 2]:
        for symbol in symbols:
            lengths[symbol] += 1
    return lengths


def codes_of(lengths: Bytes) -> NDArray[np.uint16]:
    """Canonical codes [256] for `lengths`, their first bit lowest."""
    codes = np.zeros(256, dtype=np.uint16)
    code, before = 0, 0
    for symbol in sorted(np.flatnonzero(lengths).tolist(), key=lambda s: (lengths[s], s)):
        bits = int(lengths[symbol])
        code <<= bits - before
        codes[symbol] = int(f"{code:0{bits}b}"[::-1], 2)
        code, before = code + 1, bits
    return codes


def is_code(lengths: Bytes) -> bool:
    """Whether lengths fit a code in which every bit string means something (or one symbol)."""
    used = lengths[lengths > 0].astype(np.int64)
    if used.size == 0 or used.max() > LONGEST:
        return False
    share = int((1 << (LONGEST - used)).sum())
    return share == _ENTRIES or (used.size == 1 and used[0] == 1)


def stream_count(weights: int) -> int:
    """Streams of so many weights."""
    return -(-weights // RUN)


# --- with numba ---------------------------------------------------------------------------------


@compiled
def encode_streams(exponents: Any, codes: Any, lengths: Any, starts: Any, bits: Any) -> None:
    """Fill `bits` and `starts` [streams + 1] (bytes) from all exponents."""
    place = 0
    for stream in range(starts.size - 1):
        starts[stream] = place
        held, count = np.uint64(0), 0
        for at in range(stream * RUN, min(exponents.size, (stream + 1) * RUN)):
            symbol = exponents[at]
            held |= np.uint64(codes[symbol]) << np.uint64(count)
            count += lengths[symbol]
            if count >= 32:
                _store32(bits, place, np.uint32(held & np.uint64(0xFFFFFFFF)))
                held >>= np.uint64(32)
                count -= 32
                place += 4
        while count > 0:
            bits[place] = np.uint8(held & np.uint64(0xFF))
            held >>= np.uint64(8)
            count -= 8
            place += 1
    starts[starts.size - 1] = place


@compiled
def _fill_table(codes: Any, lengths: Any, first: Any, table: Any) -> None:
    """Entries by 11 bits: `first` length | symbol << 8, `table` symbols, their count and bits."""
    for symbol in range(256):
        length = np.int64(lengths[symbol])
        if length:
            for at in range(np.int64(codes[symbol]), first.size, 1 << length):
                first[at] = np.uint16(length | symbol << 8)
    for at in range(table.size):
        used, count, symbols = np.int64(0), 0, np.uint64(0)
        while count < 4:
            entry = first[at >> used]
            length = np.int64(entry & np.uint16(0xFF))
            if length == 0 or used + length > LONGEST:
                break
            symbols |= np.uint64(entry >> np.uint16(8)) << np.uint64(8 * count)
            used += length
            count += 1
        table[at] = symbols | np.uint64(count) << np.uint64(32) | np.uint64(used) << np.uint64(40)


@compiled
def _decode_run(bits: Any, start: Any, first: Any, goal: Any, done: Any, count: Any) -> Any:
    """Decode one symbol at a time from bit `start` until `count` are done; gives the end."""
    place = start
    last: Any = bits.size - 8
    while done < count:
        window = _load64(bits, min(place >> 3, last)) >> np.uint64(place & 7)
        entry = first[np.int64(window & np.uint64(0x7FF))]
        goal[done] = np.uint8(entry >> np.uint16(8))
        place += max(1, np.int64(entry & np.uint16(0xFF)))
        done += 1
    return place


@compiled
def _window(bits: Any, place: Any) -> Any:
    """At least 57 bits from bit `place` on."""
    return _load64(bits, min(place >> 3, bits.size - 8)) >> np.uint64(place & 7)


@compiled
def _look(table: Any, window: Any, sums: Any, goal: Any, done: Any) -> Any:
    """Up to 4 symbols; gives the window and the sums (symbols | bits << 8) to go on with."""
    entry = table[window & np.uint64(0x7FF)]
    place = done + np.int64(sums & np.uint64(0xFF))
    _store32(goal, place, np.uint32(entry & np.uint64(0xFFFFFFFF)))
    return window >> (entry >> np.uint64(40)), sums + (entry >> np.uint64(32))


@compiled
def _on(place: Any, done: Any, sums: Any) -> Any:
    """The bit and the symbol to go on with."""
    return place + np.int64(sums >> np.uint64(8)), done + np.int64(sums & np.uint64(0xFF))


@compiled
def _rest_of_run(bits: Any, place: Any, table: Any, first: Any, goal: Any, done: Any) -> Any:
    """Decode one stream alone from bit `place` to its RUN symbols; gives the end."""
    before: Any = -1
    while before < done <= RUN - _MOST:
        before = done
        window, sums = _window(bits, place), np.uint64(0)
        for _ in range(_LOOKS):
            window, sums = _look(table, window, sums, goal, done)
        place, done = _on(place, done, sums)
    return _decode_run(bits, place, first, goal, done, RUN)


@compiled
def decode_streams(bits: Any, starts: Any, codes: Any, lengths: Any, rest: Any, out: Any) -> bool:
    """Decode exponents and join them with sign and mantissa `rest`; False: they are damaged."""
    first = np.zeros(_ENTRIES, np.uint16)
    table = np.zeros(_ENTRIES, np.uint64)
    _fill_table(codes, lengths, first, table)
    goals = np.zeros(_SIDE * RUN, np.uint8)
    whole = out.size // RUN
    for group in range(0, whole - whole % _SIDE, _SIDE):
        goal0, goal1 = goals[:RUN], goals[RUN : 2 * RUN]
        goal2, goal3 = goals[2 * RUN : 3 * RUN], goals[3 * RUN :]
        at0, at1 = np.int64(starts[group]) * 8, np.int64(starts[group + 1]) * 8
        at2, at3 = np.int64(starts[group + 2]) * 8, np.int64(starts[group + 3]) * 8
        done0: Any = 0
        done1: Any = 0
        done2: Any = 0
        done3: Any = 0
        while max(done0, done1, done2, done3) <= RUN - _MOST:
            before = done0 + done1 + done2 + done3
            # A look waits for the one before it, so looks of four streams take turns.
            window0, window1 = _window(bits, at0), _window(bits, at1)
            window2, window3 = _window(bits, at2), _window(bits, at3)
            sums0 = sums1 = sums2 = sums3 = np.uint64(0)
            for _ in range(_LOOKS):
                window0, sums0 = _look(table, window0, sums0, goal0, done0)
                window1, sums1 = _look(table, window1, sums1, goal1, done1)
                window2, sums2 = _look(table, window2, sums2, goal2, done2)
                window3, sums3 = _look(table, window3, sums3, goal3, done3)
            at0, done0 = _on(at0, done0, sums0)
            at1, done1 = _on(at1, done1, sums1)
            at2, done2 = _on(at2, done2, sums2)
            at3, done3 = _on(at3, done3, sums3)
            if done0 + done1 + done2 + done3 == before:
                return False
        at0 = _rest_of_run(bits, at0, table, first, goal0, done0)
        at1 = _rest_of_run(bits, at1, table, first, goal1, done1)
        at2 = _rest_of_run(bits, at2, table, first, goal2, done2)
        at3 = _rest_of_run(bits, at3, table, first, goal3, done3)
        ends = (at0, at1, at2, at3)
        for side in range(_SIDE):
            if (ends[side] + 7) >> 3 != np.int64(starts[group + side + 1]):
                return False
            _join(goals[side * RUN : (side + 1) * RUN], rest, out, (group + side) * RUN)
    goal = goals[:RUN]
    for stream in range(whole - whole % _SIDE, starts.size - 1):
        count = min(RUN, out.size - stream * RUN)
        end = _decode_run(bits, np.int64(starts[stream]) * 8, first, goal, 0, count)
        if (end + 7) >> 3 != np.int64(starts[stream + 1]):
            return False
        _join(goal[:count], rest, out, stream * RUN)
    return True


@compiled
def _join(exponents: Any, rest: Any, out: Any, start: int) -> None:
    parts = rest[start : start + exponents.size]
    goal = out[start : start + exponents.size]
    for i in range(exponents.size):
        part = np.uint16(parts[i])
        goal[i] = (
            (part & np.uint16(0x80)) << np.uint16(8)
            | np.uint16(exponents[i]) << np.uint16(7)
            | (part & np.uint16(0x7F))
        )


# --- with torch, on any device ------------------------------------------------------------------


def encode_anywhere(exponents: torch.Tensor, lengths: Bytes) -> tuple[torch.Tensor, torch.Tensor]:
    """Give starts i64 [streams + 1] in bytes and the bits u8 of exponents u8 [n]."""
    device, count = exponents.device, exponents.numel()
    streams = stream_count(count)
    codes = torch.from_numpy(codes_of(lengths).astype(np.int64)).to(device)
    widths = torch.from_numpy(lengths.astype(np.int64)).to(device)
    padded = torch.zeros(streams * RUN, dtype=torch.int64, device=device)
    width = torch.zeros_like(padded)
    padded[:count] = codes[exponents.long()]
    width[:count] = widths[exponents.long()]
    width = width.view(streams, RUN)
    ends = width.cumsum(dim=1)
    nbytes = (ends[:, -1] + 7) // 8
    starts = torch.zeros(streams + 1, dtype=torch.int64, device=device)
    starts[1:] = nbytes.cumsum(dim=0)
    places = (starts[:-1].unsqueeze(1) * 8 + ends - width).flatten()
    flat = torch.zeros(int(starts[-1]) * 8, dtype=torch.uint8, device=device)
    for bit in range(LONGEST):
        there = width.flatten() > bit
        flat[places[there] + bit] = (padded[there] >> bit & 1).to(torch.uint8)
    shifts = torch.arange(8, device=device)
    return starts, (flat.view(-1, 8).long() << shifts).sum(dim=1).to(torch.uint8)


def decode_anywhere(
    bits: torch.Tensor, starts: torch.Tensor, lengths: Bytes, *, count: int
) -> torch.Tensor | None:
    """Give the exponents u8 [count], all streams at once, a symbol a step; None: damaged."""
    device, streams = bits.device, stream_count(count)
    symbols = np.zeros(_ENTRIES, dtype=np.int64)
    widths = np.ones(_ENTRIES, dtype=np.int64)  # what is no code takes a bit, as in `_decode_run`
    codes = codes_of(lengths)
    for symbol in np.flatnonzero(lengths).tolist():
        places = slice(int(codes[symbol]), None, 1 << int(lengths[symbol]))
        symbols[places], widths[places] = symbol, lengths[symbol]
    symbol_of, width_of = (torch.from_numpy(one).to(device) for one in (symbols, widths))
    left = torch.full((streams,), RUN, dtype=torch.int64, device=device)
    left[-1] = count - (streams - 1) * RUN
    out = torch.zeros(streams, RUN, dtype=torch.uint8, device=device)
    place = starts[:-1] * 8
    last = bits.numel() - 3
    for step in range(int(left.max())):
        byte = (place >> 3).clamp(max=last)
        window = (bits[byte].long() | bits[byte + 1].long() << 8 | bits[byte + 2].long() << 16) >> (
            place & 7
        ) & (_ENTRIES - 1)
        out[:, step] = symbol_of[window].to(torch.uint8)
        place = place + width_of[window] * (step < left)
    if not torch.equal((place + 7) // 8, starts[1:]):
        return None
    return out.flatten()[:count]
