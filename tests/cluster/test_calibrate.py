"""`hotset calibrate` and `hotset bench mix`: files, refusals, and mixes of others."""

from __future__ import annotations

import json
import sysconfig
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st

from hotset.blocks.checkpoint import Catalog
from hotset.blocks.families import make_random_checkpoint
from hotset.blocks.lowrank import uninstall
from hotset.blocks.sensitivity_table import read_table
from hotset.cluster.bench_mix import run_bench
from hotset.cluster.bench_mix_report import draw, render
from hotset.cluster.bench_mix_rivals import RIVALS, rival_codes
from hotset.cluster.calibrate import meter_of, mix_within, parse_duration_ns
from hotset.cluster.cli import main
from hotset.errors import ConfigError
from hotset.policies.allocate import Costs
from hotset.policies.types import BlockId
from tests.blocks.upcycled import upcycle

pytestmark = pytest.mark.slow  # starts processes

DEMO = Path(__file__).resolve().parents[2] / "examples" / "demo-moe"
SOURCE = Path(sysconfig.get_path("stdlib")) / "argparse.py"


@pytest.fixture(scope="module")
def table_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A table of the demo model, made with hardly any time."""
    out = tmp_path_factory.mktemp("calibrate") / "sensitivity.json"
    result = CliRunner().invoke(
        main,
        ["calibrate", "--model", str(DEMO), "--text", str(SOURCE), "--budget", "1s",
         "--formats", "int8,int4,int2", "--out", str(out), "--json"],
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    summary = json.loads(result.stdout.splitlines()[-1])
    assert summary["out"] == str(out)
    assert summary["checkpoint"] == Catalog.open(DEMO).digest
    assert 0 < summary["bytes_ratio"] <= 1
    refusal = summary["lowrank"]  # its experts were trained from scratch
    assert refusal["offered"] == []
    assert all(one["error"] > 4 * one["int4_error"] for one in refusal["layers"])
    assert all(abs(one["cosine"]) < 0.05 for one in refusal["layers"])
    return out


def test_the_table_gives_a_mix_that_the_guardrail_accepts(table_path: Path) -> None:
    table = read_table(table_path, checkpoint=Catalog.open(DEMO).digest)
    drift = meter_of(table, nats=0.002)
    mix = mix_within(table, nats=0.002)
    assert mix.codes.any()
    for row, expert in np.argwhere(mix.codes > 0).tolist():
        block, form = (
            BlockId(table.layers[row], expert),
            drift.costs.formats[mix.codes[row, expert]],
        )
        assert drift.check(block, form) is None
        drift.set(block, form)
    assert drift.nats <= 0.002
    assert drift.check_layer(0, "int2") is not None, "layer 0 is the sensitive one"


def test_a_table_of_another_checkpoint_is_refused(table_path: Path, tmp_path: Path) -> None:
    other = make_random_checkpoint("olmoe", tmp_path / "other")
    with pytest.raises(ConfigError, match="was measured on checkpoint"):
        run_bench(other, table_path=table_path)


def test_upcycled_experts_are_offered_as_differences_and_measured_in_nats(tmp_path: Path) -> None:
    model, out = upcycle(DEMO, tmp_path / "model"), tmp_path / "up.json"
    result = CliRunner().invoke(
        main,
        ["calibrate", "--model", str(model), "--text", str(SOURCE), "--budget", "1s",
         "--formats", "int4", "--out", str(out)],
    )  # fmt: skip
    try:
        assert result.exit_code == 0, result.output
        assert "lowrank is offered for 6 of 6 layers" in result.output
        table = read_table(out, checkpoint=Catalog.open(model).digest)
        assert table.formats == ("int4", "lowrank")
        assert table.bases == "up.bases.safetensors"
        assert (tmp_path / table.bases).exists()
        damage = table.damage
        assert (damage > 0).all()
        assert damage[..., 1].sum() < damage[..., 0].sum(), "the smaller error costs less"
        assert table.nbytes[1] < table.nbytes[0], "in fewer bytes"
        assert mix_within(table, nats=0.002).codes.any()
    finally:
        uninstall()


@pytest.mark.parametrize(
    ("args", "named"),
    [
        (["--text", "absent.txt"], "cannot be read"),
        (["--text", str(SOURCE), "--budget", "soon"], "duration"),
        (["--text", str(SOURCE), "--budget", "0s"], "duration"),
        (["--text", str(SOURCE), "--formats", "int5"], "int5"),
        (["--text", str(SOURCE), "--formats", "bf16z"], "bf16z"),
        (["--text", str(SOURCE), "--formats", ","], "nothing"),
        ([], "--text"),
    ],
)
def test_wrong_use_is_one_line_and_exit_code_2(args: list[str], named: str) -> None:
    result = CliRunner().invoke(main, ["calibrate", "--model", str(DEMO), *args])
    assert result.exit_code == 2
    line = result.stderr.strip().splitlines()[-1]
    assert line.startswith("hotset: ")
    assert named in line


@pytest.mark.parametrize(
    ("text", "seconds"), [("90s", 90), ("10min", 600), ("1.5 h", 5400), ("2h", 7200)]
)
def test_durations(text: str, seconds: int) -> None:
    assert parse_duration_ns(text) == seconds * 1_000_000_000


@settings(max_examples=60)
@given(st.sampled_from(RIVALS), st.floats(0.1, 1.0), st.integers(0, 100))
def test_mixes_of_others_stay_within_the_bytes(name: str, part: float, seed: int) -> None:
    random = np.random.default_rng(seed)
    costs = Costs(
        formats=("bf16", "int8", "int4", "int3", "int2"),
        nbytes=np.array([1600, 810, 426, 326, 226]),
        nats=np.zeros((3, 8, 5)),
    )
    use = random.random((3, 8))
    room = part * 1600 * 24
    codes = rival_codes(name, costs, frequency=use, bytes_at_most=room, seed=seed)
    if codes is None:
        assert room < 226 * 24
        return
    size = int(costs.nbytes[codes].sum())
    assert size <= room
    assert size >= min(room, 1600 * 24) - 1600, "and use them"
    if name != "random":
        order = np.argsort(-use, axis=None)
        bits = costs.nbytes[codes].ravel()[order]
        assert (np.diff(bits) <= 0).all(), "hotter experts have no fewer bits"


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_bench_mix_measures_and_draws(table_path: Path, tmp_path: Path) -> None:
    found = run_bench(
        DEMO, held_out=(SOURCE,), shifted=(SOURCE.with_name("typing.py"),),
        table_path=table_path, quick=True,
    )  # fmt: skip
    part = found.part()
    assert part["budget_nats"] == 0.002
    assert max(found.samples_nats) <= 0.002
    assert found.live.noticed_step == -1, "the measured table raises no alarm"
    assert 0 <= found.live_zeros.noticed_step < 200
    assert found.live_zeros.kl_after_nats < found.live_zeros.kl_before_nats
    assert found.drift_nats <= 0.002
    assert "0:int2" in found.vetoes
    at_4_bits = {p.name: p.kl_nats for p in found.frontier if 3.9 < p.bits_per_weight < 4.1}
    assert at_4_bits["hotset"] <= min(at_4_bits["hobbit"], at_4_bits["random"])
    text = render(found)
    assert "vetoed 0:int2" in text
    ranks = {rank.by: rank.correlation for rank in found.ranks}
    assert {"Fisher-weighted output error", "router-weighted output error"} < set(ranks)
    assert ranks["Fisher-weighted output error"] > ranks["weight error"]
    draw(found, tmp_path / "mix.svg")
    assert (tmp_path / "mix.svg").stat().st_size > 1000
