"""Random-initialised checkpoints of real MoE families, for tests and benchmarks.

The files are what `save_pretrained` writes (small ones are written by it), so whatever reads them
reads the published ones. Large ones are written a layer at a time and never held in memory.

Invariants: a tensor's values depend on the seed and its name alone, so both ways of writing give
the same model; amplitudes keep activations near one, so greedy text varies and a wrong expert
changes it. The text means nothing.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
import xxhash

from hotset.blocks.hf import is_experts
from hotset.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Iterator

Kind = Literal["olmoe", "mixtral", "qwen3_moe", "deepseek_v3", "gpt_oss"]
KINDS: tuple[Kind, ...] = get_args(Kind)
_STREAM_FROM_BYTES = 256 << 20
_HEAD = 16  # attention head size at small widths
_END = "<|end|>"
_EMBEDDING = "model.embed_tokens.weight"
_STRIDE = 77  # the head pulls from token t towards t + 77, so greedy text does not stop at one
_PULL = 5.0  # against the experts' noise of a few units: both decide


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """Sizes of a model."""

    layers: int
    experts: int
    hidden: int
    inter: int
    top_k: int
    vocab: int

    @property
    def expert_bytes(self) -> int:
        """Bytes of all routed experts in bfloat16."""
        return self.layers * self.experts * 3 * self.hidden * self.inter * 2


SCALES = {
    "tiny": Shape(layers=3, experts=8, hidden=64, inter=32, top_k=2, vocab=320),
    "small": Shape(layers=8, experts=32, hidden=256, inter=128, top_k=4, vocab=320),
    "large": Shape(layers=16, experts=64, hidden=1024, inter=320, top_k=8, vocab=320),
}
"""Named sizes: experts of 0.3, 50 and 2013 MB."""


def make_random_checkpoint(  # noqa: PLR0913 - the sizes of a model, all with a default
    kind: Kind,
    path: str | Path,
    *,
    seed: int = 0,
    scale: str = "tiny",
    layers: int | None = None,
    experts: int | None = None,
    hidden: int | None = None,
    inter: int | None = None,
    top_k: int | None = None,
    vocab: int | None = None,
    stream: bool | None = None,
    max_shard_bytes: int = 1 << 40,
    dtype: str = "bfloat16",
) -> Path:
    """Write a checkpoint of family `kind` with a byte-level tokenizer to `path`; give `path`.

    Sizes that are not given come from `SCALES[scale]`. `stream` writes one shard a layer, by
    default from 256 MB of experts on; else `save_pretrained` writes shards of `max_shard_bytes`.
    Raises ConfigError for an unknown kind or scale.
    """
    if kind not in KINDS or scale not in SCALES:
        raise ConfigError(
            f"no random checkpoint of kind {kind!r} and scale {scale!r}",
            remedy=f"choose a kind of {', '.join(KINDS)} and a scale of {', '.join(SCALES)}",
        )
    given = {
        "layers": layers, "experts": experts, "hidden": hidden, "inter": inter, "top_k": top_k,
        "vocab": vocab,
    }  # fmt: skip
    shape = replace(SCALES[scale], **{k: v for k, v in given.items() if v is not None})
    target = Path(path)
    target.mkdir(parents=True, exist_ok=True)
    model = _meta_model(kind, shape, dtype=dtype)
    if stream is None:
        stream = shape.expert_bytes >= _STREAM_FROM_BYTES
    if stream:
        _write_streamed(model, kind, target, seed=seed)
    else:
        _write_whole(model, target, seed=seed, max_shard_bytes=max_shard_bytes)
    _write_tokenizer(target, shape.vocab)
    return target


def _meta_model(kind: Kind, shape: Shape, *, dtype: str) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(kind, **_config(kind, shape))
    config.dtype = dtype
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype)).eval()


def _config(kind: Kind, shape: Shape) -> dict[str, Any]:
    heads = max(2, shape.hidden // 64)
    head = max(_HEAD, shape.hidden // heads)
    common: dict[str, Any] = {
        "vocab_size": shape.vocab,
        "hidden_size": shape.hidden,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "num_experts_per_tok": shape.top_k,
        "max_position_embeddings": 2048,
        "tie_word_embeddings": False,
        "bos_token_id": 256,
        "eos_token_id": 256,
        "pad_token_id": 256,
    }
    own: dict[Kind, dict[str, Any]] = {
        "olmoe": {"num_experts": shape.experts, "intermediate_size": shape.inter},
        "mixtral": {"num_local_experts": shape.experts, "intermediate_size": shape.inter},
        "qwen3_moe": {
            "num_experts": shape.experts,
            "moe_intermediate_size": shape.inter,
            "intermediate_size": 2 * shape.inter,
            "head_dim": head,
            "decoder_sparse_step": 1,
            "norm_topk_prob": True,
        },
        "deepseek_v3": {
            "n_routed_experts": shape.experts,
            "moe_intermediate_size": shape.inter,
            "intermediate_size": 2 * shape.inter,
            "n_group": 2,
            "topk_group": 1,
            "n_shared_experts": 1,
            "first_k_dense_replace": 1,
            "q_lora_rank": 2 * _HEAD,
            "kv_lora_rank": 2 * _HEAD,
            "qk_nope_head_dim": _HEAD,
            "qk_rope_head_dim": _HEAD,
            "v_head_dim": _HEAD,
        },
        "gpt_oss": {
            "num_local_experts": shape.experts,
            "intermediate_size": shape.inter,
            "head_dim": head,
            "sliding_window": 64,
            "layer_types": ["sliding_attention", "full_attention"] * shape.layers,
        },
    }
    own["gpt_oss"]["layer_types"] = own["gpt_oss"]["layer_types"][: shape.layers]
    return common | own[kind]


def _values(name: str, like: torch.Tensor, *, seed: int, fan_in: int) -> torch.Tensor:
    """Draw a tensor's values: matrices keep the amplitude, norms are near one, biases small."""
    random = torch.Generator().manual_seed(xxhash.xxh3_64_intdigest(name.encode(), seed) >> 1)
    values = torch.randn(like.shape, generator=random)
    if "norm" in name:
        values.mul_(0.1).add_(1.0)
    elif like.dim() < 2 or name.endswith(("bias", "sinks")):
        values.mul_(0.05)
    elif name != _EMBEDDING:
        values.mul_(fan_in**-0.5)
    if name == "lm_head.weight":
        embedding = _values(_EMBEDDING, like, seed=seed, fan_in=1).float()
        values.add_(embedding.roll(_STRIDE, 0), alpha=_PULL / fan_in)
    return values.to(like.dtype)


