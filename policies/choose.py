"""Two choices of the token path: move the tokens or the weights, and from which source.

Decides by expected nanoseconds; must not know clocks, links or peers. A cost is an estimate from
samples that the caller observed. Invariants: same samples, same answer; ties fall to the choice
that moves fewer bytes, then to the store's name.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from hotset.policies.types import Copy


class Move(StrEnum):
    """What crosses the link."""

    TOKENS = "tokens"  # dispatch the rows to a worker that has the expert
    WEIGHTS = "weights"  # fetch the block and compute here


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """What to move, with the two prices that were compared (both expected ns)."""

    move: Move
    tokens_ns: int
    weights_ns: int


def move_tokens_or_weights(  # noqa: PLR0913 - one argument for each term of the comparison
    rows: int,
    *,
    dispatch_ns: int | None,
    fetch_ns: int,
    row_ns: int = 0,
    reuse_probability: float = 0.0,
    horizon_steps: int = 16,
    victim_probability: float = 0.0,
) -> Choice:
    """Choose between dispatching `rows` tokens and fetching the expert's weights.

    `dispatch_ns` is the whole round trip of one dispatch (None: nobody can take the rows),
    `row_ns` what each row adds to it, `fetch_ns` the time until the block is here.
    A fetched block also serves later steps: with chance `reuse_probability` a step it saves a
    dispatch, over at most `horizon_steps` steps. It displaces a copy that is needed with chance
    `victim_probability` a step, which costs the cheaper of the two ways again.
    """
    if dispatch_ns is None:
        return Choice(move=Move.WEIGHTS, tokens_ns=-1, weights_ns=fetch_ns)
    tokens_ns = dispatch_ns + rows * row_ns
    again_ns = min(tokens_ns, fetch_ns)
    net_uses = (reuse_probability - victim_probability) * horizon_steps
    weights_ns = int(fetch_ns - net_uses * again_ns)
    move = Move.WEIGHTS if weights_ns < tokens_ns else Move.TOKENS
    return Choice(move=move, tokens_ns=tokens_ns, weights_ns=weights_ns)


def order_sources(copies: Iterable[Copy], link_cost_ns: Mapping[str, int]) -> list[Copy]:
    """Return the copies, cheapest link first; a store without a known cost comes last.

    `link_cost_ns[store]` is the expected time of this block over the link from that store.
    """
    unknown = max(link_cost_ns.values(), default=0) + 1
    return sorted(
        copies,
        key=lambda copy: (link_cost_ns.get(copy.store, unknown), copy.nbytes, copy.store),
    )


class LinkCost:
    """Expected time of a read over one link: latency + bytes x ns per byte, from samples.

    Both terms are moving averages, told apart by size: a sample first gives back what the
    present line explains, and the rest is split by how much of it is due to bytes. A sample far
    above the line is clipped to `clip` times the expectation, so that one hiccup does not scare
    traffic away; the same excess again and again does move the line.
    """

    __slots__ = ("_clip", "_gain", "_latency_ns", "_ns_per_byte", "samples")

    def __init__(
        self,
        *,
        latency_ns: float = 50_000.0,
        bytes_per_s: float = 1e9,
        gain: float = 0.1,
        clip: float = 3.0,
    ) -> None:
        """Start from a guess, for instance the profile of the tier."""
        self._latency_ns = float(latency_ns)
        self._ns_per_byte = 1e9 / bytes_per_s
        self._gain = gain
        self._clip = clip
        self.samples = 0

    @property
    def latency_ns(self) -> int:
        """Estimated time of an empty read."""
        return int(self._latency_ns)

    @property
    def bytes_per_s(self) -> int:
        """Estimated bandwidth."""
        return int(1e9 / self._ns_per_byte)

    def estimate_ns(self, nbytes: int) -> int:
        """Return the expected time of a read of `nbytes`."""
        return int(self._latency_ns + nbytes * self._ns_per_byte)

    def observe(self, nbytes: int, *, elapsed_ns: int) -> None:
        """Learn from one read that took `elapsed_ns`."""
        expected = self._latency_ns + nbytes * self._ns_per_byte
        if self.samples >= 8:
            seen = min(max(float(elapsed_ns), expected / self._clip), expected * self._clip)
            gain = self._gain
        else:
            seen = float(elapsed_ns)
            gain = max(self._gain, 1.0 / (self.samples + 2))
        self.samples += 1
        by_bytes = nbytes * self._ns_per_byte / expected if expected > 0 else 0.5
        error = (seen - expected) * gain
        if nbytes > 0:
            step = error * by_bytes / nbytes
            self._ns_per_byte = max(self._ns_per_byte + step, 1e-4)  # at most 10 TB/s
        self._latency_ns = max(self._latency_ns + error * (1.0 - by_bytes), 0.0)
