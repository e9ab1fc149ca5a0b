"""Blocks as bytes: earlier versions are read, damaged and foreign blocks never decode."""

from __future__ import annotations

import base64
import dataclasses
import importlib
import json
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from format_layouts import make_layout, make_payload
from hypothesis import given, settings
from hypothesis import strategies as st

from hotset.blocks.formats import CODECS, Codec, codec
from hotset.blocks.formats_header import HEADER_NBYTES, BlockHeader
from hotset.blocks.formats_lossless import LosslessCodec
from hotset.errors import DependencyError, FormatError
from hotset.policies.types import Format

if TYPE_CHECKING:
    from hotset.blocks.checkpoint import BlockLayout

GOLDEN = sorted((Path(__file__).parent / "data").glob("blocks_v*.json"))
DENSE = LosslessCodec(dense=True)
ENCODED = [*(CODECS[name] for name in CODECS if name is not Format.BF16), DENSE]
LAYOUT = make_layout(hidden=40, inter=24, bias=True)
PAYLOAD = make_payload(LAYOUT, seed=8, spread=0.3)


def encoded(by: Codec, layout: BlockLayout = LAYOUT) -> torch.Tensor:
    block = torch.zeros(by.nbytes(layout), dtype=torch.uint8)
    used = by.encode(make_payload(layout, seed=8, spread=0.3), layout, block)
    return block[:used].clone()


def encoded_payload(by: Codec, payload: torch.Tensor, layout: BlockLayout) -> torch.Tensor:
    block = torch.zeros(by.nbytes(layout), dtype=torch.uint8)
    return block[: by.encode(payload, layout, block)].clone()


def decode(by: Codec, block: torch.Tensor, layout: BlockLayout = LAYOUT) -> torch.Tensor:
    out = torch.zeros(layout.nbytes, dtype=torch.uint8)
    by.decode(block, layout, out)
    return out


def bytes_of(text: str) -> torch.Tensor:
    return torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.uint8)


def test_there_are_golden_blocks_of_the_first_version() -> None:
    assert GOLDEN[0].name == "blocks_v1.json"


@pytest.mark.parametrize("path", GOLDEN, ids=lambda path: path.stem)
def test_blocks_of_every_version_are_read(path: Path) -> None:
    layout = make_layout(hidden=11, inter=7, bias=True)
    found = json.loads(path.read_text())
    assert {name.split()[0] for name in found["blocks"]} == set(CODECS) - {"bf16"}
    for name, one in found["blocks"].items():
        restored = decode(codec(name.split()[0]), bytes_of(one["block"]), layout)
        assert torch.equal(restored, bytes_of(one["decoded"])), name


def test_this_version_still_writes_the_same_blocks() -> None:
    layout = make_layout(hidden=11, inter=7, bias=True)
    found = json.loads(GOLDEN[-1].read_text())
    payload = bytes_of(found["payload"])
    for name, one in found["blocks"].items():
        if name == "bf16z dense":
            continue  # zstd promises that old frames are read, not that new ones are the same
        by = codec(name)
        block = torch.zeros(by.nbytes(layout), dtype=torch.uint8)
        used = by.encode(payload, layout, block)
        assert torch.equal(block[:used], bytes_of(one["block"])), name


def test_planes_that_zstd_has_made_name_the_package_that_reads_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def absent(name: str) -> None:
        raise ImportError(name)

    old = json.loads(GOLDEN[0].read_text())["blocks"]["bf16z dense"]
    layout = make_layout(hidden=11, inter=7, bias=True)
    monkeypatch.setattr(importlib, "import_module", absent)
    with pytest.raises(DependencyError, match=r"zstandard.*hotset\[formats\]"):
        decode(codec("bf16z"), bytes_of(old["block"]), layout)


