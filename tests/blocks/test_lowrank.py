"""`lowrank` is offered where experts vary one base, round-trips there, and is refused elsewhere."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from upcycled import upcycle

from hotset.blocks.checkpoint import Catalog
from hotset.blocks.formats import codec
from hotset.blocks.formats_base import field_values, is_matrix
from hotset.blocks.local import BlockReader
from hotset.blocks.lowrank import (
    Bases,
    LowRankCodec,
    install,
    leading,
    read_bases,
    uninstall,
    write_bases,
)
from hotset.blocks.lowrank_measure import measure
from hotset.blocks.sensitivity import KLMeter, rounded
from hotset.errors import CheckpointError, FormatError
from hotset.policies.types import BlockId, Format

if TYPE_CHECKING:
    from collections.abc import Iterator

DEMO = Path(__file__).resolve().parents[2] / "examples" / "demo-moe"


@pytest.fixture(scope="module")
def upcycled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return upcycle(DEMO, tmp_path_factory.mktemp("lowrank") / "model")


@pytest.fixture(scope="module")
def bases(upcycled: Path) -> Bases:
    _, found = measure(Catalog.open(upcycled))
    assert found is not None
    return found


@pytest.fixture
def installed(bases: Bases) -> Iterator[LowRankCodec]:
    yield install(bases)
    uninstall()


def payload_of(catalog: Catalog, block: BlockId) -> torch.Tensor:
    out = torch.empty(catalog.block_nbytes, dtype=torch.uint8)
    reader = BlockReader(catalog)
    reader.read(block, out)
    reader.close()
    return out


def error(catalog: Catalog, exact: torch.Tensor, rough: torch.Tensor) -> float:
    matrices = [field for field in catalog.layout.fields if is_matrix(field)]
    away = [
        (field_values(rough, catalog.layout, f).float()
         - field_values(exact, catalog.layout, f).float()).norm()
        for f in matrices
    ]  # fmt: skip
    size = [field_values(exact, catalog.layout, f).float().norm() for f in matrices]
    return float(torch.stack(away).norm() / torch.stack(size).norm())


def trained() -> list[Path]:
    tiny = os.environ.get("HOTSET_TINY_MOE")
    return [DEMO, *([Path(tiny)] if tiny else [])]


@pytest.mark.parametrize("path", trained(), ids=lambda path: path.name)
def test_experts_trained_from_scratch_are_refused_with_the_figures(path: Path) -> None:
    found, bases = measure(Catalog.open(path))
    assert bases is None
    assert found.rank == 0
    assert found.offered == ()
    for layer in found.layers:
        assert abs(layer.cosine) < 0.05
        assert layer.error > 4 * layer.int4_error
    text = found.render()
    assert "not offered" in text
    assert "times int4's: refused" in text


def test_variations_of_one_expert_are_offered_and_beat_int4_for_fewer_bytes(
    upcycled: Path, bases: Bases
) -> None:
    catalog = Catalog.open(upcycled)
    found, _ = measure(catalog)
    assert found.offered == catalog.layers
    assert found.rank == bases.rank
    assert found.nbytes < found.int4_nbytes < found.full_nbytes
    assert all(layer.cosine > 0.5 and layer.error <= layer.int4_error for layer in found.layers)
    assert "is offered for 6 of 6 layers" in found.render()


def test_round_trip_is_nearer_than_int4_and_repeats_bit_for_bit(
    upcycled: Path, installed: LowRankCodec
) -> None:
    catalog = Catalog.open(upcycled)
    assert codec("lowrank") is installed
    for block in (BlockId(0, 1), BlockId(3, 5), BlockId(catalog.layers[-1], 7)):
        exact = payload_of(catalog, block)
        rough = rounded(exact, catalog.layout, form="lowrank")
        assert error(catalog, exact, rough) < error(
            catalog, exact, rounded(exact, catalog.layout, form="int4")
        )
        blocks = [torch.zeros(installed.nbytes(catalog.layout)).byte() for _ in range(2)]
        assert all(installed.encode(exact, catalog.layout, each) == each.numel() for each in blocks)
        assert torch.equal(*blocks)


def test_it_serves_about_as_well_as_int4_in_fewer_bytes_than_int2(
    upcycled: Path, installed: LowRankCodec
) -> None:
    assert installed.name is Format.LOWRANK
    meter = KLMeter(upcycled)
    random = torch.Generator().manual_seed(1)
    windows = torch.randint(3, 250, (4, 32), generator=random)
    kl = {
        form: float(meter.measure(meter.uniform(form), windows).kl.mean())
        for form in ("lowrank", "int4", "int3")
    }
    sizes = {form: meter.nbytes(form) for form in ("lowrank", "int2")}
    meter.close()
    assert 0 < kl["lowrank"] < 1.5 * kl["int4"] < kl["int3"]
    assert sizes["lowrank"] < sizes["int2"]


def test_damaged_blocks_and_foreign_bases_are_refused(
    upcycled: Path, bases: Bases, installed: LowRankCodec
) -> None:
    catalog = Catalog.open(upcycled)
    block = torch.zeros(installed.nbytes(catalog.layout)).byte()
    installed.encode(payload_of(catalog, BlockId(0, 0)), catalog.layout, block)
    out = torch.empty(catalog.block_nbytes, dtype=torch.uint8)
    with pytest.raises(FormatError, match="truncated"):
        installed.decode(block[:-64], catalog.layout, out)
    flipped = block.clone()
    flipped[200] ^= 1
    with pytest.raises(FormatError, match="damaged"):
        installed.decode(flipped, catalog.layout, out)
    layer, payload = next(iter(bases.payloads.items()))
    other = LowRankCodec(Bases(checkpoint="", rank=bases.rank, payloads={layer: payload.roll(2)}))
    with pytest.raises(FormatError, match="base that is not here"):
        other.decode(block, catalog.layout, out)
    wider = LowRankCodec(Bases(checkpoint="", rank=bases.rank + 1, payloads=bases.payloads))
    with pytest.raises(FormatError):
        wider.decode(block, catalog.layout, out)


def test_without_bases_there_is_no_such_format() -> None:
    with pytest.raises(CheckpointError, match="lowrank cannot be made"):
        codec("lowrank")


def test_bases_are_read_for_their_checkpoint_only(bases: Bases, tmp_path: Path) -> None:
    path = tmp_path / "bases.safetensors"
    write_bases(bases, path)
    found = read_bases(path, checkpoint=bases.checkpoint)
    assert found.rank == bases.rank
    assert found.payloads.keys() == bases.payloads.keys()
    assert all(torch.equal(found.payloads[at], bases.payloads[at]) for at in bases.payloads)
    with pytest.raises(CheckpointError, match=r"not of other.*hotset calibrate"):
        read_bases(path, checkpoint="other")
    path.write_bytes(b"no bases")
    with pytest.raises(CheckpointError, match="holds no bases"):
        read_bases(path, checkpoint=bases.checkpoint)


@pytest.mark.parametrize("shape", [(40, 24), (24, 40), (3, 50)])
def test_leading_values_are_those_of_the_whole_decomposition(shape: tuple[int, int]) -> None:
    random = torch.Generator().manual_seed(5)
    matrix = torch.randn(shape, generator=random) @ torch.diag(0.8 ** torch.arange(shape[1]))
    whole = torch.linalg.svdvals(matrix)
    left, values, right = leading(matrix, rank=6)
    keep = min(6, *shape)
    assert torch.allclose(values, whole[:keep], rtol=1e-3)
    best = float(whole[keep:].norm())
    assert float((left * values @ right - matrix).norm()) <= 1.01 * best + 1e-4