def _tensors(model: Any, *, seed: int) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the model's tensors, one in memory at a time; experts one by one within a tensor."""
    transposed = {name for name, m in model.named_modules() if is_experts(m) and m.is_transposed}
    for name, like in model.state_dict().items():
        flip = name.rpartition(".")[0] in transposed and like.dim() == 3
        fan_in = like.shape[-2 if flip else -1] if like.dim() >= 2 else 1
        yield name, _values(name, like, seed=seed, fan_in=fan_in)


def _write_whole(model: Any, target: Path, *, seed: int, max_shard_bytes: int) -> None:
    for name, values in _tensors(model, seed=seed):
        module = model.get_submodule(name.rpartition(".")[0])
        leaf = name.rpartition(".")[2]
        if leaf in module._parameters:  # noqa: SLF001 - replaces a meta tensor in place
            values = torch.nn.Parameter(values, requires_grad=False)  # noqa: PLW2901 - same value
        setattr(module, leaf, values)
    model.save_pretrained(str(target), max_shard_size=max_shard_bytes)


def _write_streamed(model: Any, kind: Kind, target: Path, *, seed: int) -> None:
    """Write one shard a layer, with the names of `save_pretrained`, and the index."""
    from safetensors.torch import save_file

    model.config.save_pretrained(str(target))
    held: dict[str, torch.Tensor] = {}
    places: dict[str, str] = {}
    total = 0

    def flush(layer: str) -> None:
        nonlocal total
        if held:
            file = f"model-{layer}.safetensors"
            save_file(held, target / file, metadata={"format": "pt"})
            places.update(dict.fromkeys(held, file))
            total += sum(t.numel() * t.element_size() for t in held.values())
            held.clear()

    current = "dense-0"
    for name, values in _tensors(model, seed=seed):
        parts = name.split(".")
        layer = f"layer-{int(parts[2]):05d}" if parts[1] == "layers" else f"dense-{parts[-2]}"
        if layer != current:
            flush(current)
            current = layer
        held.update(_disk_names(kind, name, values))
    flush(current)
    index = {"metadata": {"total_size": total}, "weight_map": places}
    (target / "model.safetensors.index.json").write_text(json.dumps(index))


def _disk_names(kind: Kind, name: str, values: torch.Tensor) -> dict[str, torch.Tensor]:
    """Give the tensors that `save_pretrained` makes of one of the model's."""
    disk = name.replace(".mlp.", ".block_sparse_moe.") if kind == "mixtral" else name
    base, _, leaf = disk.rpartition(".")
    if kind == "gpt_oss" or leaf not in {"gate_up_proj", "down_proj"} or values.dim() != 3:
        return {disk: values}
    gate, up, down = ("w1", "w3", "w2") if kind == "mixtral" else (
        "gate_proj", "up_proj", "down_proj"
    )  # fmt: skip
    out: dict[str, torch.Tensor] = {}
    for expert, matrix in enumerate(values):
        if leaf == "down_proj":
            out[f"{base}.{expert}.{down}.weight"] = matrix.clone()
            continue
        first, second = matrix.chunk(2)
        out[f"{base}.{expert}.{gate}.weight"] = first.clone()
        out[f"{base}.{expert}.{up}.weight"] = second.clone()
    return out


def _write_tokenizer(target: Path, vocab: int) -> None:
    """Write a tokenizer of one token a byte, an end token, and names for the ids that are left."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = [*sorted(pre_tokenizers.ByteLevel.alphabet()), _END]
    words += [f"<{number}>" for number in range(len(words), vocab)]
    tokenizer = Tokenizer(models.BPE(vocab={w: i for i, w in enumerate(words)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=_END, pad_token=_END, bos_token=_END
    ).save_pretrained(str(target))
