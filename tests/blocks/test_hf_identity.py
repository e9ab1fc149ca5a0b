"""At full precision, tokens and logits are those of the unmodified model, bit for bit."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch

from hotset.blocks.families import KINDS, make_random_checkpoint
from hotset.blocks.hf import load_skeleton
from hotset.blocks.local import LocalRunner

if TYPE_CHECKING:
    from hotset.blocks.families import Kind
    from hotset.blocks.hf import Skeleton
    from hotset.blocks.routing import Reference

pytestmark = pytest.mark.slow  # loads models

PROMPT_SEED = 7
STEPS = 24


def reference_model(path: Path, implementation: str, dtype: torch.dtype = torch.bfloat16) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(
        path, dtype=dtype, experts_implementation=implementation
    ).eval()


def prompt(rows: int = 1, length: int = 13) -> torch.Tensor:
    random = torch.Generator().manual_seed(PROMPT_SEED)
    return torch.randint(0, 256, (rows, length), generator=random)


def generate(model: Any, ids: torch.Tensor) -> torch.Tensor:
    return model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=STEPS,
        min_new_tokens=STEPS,
        do_sample=False,
        pad_token_id=0,
    )


def assert_identical(
    path: Path,
    reference: Reference,
    *,
    ids: torch.Tensor | None = None,
    dtype: torch.dtype = torch.bfloat16,
    skeleton: Skeleton | None = None,
) -> torch.Tensor:
    ids = prompt() if ids is None else ids
    skeleton = skeleton or load_skeleton(path)
    skeleton.bind(LocalRunner(skeleton.catalog, reference=reference))
    model = reference_model(path, reference, dtype)
    with torch.inference_mode():
        assert torch.equal(skeleton.model(ids).logits, model(ids).logits)
        expected = generate(model, ids)
        assert torch.equal(generate(skeleton.model, ids), expected)
    return expected[:, ids.shape[1] :]


@pytest.fixture(scope="module")
def skeletons(checkpoints: dict[str, Path]) -> dict[str, Skeleton]:
    return {kind: load_skeleton(checkpoints[kind]) for kind in KINDS}


@pytest.mark.parametrize("reference", ["eager", "grouped_mm"])
@pytest.mark.parametrize("kind", KINDS)
def test_same_logits_and_tokens(
    checkpoints: dict[str, Path], skeletons: dict[str, Skeleton], kind: Kind, reference: Reference
) -> None:
    tokens = assert_identical(checkpoints[kind], reference, skeleton=skeletons[kind])
    assert len(set(tokens[0].tolist())) > STEPS // 3  # else equality would say little


@pytest.mark.parametrize("reference", ["eager", "grouped_mm"])
def test_same_for_a_batch(
    olmoe: Path, skeletons: dict[str, Skeleton], reference: Reference
) -> None:
    assert_identical(olmoe, reference, ids=prompt(rows=3), skeleton=skeletons["olmoe"])


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_same_in_other_types(tmp_path: Path, dtype: str) -> None:
    path = make_random_checkpoint("qwen3_moe", tmp_path, seed=2, dtype=dtype)
    assert_identical(path, "eager", dtype=getattr(torch, dtype))


def test_same_from_shards_and_streamed(tmp_path: Path, skeletons: dict[str, Skeleton]) -> None:
    whole = skeletons["olmoe"]
    sharded = make_random_checkpoint("olmoe", tmp_path / "a", seed=1, max_shard_bytes=100_000)
    streamed = make_random_checkpoint("olmoe", tmp_path / "b", seed=1, stream=True)
    ids = prompt()
    logits = []
    for skeleton in (whole, load_skeleton(sharded), load_skeleton(streamed)):
        skeleton.bind(LocalRunner(skeleton.catalog))
        with torch.inference_mode():
            logits.append(skeleton.model(ids).logits)
        assert skeleton.catalog.expert_bytes == whole.catalog.expert_bytes
    assert torch.equal(logits[0], logits[1])
    assert torch.equal(logits[0], logits[2])


def test_tiled_rows_do_not_depend_on_company(skeletons: dict[str, Skeleton]) -> None:
    """Rows of other requests in the same expert call change no bit of a request's output."""
    skeleton = skeletons["olmoe"]
    runner = LocalRunner(skeleton.catalog, tiled=True)
    module = skeleton.model.model.layers[0].mlp.experts
    random = torch.Generator().manual_seed(PROMPT_SEED)
    hidden = torch.randn(40, 64, generator=random).bfloat16()
    scores = torch.rand(40, 8, generator=random)
    weights, index = scores.topk(2)
    weights = weights.bfloat16()
    together = runner.run(0, module, hidden, index, weights)
    for rows in (slice(0, 1), slice(3, 20), slice(39, 40)):
        alone = runner.run(0, module, hidden[rows], index[rows], weights[rows])
        assert torch.equal(alone, together[rows])


@pytest.mark.parametrize("reference", ["eager", "grouped_mm"])
def test_same_for_a_trained_model(reference: Reference) -> None:
    path = os.environ.get("HOTSET_TINY_MOE")
    if not path:
        pytest.skip("HOTSET_TINY_MOE does not name a trained checkpoint")
    assert_identical(Path(path), reference)
