"""The brain's books count a copy as the stores that hold it do."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from hotset.policies.books import Sizes
from hotset.policies.config import PolicyConfig
from hotset.policies.types import BlockId, BlockInfo, Format
from hotset.transport.slots import part_bytes, slot_parts, slot_stride


@given(
    full=st.integers(200, 1 << 24),
    reduced_ratio=st.floats(0.1, 0.99),
    small_ratio=st.floats(0.05, 0.6),
)
def test_sizes_are_those_of_the_slab(full: int, reduced_ratio: float, small_ratio: float) -> None:
    reduced, small = max(1, int(full * reduced_ratio)), max(1, int(full * small_ratio))
    info = BlockInfo(
        block=BlockId(0, 0), nbytes=full, reduced_nbytes=reduced,
        by_format=((Format.INT4, small),),
    )  # fmt: skip
    sizes = Sizes([info], config=PolicyConfig())
    stride = slot_stride(full, reduced, small)
    assert sizes.of(0, Format.BF16) == stride
    for form, nbytes in ((Format.INT8, reduced), (Format.INT4, small)):
        assert sizes.of(0, form) == part_bytes(slot_parts(nbytes, stride=stride), stride=stride)
