"""What slots cost: the stride of a super-slot and the parts that it is cut into.

Arithmetic only; the slab does the rest. Must not know memory or copies.
"""

from __future__ import annotations

from typing import Final

from hotset.transport.header import HEADER_BYTES

ALIGN: Final = 64  # bytes; payloads start on a cache line


def slot_stride(slot_payload_bytes: int, *reduced_payload_bytes: int | None) -> int:
    """Bytes of one super-slot, headers included: what one full-size copy costs of a budget.

    It has room for two copies of the largest reduced size.
    """
    full = slot_bytes(slot_payload_bytes)
    reduced = [nbytes for nbytes in reduced_payload_bytes if nbytes is not None]
    if not reduced:
        return full
    half = slot_bytes(max(reduced))
    return 2 * max(half, -(-full // (2 * ALIGN)) * ALIGN)


def slot_bytes(nbytes: int) -> int:
    """Least bytes of a slot for a payload of `nbytes`, header included."""
    return HEADER_BYTES + -(-nbytes // ALIGN) * ALIGN


def slot_parts(nbytes: int, *, stride: int) -> int:
    """How many payloads of `nbytes` one super-slot of `stride` bytes serves, at least one."""
    return max(1, stride // slot_bytes(nbytes))


def part_bytes(parts: int, *, stride: int) -> int:
    """Bytes of one of the equal parts of a super-slot, header included: what a copy costs."""
    return stride // parts // ALIGN * ALIGN
