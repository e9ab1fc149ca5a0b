from __future__ import annotations

import json
import pickle
import subprocess
import sys
from itertools import pairwise
from typing import TYPE_CHECKING

import pytest
import torch

from hotset.blocks.checkpoint import Catalog
from hotset.blocks.families import KINDS, make_random_checkpoint
from hotset.blocks.local import BlockReader
from hotset.blocks.naming import TableNaming, TransformersNaming
from hotset.blocks.tensors import read_shard
from hotset.policies.types import BlockId

if TYPE_CHECKING:
    from pathlib import Path

    from hotset.blocks.families import Kind


@pytest.mark.parametrize("kind", KINDS)
def test_every_byte_is_dense_or_of_one_expert(checkpoints: dict[str, Path], kind: Kind) -> None:
    catalog = Catalog.open(checkpoints[kind])
    shard = read_shard(checkpoints[kind] / "model.safetensors")
    total = sum(t.nbytes for t in shard.tensors)
    ranges = sorted((s.offset, s.nbytes) for b in catalog.blocks for s in catalog.ranges(b))
    assert catalog.dense_bytes + catalog.expert_bytes == total
    assert sum(n for _, n in ranges) == catalog.expert_bytes
    assert all(a + n <= b for (a, n), (b, _) in pairwise(ranges))
    assert len(catalog.blocks) == len(catalog.layers) * catalog.num_experts


@pytest.mark.parametrize("kind", KINDS)
def test_payload_is_the_models_own_weights(checkpoints: dict[str, Path], kind: Kind) -> None:
    from transformers import AutoModelForCausalLM

    catalog = Catalog.open(checkpoints[kind])
    model = AutoModelForCausalLM.from_pretrained(checkpoints[kind], dtype=torch.bfloat16)
    reader = BlockReader(catalog)
    buffer = torch.empty(catalog.block_nbytes, dtype=torch.uint8)
    for block in catalog.blocks:
        reader.read(block, buffer)
        experts = model.get_submodule(f"model.layers.{block.layer}.mlp.experts")
        for field in catalog.layout.fields:
            name = {"gate_up": "gate_up_proj", "down": "down_proj"}.get(
                field.role, field.role.replace("_bias", "_proj_bias")
            )
            expected = getattr(experts, name)[block.index]
            got = buffer[field.offset : field.offset + field.nbytes].view(torch.bfloat16)
            assert torch.equal(got.view(field.shape), expected)
    reader.close()


@pytest.mark.parametrize("kind", KINDS)
def test_table_and_transformers_agree_on_names(checkpoints: dict[str, Path], kind: Kind) -> None:
    config = json.loads((checkpoints[kind] / "config.json").read_bytes())
    table = TableNaming(config, transposed=kind == "gpt_oss")
    theirs = TransformersNaming(str(checkpoints[kind]), model_type=kind)
    shard = read_shard(checkpoints[kind] / "model.safetensors")
    assert table.transposed == theirs.transposed
    assert [table.place(t.name) for t in shard.tensors] == [
        theirs.place(t.name) for t in shard.tensors
    ]


def test_a_family_outside_the_table_is_read_by_transformers(tmp_path: Path, olmoe: Path) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(
        "flex_olmo", num_experts=4, num_experts_per_tok=2, hidden_size=64, intermediate_size=32,
        num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2, vocab_size=64,
        pad_token_id=0,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).to(torch.bfloat16).save_pretrained(tmp_path)
    catalog = Catalog.open(tmp_path)
    assert catalog.model_type == "flex_olmo"
    assert sorted(catalog.blocks) == [BlockId(layer, e) for layer in (0, 1) for e in range(4)]
    assert [f.role for f in catalog.layout.fields] == [
        f.role for f in Catalog.open(olmoe).layout.fields
    ]


def test_dense_layers_leave_gaps(checkpoints: dict[str, Path]) -> None:
    assert Catalog.open(checkpoints["deepseek_v3"]).layers == (1, 2)


def test_prediction_layers_beyond_the_model_are_not_blocks() -> None:
    naming = TableNaming({"num_hidden_layers": 61}, transposed=False)
    assert naming.place("model.layers.60.mlp.experts.3.up_proj.weight") is not None
    assert naming.place("model.layers.61.mlp.experts.3.up_proj.weight") is None


def test_shards(tmp_path: Path, olmoe: Path) -> None:
    path = make_random_checkpoint("olmoe", tmp_path, seed=1, max_shard_bytes=100_000)
    sharded, single = Catalog.open(path), Catalog.open(olmoe)
    assert len({p.path for s in sharded.blocks.values() for p in s.parts}) > 2
    assert sharded.layout == single.layout
    assert sharded.expert_bytes == single.expert_bytes
    assert sharded.dense_bytes == single.dense_bytes


def test_gate_and_up_are_one_read_where_they_are_neighbours(olmoe: Path) -> None:
    catalog = Catalog.open(olmoe)
    spans = catalog.ranges(BlockId(0, 0))
    assert [s.nbytes for s in spans] == [2 * 32 * 64 * 2, 64 * 32 * 2]


def test_key_names_block_and_version(checkpoints: dict[str, Path]) -> None:
    olmoe, mixtral = Catalog.open(checkpoints["olmoe"]), Catalog.open(checkpoints["mixtral"])
    key = olmoe.key(BlockId(2, 300))
    assert len(key) == 16
    assert Catalog.describe(key) == (2, 300)
    assert key != mixtral.key(BlockId(2, 300))
    assert len({olmoe.key(b) for b in olmoe.blocks}) == len(olmoe.blocks)


def test_digest_follows_headers_config_and_values(tmp_path: Path) -> None:
    olmoe = make_random_checkpoint("olmoe", tmp_path / "olmoe", seed=1)
    first = Catalog.open(olmoe).digest
    again = make_random_checkpoint("olmoe", tmp_path / "again", seed=1)
    assert Catalog.open(again).digest == first
    sibling = make_random_checkpoint("olmoe", tmp_path / "sibling", seed=2)
    assert Catalog.open(sibling).digest != first
    config = json.loads((again / "config.json").read_bytes())
    (again / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 1e-4}))
    assert Catalog.open(again).digest != first
    wider = make_random_checkpoint("olmoe", tmp_path / "wider", seed=1, vocab=321)
    (wider / "config.json").write_bytes((olmoe / "config.json").read_bytes())
    assert Catalog.open(wider).digest != first


def test_catalog_survives_pickling(olmoe: Path) -> None:
    catalog = Catalog.open(olmoe)
    assert pickle.loads(pickle.dumps(catalog)) == catalog  # noqa: S301 - our own bytes


def test_opening_needs_no_torch(olmoe: Path) -> None:
    code = (
        "import sys; from hotset.blocks.checkpoint import Catalog; "
        f"Catalog.open({str(olmoe)!r}); sys.exit('torch' in sys.modules)"
    )
    ended = subprocess.run([sys.executable, "-c", code], check=False)
    assert ended.returncode == 0
