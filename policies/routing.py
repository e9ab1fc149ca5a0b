"""What recorded routing says about offloading: skew, locality, and a cache size.

Decides a verdict from a trace [tokens, L, k]. Must not know files or links.

SRP and SCH are the measures of local routing consistency of Liang et al. (arXiv:2505.16056):
SRP(m) asks how well one fixed group of experts covers a segment of m tokens (F1 of the best
threshold on the counts within the segment); SCH(m, c) is the share of uses that the c experts
most used in a segment cover, the best hit ratio of a cache that changes only between segments.
The hit curve of LRU comes from stack distances (Mattson et al., 1970), all sizes in one pass.

Invariants: ratios lie in 0..1; SCH and the hit curve never fall with the size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

SEGMENTS = (4, 16, 64)
"""Lengths of segments in tokens."""
_SUITS = 0.15
"""Hits beyond those of an equally large random cache from which offloading suits the model."""
_SUITS_IN_PART = 0.05
_ENOUGH = 0.95
"""The best size is the smallest with this share of the largest excess of hits over size."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RoutingAnalysis:
    """Means over layers; `lru_hit_ratio[c]` is that of c slots a layer, c = 0..E."""

    tokens: int
    sequences: int
    layers: int
    num_experts: int
    top_k: int
    entropy_ratio: float  # entropy of use / log2(E): 1 is uniform
    skew_ratio: float  # uses of the busiest expert / mean uses
    top_tenth_ratio: float  # share of uses that the busiest tenth of the experts has
    repeat_ratio: float  # share of uses that the same sequence's last token had, too
    srp: dict[int, float]
    sch: dict[int, dict[int, float]]  # segment -> slots a layer -> share
    lru_hit_ratio: tuple[float, ...]
    best_slots: int
    excess_ratio: float  # LRU hits at the best size beyond those of a random cache
    verdict: str


def analyze_routing(
    experts: NDArray[np.integer], seq: NDArray[np.integer], *, num_experts: int, sample: int = 4000
) -> RoutingAnalysis:
    """Analyze `experts` [tokens, L, k]; the hit curve is measured on the first `sample` tokens."""
    tokens, layers, top_k = experts.shape
    uses = np.array(
        [
            np.bincount(experts[:, layer].reshape(-1), minlength=num_experts)
            for layer in range(layers)
        ]
    )
    share = uses / uses.sum(axis=1, keepdims=True)
    logs = np.log2(np.where(share > 0, share, 1.0))
    tenth = max(1, round(num_experts / 10))
    curve = _lru_curve(experts[:sample], num_experts=num_experts)
    excess = curve - np.arange(num_experts + 1) / num_experts
    best = int((excess >= _ENOUGH * excess.max()).argmax())
    sizes = sorted({min(num_experts, round(top_k * f)) for f in (1, 1.5, 2, 3, 4)})
    srp, sch = _consistency(experts, seq, num_experts=num_experts, sizes=sizes)
    return RoutingAnalysis(
        tokens=tokens,
        sequences=len(np.unique(seq)),
        layers=layers,
        num_experts=num_experts,
        top_k=top_k,
        entropy_ratio=float(-(share * logs).sum(axis=1).mean() / max(1.0, np.log2(num_experts))),
        skew_ratio=float((uses.max(axis=1) / uses.mean(axis=1)).mean()),
        top_tenth_ratio=float(np.sort(share, axis=1)[:, -tenth:].sum(axis=1).mean()),
        repeat_ratio=_repeats(experts, seq),
        srp=srp,
        sch=sch,
        lru_hit_ratio=tuple(curve.tolist()),
        best_slots=best,
        excess_ratio=float(excess[best]),
        verdict=_verdict(best, num_experts=num_experts, top_k=top_k, hits=curve[best],
                         excess=float(excess[best])),
    )  # fmt: skip


def _verdict(best: int, *, num_experts: int, top_k: int, hits: float, excess: float) -> str:
    share = round(100 * best / num_experts)
    cache = (
        f"{best} of {num_experts} experts a layer ({share} %, {best / top_k:.1f} times the "
        f"{top_k} that a token uses) serve {100 * hits:.0f} % of uses under LRU"
    )
    beyond = f"{100 * excess:.0f} points more than chance"
    if excess >= _SUITS:
        return f"Offloading suits this model: {cache}, {beyond}."
    if excess >= _SUITS_IN_PART:
        return (
            f"Offloading suits this model only in part: {cache}, {beyond}. Keep more resident than "
            "that, or use prefetching and cheaper formats."
        )
    return (
        f"Offloading does not suit this model: at its best, {cache}, {beyond}. Misses are nearly "
        "what chance gives, so keep it resident or spread it over devices."
    )


def _repeats(experts: NDArray[np.integer], seq: NDArray[np.integer]) -> float:
    if len(experts) < 2:
        return 0.0
    again = np.zeros(experts[1:].shape, dtype=np.bool_)
    for place in range(experts.shape[2]):
        again |= experts[1:] == experts[:-1, :, place : place + 1]
    inside = seq[1:] == seq[:-1]
    return float(again[inside].mean()) if inside.any() else 0.0


def _consistency(
    experts: NDArray[np.integer],
    seq: NDArray[np.integer],
    *,
    num_experts: int,
    sizes: Sequence[int],
) -> tuple[dict[int, float], dict[int, dict[int, float]]]:
    tokens, layers, _ = experts.shape
    srp = dict.fromkeys(SEGMENTS, 0.0)
    sch = {length: dict.fromkeys(sizes, 0.0) for length in SEGMENTS}
    starts = {}
    for length in SEGMENTS:
        first = np.arange(0, tokens - length + 1, max(1, length // 4))
        starts[length] = first[seq[first] == seq[first + length - 1]]
    for layer in range(layers):
        used = np.zeros((tokens + 1, num_experts), dtype=np.int32)
        used[np.arange(1, tokens + 1)[:, None], experts[:, layer]] = 1
        np.cumsum(used, axis=0, out=used)
        for length in SEGMENTS:
            first = starts[length]
            if not len(first):
                continue
            counts = used[first + length] - used[first]
            srp[length] += _group_f1(counts, length=length) / layers
            covered = np.cumsum(-np.sort(-counts, axis=1), axis=1, dtype=np.int64).sum(axis=0)
            for size in sizes:
                sch[length][size] += float(covered[size - 1] / covered[-1]) / layers
    return srp, sch


def _group_f1(counts: NDArray[np.int32], *, length: int) -> float:
    """F1 of the groups {experts used at least a times in the segment}, for the best a."""
    histogram = np.bincount(counts.reshape(-1), minlength=length + 1)
    used = histogram * np.arange(length + 1)
    matches = np.cumsum(used[::-1])[::-1][1:]
    chosen = np.cumsum(histogram[::-1])[::-1][1:] * length
    return float((2.0 * matches / np.maximum(chosen + used.sum(), 1)).max())


def _lru_curve(experts: NDArray[np.integer], *, num_experts: int) -> NDArray[np.float64]:
    """Hit ratio of LRU with c slots a layer, c = 0..E, the mean over layers."""
    hits = np.zeros(num_experts + 1, dtype=np.int64)
    for layer in range(experts.shape[1]):
        recent: list[int] = []
        for chosen in experts[:, layer].tolist():
            for depth in [recent.index(expert) for expert in chosen if expert in recent]:
                hits[depth + 1] += 1
            recent = [*chosen, *(expert for expert in recent if expert not in chosen)]
    curve: NDArray[np.float64] = np.cumsum(hits) / max(1, experts.size)
    return curve
