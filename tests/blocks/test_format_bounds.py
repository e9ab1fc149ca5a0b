"""Every format on any finite payload: error bounds, sizes, equal blocks on every path, refusals."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from format_layouts import any_payload, make_layout, make_payload, values_of
from hypothesis import given, settings
from hypothesis import strategies as st

from hotset.blocks import (
    formats_base,
    formats_channel,
    formats_decode,
    formats_group,
    formats_lossless,
)
from hotset.blocks.formats import CODECS, Codec, codec
from hotset.blocks.formats_base import scale_dtype
from hotset.blocks.formats_group import NF4_LEVELS, pack, unpack
from hotset.blocks.formats_lossless import LosslessCodec
from hotset.errors import CheckpointError
from hotset.policies.types import Format

if TYPE_CHECKING:
    from hotset.blocks.checkpoint import BlockLayout

DENSE = LosslessCodec(dense=True)
ALL = [*CODECS.values(), DENSE]
GROUPED = {
    Format.INT4: np.arange(-8.0, 8),
    Format.NF4: np.array(NF4_LEVELS),
    Format.INT3: np.arange(-4.0, 4),
    Format.INT2: np.array([-1.5, -0.5, 0.5, 1.5]),
}
UNIT = {"bfloat16": 2.0**-8, "float16": 2.0**-11, "float32": 2.0**-24}  # one rounding

layouts = st.builds(
    make_layout,
    hidden=st.integers(1, 90),
    inter=st.integers(1, 50),
    dtype=st.sampled_from(sorted(UNIT)),
    transposed=st.booleans(),
    bias=st.booleans(),
)


@st.composite
def blocks(draw: st.DrawFn) -> tuple[BlockLayout, torch.Tensor]:
    layout = draw(layouts)
    seed = draw(st.integers(0, 10_000))
    kind = draw(st.sampled_from(["bits", "sparse", "trained", "wide", "tiny", "zero"]))
    if kind == "zero":
        return layout, torch.zeros(layout.nbytes, dtype=torch.uint8)
    if kind in {"bits", "sparse"}:
        return layout, any_payload(layout, seed=seed, zeros=0.0 if kind == "bits" else 0.97)
    payload = make_payload(layout, seed=seed, spread={"wide": 4.0}.get(kind, 0.5))
    if kind == "tiny":
        dtype = getattr(torch, layout.dtype)
        payload.view(dtype).mul_(torch.finfo(dtype).smallest_normal)
    return layout, payload


def encoded(by: Codec, layout: BlockLayout, payload: torch.Tensor) -> torch.Tensor:
    out = torch.full((by.nbytes(layout),), 0xA5, dtype=torch.uint8)
    before = payload.clone()
    used = by.encode(payload, layout, out)
    assert torch.equal(payload, before)
    assert used == by.stored_nbytes(out, layout) <= by.nbytes(layout)
    return out[:used]


def decoded(by: Codec, layout: BlockLayout, block: torch.Tensor) -> torch.Tensor:
    out = torch.full((layout.nbytes,), 0x5A, dtype=torch.uint8)
    by.decode(block, layout, out)
    return out


def floor(layout: BlockLayout) -> float:
    """The smallest step of the model's type, and of the scale's."""
    kinds = (getattr(torch, layout.dtype), scale_dtype(layout))
    return float(max(torch.finfo(k).smallest_normal * torch.finfo(k).eps for k in kinds))


def matrices(layout: BlockLayout) -> list[str]:
    return [field.role for field in layout.fields if len(field.shape) == 2]


@settings(max_examples=60)
@given(block=blocks())
def test_lossless_formats_and_biases_keep_every_bit(
    block: tuple[BlockLayout, torch.Tensor],
) -> None:
    layout, payload = block
    for by in ALL:
        restored = decoded(by, layout, encoded(by, layout, payload))
        for field in layout.fields:
            if by.name in {Format.BF16, Format.BF16Z} or len(field.shape) == 1:
                span = slice(field.offset, field.offset + field.nbytes)
                assert torch.equal(restored[span], payload[span])


@settings(max_examples=60)
@given(block=blocks())
def test_error_of_int8_is_half_a_scale_and_of_fp8_a_sixteenth(
    block: tuple[BlockLayout, torch.Tensor],
) -> None:
    layout, payload = block
    for name, top in ((Format.INT8, 127.0), (Format.FP8, 448.0)):
        by = codec(name)
        restored = decoded(by, layout, encoded(by, layout, payload))
        for role in matrices(layout):
            was, now = values_of(payload, layout, role), values_of(restored, layout, role)
            assert torch.isfinite(now).all()
            largest = was.abs().amax(dim=0 if layout.transposed else 1, keepdim=True)
            scale = largest.clamp_min(1e-30) / top * (1 + 2**-8) ** 2
            # Near the type's end the scale is cut so that nothing overflows.
            near_end = (largest > 0.98 * torch.finfo(getattr(torch, layout.dtype)).max) * largest
            step = scale / 2 if name is Format.INT8 else torch.maximum(was.abs() / 16, scale / 1024)
            slack = now.abs() * UNIT[layout.dtype] + floor(layout) + near_end / 100
            assert ((was - now).abs() <= step * 1.001 + slack).all()


@settings(max_examples=80)
@given(block=blocks(), name=st.sampled_from(sorted(GROUPED)))
def test_a_group_errs_at_most_as_much_as_plain_rounding(
    block: tuple[BlockLayout, torch.Tensor], name: Format
) -> None:
    layout, payload = block
    by, levels = codec(name), GROUPED[name]
    restored = decoded(by, layout, encoded(by, layout, payload))
    for role in matrices(layout):
        was, now = values_of(payload, layout, role), values_of(restored, layout, role)
        assert torch.isfinite(now).all()
        ours, theirs = (groups_of(tensor) for tensor in (now, was))
        largest = np.abs(theirs).max(axis=1, keepdims=True)
        outermost = np.where(theirs.max(axis=1, keepdims=True) >= largest, -largest, largest)
        plain = outermost / -levels[0]
        scaled = np.divide(theirs, plain, out=np.zeros_like(theirs), where=plain != 0)
        nearest = levels[np.abs(scaled[..., None] - levels).argmin(axis=-1)] * plain
        # A scale rounds by 2**-9; the result rounds once; tiny groups become zero.
        slack = largest * 2.0**-8 * (2 if layout.dtype == "bfloat16" else 0.5)
        slack = slack + np.where(largest < 2.0**-122, largest, 0) + 8 * floor(layout)
        bound = np.sqrt(((nearest - theirs) ** 2).sum(axis=1)) + 8 * slack[:, 0]
        assert (np.sqrt(((ours - theirs) ** 2).sum(axis=1)) <= bound).all()


def groups_of(matrix: torch.Tensor) -> np.ndarray:
    flat = matrix.flatten().numpy()
    return np.pad(flat, (0, -flat.size % 64)).reshape(-1, 64)


@settings(max_examples=40)
@given(block=blocks())
def test_torch_and_kernels_make_and_read_the_same_blocks(
    block: tuple[BlockLayout, torch.Tensor],
) -> None:
    layout, payload = block
    modules = (formats_base, formats_channel, formats_group, formats_lossless)
    for by in ALL:
        fast = encoded(by, layout, payload)
        restored = decoded(by, layout, fast)
        with pytest.MonkeyPatch.context() as patch:
            for module in modules:
                patch.setattr(module, "COMPILED", False)
            assert torch.equal(encoded(by, layout, payload), fast)
            assert torch.equal(decoded(by, layout, fast), restored)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_packing_keeps_every_code(bits: int) -> None:
    random = torch.Generator().manual_seed(bits)
    codes = torch.randint(0, 1 << bits, (50, 64), generator=random, dtype=torch.uint8)
    packed = pack(codes, bits=bits)
    assert packed.shape == (50, 8 * bits)
    assert torch.equal(unpack(packed, bits=bits), codes)


@settings(max_examples=30)
@given(
    layout=layouts,
    by=st.sampled_from(ALL),
    bad=st.sampled_from([float("nan"), float("inf"), -float("inf")]),
    place=st.floats(0, 1, exclude_max=True),
)
def test_what_is_not_finite_is_refused_wherever_it_is(
    layout: BlockLayout, by: Codec, bad: float, place: float
) -> None:
    payload = make_payload(layout, seed=1)
    values = payload.view(getattr(torch, layout.dtype))
    values[int(place * values.numel())] = bad
    with pytest.raises(CheckpointError, match=r"NaN or infinity.*use another"):
        by.encode(payload, layout, torch.empty(by.nbytes(layout), dtype=torch.uint8))


def test_sizes_of_a_real_expert() -> None:
    layout = make_layout(hidden=2048, inter=1024)
    bits = {by.name.value: 16 * by.nbytes(layout) / layout.nbytes for by in CODECS.values()}
    expected = {
        "bf16": 16, "fp8": 8.02, "int8": 8.02, "int4": 4.25, "nf4": 4.25, "int3": 3.25,
        "int2": 2.25, "bf16z": 16,
    }  # fmt: skip
    assert bits == pytest.approx(expected, abs=0.01)


@pytest.mark.parametrize(("by", "most"), [(codec("bf16z"), 0.76), (DENSE, 0.70)])
def test_weights_of_a_usual_spread_get_smaller(by: Codec, most: float) -> None:
    layout = make_layout(hidden=256, inter=128)
    block = encoded(by, layout, make_payload(layout, seed=2, spread=0.2))
    assert block.numel() / layout.nbytes < most


@pytest.mark.parametrize("name", [f for f in CODECS if not CODECS[f].direct])
def test_compute_reads_other_formats_through_a_scratch(name: Format) -> None:
    layout = make_layout(hidden=64, inter=32)
    payload = make_payload(layout, seed=4)
    block = encoded(codec(name), layout, payload)
    with pytest.raises(ValueError, match="pass scratch"):
        codec(name).views(block, layout)
    scratch = torch.empty(layout.nbytes, dtype=torch.uint8)
    views = codec(name).views(block, layout, scratch=scratch)
    assert views.gate_up.data_ptr() == scratch.data_ptr()
    assert torch.equal(scratch, decoded(codec(name), layout, block))


def test_int8_views_are_the_block_itself() -> None:
    layout = make_layout(hidden=64, inter=32)
    block = encoded(codec("int8"), layout, make_payload(layout, seed=5))
    views = codec("int8").views(block, layout)
    assert views.gate_up.data_ptr() == block.data_ptr() + 64
    assert views.gate_up.dtype == torch.int8


def test_a_buffer_that_is_too_small_is_refused() -> None:
    layout = make_layout(hidden=64, inter=32)
    with pytest.raises(ValueError, match="give nbytes"):
        codec("int4").encode(
            make_payload(layout, seed=6), layout, torch.empty(100, dtype=torch.uint8)
        )


@pytest.mark.parametrize(("bits", "name"), [(4, "nf4"), (3, "int3"), (2, "int2")])
def test_processors_without_the_permute_read_the_same_weights(
    bits: int, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    by = codec(name)
    assert isinstance(by, formats_group.GroupCodec)
    random = np.random.default_rng(bits)
    packed = random.integers(0, 256, 20 * 8 * bits, dtype=np.uint8)
    scales = torch.randn(20).to(torch.bfloat16).view(torch.int16).numpy().view(np.uint16)
    kernel = getattr(formats_decode, f"decode{bits}")
    fast, slow = np.zeros((2, 20 * 64), dtype=np.uint16)
    assert kernel(packed, scales, by.filled, fast) == fast.size
    monkeypatch.setattr(formats_decode, "PERMUTES", False)
    assert kernel.py_func(packed, scales, by.filled, slow) == slow.size
    assert np.array_equal(fast, slow)
    assert fast.any()
