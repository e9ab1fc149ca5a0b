"""A worker's memory is imports + dense part + budget, however large the checkpoint is."""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING

import pytest

from hotset.blocks.families import make_random_checkpoint
from hotset.cluster.front import Front
from tests.cluster.world import assert_sound, call, deployed, prompts

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from hotset.cluster.local import LocalCluster

pytestmark = [pytest.mark.ray, pytest.mark.nixl, pytest.mark.slow]

BUDGET_BYTES = 400_000_000
SLACK_BYTES = 100_000_000
"""Over baseline + dense + budget: read-ahead of a transfer, activations, telemetry, allocator."""
TOKENS = 12


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder for gigabytes, which pytest would keep for two more sessions."""
    folder = tmp_path_factory.mktemp("large")
    yield folder
    shutil.rmtree(folder)


@pytest.mark.timeout(500)
@pytest.mark.parametrize("host_pools", [0, 1], ids=["storage-only", "host-pool"])
def test_memory_does_not_grow_with_the_checkpoint(
    cluster: LocalCluster, root: Path, host_pools: int
) -> None:
    assert cluster.address
    baseline = peak_of_worker(tiny(root), root / f"tiny-{host_pools}", host_pools, TOKENS)
    large = peak_of_worker(huge(root), root / f"huge-{host_pools}", host_pools, TOKENS)
    experts = large.expert_bytes
    bound = baseline.peak_bytes + large.dense_bytes + BUDGET_BYTES + SLACK_BYTES
    print(
        f"\nexperts {experts / 1e6:.0f} MB; worker peak {large.peak_bytes / 1e6:.0f} MB = "
        f"imports {baseline.peak_bytes / 1e6:.0f} + dense {large.dense_bytes / 1e6:.0f} + budget "
        f"{BUDGET_BYTES / 1e6:.0f} + {(large.peak_bytes - bound + SLACK_BYTES) / 1e6:.0f} MB; "
        f"{large.fetched_bytes / 1e6:.0f} MB were moved to it"
    )
    assert experts > 4 * BUDGET_BYTES
    assert large.fetched_bytes > BUDGET_BYTES  # more went through it than it holds
    assert large.peak_bytes < bound


class Peak:
    """What a worker used, and what it was given to do."""

    def __init__(self, *, peak: int, dense: int, experts: int, fetched: int) -> None:
        self.peak_bytes = peak
        self.dense_bytes = dense
        self.expert_bytes = experts
        self.fetched_bytes = fetched


def tiny(root: Path) -> Path:
    return once(root / "tiny-model", scale="tiny")


def huge(root: Path) -> Path:
    return once(root / "huge-model", scale="large")


def once(path: Path, *, scale: str) -> Path:
    if not (path / "config.json").exists():
        make_random_checkpoint("olmoe", path, seed=6, scale=scale)
    return path


def peak_of_worker(model: Path, run_dir: Path, host_pools: int, tokens: int) -> Peak:
    with deployed(
        model, run_dir, workers=1, hbm_bytes=BUDGET_BYTES if "huge" in model.name else None,
        host_pools=host_pools, cxl_pools=0, host_ratio=1.0,
    ) as deployment:  # fmt: skip
        front = Front(deployment)
        for prompt in prompts(3, seed=7):
            assert len(front.generate(prompt, max_new_tokens=tokens).tokens) == tokens
        worker = deployment.workers["worker-0"]
        totals = deployment.totals()
        fetched = [n for link, n in totals.bytes_by_link.items() if link.endswith("worker-0")]
        if host_pools:
            assert totals.bytes_by_link["host-0->worker-0"] > 0
        assert_sound(deployment)
        return Peak(
            peak=call(worker.peak_rss_bytes),
            dense=call(worker.dense_bytes),
            experts=len(deployment.catalog.blocks) * deployment.catalog.block_nbytes,
            fetched=sum(fetched),
        )
