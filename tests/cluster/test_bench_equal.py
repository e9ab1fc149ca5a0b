"""The benches of formats give figures that agree with themselves."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest

from hotset.blocks.checkpoint import Catalog
from hotset.blocks.sensitivity_table import write_table
from hotset.cluster.bench_equal import run_bench as run_equal
from hotset.cluster.bench_equal_command import render, render_wire
from hotset.cluster.bench_wire import run_bench as run_wire
from tests.cluster.conftest import DEMO
from tests.cluster.test_quality import table_of

if TYPE_CHECKING:
    from pathlib import Path


def quiet(_text: str) -> None:
    """Say nothing."""


def test_packing_pays_on_a_slow_link_and_not_on_a_fast_one() -> None:
    found = run_wire(DEMO, rates=(0.02, 20.0), blocks=2, rounds=2, say=quiet)
    rows = {(row.link_gb_per_s, row.format): row for row in found.rows}
    assert found.packs == {"0.02": True, "20": False}
    assert all(row.same_bytes == row.format.startswith("bf16") for row in found.rows)
    assert rows[0.02, "bf16z"].wire_bytes < 0.8 * rows[0.02, "bf16"].wire_bytes
    assert rows[0.02, "bf16z"].block_us < rows[0.02, "bf16"].block_us
    assert rows[0.02, "int4"].block_us < rows[0.02, "int8"].block_us < rows[0.02, "bf16"].block_us
    assert all(row.block_us >= 0.9 * row.bound_us for row in found.rows)
    assert "a live pool would pack: 0.02 GB/s yes, 20 GB/s no" in render_wire(found)


@pytest.mark.ray
@pytest.mark.nixl
@pytest.mark.slow
def test_both_sides_run_on_equal_bytes_and_the_drift_is_measured(tmp_path: Path) -> None:
    path = tmp_path / "sensitivity.json"
    write_table(table_of(Catalog.open(DEMO)), path)
    found = run_equal(
        DEMO, sensitivity=path, budget_nats=0.002, hbm_ratio=0.3, host_ratio=0.5,
        cxl_profile="cxl2x8", transport="nixl", tokens=8, rounds=1, say=quiet,
    )  # fmt: skip
    assert found.full.hbm_bytes == found.mixed.hbm_bytes == found.hbm_bytes
    assert set(found.full.held) <= {"bf16", "bf16z"}
    assert sum(found.mixed.held.values()) > sum(found.full.held.values())
    assert found.mixed.bits_per_weight < found.full.bits_per_weight == 16.0
    assert found.drift.tokens == found.tokens == 32
    assert found.inside == (found.drift.upper <= found.budget_nats)
    assert json.loads(json.dumps(found.to_json()))["budget_nats"] == 0.002
    assert "budget 0.002" in render(found)
