"""KL divergence of two next-token distributions that hardly differ, in the accuracy of float32.

Decides how the figure is computed, nothing else. Summing p (log p - log q) leaves rounding errors
of the first order, some 1e-7 nats a token, which is as much as a single expert in int4 costs. Since
p and q both add up to 1, the divergence is also the sum of p (r - 1 - log r) with r = q / p: each
term is positive and of the second order in the difference, and so are the errors (the estimator k3
of Schulman, 2020, here over the whole vocabulary and therefore exact).
"""

from __future__ import annotations

import torch

_MOST = 80.0  # of log q - log p: e**80 is still a float32, and p is then nothing


def paired_kl(full: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """KL(full || other) in nats [...] of log-probabilities [..., V] in float32; never negative."""
    away = (other - full).clamp_max_(_MOST)
    return (full.exp() * (torch.expm1(away) - away)).sum(dim=-1).clamp_min_(0.0)
