"""The divergence of float32 log-probabilities agrees with float64, however small it is."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional

from hotset.blocks.divergence import paired_kl


def pair(seed: int, *, size: int, away: float) -> tuple[torch.Tensor, torch.Tensor]:
    random = torch.Generator().manual_seed(seed)
    logits = torch.randn(4, size, generator=random, dtype=torch.float64) * 4
    return logits, logits + away * torch.randn(4, size, generator=random, dtype=torch.float64)


@pytest.mark.parametrize("away", [1e-4, 1e-3, 1e-2, 0.1, 1.0, 10.0])
@pytest.mark.parametrize("size", [50, 5000])
def test_it_is_that_of_float64_down_to_the_smallest(away: float, size: int) -> None:
    full, other = pair(1, size=size, away=away)
    exact_full, exact_other = (functional.log_softmax(one, dim=-1) for one in (full, other))
    exact = (exact_full.exp() * (exact_full - exact_other)).sum(dim=-1)
    found = paired_kl(
        functional.log_softmax(full.float(), dim=-1), functional.log_softmax(other.float(), dim=-1)
    )
    assert torch.allclose(found.double(), exact, rtol=0.02, atol=1e-11)


@settings(max_examples=50)
@given(st.integers(0, 1000), st.integers(1, 300), st.floats(0, 200))
def test_it_is_finite_and_never_negative(seed: int, size: int, away: float) -> None:
    full, other = (
        functional.log_softmax(one.float(), dim=-1) for one in pair(seed, size=size, away=away)
    )
    found = paired_kl(full, other)
    assert torch.isfinite(found).all()
    assert (found >= 0).all()
    assert (paired_kl(full, full) == 0).all()
