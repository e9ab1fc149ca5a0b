from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest
import torch
from click.testing import CliRunner

from hotset.blocks.checkpoint import Catalog
from hotset.blocks.formats import CODECS
from hotset.cluster import bench_formats, bench_formats_peers
from hotset.cluster.bench_formats import experts_of, measure, stack
from hotset.cluster.bench_formats_peers import Peer, find_peers
from hotset.cluster.cli import DEMO_MODEL
from hotset.cluster.formats_command import bench_formats_command

if TYPE_CHECKING:
    from hotset.cluster.bench_formats_peers import LeftOut


def no_peers(_probe: list[torch.Tensor]) -> tuple[list[Peer], list[LeftOut]]:
    return [], []


def test_json_names_every_format_once_with_true_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_formats, "find_peers", no_peers)
    monkeypatch.setattr(bench_formats, "_LEAST_NBYTES", 100_000)
    result = CliRunner().invoke(bench_formats_command, ["--quick", "--no-mix", "--json"])
    assert result.exit_code == 0, result.output
    found = json.loads(result.output)
    rows = {row["format"]: row for row in found["formats"] if row["by"] == "hotset"}
    assert set(rows) == set(CODECS)
    assert found["mix"] is None
    assert found["repeat"] == 5
    assert found["block_nbytes"] == Catalog.open(DEMO_MODEL).block_nbytes
    assert all(row["decode_gb_per_s"] > 0 and row["encode_gb_per_s"] > 0 for row in rows.values())
    assert rows["bf16"]["output_error"] == rows["bf16z"]["output_error"] == 0
    order = ["int8", "fp8", "nf4", "int4", "int3", "int2"]
    errors = [rows[name]["output_error"] for name in order]
    assert errors == sorted(errors)
    assert 0 < errors[0] < 0.02
    assert rows["int2"]["ratio"] > rows["int3"]["ratio"] > rows["int4"]["ratio"] > 3.7
    assert rows["bf16z"]["ratio"] > 1.3


def test_a_peer_is_measured_in_turns_and_compared() -> None:
    experts = experts_of(Catalog.open(DEMO_MODEL), count=2)
    block = stack(experts, least_nbytes=200_000)
    assert block.layout.nbytes >= 200_000
    peer = Peer(
        format="int8",
        by="clone",
        encode=torch.clone,
        decode=torch.clone,
        nbytes=lambda found: found.nbytes,
    )
    rows = measure(
        "int8",
        [("hotset", CODECS["int8"]), ("clone", peer)],  # type: ignore[index] # a StrEnum's value
        block=block,
        experts=experts,
        repeat=5,
        rows=torch.randn(4, 128, generator=torch.Generator().manual_seed(0)),
    )
    ours, theirs = rows
    assert theirs.output_error == 0
    assert theirs.ratio == 1
    assert theirs.decode_over_best_peer is None
    assert ours.decode_over_best_peer == pytest.approx(
        ours.decode_gb_per_s / theirs.decode_gb_per_s
    )


def test_absent_libraries_are_left_out_with_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> None:
        raise ImportError(f"No module named {name!r}")

    monkeypatch.setattr(bench_formats_peers, "_quietly", absent)
    peers, left_out = find_peers([torch.randn(8, 8).to(torch.bfloat16)])
    assert [peer.by for peer in peers] == ["torch cast"]
    assert {one.by for one in left_out} == {"torchao", "bitsandbytes", "blosc2"}
    assert all("pip install 'hotset[bench]'" in one.reason for one in left_out)
