from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from expert_modules import Silu, Transposed
from format_layouts import make_layout, make_payload
from hypothesis import given, settings
from hypothesis import strategies as st

from hotset.blocks.experts import run_expert, view_weights
from hotset.blocks.formats import CODECS, CODECS_BY_CODE, codec, reduced_nbytes
from hotset.errors import CheckpointError
from hotset.policies.types import Format

if TYPE_CHECKING:
    from hotset.blocks.checkpoint import BlockLayout

INT8 = codec(Format.INT8)
FULL = codec(Format.BF16)
UNIT = {"bfloat16": 2**-8, "float16": 2**-11, "float32": 2**-24}  # one rounding


def encode(layout: BlockLayout, payload: torch.Tensor) -> torch.Tensor:
    out = torch.empty(INT8.nbytes(layout), dtype=torch.uint8)
    INT8.encode(payload, layout, out)
    return out


def test_codes_are_stable() -> None:
    expected = {
        "bf16": 1, "fp8": 2, "int8": 3, "int4": 4, "bf16z": 5, "nf4": 7, "int3": 8, "int2": 9,
    }  # fmt: skip
    assert {name.value: c.code for name, c in CODECS.items()} == expected
    assert {code: c.name.value for code, c in CODECS_BY_CODE.items()} == {
        code: name for name, code in expected.items()
    }


@pytest.mark.parametrize("name", ["lowrank", "int7"])
def test_a_format_without_codec_is_refused(name: str) -> None:
    with pytest.raises(CheckpointError, match=f"format {name} cannot be made"):
        codec(name)


def test_full_is_the_same_bytes_without_a_copy() -> None:
    layout = make_layout(hidden=32, inter=16)
    payload = make_payload(layout, seed=0)
    out = torch.empty(FULL.nbytes(layout), dtype=torch.uint8)
    FULL.encode(payload, layout, out)
    assert torch.equal(out, payload)
    assert FULL.views(out, layout).gate_up.data_ptr() == out.data_ptr()


@settings(max_examples=60)
@given(
    hidden=st.integers(1, 70),
    inter=st.integers(1, 40),
    dtype=st.sampled_from(sorted(UNIT)),
    transposed=st.booleans(),
    bias=st.booleans(),
    spread=st.floats(0, 3),
    seed=st.integers(0, 1000),
)
def test_int8_error_is_half_a_scale(
    *, hidden: int, inter: int, dtype: str, transposed: bool, bias: bool, spread: float, seed: int
) -> None:
    layout = make_layout(hidden=hidden, inter=inter, dtype=dtype, transposed=transposed, bias=bias)
    payload = make_payload(layout, seed=seed, spread=spread)
    before = payload.clone()
    encoded = encode(layout, payload)
    assert torch.equal(payload, before)
    assert encoded.numel() == INT8.nbytes(layout)
    restored = torch.empty(layout.nbytes, dtype=torch.uint8)
    INT8.decode(encoded, layout, restored)
    for field in layout.fields:
        span = slice(field.offset, field.offset + field.nbytes)
        was = payload[span].view(getattr(torch, dtype)).view(field.shape).float()
        now = restored[span].view(getattr(torch, dtype)).view(field.shape).float()
        if field.role.endswith("_bias"):
            assert torch.equal(was, now)
            continue
        largest = was.abs().amax(dim=0 if transposed else 1, keepdim=True)
        scale = largest / 127 * (1 + 2**-8) ** 2  # slack, then the rounding of a scale
        tiny = torch.finfo(getattr(torch, dtype)).smallest_normal * UNIT[dtype]
        assert ((was - now).abs() <= scale * 0.5001 + now.abs() * UNIT[dtype] + tiny).all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", [Format.BF16, Format.INT8])
def test_weights_that_are_not_finite_are_refused(name: Format, bad: float) -> None:
    layout = make_layout(hidden=16, inter=8)
    payload = make_payload(layout, seed=1)
    payload.view(torch.bfloat16)[37] = bad
    with pytest.raises(CheckpointError, match="NaN or infinity"):
        codec(name).encode(
            payload, layout, torch.empty(codec(name).nbytes(layout), dtype=torch.uint8)
        )


def test_zero_channels_stay_zero() -> None:
    layout = make_layout(hidden=16, inter=8)
    restored = torch.empty(layout.nbytes, dtype=torch.uint8)
    INT8.decode(encode(layout, torch.zeros(layout.nbytes, dtype=torch.uint8)), layout, restored)
    assert not restored.view(torch.bfloat16).any()


def test_int8_is_about_half_the_bytes() -> None:
    layout = make_layout(hidden=2048, inter=1024)
    assert 0.500 < reduced_nbytes(layout) / layout.nbytes < 0.502


@pytest.mark.parametrize("rows", [1, 16])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_compute_from_int8_is_compute_from_the_decoded_weights(
    *, rows: int, transposed: bool, dtype: str
) -> None:
    layout = make_layout(hidden=256, inter=128, dtype=dtype, transposed=transposed, bias=transposed)
    payload = make_payload(layout, seed=3)
    encoded = encode(layout, payload)
    scratch = torch.empty(layout.nbytes, dtype=torch.uint8)
    module = Transposed() if transposed else Silu()
    x = torch.randn(rows, 256, generator=torch.Generator().manual_seed(4)).to(getattr(torch, dtype))
    direct = run_expert(module, x, INT8.views(encoded, layout)).float()
    decoded = run_expert(module, x, INT8.views(encoded, layout, scratch=scratch)).float()
    full = run_expert(module, x, view_weights(payload, layout)).float()
    assert (direct - decoded).norm() <= 0.01 * full.norm()
    assert 0 < (direct - full).norm() <= 0.05 * full.norm()
