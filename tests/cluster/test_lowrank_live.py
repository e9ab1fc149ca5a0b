"""Experts kept as a shared base and a low-rank difference serve on a real cluster (S7)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from hotset.blocks.checkpoint import Catalog
from hotset.blocks.lowrank import install, uninstall, write_bases
from hotset.blocks.lowrank_measure import measure
from hotset.cluster.front import Front
from hotset.errors import ConfigError
from tests.blocks.upcycled import upcycle
from tests.cluster.conftest import DEMO
from tests.cluster.test_live_check import SMALL, live_checked, zeros
from tests.cluster.world import assert_sound, deployed, eventually, prompts

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from hotset.cluster.launch import Deployment
    from hotset.cluster.local import LocalCluster

pytestmark = [pytest.mark.ray, pytest.mark.nixl]

TOKENS = 24


@pytest.fixture
def table(tmp_path: Path) -> Iterator[tuple[Path, Path]]:
    """An upcycled model, and a file that lets its experts be kept as differences."""
    model = upcycle(DEMO, tmp_path / "model")
    found, bases = measure(Catalog.open(model))
    assert bases is not None, found.render()
    install(bases)
    path = tmp_path / "sensitivity.json"
    write_bases(bases, path.with_suffix(".bases.safetensors"))
    zeros(path, model=model, formats=("int8", "lowrank"), bases="sensitivity.bases.safetensors")
    yield model, path
    uninstall()


def held(deployment: Deployment, tier: str) -> int:
    """Differences in the stores of one tier."""
    stores = deployment.status()["stores"]
    return sum(one["blocks"].get("lowrank", 0) for one in stores if one["tier"] == tier)


def test_differences_are_held_moved_rebuilt_and_checked(
    cluster: LocalCluster, tmp_path: Path, table: tuple[Path, Path]
) -> None:
    assert cluster.address
    model, path = table
    options = {**SMALL, "hbm_ratio": 0.35, "sensitivity": path, "quality_budget": 20.0}
    with deployed(model, tmp_path / "run", **options) as deployment:
        front = Front(deployment)
        for prompt in prompts(3):
            assert len(front.generate(prompt, max_new_tokens=TOKENS).tokens) == TOKENS
        eventually(lambda: held(deployment, "hbm") > 0, what="differences at the worker")
        eventually(lambda: live_checked(deployment) > 0, what="steps computed again")
        status = deployment.status()
        assert sum(status["states"].values()) == status["blocks"]
        assert "veto_drift" not in status["vetoes"]
        assert_sound(deployment)


def test_bases_of_another_checkpoint_are_refused_before_anything_starts(
    tmp_path: Path, table: tuple[Path, Path]
) -> None:
    _, path = table
    with (
        pytest.raises(ConfigError, match="was measured on checkpoint"),
        deployed(DEMO, tmp_path / "run", sensitivity=path, **SMALL),
    ):
        raise AssertionError("it must not start")
