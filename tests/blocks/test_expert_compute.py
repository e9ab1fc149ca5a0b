from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from expert_modules import Silu, Transposed

from hotset.blocks.experts import ExpertWeights, run_expert, run_expert_tiled, tile_holds
from hotset.blocks.routing import combine_eager, combine_grouped, experts_hit, group_rows

if TYPE_CHECKING:
    from collections.abc import Callable


def make_weights(
    hidden: int, inter: int, dtype: torch.dtype, *, transposed: bool, seed: int = 0
) -> ExpertWeights:
    random = torch.Generator().manual_seed(seed)
    up, down = (2 * inter, hidden), (hidden, inter)
    shapes = (up[::-1], down[::-1]) if transposed else (up, down)
    return ExpertWeights(*((torch.randn(*s, generator=random) * 0.02).to(dtype) for s in shapes))


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(("hidden", "inter"), [(64, 32), (256, 128), (1024, 320)])
def test_tile_holds_here(*, hidden: int, inter: int, dtype: torch.dtype, transposed: bool) -> None:
    weights = make_weights(hidden, inter, dtype, transposed=transposed)
    assert tile_holds(Transposed() if transposed else Silu(), weights, dtype=dtype)


@pytest.mark.parametrize("tile", [1, 4, 16])
@pytest.mark.parametrize("count", [0, 1, 16, 17])
def test_tiling_keeps_the_number_of_rows(count: int, tile: int) -> None:
    weights = make_weights(64, 32, torch.bfloat16, transposed=False)
    rows = torch.ones(count, 64).bfloat16()
    assert run_expert_tiled(Silu(), rows, weights, tile=tile).shape == (count, 64)


def test_tiles_do_not_depend_on_threads_in_bf16() -> None:
    weights = make_weights(1024, 512, torch.bfloat16, transposed=False)
    rows = torch.randn(37, 1024, generator=torch.Generator().manual_seed(1)).bfloat16()
    one = run_expert_tiled(Silu(), rows, weights)
    torch.set_num_threads(2)
    two = run_expert_tiled(Silu(), rows, weights)
    torch.set_num_threads(1)
    assert torch.equal(one, two)


def test_tiled_is_the_exact_value_up_to_rounding() -> None:
    weights = make_weights(256, 128, torch.float32, transposed=False)
    rows = torch.randn(21, 256, generator=torch.Generator().manual_seed(2))
    torch.testing.assert_close(
        run_expert_tiled(Silu(), rows, weights), run_expert(Silu(), rows, weights)
    )


def eager_reference(
    hidden: torch.Tensor,
    index: torch.Tensor,
    weights: torch.Tensor,
    outputs_of: Callable[[int, torch.Tensor], torch.Tensor],
    experts: int,
) -> torch.Tensor:
    """The loop of transformers' eager experts, with its masks."""
    result = torch.zeros_like(hidden)
    mask = torch.nn.functional.one_hot(index, num_classes=experts + 1).permute(2, 1, 0)
    for expert in range(experts):
        positions, tokens = torch.where(mask[expert])
        if not len(tokens):
            continue
        out = outputs_of(expert, hidden[tokens]) * weights[tokens, positions, None]
        result.index_add_(0, tokens, out.to(result.dtype))
    return result


@pytest.mark.parametrize("weight_dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("count", "choices"), [(1, 8), (1, 1), (5, 4), (40, 8)])
def test_combine_eager_is_the_loop_of_transformers(
    count: int, choices: int, weight_dtype: torch.dtype
) -> None:
    random = torch.Generator().manual_seed(count * 10 + choices)
    hidden = torch.randn(count, 64, generator=random).bfloat16()
    weights, index = torch.rand(count, 16, generator=random).topk(choices)
    weights = weights.to(weight_dtype)

    def outputs_of(expert: int, rows: torch.Tensor) -> torch.Tensor:
        return (rows * (expert + 0.3)).sin()

    outputs = {
        e: outputs_of(e, hidden[group_rows(index, e).tokens])
        for e in reversed(experts_hit(index, num_experts=16))
    }
    got = combine_eager(hidden, index, weights, outputs)
    assert torch.equal(got, eager_reference(hidden, index, weights, outputs_of, 16))


def test_the_two_references_differ_in_bf16() -> None:
    random = torch.Generator().manual_seed(5)
    hidden = torch.randn(30, 64, generator=random).bfloat16()
    weights, index = torch.rand(30, 16, generator=random).topk(8)
    weights = weights.bfloat16()
    results = []
    for reference, combine in (("eager", combine_eager), ("grouped_mm", combine_grouped)):
        outputs = {
            e: (hidden[group_rows(index, e, reference=reference).tokens] * (e + 0.3)).sin()
            for e in experts_hit(index, num_experts=16)
        }
        results.append(combine(hidden, index, weights, outputs))
    assert not torch.equal(*results)
    torch.testing.assert_close(*results, rtol=0.05, atol=0.05)
