"""Whether a block should cross a link compressed without loss.

Decides by nanoseconds: the link's time for full and for packed bytes, and the time to decode. Must
not know codecs, links or clocks. Encoding does not count: a store does it once and keeps the copy.
"""

from __future__ import annotations


def packing_pays(
    *, full_nbytes: int, packed_nbytes: int, decode_ns: int, link_bytes_per_s: int
) -> bool:
    """Tell whether the packed bytes and their decoding take less time than the full bytes."""
    if link_bytes_per_s <= 0:
        raise ValueError(f"link_bytes_per_s must be positive, not {link_bytes_per_s}")
    saved_ns = (full_nbytes - packed_nbytes) * 1_000_000_000 // link_bytes_per_s
    return decode_ns < saved_ns
