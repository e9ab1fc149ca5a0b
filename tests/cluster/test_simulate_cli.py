"""`hotset simulate`, `hotset record`'s file and `hotset bench brain`, without a cluster."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from hotset.actors.observe import Recording, Routed
from hotset.cluster.bench_simulate import lay_out
from hotset.cluster.cli import main
from hotset.cluster.record import join_recordings
from hotset.dashboards.routertrace import read_trace, write_trace
from hotset.errors import ClusterError

SMALL = Path(__file__).resolve().parents[2] / "examples" / "simulate" / "small.yaml"


def run(*args: str, code: int = 0) -> Any:
    result = CliRunner().invoke(main, list(args))
    assert result.exit_code == code, result.output
    return result


def config_in(folder: Path, **changes: Any) -> Path:
    values = {
        "layers": 3, "experts": 8, "top_k": 2, "block_bytes": 4096, "workers": 2,
        "worker_ratio": 0.3, "host_pools": 1, "tokens": 12, "layer_ns": 1000, **changes,
    }  # fmt: skip
    path = folder / "config.yaml"
    path.write_text(json.dumps(values), encoding="utf-8")  # JSON is YAML
    return path


def test_the_example_runs_and_its_sums_add_up(tmp_path: Path) -> None:
    found = json.loads(run("simulate", str(config_in(tmp_path)), "--json").stdout)
    assert found["steps"] == 24
    assert found["needs"] == 24 * 3 * 2
    assert found["step_ns"] == 24 * 3 * 1000 + found["stall_ns"]
    again = json.loads(run("simulate", str(config_in(tmp_path)), "--json").stdout)
    assert {**again, "seconds": 0} == {**found, "seconds": 0}
    text = run("simulate", str(config_in(tmp_path)), "--policy", "lru").stdout
    assert "everything is modelled" in text


def test_the_example_with_a_fault_is_read() -> None:
    found = json.loads(run("simulate", str(SMALL), "--policy", "lru", "--json").stdout)
    assert found["lost"] == 1
    assert found["steps"] == 4 * 50


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"experts": 0}, "experts"),
        ({"colour": 1}, "colour"),
        ({"top_k": 9}, "top_k"),
        ({"faults": [{"store": "cxl-3", "at_ns": 1}]}, "cxl-3"),
        ({"tiers": {"tape": {"bytes_per_s": 1}}}, "tiers"),
        ({"tiers": {"host": {"bytes_per_s": 1, "speed": 2}}}, "bytes_per_s, latency_ns"),
        ({"layers": "many"}, "got many"),
        ({"colour": 1}, "known keys: layers"),
        ({"skip_tokens": 12}, "raise tokens"),
        ({"workers": 10_000, "layers": 1024, "experts": 65_536}, "fewer workers"),
    ],
)
def test_what_cannot_work_is_one_line(tmp_path: Path, changes: dict[str, Any], said: str) -> None:
    result = run("simulate", str(config_in(tmp_path, **changes)), code=2)
    assert said in result.stderr
    assert result.stderr.count("\n") == 1


def test_a_missing_key_or_no_mapping_is_one_line(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    for text, said in (("layers: 3\n", "add experts"), ("- 3\n", "the file"), ("{", "YAML")):
        path.write_text(text, encoding="utf-8")
        result = run("simulate", str(path), code=2)
        assert said in result.stderr
        assert result.stderr.count("\n") == 1


def test_an_unknown_policy_or_file_is_refused(tmp_path: Path) -> None:
    assert "belady" in run("simulate", str(SMALL), "--policy", "belady", code=2).stderr
    assert "cannot read" in run("simulate", str(tmp_path / "no.yaml"), code=2).stderr


def test_a_recording_drives_a_simulation(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    experts = np.array([[rng.permutation(8)[:2] for _ in range(3)] for _ in range(24)])
    path = tmp_path / "routing.npz"
    write_trace(path, experts=experts, seq=np.arange(24) // 12, num_experts=8)
    found = json.loads(run("simulate", str(config_in(tmp_path, router=str(path))), "--json").stdout)
    assert found["needs"] == 24 * 3 * 2
    refused = run("simulate", str(config_in(tmp_path, router=str(path), layers=4)), code=2)
    assert "asks for" in refused.stderr


def routed(request: int, tokens: np.ndarray[Any, Any]) -> Routed:
    layers = tuple(tokens[:, row].astype("<u2").tobytes() for row in range(tokens.shape[1]))
    return Routed(request=request, top_k=tokens.shape[2], layers=layers)


def test_recordings_become_a_trace_that_replay_reads(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    parts = [
        np.array([[rng.permutation(8)[:2] for _ in range(3)] for _ in range(tokens)])
        for tokens in (5, 9, 30)
    ]
    found = join_recordings(
        [
            Recording(requests=(routed(1, parts[0]), routed(2, parts[1])), cut=False),
            Recording(requests=(routed(1, parts[2]),), cut=True),
        ]
    )
    assert found.cut
    path = tmp_path / "routing.npz"
    write_trace(path, experts=found.experts, seq=found.seq, num_experts=8)
    trace = read_trace(path)
    assert np.array_equal(trace.experts, np.concatenate(parts))
    assert np.bincount(trace.seq).tolist() == [5, 9, 30]
    scored = json.loads(run("replay", "--router", str(path), "--policy", "lru", "--json").stdout)
    assert 0 < scored["hit_ratio"] < 1
    with pytest.raises(ClusterError, match="no routing"):
        join_recordings([Recording(requests=(), cut=False)])


def test_a_prefill_is_one_pass_and_every_second_request_is_tested() -> None:
    experts = np.array([[[0, 1]], [[1, 2]], [[3, 4]], [[5, 6]], [[0, 7]], [[1, 3]], [[2, 4]]])
    seq = np.array([0, 0, 0, 1, 1, 2, 2])
    passes = lay_out(experts.astype(np.uint16), seq, prefills=[2, 1, 1])
    assert passes.visits == [[[0, 1, 2]], [[3, 4]], [[5, 6]], [[0, 7]], [[1, 3]], [[2, 4]]]
    assert passes.scored == {5}


def test_the_brains_tick_is_measured() -> None:
    rows = json.loads(run("bench", "brain", "--blocks", "512", "--repeat", "2", "--json").stdout)
    assert rows[0]["blocks"] == 512
    assert rows[0]["moves_per_tick"] > 0
    assert "--blocks" in run("bench", "brain", "--blocks", "few", code=2).stderr
