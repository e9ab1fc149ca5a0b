"""Which tensor of a checkpoint belongs to which expert of which layer, and where in its block.

Two ways to know, tried in this order: a table of families whose names are fixed (no torch, so a
process that only counts bytes stays light), and transformers' own conversion tables with the model
built on the meta device (any other family that transformers can load). A test keeps them equal on
the families of the table.

Must not know files or where blocks are.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from hotset.errors import CheckpointError, DependencyError

if TYPE_CHECKING:
    from collections.abc import Mapping

_PER_EXPERT = re.compile(
    r"(?:^|\.)layers\.(\d+)\.(?:mlp|block_sparse_moe)\.experts\.(\d+)\."
    r"(gate_proj|up_proj|down_proj|w1|w3|w2)\.weight$"
)
_STACKED = re.compile(
    r"(?:^|\.)layers\.(\d+)\.(?:mlp|block_sparse_moe)\.experts\.(gate_up_proj|down_proj)(_bias)?$"
)
_LAYER = re.compile(r"(?:^|\.)layers\.(\d+)\.")
_EXPERT = re.compile(r"\.experts\.(\d+)\.")
_ROLES = {
    "gate_proj": "gate", "w1": "gate", "up_proj": "up", "w3": "up", "down_proj": "down",
    "w2": "down", "gate_up_proj": "gate_up", "gate_up_proj_bias": "gate_up_bias",
    "down_proj_bias": "down_bias",
}  # fmt: skip
_TABLE = {
    "olmoe": False,
    "qwen2_moe": False,
    "qwen3_moe": False,
    "mixtral": False,
    "deepseek_v2": False,
    "deepseek_v3": False,
    "gpt_oss": True,
}
"""Families whose tensor names are known here: model_type -> weights are stored [in, out]."""

ROLE_ORDER = ("gate", "up", "gate_up", "down", "gate_up_bias", "down_bias")
"""Canonical order of parts in a block; gate and up are adjacent, so that they are one matrix."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """A tensor's place: `expert` is None for one that stacks all experts along dimension 0."""

    layer: int
    expert: int | None
    role: str


class Naming(Protocol):
    """Knows the names of one model."""

    transposed: bool

    def place(self, name: str) -> Place | None:
        """Where a tensor belongs; None for one of the dense part."""


class TableNaming:
    """Names by regular expression, for the families in the table."""

    def __init__(self, config: Mapping[str, Any], *, transposed: bool) -> None:
        """Layers from `num_hidden_layers` on (multi-token prediction heads) are not served."""
        self.transposed = transposed
        self._layers = int(config.get("num_hidden_layers", 1 << 30))

    def place(self, name: str) -> Place | None:
        """As `Naming.place`."""
        if match := _PER_EXPERT.search(name):
            layer, expert, part = int(match[1]), int(match[2]), match[3]
            found = Place(layer=layer, expert=expert, role=_ROLES[part])
        elif match := _STACKED.search(name):
            role = _ROLES[match[2] + (match[3] or "")]
            found = Place(layer=int(match[1]), expert=None, role=role)
        else:
            return None
        return found if found.layer < self._layers else None


class TransformersNaming:
    """Names by transformers' conversion tables; imports torch and builds the model on meta."""

    def __init__(self, path: str, *, model_type: str) -> None:
        """Build the model on meta. Raises CheckpointError when that fails or it has no experts."""
        import torch
        from transformers import AutoConfig, AutoModelForCausalLM

        try:
            from transformers.conversion_mapping import get_model_conversion_mapping
            from transformers.core_model_loading import (
                WeightConverter,
                WeightRenaming,
                rename_source_key,
            )
        except ImportError as error:
            raise DependencyError(
                f"this transformers has no conversion tables, which {model_type!r} needs",
                remedy="install transformers>=5.3,<6",
            ) from error
        try:
            config = AutoConfig.from_pretrained(path, local_files_only=True)
            with torch.device("meta"):
                model = AutoModelForCausalLM.from_config(config)
        except (ValueError, KeyError, OSError) as error:
            raise CheckpointError(
                f"{path}: transformers cannot build the architecture {model_type!r}",
                remedy="use a Mixture-of-Experts model that transformers can load without "
                "remote code",
            ) from error
        self._experts = {
            name: module
            for name, module in model.named_modules()
            if hasattr(module, "has_gate") and hasattr(module, "is_transposed")
        }
        if not self._experts:
            raise no_experts(path, model_type)
        self._refuse_unknown_compute(path)
        self.transposed = any(m.is_transposed for m in self._experts.values())
        tables = get_model_conversion_mapping(model)
        self._renamings = [t for t in tables if isinstance(t, WeightRenaming)]
        self._converters = [t for t in tables if isinstance(t, WeightConverter)]
        self._rename = rename_source_key
        self._prefix = model.base_model_prefix
        self._names = model.state_dict()

    def _refuse_unknown_compute(self, path: str) -> None:
        for name, module in self._experts.items():
            if not module.has_gate or getattr(module, "has_post_expert_norm", False):
                raise CheckpointError(
                    f"{path}: experts of class {type(module).__name__} ({name}) have no gate or a "
                    "norm of their own",
                    remedy="use a model whose experts are a gated two-matrix FFN",
                )

    def place(self, name: str) -> Place | None:
        """As `Naming.place`."""
        target, pattern = self._rename(
            name, self._renamings, self._converters, self._prefix, self._names
        )
        module, _, role = target.rpartition(".")
        layer = _LAYER.search(target)
        if module not in self._experts or layer is None or role not in _ROLES:
            return None
        if pattern is None:
            return Place(layer=int(layer[1]), expert=None, role=_ROLES[role])
        expert = _EXPERT.search(name)
        if ".*." not in pattern or expert is None:
            raise CheckpointError(
                f"tensor {name} needs a conversion that hotset does not know",
                remedy="save the model again with transformers 5 (save_pretrained)",
            )
        if role == "gate_up_proj":
            sources = next(c for c in self._converters if pattern in c.source_patterns)
            fused = ("gate", "up")[sources.source_patterns.index(pattern)]
            return Place(layer=int(layer[1]), expert=int(expert[1]), role=fused)
        return Place(layer=int(layer[1]), expert=int(expert[1]), role=_ROLES[role])


def no_experts(path: str, model_type: str) -> CheckpointError:
    """Make the error for a model without MoE layers."""
    return CheckpointError(
        f"{path}: the {model_type} model has no Mixture-of-Experts layers",
        remedy="give the checkpoint of a MoE model (OLMoE, Mixtral, Qwen-MoE, DeepSeek, gpt-oss)",
    )


def naming_for(path: str, config: Mapping[str, Any]) -> Naming:
    """Choose how to read this model's names. Raises CheckpointError for an unknown one."""
    model_type = str(config.get("model_type", ""))
    transposed = _TABLE.get(model_type)
    if transposed is not None:
        return TableNaming(config, transposed=transposed)
    return TransformersNaming(path, model_type=model_type)
