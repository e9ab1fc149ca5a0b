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


_DISBELIEF = 0.1
"""Weight left to all earlier samples together when a read was far faster than they said."""
_PRIOR_WEIGHT = 0.01
_FASTEST_NS_PER_BYTE = 1e-4
"""10 TB/s: below this the samples say nothing about bytes."""


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


def prefetch_bar(
    *,
    fetch_ns: int,
    ahead_ns: int,
    busy_ratio: float,
    start_ns: int = 0,
    missed_ns: int | None = None,
) -> float:
    """Least chance of use, 0..1, at which a prefetch is worth its place on the link.

    With chance p it hides what a demand fetch has been seen to cost (`missed_ns`; None: not
    measured, `fetch_ns` then), but no more than `ahead_ns`, the time until its layer comes. With
    chance 1 - p it was in vain: it took `start_ns` of compute, and held up a demand
    fetch for `fetch_ns` if one came meanwhile, which happens with `busy_ratio` (share of the time
    in which demand fetches occupy the link). Where starting costs nothing, every guess is free on
    an idle link; on a link that is the bottleneck nearly certain ones pay.
    """
    vain = busy_ratio * fetch_ns + start_ns
    hidden = min(fetch_ns if missed_ns is None else missed_ns, ahead_ns)
    return vain / (vain + hidden) if vain + hidden > 0 else 0.0


class LinkCost:
    """Expected time of a read over one link: latency + bytes x ns per byte, from samples.

    Least squares over samples that fade by `gain`. Each is weighted by the inverse square of its
    size plus the size whose bytes take as long as the latency, so that small and large reads
    count alike. The first guess stays in with a small weight, which tells the two terms apart
    while all reads have one size. A sample far above the line is clipped to `clip` times the
    expectation: one hiccup, or the connection that the first read waits for, does not scare traffic
    away, the same excess again and again does. A read that was far faster says more than those
    before it, since many things slow a read down and none makes it faster than its link.
    """

    __slots__ = (
        "_clip",
        "_fade",
        "_latency_bytes",
        "_latency_ns",
        "_nn",
        "_ns_per_byte",
        "_nt",
        "_prior",
        "_w",
        "_wn",
        "_wt",
        "samples",
    )

    def __init__(
        self,
        *,
        latency_ns: float = 50_000.0,
        bytes_per_s: float = 1e9,
        gain: float = 0.05,
        clip: float = 3.0,
    ) -> None:
        """Start from a guess, for instance the profile of the tier."""
        self._latency_ns = float(latency_ns)
        self._ns_per_byte = 1e9 / bytes_per_s
        self._fade = 1.0 - gain
        self._clip = clip
        self._w = self._wn = self._nn = self._wt = self._nt = 0.0
        self.samples = 0
        self._latency_bytes = max(self._latency_ns, 1e3) / self._ns_per_byte
        # Two reads that the guess explains: an empty one and one that is mostly bytes.
        long_bytes = 9.0 * self._latency_bytes
        self._prior = (
            (0.0, self._latency_ns),
            (long_bytes, self._latency_ns + long_bytes * self._ns_per_byte),
        )

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
        seen = min(max(float(elapsed_ns), 1.0), expected * self._clip)
        weight = (nbytes + self._latency_bytes) ** -2.0
        fade = self._fade
        if self._w and seen * self._clip < expected:
            fade = min(fade, _DISBELIEF * weight / self._w)
        self.samples += 1
        self._w = self._w * fade + weight
        self._wn = self._wn * fade + weight * nbytes
        self._nn = self._nn * fade + weight * nbytes * nbytes
        self._wt = self._wt * fade + weight * seen
        self._nt = self._nt * fade + weight * nbytes * seen
        self._solve()

    def _solve(self) -> None:
        w, wn, nn, wt, nt = self._w, self._wn, self._nn, self._wt, self._nt
        for nbytes, elapsed_ns in self._prior:
            weight = _PRIOR_WEIGHT * (nbytes + self._latency_bytes) ** -2.0
            w += weight
            wn += weight * nbytes
            nn += weight * nbytes * nbytes
            wt += weight * elapsed_ns
            nt += weight * nbytes * elapsed_ns
        det = w * nn - wn * wn
        per_byte = (w * nt - wn * wt) / det
        latency = (nn * wt - wn * nt) / det
        if latency < 0.0:
            latency, per_byte = 0.0, nt / nn
        if per_byte < _FASTEST_NS_PER_BYTE:
            latency, per_byte = wt / w, _FASTEST_NS_PER_BYTE
        self._latency_ns, self._ns_per_byte = latency, per_byte
