"""The bench of wire formats gives figures that agree with themselves."""

from __future__ import annotations

from hotset.cluster.bench_equal_command import render_wire
from hotset.cluster.bench_wire import run_bench
from tests.cluster.conftest import DEMO


def quiet(_text: str) -> None:
    """Say nothing."""


def test_packing_pays_on_a_slow_link_and_not_on_a_fast_one() -> None:
    found = run_bench(DEMO, rates=(0.005, 20.0), blocks=2, rounds=3, say=quiet)
    rows = {(row.link_gb_per_s, row.format): row for row in found.rows}
    assert found.packs == {"0.005": True, "20": False}
    assert all(row.same_bytes == row.format.startswith("bf16") for row in found.rows)
    assert rows[0.005, "bf16z"].wire_bytes < 0.8 * rows[0.005, "bf16"].wire_bytes
    bounds = [rows[0.005, form].bound_us for form in ("int4", "int8", "bf16z", "bf16")]
    assert bounds == sorted(bounds)
    assert all(row.block_us >= 0.9 * row.bound_us for row in found.rows)
    assert "a live pool would pack: 0.005 GB/s yes, 20 GB/s no" in render_wire(found)
