"""Each damaged or unknown checkpoint is one CheckpointError of one line with a remedy."""

from __future__ import annotations

import json
import shutil
from typing import TYPE_CHECKING

import pytest
import torch
from safetensors.torch import load_file, save_file

from hotset.blocks.checkpoint import Catalog
from hotset.blocks.families import make_random_checkpoint
from hotset.blocks.hf import load_skeleton
from hotset.blocks.local import BlockReader
from hotset.errors import CheckpointError
from hotset.policies.types import BlockId

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


def edit_config(path: Path, **changes: object) -> None:
    config = json.loads((path / "config.json").read_bytes())
    (path / "config.json").write_text(json.dumps(config | changes))


def edit_tensors(path: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    file = path / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


def expert(layer: int, index: int, part: str) -> str:
    return f"model.layers.{layer}.mlp.experts.{index}.{part}.weight"


def missing_directory(path: Path) -> None:
    shutil.rmtree(path)


def no_config(path: Path) -> None:
    (path / "config.json").unlink()


def bad_config(path: Path) -> None:
    (path / "config.json").write_text("{")


def no_weights(path: Path) -> None:
    (path / "model.safetensors").unlink()


def truncated(path: Path) -> None:
    file = path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])


def truncated_header(path: Path) -> None:
    file = path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:100])


def empty_file(path: Path) -> None:
    (path / "model.safetensors").write_bytes(b"")


def garbage_header(path: Path) -> None:
    (path / "model.safetensors").write_bytes((16).to_bytes(8, "little") + b"x" * 16)


def float8(path: Path) -> None:
    edit_tensors(
        path, lambda t: t.update({expert(0, 0, "up_proj"): torch.zeros(32, 64, dtype=torch.int8)})
    )


def quantised(path: Path) -> None:
    edit_config(path, quantization_config={"quant_method": "mxfp4"})


def unknown_architecture(path: Path) -> None:
    edit_config(path, model_type="perceptron9000", architectures=["Perceptron"])


def dense_model(path: Path) -> None:
    edit_tensors(path, lambda t: [t.pop(k) for k in list(t) if ".experts." in k])


def missing_part(path: Path) -> None:
    edit_tensors(path, lambda t: t.pop(expert(1, 3, "down_proj")))


def missing_expert(path: Path) -> None:
    edit_tensors(path, lambda t: [t.pop(k) for k in list(t) if ".layers.1.mlp.experts.7." in k])


def other_size(path: Path) -> None:
    edit_tensors(
        path,
        lambda t: t.update({expert(2, 5, "down_proj"): torch.zeros(64, 16, dtype=torch.bfloat16)}),
    )


DAMAGE = [
    (missing_directory, "is no directory"),
    (no_config, "config.json is missing"),
    (bad_config, "config.json is not JSON"),
    (no_weights, "holds neither model.safetensors nor model.safetensors.index.json"),
    (truncated, "model.safetensors is truncated"),
    (truncated_header, "model.safetensors is truncated"),
    (empty_file, "model.safetensors is truncated"),
    (garbage_header, "is not valid safetensors"),
    (float8, "has type I8"),
    (quantised, "is quantised (mxfp4)"),
    (unknown_architecture, "cannot build the architecture 'perceptron9000'"),
    (dense_model, "no Mixture-of-Experts layers"),
    (missing_part, "expert 3 of layer 1 is incomplete"),
    (missing_expert, "layer 1 has no tensors of expert 7"),
    (other_size, "expert 5 of layer 2"),
]


@pytest.fixture
def copy(tmp_path: Path, olmoe: Path) -> Path:
    return shutil.copytree(olmoe, tmp_path / "model")


@pytest.mark.parametrize(("damage", "says"), DAMAGE, ids=lambda x: getattr(x, "__name__", ""))
def test_damage_is_one_line_with_a_remedy(
    copy: Path, damage: Callable[[Path], None], says: str
) -> None:
    damage(copy)
    with pytest.raises(CheckpointError) as caught:
        Catalog.open(copy)
    assert says in caught.value.what
    assert str(copy) in str(caught.value) or "tensor" in str(caught.value)
    assert caught.value.remedy
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == 2


def test_missing_shard_is_named(tmp_path: Path) -> None:
    path = make_random_checkpoint("olmoe", tmp_path, max_shard_bytes=100_000)
    shard = sorted(path.glob("model-*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(CheckpointError, match=rf"{shard.name} is missing \(1 of the"):
        Catalog.open(path)


def test_tensor_in_the_index_but_in_no_shard(tmp_path: Path) -> None:
    path = make_random_checkpoint("olmoe", tmp_path, stream=True)
    index = path / "model.safetensors.index.json"
    content = json.loads(index.read_bytes())
    content["weight_map"]["model.lost"] = "model-layer-00000.safetensors"
    index.write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match=r"tensor model\.lost is in"):
        Catalog.open(path)


def test_file_truncated_while_in_use(copy: Path) -> None:
    catalog = Catalog.open(copy)
    reader = BlockReader(catalog)
    buffer = torch.empty(catalog.block_nbytes, dtype=torch.uint8)
    last = max(catalog.blocks, key=lambda b: max(s.offset for s in catalog.ranges(b)))
    truncated_to = catalog.ranges(last)[-1].offset + 10
    with (copy / "model.safetensors").open("r+b") as file:
        file.truncate(truncated_to)
    with pytest.raises(CheckpointError, match="ended at"):
        reader.read(last, buffer)
    reader.close()


def test_skeleton_refuses_another_type(olmoe: Path) -> None:
    with pytest.raises(CheckpointError, match="holds experts in bfloat16, not float32"):
        load_skeleton(olmoe, dtype=torch.float32)


@pytest.mark.parametrize("change", ["missing", "unknown"])
def test_skeleton_refuses_a_dense_part_that_does_not_fit(copy: Path, change: str) -> None:
    def edit(tensors: dict[str, torch.Tensor]) -> None:
        norm = tensors.pop("model.norm.weight")
        if change == "unknown":
            tensors["model.norm.weight"] = norm
            tensors["model.extra.weight"] = norm.clone()

    edit_tensors(copy, edit)
    with pytest.raises(CheckpointError, match=f"1 tensors of the dense part are {change}"):
        load_skeleton(copy)


def test_patches_are_gone_after_a_failed_load(copy: Path) -> None:
    import transformers.models.olmoe.modeling_olmoe as module
    from transformers.monkey_patching import get_patch_mapping

    original = module.OlmoeExperts
    edit_config(copy, hidden_act="no_such_activation")
    with pytest.raises(CheckpointError, match="no_such_activation"):
        load_skeleton(copy)
    assert module.OlmoeExperts is original
    assert not get_patch_mapping()


def test_block_ids_are_sorted(olmoe: Path) -> None:
    blocks = list(Catalog.open(olmoe).blocks)
    assert blocks == sorted(blocks)
    assert blocks[0] == BlockId(0, 0)
