"""First-order damage of every block in every format, from one backward pass over a text.

For a small error d of a MoE layer's output at one token, KL is about half d' F d with the Fisher
matrix F of the next-token distribution. Labels drawn from the model's own distribution make the
square of (gradient . d) an unbiased sample of d' F d, so one backward pass serves all blocks and
all formats (Kunstner et al. 2019 on true and empirical Fisher; per-output use as in K-FAC, Martens
and Grosse 2015). d of a block is its router weight times the change of the expert's output.

The same pass gives the router-weighted output error of each block, d' d: cheaper to have (it needs
no gradient), and how well either ranks blocks is measured by `sensitivity_rank`.

Must not know which formats are wanted. Invariants: damages are sums over tokens, never negative;
cross terms between tokens and between blocks are left out, which is what the check against true KL
measures; nothing of the model changes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch.nn import functional

from hotset.blocks.experts import run_expert
from hotset.blocks.routing import experts_hit, group_rows
from hotset.blocks.sensitivity import FULL
from hotset.policies.types import BlockId

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from hotset.blocks.sensitivity import KLMeter

    Floats = NDArray[np.float64]

PSEUDO_TOKENS = 32.0
"""Weight of the layer's mean in a block's damage for each token: as if seen so often."""

EVEN_SHARE = 0.25
"""Part of the served text that is taken to use all experts evenly, since it may be of another kind
than the calibration text. Experts that only other kinds use would else be sacrificed first."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Damage:
    """What a text showed: sums over its tokens, kept apart by window for error bars.

    `nats` [W, L, E, F] and `counts` [W, L, E] tokens routed; axes are windows, MoE layers, experts,
    formats. `router` [L, E, F] is the router-weighted squared output error.
    """

    layers: tuple[int, ...]
    formats: tuple[str, ...]
    tokens: int
    nats: Floats
    counts: Floats
    router: Floats

    def join(self, other: Damage) -> Damage:
        """Both texts together."""
        return Damage(
            layers=self.layers,
            formats=self.formats,
            tokens=self.tokens + other.tokens,
            nats=np.concatenate([self.nats, other.nats]),
            counts=np.concatenate([self.counts, other.counts]),
            router=self.router + other.router,
        )


class _Tape:
    """Keeps each layer's input and routing, and a probe whose gradient is the output's."""

    def __init__(self) -> None:
        self.seen: dict[int, tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]] = {}

    def layer(
        self, layer: int, hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor,
        out: torch.Tensor,
    ) -> torch.Tensor:  # fmt: skip
        """As `Observer.layer`: add a zero that collects the gradient."""
        probe = torch.zeros_like(out, requires_grad=True)
        self.seen[layer] = (hidden.detach(), index.detach(), weights.detach(), probe)
        return out + probe


def first_order(
    meter: KLMeter, windows: torch.Tensor, *, formats: tuple[str, ...], seed: int = 0
) -> Damage:
    """Damage of every block in each of `formats` on `windows` [W, T] of token ids."""
    random = torch.Generator().manual_seed(seed)
    found: Damage | None = None
    for batch in meter.batches(windows):
        part = _batch(meter, batch, formats=formats, random=random)
        found = part if found is None else found.join(part)
    if found is None:
        raise ValueError("windows is empty; give at least one window of tokens")
    return found


def _batch(
    meter: KLMeter, batch: torch.Tensor, *, formats: tuple[str, ...], random: torch.Generator
) -> Damage:
    tape = _Tape()
    with torch.enable_grad():
        logits = meter.logits(batch, observer=tape).flatten(0, 1)
        with torch.no_grad():
            labels = torch.multinomial(logits.softmax(dim=-1), 1, generator=random).squeeze(1)
        functional.cross_entropy(logits, labels, reduction="sum").backward()  # type: ignore[no-untyped-call] # torch has none
    layers = meter.catalog.layers
    shape = (batch.shape[0], len(layers), meter.catalog.num_experts, len(formats))
    nats = np.zeros(shape)
    router = np.zeros(shape[1:])
    counts = np.zeros(shape[:3])
    with torch.no_grad():
        for place, layer in enumerate(layers):
            hidden, index, weights, probe = tape.seen[layer]
            assert probe.grad is not None  # noqa: S101 - backward has just run
            for expert in experts_hit(index, num_experts=meter.catalog.num_experts):
                positions, tokens = group_rows(index, expert)
                window = (tokens // batch.shape[1]).numpy()
                counts[:, place, expert] = np.bincount(window, minlength=shape[0])
                rows, grads = hidden[tokens], probe.grad[tokens]
                share = weights[tokens, positions, None].float()
                block, module = BlockId(layer, expert), meter.skeleton.experts[layer]
                exact = run_expert(module, rows, meter.runner.weights(block, FULL))
                for code, form in enumerate(formats):
                    rounded = run_expert(module, rows, meter.runner.weights(block, form))
                    error = (rounded - exact) * share
                    router[place, expert, code] = float(error.square().sum())
                    cost = (grads * error).sum(dim=1).square_().mul_(0.5).double().numpy()
                    nats[:, place, expert, code] = np.bincount(window, cost, shape[0])
    return Damage(
        layers=layers, formats=formats, tokens=batch.numel(), nats=nats, counts=counts,
        router=router,
    )  # fmt: skip


def smoothed(
    sums: Floats, counts: Floats, *, tokens: int, top_k: int, pseudo_tokens: float = PSEUDO_TOKENS
) -> Floats:
    """Damage for each token of text, [L, E, F], with rarely used experts drawn to their layer.

    `sums` [L, E, F] over the text, `counts` [L, E] tokens routed. A block's damage for each routed
    token is averaged with `pseudo_tokens` tokens of its layer's mean, then taken times the blended
    frequency: an expert that the text never used has the layer's damage at a quarter of the even
    use, not a damage of zero.
    """
    routed = np.maximum(counts.sum(axis=1, keepdims=True), 1.0)  # [L, 1]
    mean = sums.sum(axis=1, keepdims=True) / routed[..., None]  # [L, 1, F]
    per_token = (sums + pseudo_tokens * mean) / (counts + pseudo_tokens)[..., None]
    damage: Floats = per_token * frequencies(counts, tokens=tokens, top_k=top_k)[..., None]
    return damage


def frequencies(counts: Floats, *, tokens: int, top_k: int) -> Floats:
    """Share of tokens routed to each block, [L, E], blended with even use; never 0."""
    even = top_k / counts.shape[1]
    blended: Floats = (1 - EVEN_SHARE) * counts / tokens + EVEN_SHARE * even
    return blended
