"""Stand-ins for the activation of an experts module: nothing but the gate."""

from __future__ import annotations

import torch


class Silu:
    """The gate of OLMoE, Mixtral, Qwen and DeepSeek."""

    is_transposed = False

    def _apply_gate(self, gate_up: torch.Tensor) -> torch.Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        return torch.nn.functional.silu(gate) * up


class Transposed(Silu):
    """The same gate with weights stored [in, out]."""

    is_transposed = True
