"""Whether blocks should cross a link compressed without loss.

Decides by nanoseconds: what full and packed reads take, and the time to decode. Must not know
codecs, links or clocks. Encoding does not count: a store does it once and keeps the copy.

Who reads a store measures link and decoder, the store packs: readers say what packing would save
them (`Reading`), each counts by the bytes that it reads, and the store goes by the mean, with a
margin, so that figures near the line do not make it pack and unpack in turns.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

MARGIN = 0.1
"""Share of a full read's time that must be at stake before a store changes its copies."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """What one reader has measured at one source.

    `gain` is as of `packing_gain`, `nbytes` what was read from there so far.
    """

    source: str
    nbytes: int
    gain: float


def packing_gain(*, full_ns: float, packed_ns: float, decode_ns: float) -> float:
    """Share of a full read's time that packing saves; negative: what it costs."""
    return 1.0 - (packed_ns + decode_ns) / full_ns if full_ns > 0 else 0.0


def expected_ns(full_ns: float, *, full_nbytes: int, packed_nbytes: int, latency_ns: int) -> float:
    """Time that a packed read would take: what full ones take beyond latency shrinks with bytes."""
    latency = min(full_ns, latency_ns)
    return latency + (full_ns - latency) * packed_nbytes / full_nbytes


def packing_pays(
    *, full_nbytes: int, packed_nbytes: int, decode_ns: int, link_bytes_per_s: int
) -> bool:
    """Tell whether the packed bytes and their decoding take less time than the full bytes."""
    if link_bytes_per_s <= 0:
        raise ValueError(f"link_bytes_per_s must be positive, not {link_bytes_per_s}")
    saved_ns = (full_nbytes - packed_nbytes) * 1_000_000_000 // link_bytes_per_s
    return decode_ns < saved_ns


def shared_gain(readings: Iterable[Reading]) -> float | None:
    """Mean gain of all readers of one source, by the bytes that they read; None without any."""
    found = list(readings)
    total = sum(one.nbytes for one in found)
    if total <= 0:
        return None
    return sum(one.gain * one.nbytes for one in found) / total


def should_pack(gain: float, *, packed: bool) -> bool:
    """Whether a store should hold packed copies, given that it does so now or not."""
    return gain > (-MARGIN if packed else MARGIN)
