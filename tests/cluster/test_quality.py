"""Formats by measured sensitivity: the file, the plan, the live cluster, and exact mode."""

from __future__ import annotations

import json
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from hotset.blocks.checkpoint import Catalog
from hotset.blocks.families import make_random_checkpoint
from hotset.blocks.formats import codec
from hotset.blocks.sensitivity_table import VERSION, SensitivityTable, write_table
from hotset.cluster.bench_equal import run_bench as run_equal
from hotset.cluster.bench_equal_command import render
from hotset.cluster.config import RunConfig
from hotset.cluster.front import Front
from hotset.cluster.inspect import live_story
from hotset.cluster.launch import prepare
from hotset.errors import ConfigError
from hotset.policies.guard import QUALITY
from hotset.policies.types import Format
from tests.cluster.conftest import DEMO
from tests.cluster.world import assert_sound, deployed, eventually, prompts

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from hotset.cluster.launch import Deployment
    from hotset.cluster.local import LocalCluster

FORMATS = ("int8", "int4", "int3")
DAMAGE = (1e-8, 2e-7, 4e-6)
DEAR = 0
"""The layer that bears nothing."""
TOKENS = 24


@pytest.fixture(scope="module")
def large_blocks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with blocks of 1.5 MiB: packing saves 3 ms of 12 over 1 Gb/s, decoding takes below 1.

    Of the demo model's small blocks it saves about what decoding takes, so either would be right.
    """
    path = tmp_path_factory.mktemp("model")
    return make_random_checkpoint("olmoe", path, layers=4, experts=8, hidden=512, inter=512)


def table_of(catalog: Catalog, *, checkpoint: str = "") -> SensitivityTable:
    """A table for plumbing, not for quality: one dear layer, the others alike."""
    shape = (len(catalog.layers), catalog.num_experts, len(FORMATS))
    nats = np.broadcast_to(np.array(DAMAGE), shape).copy()
    nats[catalog.layers.index(DEAR)] = 1.0
    share = catalog.top_k / catalog.num_experts
    return SensitivityTable(
        version=VERSION, checkpoint=checkpoint or catalog.digest, text="test", tokens=1000,
        layers=catalog.layers, num_experts=catalog.num_experts, formats=FORMATS,
        nbytes=tuple(codec(name).nbytes(catalog.layout) for name in FORMATS),
        full_nbytes=catalog.block_nbytes, nats=nats.tolist(),
        frequency=[[share] * catalog.num_experts for _ in catalog.layers],
        groups=(), mixes=(), optimism=1.0, optimism_upper=1.0,
    )  # fmt: skip


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("table") / "sensitivity.json"
    write_table(table_of(Catalog.open(DEMO)), path)
    return path


def planned(tmp_path: Path, table: Path, **options: Any) -> Deployment:
    config = RunConfig.build(model=DEMO, run_dir=tmp_path, sensitivity=table, **options)
    return prepare(config, run="test", say=lambda _text: None)


# --- before anything starts -----------------------------------------------------------------------


def test_a_table_of_another_checkpoint_is_refused_with_the_remedy(tmp_path: Path) -> None:
    path = tmp_path / "other.json"
    write_table(table_of(Catalog.open(DEMO), checkpoint="0" * 32), path)
    with pytest.raises(ConfigError, match=r"measured on checkpoint 0000.*hotset calibrate"):
        planned(tmp_path, path)


def test_a_budget_without_a_table_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"quality budget .* --sensitivity"):
        RunConfig.build(model=DEMO, quality_budget=0.002)
    assert RunConfig.build(model=DEMO, quality_budget=0.0).exact


def test_the_plan_follows_memory_budget_and_floors(tmp_path: Path, table: Path) -> None:
    def formats(**options: Any) -> dict[Format, int]:
        quality = planned(tmp_path, table, **options).quality
        assert quality is not None
        found = list(quality.planned().items())
        assert all(block.layer != DEAR for block, _ in found)
        return {form: sum(one is form for _, one in found) for form in {one for _, one in found}}

    blocks = len(Catalog.open(DEMO).blocks)
    ample, tight = formats(hbm_ratio=1.0), formats(hbm_ratio=0.2)
    assert sum(ample.values()) < sum(tight.values()) < blocks
    assert Format.INT3 in tight
    assert set(formats(hbm_ratio=0.2, default_floor="int8")) == {Format.INT8}
    assert formats(hbm_ratio=0.2, quality_budget=0.0) == {}


# --- on a real cluster ----------------------------------------------------------------------------


@pytest.mark.ray
@pytest.mark.nixl
def test_a_run_holds_blocks_by_the_plan_and_serves(
    cluster: LocalCluster, table: Path, tmp_path: Path
) -> None:
    assert cluster.address
    with deployed(DEMO, tmp_path, workers=2, hbm_ratio=0.3, sensitivity=table) as deployment:
        assert deployment.quality is not None
        plan = deployment.quality.planned()

        def held() -> dict[str, dict[str, int]] | None:
            stores = {one["name"]: one["blocks"] for one in deployment.status()["stores"]}
            cheap = {name: set(forms) - {"bf16", "bf16z"} for name, forms in stores.items()}
            return stores if cheap["worker-0"] and cheap["host-0"] else None

        stores = held()  # the pools are filled, and nothing was served yet
        assert stores is not None, "formats are chosen when the run starts"
        slots = deployment.sizes.hbm_bytes // deployment.sizes.slot_bytes
        assert max(sum(stores[name].values()) for name in deployment.workers) > slots
        for prompt in prompts(3):
            served = Front(deployment).generate(prompt, max_new_tokens=TOKENS)
            assert len(served.tokens) == TOKENS
        seen = set()
        for block in deployment.catalog.blocks:
            _, copies = live_story(deployment.controller, block)
            for copy in copies:
                floor = plan.get(block, Format.BF16)
                assert QUALITY[Format(copy.format)] >= QUALITY[floor], (block, copy)
                seen.add(copy.format)
        assert len(seen) > 1  # the same run holds several
        hits = deployment.totals().hits
        assert hits["hbm"] > 0
        assert_sound(deployment)


@pytest.mark.ray
@pytest.mark.nixl
def test_exact_mode_over_a_slow_link_moves_packed_bytes_and_keeps_the_tokens(
    cluster: LocalCluster, large_blocks: Path, tmp_path: Path, expected: Callable[..., Any]
) -> None:
    assert cluster.address
    asked = prompts(2, seed=41)
    table = tmp_path / "sensitivity.json"
    write_table(table_of(Catalog.open(large_blocks)), table)
    options = {"hbm_ratio": 0.25, "host_pools": 0, "cxl_profile": "eth1g", "workers": 1}
    with deployed(
        large_blocks, tmp_path, sensitivity=table, quality_budget=0.0, move="weights", **options
    ) as deployment:

        def packed() -> bool:
            stores = {one["name"]: one["blocks"] for one in deployment.status()["stores"]}
            return set(stores["cxl-0"]) == {"bf16z"}

        eventually(packed, deadline_s=90, what="a pool of packed blocks")
        for prompt, wanted in zip(asked, expected(large_blocks, asked, count=TOKENS), strict=True):
            assert Front(deployment).generate(prompt, max_new_tokens=TOKENS).tokens == wanted
        held = {one["name"]: set(one["blocks"]) for one in deployment.status()["stores"]}
        assert held["worker-0"] <= {"bf16", "bf16z"}
        assert_sound(deployment)


@pytest.mark.ray
@pytest.mark.nixl
def test_a_slow_link_without_a_profile_packs_once_its_reader_has_measured_it(
    cluster: LocalCluster, large_blocks: Path, tmp_path: Path, expected: Callable[..., Any]
) -> None:
    assert cluster.address
    asked = prompts(2, seed=43)
    # A host pool is told nothing of the link that it is read over; here that is 1 Gb/s.
    options = {"hbm_ratio": 0.25, "host_profile": "eth1g", "host_ratio": 1.0, "cxl_pools": 0}
    with deployed(large_blocks, tmp_path, workers=1, move="weights", **options) as deployment:

        def forms() -> set[str]:
            stores = {one["name"]: one["blocks"] for one in deployment.status()["stores"]}
            return set(stores["host-0"])

        eventually(lambda: forms() == {"bf16"}, deadline_s=90, what="a filled pool")
        front = Front(deployment)

        def packed() -> bool:
            # Storage is faster here, so only the reads that look again measure the pool.
            front.generate(asked[0], max_new_tokens=TOKENS)
            return forms() == {"bf16z"}

        eventually(packed, deadline_s=120, what="a pool of packed blocks")
        for prompt, wanted in zip(asked, expected(large_blocks, asked, count=TOKENS), strict=True):
            assert front.generate(prompt, max_new_tokens=TOKENS).tokens == wanted
        assert_sound(deployment)


@pytest.mark.ray
@pytest.mark.nixl
def test_both_sides_run_on_equal_bytes_and_the_drift_is_measured(
    cluster: LocalCluster, table: Path
) -> None:
    # The table is made up: a budget that the live check does not see broken keeps the plan.
    found = run_equal(
        DEMO, sensitivity=table, budget_nats=20.0, hbm_ratio=0.3, host_ratio=0.5,
        cxl_profile="cxl2x8", transport="nixl", tokens=4, rounds=1, say=lambda _text: None,
        on=nullcontext(cluster),
    )  # fmt: skip
    assert found.full.hbm_bytes == found.mixed.hbm_bytes == found.hbm_bytes
    assert set(found.full.held) <= {"bf16", "bf16z"}
    assert sum(found.mixed.held.values()) > sum(found.full.held.values())
    assert found.mixed.bits_per_weight < found.full.bits_per_weight == 16.0
    assert found.drift.tokens == found.tokens == 16
    assert found.inside == (found.drift.upper <= found.budget_nats)
    assert json.loads(json.dumps(found.to_json()))["budget_nats"] == 20.0
    assert "budget 20" in render(found)
