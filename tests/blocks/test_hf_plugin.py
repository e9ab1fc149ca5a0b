from __future__ import annotations

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch

from hotset.blocks.families import KINDS
from hotset.blocks.hf import load_skeleton, routers
from hotset.blocks.local import LocalRunner

if TYPE_CHECKING:
    from hotset.blocks.families import Kind
    from hotset.blocks.hf import Skeleton

MEMORY_LIMIT_KB = 200 * 1024


@pytest.fixture(scope="module")
def skeleton(olmoe: Path) -> Skeleton:
    return load_skeleton(olmoe)


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_of_the_checkpoint_stays_mapped_and_no_expert_is_held(
    checkpoints: dict[str, Path], kind: Kind
) -> None:
    loaded = load_skeleton(checkpoints[kind])
    smaps = Path("/proc/self/smaps").read_text()
    assert str(checkpoints[kind]) not in smaps
    assert not [n for n, _ in loaded.model.named_parameters() if ".experts." in n]
    assert abs(loaded.dense_bytes - loaded.catalog.dense_bytes) < 1024  # rotary tables are extra
    assert loaded.layers == loaded.catalog.layers


def test_the_original_class_is_back(skeleton: Skeleton, olmoe: Path) -> None:
    from transformers import AutoModelForCausalLM
    from transformers.monkey_patching import get_patch_mapping

    assert skeleton.layers == (0, 1, 2)
    assert not get_patch_mapping()
    model = AutoModelForCausalLM.from_pretrained(olmoe)
    assert model.model.layers[0].mlp.experts.gate_up_proj.shape == (8, 64, 64)


def test_a_model_without_a_runner_says_so(olmoe: Path) -> None:
    with pytest.raises(RuntimeError, match=r"call skeleton\.bind"):
        load_skeleton(olmoe).model(torch.tensor([[1, 2]]))


def test_routers_by_layer(checkpoints: dict[str, Path]) -> None:
    found = routers(load_skeleton(checkpoints["deepseek_v3"]).model)
    assert sorted(found) == [1, 2]


def test_the_runner_sees_what_the_router_chose(skeleton: Skeleton) -> None:
    seen = []

    class Spy(LocalRunner):
        def run(
            self,
            layer: int,
            module: Any,
            hidden: torch.Tensor,
            top_k_index: torch.Tensor,
            top_k_weights: torch.Tensor,
        ) -> torch.Tensor:
            seen.append((layer, tuple(hidden.shape), tuple(top_k_index.shape)))
            return super().run(layer, module, hidden, top_k_index, top_k_weights)

    skeleton.bind(Spy(skeleton.catalog))
    skeleton.model(torch.tensor([[1, 2, 3]]))
    assert seen == [(layer, (3, 64), (3, 2)) for layer in (0, 1, 2)]


def test_requests_on_threads_get_their_tokens_alone(skeleton: Skeleton) -> None:
    skeleton.bind(LocalRunner(skeleton.catalog))
    prompts = [torch.tensor([[i, 2 * i + 1, 5]]) for i in range(4)]

    def tokens(ids: torch.Tensor) -> list[int]:
        with torch.inference_mode():
            out = skeleton.model.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False,
                pad_token_id=0,
            )  # fmt: skip
        return out[0].tolist()

    alone = [tokens(ids) for ids in prompts]
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(tokens, prompts)) == alone
    assert len({tuple(t[3:]) for t in alone}) == 4


@pytest.mark.slow
def test_loading_never_holds_the_experts(tmp_path: Path) -> None:
    """A checkpoint with 2 GB of experts loads within its dense part and 200 MB."""
    from hotset.blocks.families import make_random_checkpoint

    make_random_checkpoint("olmoe", tmp_path, scale="large")
    code = (
        "import resource, torch\n"
        "from transformers import OlmoeForCausalLM\n"
        "from hotset.blocks.hf import load_skeleton\n"
        "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "before = peak()\n"
        f"s = load_skeleton({str(tmp_path)!r})\n"
        "print(peak() - before - s.dense_bytes // 1024, s.catalog.expert_bytes)\n"
    )
    ended = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    extra_kb, expert_bytes = map(int, ended.stdout.split())
    assert expert_bytes > 2_000_000_000
    assert extra_kb < MEMORY_LIMIT_KB
