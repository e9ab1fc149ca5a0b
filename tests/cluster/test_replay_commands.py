"""`hotset replay` and `hotset analyze-routing`: options in, tables and JSON out."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import numpy as np
import pytest
from click.testing import CliRunner

from hotset.cluster.cli import main
from hotset.cluster.config import RunConfig
from hotset.dashboards.routertrace import write_trace
from hotset.errors import ConfigError
from hotset.policies.residency import POLICIES

if TYPE_CHECKING:
    from pathlib import Path

KEYS = {
    "hit_ratio",
    "demand_per_layer_step",
    "loads_per_layer_step",
    "bytes_per_token",
    "stall_ns_per_token",
    "prefetch_precision",
    "policy_ns_per_layer_step",
    "predictors",
}


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    rng = np.random.default_rng(2)
    experts = np.array([[rng.permutation(16)[:2] for _ in range(3)] for _ in range(60)])
    path = tmp_path / "trace.npz"
    write_trace(path, experts=experts, seq=np.arange(60) // 20, num_experts=16)
    return path


def run(*args: str) -> tuple[int, str, str]:
    result = CliRunner().invoke(main, list(args))
    return result.exit_code, result.stdout, result.stderr


def test_json_has_exactly_the_keys(trace: Path) -> None:
    code, out, err = run(
        "replay", "--router", str(trace), "--policy", "lru", "--resident", "0.25", "--batch", "1",
        "--profile", "pcie5", "--expert-bytes", "1000", "--json",
    )  # fmt: skip
    assert (code, err) == (0, "")
    found = json.loads(out)
    assert set(found) == KEYS
    assert found["predictors"] == [], "lru predicts nothing"
    assert found["hit_ratio"] == pytest.approx(1 - found["demand_per_layer_step"] / 2, abs=1e-5)
    assert found["loads_per_layer_step"] == found["demand_per_layer_step"]
    assert found["bytes_per_token"] == pytest.approx(
        found["loads_per_layer_step"] * 3 * 1000, abs=1
    )
    assert found["prefetch_precision"] == 0
    assert found["policy_ns_per_layer_step"] > 0


def test_all_policies_in_one_table(trace: Path) -> None:
    code, out, _ = run("replay", "--router", str(trace), "--all", "--batch", "2")
    assert code == 0
    lines = out.splitlines()
    assert "3 layers x 16 experts, top 2; 25 % resident, batch 2" in lines[0]
    table, accounts = lines[4 : 4 + len(POLICIES)], lines[4 + len(POLICIES) :]
    assert [line.split()[0] for line in table] == list(POLICIES)
    assert accounts
    assert all(line.startswith("predictors of ") for line in accounts)
    code, out, _ = run("replay", "--router", str(trace), "--all", "--tokens", "20", "--json")
    assert set(json.loads(out)) == set(POLICIES)


@pytest.mark.parametrize(
    ("args", "why"),
    [
        (("--policy", "best"), "choose one of hotset,"),
        (("--profile", "usb"), "choose one of pcie5,"),
        (("--resident", "0.001"), "hold no expert"),
        (("--resident", "0"), "0.0 is not in the range"),
        (("--batch", "0"), "0 is not in the range"),
    ],
)
def test_what_cannot_work_is_one_line(trace: Path, args: tuple[str, ...], why: str) -> None:
    code, out, err = run("replay", "--router", str(trace), *args)
    assert (code, out) == (2, "")
    assert why in err
    assert err.count("\n") == 1


def test_a_bad_file_is_one_line(tmp_path: Path) -> None:
    path = tmp_path / "bad.npz"
    path.write_bytes(b"PK\x03\x04 and no more")
    for command in (("replay", "--router"), ("analyze-routing",)):
        code, out, err = run(*command, str(path))
        assert (code, out) == (2, "")
        assert "damaged" in err
        assert err.count("\n") == 1


def test_analysis_ends_with_a_verdict(trace: Path) -> None:
    code, out, _ = run("analyze-routing", str(trace))
    assert code == 0
    assert out.splitlines()[-1].startswith("Offloading does not suit this model")
    code, out, _ = run("analyze-routing", str(trace), "--json")
    found = json.loads(out)
    assert found["verdict"].startswith("Offloading")
    assert set(found["srp"]) == {"4", "16", "64"}


@pytest.mark.parametrize("policy", ["belady", "best"])
def test_a_run_takes_only_policies_that_need_no_future(policy: str, tmp_path: Path) -> None:
    assert RunConfig.build(model=tmp_path, policy="fate").policy == "fate"
    with pytest.raises(ConfigError, match=f"policy '{policy}' is unknown or for replays only"):
        RunConfig.build(model=tmp_path, policy=policy)
