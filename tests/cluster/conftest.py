"""Fixtures of tests on real Ray: one embedded cluster a module, random checkpoints, references."""

from __future__ import annotations

import os
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from hotset.cluster.local import local_cluster, quiet_environment

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from hotset.cluster.local import LocalCluster

DEMO = Path(__file__).resolve().parents[2] / "examples" / "demo-moe"
SEED = 3

quiet_environment()


@pytest.fixture(scope="module")
def cluster() -> Iterator[LocalCluster]:
    """A head, three nodes for workers, one for the CXL pool; ends with the module."""
    nodes: dict[str, dict[str, float]] = {f"node{index}": {"hbm": 1} for index in range(3)}
    nodes["memory"] = {"cxl": 1}
    with local_cluster(nodes) as local:
        yield local


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a model by name: `demo`, `trained`, or a family with random weights."""
    from hotset.blocks.families import make_random_checkpoint

    root = tmp_path_factory.mktemp("models")

    @cache
    def find(name: str) -> Path:
        if name == "demo":
            return DEMO
        if name == "trained":
            path = os.environ.get("HOTSET_TINY_MOE")
            if not path:
                pytest.skip("HOTSET_TINY_MOE does not name a trained checkpoint")
            return Path(path)
        return make_random_checkpoint(name, root / name, seed=SEED)  # type: ignore[arg-type] # a family's name

    return find


@pytest.fixture(scope="session")
def expected() -> Callable[..., list[list[int]]]:
    """Tokens of the unmodified model for prompts of ids, computed once for each request."""
    import torch
    from transformers import AutoModelForCausalLM

    from hotset.blocks.generate import generate

    torch.set_num_threads(1)

    @cache
    def load(path: Path, reference: str) -> Any:
        return AutoModelForCausalLM.from_pretrained(
            path, dtype="auto", experts_implementation=reference
        ).eval()

    @cache
    def tokens(path: Path, reference: str, prompt: tuple[int, ...], count: int) -> list[int]:
        return generate(load(path, reference), prompt, max_new_tokens=count)

    def ask(
        path: Path, prompts: list[list[int]], *, count: int, reference: str = "eager"
    ) -> list[list[int]]:
        return [tokens(path, reference, tuple(prompt), count) for prompt in prompts]

    return ask
