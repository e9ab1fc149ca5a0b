"""What a copy of a block is worth: stall avoided by a nearer tier, against bytes and decode.

Decides numbers, never a move. Must not know stores or events. For a block that a token uses with
chance p, in a cluster that computes t tokens a second:

    reuse horizon     1 / (p t) seconds between two uses
    value of a copy   uses within the payback time x (exposed read from the far tier - near tier)
    exposed           transfer + decode, less what hides behind the layer before
    it pays           value > time to move it there

After the expected value of perfect information about the next use (Belady 1966, on expectations);
the payback time is break-even analysis, as in `place_worth`. Invariants: arrays are int64 [blocks];
with nothing known about time every block is worth its popularity, and every move pays.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray

    from hotset.policies.linkmodel import LinkSpec
    from hotset.policies.types import BlockInfo

NEVER_NS = 1 << 62
_UNIT = 1024
"""Weights by block are integers in this unit."""
_MOST_WEIGHT = 64 * _UNIT


@dataclass(frozen=True, slots=True, kw_only=True)
class Rates:
    """How fast things go. `tokens_per_s` 0: nobody knows."""

    tokens_per_s: int
    uses_per_token: int  # blocks that a token uses, all layers, in thousandths
    hide_ns: int  # compute of one layer, behind which a transfer may hide


def reuse_horizon_ns(counts: NDArray[np.int64], *, rates: Rates) -> NDArray[np.int64]:
    """Return the expected time between two uses of each block; NEVER_NS where nobody knows."""
    total = int(counts.sum())
    uses_per_s = rates.tokens_per_s * rates.uses_per_token / 1000
    horizon = np.full(len(counts), NEVER_NS, dtype=np.int64)
    if not total or not uses_per_s:
        return horizon
    seen = counts > 0
    between = total / uses_per_s * 1e9 / counts[seen]
    horizon[seen] = np.minimum(between, float(NEVER_NS >> 1)).astype(np.int64)
    return horizon


def exposed_ns(
    nbytes: NDArray[np.int64], *, link: LinkSpec, hide_ns: int, decode_ns: NDArray[np.int64] | int
) -> NDArray[np.int64]:
    """Return what compute waits for a read of each block, decode included; at least 1."""
    wire = link.latency_ns + nbytes * 1_000_000_000 // link.bandwidth_bytes_per_s
    exposed: NDArray[np.int64] = np.maximum(wire + decode_ns - hide_ns, 1)
    return exposed


def saved_ns(
    nbytes: NDArray[np.int64], *, near: LinkSpec, far: LinkSpec, hide_ns: int
) -> NDArray[np.int64]:
    """Return the stall that one use avoids when the block is read from the near tier."""
    slow = exposed_ns(nbytes, link=far, hide_ns=hide_ns, decode_ns=0)
    fast = exposed_ns(nbytes, link=near, hide_ns=hide_ns, decode_ns=0)
    saved: NDArray[np.int64] = np.maximum(slow - fast, 0)
    return saved


def weights(saved: NDArray[np.int64], nbytes: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return stall saved by byte, relative to the mean block, in units of 1 / 1024.

    Blocks of one size have one weight, so that popularity alone orders them.
    """
    if not len(nbytes):
        return np.zeros(0, dtype=np.int64)
    if int(nbytes.min()) == int(nbytes.max()) or not saved.any():
        return np.full(len(nbytes), _UNIT, dtype=np.int64)
    by_byte = saved / nbytes
    scaled = np.rint(by_byte * (_UNIT / by_byte.mean()))
    found: NDArray[np.int64] = np.clip(scaled, 1, _MOST_WEIGHT).astype(np.int64)
    return found


def worth(counts: NDArray[np.int64], weight: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return popularity times weight, in the counts' unit; what is used is worth something."""
    if not len(weight) or (int(weight.min()) == int(weight.max()) == _UNIT):
        return counts
    found: NDArray[np.int64] = np.maximum(counts * weight // _UNIT, counts > 0)
    return found


def pays(
    counts: NDArray[np.int64],
    *,
    saved: NDArray[np.int64],
    move_ns: NDArray[np.int64],
    rates: Rates,
    payback_ns: int,
) -> NDArray[np.bool_]:
    """Say for each block whether the stall that a nearer copy avoids outweighs moving it there."""
    total = int(counts.sum())
    if not rates.tokens_per_s or not rates.uses_per_token or not total:
        return np.ones(len(counts), dtype=np.bool_)
    uses_per_s = rates.tokens_per_s * rates.uses_per_token / 1000
    uses = counts * (uses_per_s * payback_ns / 1e9 / total)
    return uses * saved > move_ns


def sensitivities(
    blocks: Sequence[BlockInfo], kl_by_layer: Mapping[int, float]
) -> NDArray[np.int64]:
    """Return how much each block suffers from a cheap format, in units of 1 / 1024 of the mean.

    Layers that were not measured count as the most sensitive one; with no measurement all are 1.
    """
    if not kl_by_layer:
        return np.full(len(blocks), _UNIT, dtype=np.int64)
    most = max(kl_by_layer.values())
    raw = np.array([max(kl_by_layer.get(b.block.layer, most), 0.0) for b in blocks])
    mean = float(raw.mean())
    if mean <= 0:
        return np.full(len(blocks), _UNIT, dtype=np.int64)
    return np.clip(np.rint(raw * (_UNIT / mean)), 1, _MOST_WEIGHT).astype(np.int64)
