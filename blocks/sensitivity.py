"""Measures what cheaper formats do to a model: paired KL of the next-token distribution, in nats.

`KLMeter.measure(mix, windows)` runs the same tokens through the full-precision experts and through
the mix, and gives KL(full || mix) for every token. Decides nothing. Must not know where copies of
blocks are, nor which mix is wanted.

Invariants: the dense part is never changed; the mix of no demotion gives exactly 0; arithmetic is
float32 on the decoded weights, so what is measured is the format and not the noise of bf16
activations, which depends on the kernel.

Why paired KL and not the difference of mean loss: the paired difference of two distributions on
the same token has a spread of its own size, the difference of two losses has that of the text.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from torch.nn import functional

from hotset.blocks.divergence import paired_kl
from hotset.blocks.experts import ExpertWeights, layout_dtype, run_expert, view_weights
from hotset.blocks.formats import codec
from hotset.blocks.hf import load_skeleton
from hotset.blocks.local import BlockReader
from hotset.blocks.routing import combine_eager, experts_hit, group_rows
from hotset.blocks.sensitivity_stats import PairedKL
from hotset.policies.types import BlockId

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

    from hotset.blocks.checkpoint import BlockLayout, Catalog
    from hotset.blocks.experts import ExpertsModule
    from hotset.blocks.hf import Skeleton

FULL = "bf16"
"""Format of blocks that a mix does not name."""
_CACHE_BYTES = 1 << 30  # decoded weights kept
_REFERENCE_BYTES = 1 << 29  # log-probabilities of the reference kept
_LOGITS_BYTES = 1 << 28  # of one pass; a large vocabulary makes batches smaller
_BATCH_TOKENS = 2048


class Observer(Protocol):
    """Sees every MoE layer of a pass at full precision; may replace its output."""

    def layer(
        self, layer: int, hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor,
        out: torch.Tensor,
    ) -> torch.Tensor:  # fmt: skip
        """Give the output [n, H] to go on with; `hidden` [n, H], `index` and `weights` [n, K]."""


class MixRunner:
    """Runs each expert in the format that the mix names, in float32, from the files."""

    def __init__(self, catalog: Catalog, *, cache_bytes: int) -> None:
        """Keep up to `cache_bytes` of decoded weights, least recently used first to go."""
        self.catalog = catalog
        self.mix: Mapping[BlockId, str] = {}
        self.observer: Observer | None = None
        self._reader = BlockReader(catalog)
        self._cache: OrderedDict[tuple[BlockId, str], ExpertWeights] = OrderedDict()
        width = torch.float32.itemsize
        own = getattr(torch, catalog.dtype).itemsize
        self._most = max(catalog.top_k + 1, cache_bytes // (catalog.block_nbytes // own * width))

    def run(
        self,
        layer: int,
        module: ExpertsModule,
        hidden: torch.Tensor,
        top_k_index: torch.Tensor,
        top_k_weights: torch.Tensor,
    ) -> torch.Tensor:
        """As `ExpertRunner.run`."""
        outputs = {}
        for expert in experts_hit(top_k_index, num_experts=self.catalog.num_experts):
            block = BlockId(layer, expert)
            weights = self.weights(block, self.mix.get(block, FULL))
            tokens = group_rows(top_k_index, expert).tokens
            outputs[expert] = run_expert(module, hidden[tokens], weights)
        out = combine_eager(hidden, top_k_index, top_k_weights, outputs)
        if self.observer is None:
            return out
        return self.observer.layer(layer, hidden, top_k_index, top_k_weights, out)

    def weights(self, block: BlockId, form: str) -> ExpertWeights:
        """Weights of `block` after a round trip through `form`, in float32."""
        key = (block, form)
        found = self._cache.get(key)
        if found is not None:
            self._cache.move_to_end(key)
            return found
        payload = torch.empty(self.catalog.block_nbytes, dtype=torch.uint8)
        self._reader.read(block, payload)
        layout = self.catalog.layout
        if form != FULL:
            payload = rounded(payload, layout, form=form)
        made = _float(view_weights(payload, layout))
        self._cache[key] = made
        while len(self._cache) > self._most:
            self._cache.popitem(last=False)
        return made

    def close(self) -> None:
        """Close the files and forget the weights."""
        self._reader.close()
        self._cache.clear()


class KLMeter:
    """A model whose experts can be given any mix of formats, and the divergence that it causes."""

    def __init__(
        self,
        path: str | Path,
        *,
        cache_bytes: int = _CACHE_BYTES,
        reference_bytes: int = _REFERENCE_BYTES,
        batch_tokens: int = _BATCH_TOKENS,
    ) -> None:
        """Load the dense part in float32. Raises CheckpointError as `load_skeleton` does."""
        self.skeleton: Skeleton = load_skeleton(path)
        self.skeleton.model.float()
        self.catalog: Catalog = self.skeleton.catalog
        self.runner = MixRunner(self.catalog, cache_bytes=cache_bytes)
        self.skeleton.bind(self.runner)
        vocabulary = int(self.skeleton.model.config.vocab_size)
        fitting = _LOGITS_BYTES // (vocabulary * torch.float32.itemsize)
        self._batch_tokens = min(batch_tokens, fitting)
        self._reference_bytes = reference_bytes
        self._references: OrderedDict[bytes, torch.Tensor] = OrderedDict()

    @property
    def blocks(self) -> tuple[BlockId, ...]:
        """Every block, by layer and index."""
        return tuple(sorted(self.catalog.blocks))

    @property
    def full_bits(self) -> float:
        """Bits of one weight at full precision."""
        return 8.0 * layout_dtype(self.catalog.layout).itemsize

    def nbytes(self, form: str) -> int:
        """Bytes of a block in `form`."""
        return codec(form).nbytes(self.catalog.layout)

    def uniform(self, form: str, *, layers: tuple[int, ...] | None = None) -> dict[BlockId, str]:
        """Give the mix in which all blocks (of `layers`) are in `form`."""
        return {b: form for b in self.blocks if layers is None or b.layer in layers}

    def measure(self, mix: Mapping[BlockId, str], windows: torch.Tensor) -> PairedKL:
        """Compare `mix` with full precision on `windows` [W, T] of token ids."""
        kl, flips = [], []
        with torch.no_grad():
            for batch in self.batches(windows):
                full = self._reference(batch)
                mixed = functional.log_softmax(self._logits(batch, mix), dim=-1)
                kl.append(paired_kl(full, mixed))
                flips.append(full.argmax(dim=-1) != mixed.argmax(dim=-1))
        return PairedKL(
            kl=torch.cat(kl).double().numpy(), flips=torch.cat(flips).numpy().astype(np.bool_)
        )

    def logits(self, batch: torch.Tensor, *, observer: Observer | None = None) -> torch.Tensor:
        """Full-precision logits [B, T, V] of `batch` [B, T]; gradients flow if they are on."""
        self.runner.observer = observer
        try:
            return self._logits(batch, {})
        finally:
            self.runner.observer = None

    def routing(self, windows: torch.Tensor) -> dict[BlockId, int]:
        """Tokens of `windows` [W, T] that each block gets at full precision."""
        counter = _Counter()
        with torch.no_grad():
            for batch in self.batches(windows):
                self.logits(batch, observer=counter)
        return dict(counter.counts)

    def batches(self, windows: torch.Tensor) -> Iterator[torch.Tensor]:
        """Cut `windows` [W, T] into batches that one pass takes."""
        rows = max(1, self._batch_tokens // windows.shape[1])
        for start in range(0, windows.shape[0], rows):
            yield windows[start : start + rows]

    def close(self) -> None:
        """Free weights, references and files."""
        self.runner.close()
        self._references.clear()

    def _logits(self, batch: torch.Tensor, mix: Mapping[BlockId, str]) -> torch.Tensor:
        self.runner.mix = mix
        out: Any = self.skeleton.model(input_ids=batch, use_cache=False)
        logits: torch.Tensor = out.logits
        return logits

    def _reference(self, batch: torch.Tensor) -> torch.Tensor:
        """Log-probabilities at full precision; kept, as a search asks for the same text often."""
        key = batch.numpy().tobytes()
        found = self._references.get(key)
        if found is None:
            found = functional.log_softmax(self._logits(batch, {}), dim=-1)
            self._references[key] = found
            while len(self._references) > 1 and self._held() > self._reference_bytes:
                self._references.popitem(last=False)
        else:
            self._references.move_to_end(key)
        return found

    def _held(self) -> int:
        return sum(each.nbytes for each in self._references.values())


class _Counter:
    """Counts the experts that the routers choose."""

    def __init__(self) -> None:
        self.counts: Counter[BlockId] = Counter()

    def layer(
        self, layer: int, hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor,
        out: torch.Tensor,
    ) -> torch.Tensor:  # fmt: skip
        """As `Observer.layer`: change nothing."""
        del hidden, weights
        experts, counts = torch.unique(index, return_counts=True)
        for expert, count in zip(experts.tolist(), counts.tolist(), strict=True):
            self.counts[BlockId(layer, expert)] += count
        return out


def rounded(payload: torch.Tensor, layout: BlockLayout, *, form: str) -> torch.Tensor:
    """Encode the full-precision `payload` (u8, unchanged) and decode it into a fresh buffer."""
    coder = codec(form)
    encoded = torch.zeros(coder.nbytes(layout), dtype=torch.uint8)
    coder.encode(payload, layout, encoded)
    out = torch.empty(layout.nbytes, dtype=torch.uint8)
    coder.decode(encoded, layout, out, verified=True)
    return out


def _float(weights: ExpertWeights) -> ExpertWeights:
    """The same weights in float32."""
    biases = (weights.gate_up_bias, weights.down_bias)
    gate_up_bias, down_bias = (None if bias is None else bias.float() for bias in biases)
    return ExpertWeights(
        gate_up=weights.gate_up.float(),
        down=weights.down.float(),
        gate_up_bias=gate_up_bias,
        down_bias=down_bias,
    )
