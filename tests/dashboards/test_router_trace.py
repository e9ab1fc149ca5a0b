"""Recorded routing: what is read, and one line for each kind of file that is not."""

from __future__ import annotations

import zipfile
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from hotset.dashboards import routertrace
from hotset.dashboards.routertrace import read_trace, write_trace
from hotset.errors import ConfigError

if TYPE_CHECKING:
    from pathlib import Path

GOOD = np.arange(10 * 2 * 3).reshape(10, 2, 3).astype(np.uint8) % 8
SEQ = np.repeat([4, 2], 5)


def test_what_is_written_is_read(tmp_path: Path) -> None:
    path = tmp_path / "one.npz"
    write_trace(path, experts=GOOD, seq=SEQ, num_experts=8)
    trace = read_trace(path)
    assert (trace.name, trace.tokens, trace.layers, trace.top_k) == ("one", 10, 2, 3)
    assert trace.num_experts == 8
    assert (trace.experts == GOOD).all()
    assert (trace.seq == SEQ).all()
    head = trace.head(4)
    assert head.tokens == len(head.seq) == 4
    assert trace.head(None) is trace


def test_a_trace_may_leave_out_what_can_be_inferred(tmp_path: Path) -> None:
    path = tmp_path / "bare.npz"
    np.savez(path, experts=GOOD.astype(np.int64))
    trace = read_trace(path)
    assert trace.num_experts == 8
    assert not trace.seq.any()


def test_statistics_by_domain_are_read(tmp_path: Path) -> None:
    path = tmp_path / "domains.npz"
    np.savez(path, b_topk=GOOD, b_lens=[6, 4], a_topk=GOOD[:3], a_lens=[3])
    trace = read_trace(path)
    assert trace.tokens == 13
    assert trace.seq.tolist() == [0] * 3 + [1] * 6 + [2] * 4


def test_pieces_make_no_difference(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "one.npz"
    write_trace(path, experts=GOOD, seq=SEQ, num_experts=8)
    monkeypatch.setattr(routertrace, "_PIECE_BYTES", 13)
    assert (read_trace(path).experts == GOOD).all()


def with_value(value: int) -> np.ndarray[Any, Any]:
    bad = GOOD.astype(np.int32)
    bad[7, 1, 2] = value
    return bad


@pytest.mark.parametrize(
    ("arrays", "why"),
    [
        ({"experts": GOOD[:, 0]}, r"experts has shape \(10, 3\), not \[tokens, layers, k\]"),
        ({"experts": GOOD[:0]}, r"experts has shape \(0, 2, 3\)"),
        ({"experts": GOOD.astype(np.float32)}, "experts has type float32, not integers"),
        ({"experts": np.full((2, 1, 1), np.nan)}, "experts has type float64, not integers"),
        ({"experts": with_value(-3)}, "expert -3 of token 7 is not in 0..65535"),
        ({"experts": with_value(99), "num_experts": 8}, "expert 99 of token 7 is not in 0..7"),
        ({"experts": np.zeros_like(GOOD), "num_experts": 2}, "k = 3 exceeds the 2 experts"),
        ({"experts": GOOD, "num_experts": 0}, r"num_experts is 0, not in 1\.\."),
        ({"experts": GOOD, "num_experts": [8, 8]}, r"num_experts has shape \(2,\)"),
        ({"experts": GOOD, "seq": SEQ[:4]}, r"seq has shape \(4,\), not \(10,\)"),
        ({"experts": GOOD, "seq": SEQ % 2 + np.arange(10) % 2}, "not contiguous"),
        ({"experts": GOOD, "weights": np.ones((10, 2))}, r"weights has shape \(10, 2\)"),
        (
            {"experts": GOOD, "weights": np.where(GOOD == 5, np.nan, 1).astype(np.float16)},
            r"weights of token 0 are not finite",
        ),
        ({"wrong": GOOD}, r"no array `experts` \(it has wrong\)"),
        ({"a_topk": GOOD, "a_lens": [3, 3]}, "a_lens does not add up to the 10 tokens"),
        ({"experts": np.asfortranarray(GOOD)}, "stored by column"),
        ({"experts": GOOD.astype(object)}, "experts has type object, not integers"),
    ],
)
def test_a_bad_file_is_refused_with_the_reason(
    tmp_path: Path, arrays: dict[str, Any], why: str
) -> None:
    path = tmp_path / "bad.npz"
    np.savez(path, **arrays)
    with pytest.raises(ConfigError, match=why) as refusal:
        read_trace(path)
    assert "\n" not in str(refusal.value)
    assert str(path) in str(refusal.value)


@pytest.mark.parametrize("keep", [0, 10, 200, -30])
def test_a_truncated_file_is_refused(tmp_path: Path, keep: int) -> None:
    path = tmp_path / "cut.npz"
    write_trace(path, experts=np.tile(GOOD, (50, 1, 1)), seq=np.zeros(500, int), num_experts=8)
    data = path.read_bytes()
    path.write_bytes(data[:keep])
    with pytest.raises(ConfigError, match=r"damaged or no \.npz file"):
        read_trace(path)


def test_a_member_that_ends_early_is_refused(tmp_path: Path) -> None:
    whole, path = tmp_path / "whole.npz", tmp_path / "early.npz"
    np.savez(whole, experts=GOOD)
    with zipfile.ZipFile(whole) as source, zipfile.ZipFile(path, "w") as target:
        target.writestr("experts.npy", source.read("experts.npy")[:-7])
    with pytest.raises(ConfigError, match="experts ends after 8 of 10 tokens"):
        read_trace(path)


def test_damaged_bytes_are_noticed(tmp_path: Path) -> None:
    path = tmp_path / "flipped.npz"
    np.savez(path, experts=np.tile(GOOD, (50, 1, 1)))
    data = bytearray(path.read_bytes())
    data[400] ^= 1
    path.write_bytes(data)
    with pytest.raises(ConfigError, match="damaged"):
        read_trace(path)


def test_a_missing_file_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="No such file"):
        read_trace(tmp_path / "none.npz")
    with pytest.raises(ConfigError, match="Is a directory"):
        read_trace(tmp_path)
