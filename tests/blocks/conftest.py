from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch

from hotset.blocks.families import KINDS, make_random_checkpoint

if TYPE_CHECKING:
    from pathlib import Path

SEED = 1


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """Two threads on two shared cores spin against each other."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One tiny checkpoint of each family, written by save_pretrained."""
    root = tmp_path_factory.mktemp("checkpoints")
    return {kind: make_random_checkpoint(kind, root / kind, seed=SEED) for kind in KINDS}


@pytest.fixture(scope="session")
def olmoe(checkpoints: dict[str, Path]) -> Path:
    return checkpoints["olmoe"]