def test_dense_blocks_are_read_and_still_made() -> None:
    found = json.loads((Path(__file__).parent / "data" / "dense_v1.json").read_text())
    payload = bytes_of(found["payload"])
    layout = make_layout(hidden=40, inter=60)
    assert torch.equal(encoded_payload(DENSE, payload, layout), bytes_of(found["block"]))
    assert torch.equal(decode(codec("bf16z"), bytes_of(found["block"]), layout), payload)


@settings(max_examples=60)
@given(by=st.sampled_from(ENCODED), place=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
def test_a_flipped_bit_never_decodes(by: Codec, place: float, bit: int) -> None:
    block = encoded(by)
    block[int(place * block.numel())] ^= 1 << bit
    with pytest.raises(FormatError, match=r"damaged|no encoded block"):
        decode(by, block)


@settings(max_examples=40)
@given(by=st.sampled_from(ENCODED), keep=st.floats(0, 1, exclude_max=True))
def test_a_truncated_block_never_decodes(by: Codec, keep: float) -> None:
    block = encoded(by)
    with pytest.raises(FormatError, match=r"truncated|shorter.*again"):
        decode(by, block[: int(keep * block.numel())])


@pytest.mark.parametrize("by", ENCODED, ids=lambda by: by.name.value)
def test_bytes_after_the_block_do_not_matter(by: Codec) -> None:
    block = encoded(by)
    slot = torch.cat((block, torch.full((1000,), 0xFF, dtype=torch.uint8)))
    assert torch.equal(decode(by, slot), decode(by, block))


@pytest.mark.parametrize("by", ENCODED, ids=lambda by: by.name.value)
def test_another_layout_of_the_same_size_is_refused(by: Codec) -> None:
    other = dataclasses.replace(LAYOUT, transposed=True)
    with pytest.raises(FormatError, match="another layout"):
        decode(by, encoded(by), other)


@pytest.mark.parametrize("by", ENCODED, ids=lambda by: by.name.value)
def test_a_block_of_another_format_is_refused_by_name(by: Codec) -> None:
    other = codec("int8" if by.name is Format.INT4 else "int4")
    with pytest.raises(FormatError, match=rf"is in format {by.name}.*codec\('{by.name}'\)"):
        decode(other, encoded(by))


@pytest.mark.parametrize(
    ("field", "value", "match"),
    [
        ("version", 2, "upgrade hotset"),
        ("mode", 9, "mode 9"),
        ("body_nbytes", 1 << 40, "truncated"),
    ],
)
def test_what_a_later_version_may_write_is_refused(field: str, value: int, match: str) -> None:
    block = encoded(codec("bf16z"))
    header = BlockHeader.parse(block[:HEADER_NBYTES].numpy().tobytes())
    changed = dataclasses.replace(header, **{field: value}).pack()
    block[:HEADER_NBYTES] = torch.frombuffer(bytearray(changed), dtype=torch.uint8)
    with pytest.raises(FormatError, match=match):
        decode(codec("bf16z"), block)


def test_the_header_is_what_the_manual_says() -> None:
    raw = encoded(codec("int8"))[:HEADER_NBYTES].numpy().tobytes()
    assert raw[:8] == b"HSBF\x01\x00\x03\x00"
    assert int.from_bytes(raw[8:16], "little") == codec("int8").nbytes(LAYOUT) - HEADER_NBYTES
    assert int.from_bytes(raw[16:24], "little") == LAYOUT.nbytes
    assert raw[40:56] == bytes(16)


def test_views_check_the_header_but_not_the_body() -> None:
    int8 = codec("int8")
    block = encoded(int8)
    block[HEADER_NBYTES] ^= 1
    assert int8.views(block, LAYOUT).gate_up.shape == (48, 40)  # the slot's checksum guards it
    block[9] ^= 1
    with pytest.raises(FormatError, match="header"):
        int8.views(block, LAYOUT)


def test_a_short_full_payload_is_refused() -> None:
    with pytest.raises(ValueError, match="give the"):
        decode(codec("bf16"), PAYLOAD[:-1])
