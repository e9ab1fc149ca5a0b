"""At full precision, tokens and logits are those of the unmodified model, bit for bit."""

from __future__ import annotations

import os

import pytest
import torch
from hotset.blocks.families import KINDS, make_random_checkpoint
from hotset.blocks.hf import load_skeleton
from hotset.blocks.local import LocalRunner

PROMPT_SEED = 7
STEPS = 24


def reference_model(path, implementation, dtype=torch.bfloat16):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(
        path, dtype=dtype, experts_implementation=implementation
    ).eval()


def prompt(rows=1, length=13):
    random = torch.Generator().manual_seed(PROMPT_SEED)
    return torch.randint(0, 256, (rows, length), generator=random)


def generate(model, ids):
    return model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=STEPS,
        min_new_tokens=STEPS,
        do_sample=False,
        pad_token_id=0,
    )


def assert_identical(path, reference, *, ids=None, dtype=torch.bfloat16):
    ids = prompt() if ids is None else ids
    skeleton = load_skeleton(path)
    skeleton.bind(LocalRunner(skeleton.catalog, reference=reference))
    model = reference_model(path, reference, dtype)
    with torch.inference_mode():
        assert torch.equal(skeleton.model(ids).logits, model(ids).logits)
        expected = generate(model, ids)
        assert torch.equal(generate(skeleton.model, ids), expected)
    return expected[:, ids.shape[1] :]


@pytest.mark.parametrize("reference", ["eager", "grouped_mm"])
@pytest.mark.parametrize("kind", KINDS)
def test_same_logits_and_tokens(checkpoints, kind, reference):
    tokens = assert_identical(checkpoints[kind], reference)
    assert len(set(tokens[0].tolist())) > STEPS // 3  # else equality would say little


@pytest.mark.parametrize("reference", ["eager", "grouped_mm"])
def test_same_for_a_batch(olmoe, reference):
    assert_identical(olmoe, reference, ids=prompt(rows=3))


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_same_in_other_types(tmp_path, dtype):
    path = make_random_checkpoint("qwen3_moe", tmp_path, seed=2, dtype=dtype)
    assert_identical(path, "eager", dtype=getattr(torch, dtype))


def test_same_from_shards_and_streamed(tmp_path, olmoe):
    whole = load_skeleton(olmoe)
    sharded = make_random_checkpoint("olmoe", tmp_path / "a", seed=1, max_shard_bytes=100_000)
    streamed = make_random_checkpoint("olmoe", tmp_path / "b", seed=1, stream=True)
    ids = prompt()
    logits = []
    for path in (olmoe, sharded, streamed):
        skeleton = load_skeleton(path)
        skeleton.bind(LocalRunner(skeleton.catalog))
        with torch.inference_mode():
            logits.append(skeleton.model(ids).logits)
        assert skeleton.catalog.expert_bytes == whole.catalog.expert_bytes
    assert torch.equal(logits[0], logits[1])
    assert torch.equal(logits[0], logits[2])


def test_tiled_rows_do_not_depend_on_company(olmoe):
    """Rows of other requests in the same expert call change no bit of a request's output."""
    skeleton = load_skeleton(olmoe)
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
def test_same_for_a_trained_model(reference):
    path = os.environ.get("HOTSET_TINY_MOE")
    if not path:
        pytest.skip("HOTSET_TINY_MOE does not name a trained checkpoint")
    assert_identical(path, reference)
