"""The compiled scan gives what the general decoder gives, or refuses the line."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hotset.actors.kinds import KINDS
from hotset.actors.spans import RowBatch, SpanWriter
from hotset.dashboards import otlp
from hotset.dashboards.otlp import SPAN, TEXTS, Spans, read_run
from hotset.policies.types import Tier
from hotset.transport.records import NO_NAME, ROW

if TYPE_CHECKING:
    from pathlib import Path

pytest.importorskip("numba", reason="the scan is compiled by numba")

NAMES = ("host-0", "storage", "demand", 'odd "näme"\\\n', "")
T0 = 1_790_000_000_000_000_000


def batch(seed: int, count: int, **said: Any) -> RowBatch:
    """Rows of every kind with values up to the ends of their columns."""
    rng = np.random.default_rng(seed)
    rows = np.zeros(count, ROW)
    rows["kind"] = rng.choice(KINDS, count)
    rows["code"] = rng.integers(0, 5, count)
    for column in ("source", "reason"):
        rows[column] = rng.choice([*range(len(NAMES)), NO_NAME], count)
    rows["format"] = rng.integers(0, 9, count)
    rows["layer"], rows["index"] = rng.integers(-1, 60, count), rng.integers(-1, 256, count)
    rows["start_ns"] = T0 + rng.integers(0, 10**10, count)
    rows["end_ns"] = rows["start_ns"] + rng.integers(0, 10**9, count)
    for column in ("row_id", "waits_for", "parent", "trace_hi", "trace_lo"):
        rows[column] = rng.integers(1, 2**64, count, dtype=np.uint64, endpoint=False)
    rows["trace_hi"][rng.random(count) < 0.3] = 0
    rows["trace_lo"][rows["trace_hi"] == 0] = 0
    rows["waits_for"][rng.random(count) < 0.3] = 0
    for column in ("nbytes", "queue_ns", "wire_ns", "verify_ns", "activate_ns"):
        rows[column] = rng.choice([0, 7, 2**61], count)
    rows["used"], rows["attempt"] = rng.integers(0, 2, count), rng.integers(0, 3, count)
    return RowBatch(
        store="worker-0", tier=Tier.HBM, rows=rows.tobytes(), names=NAMES,
        tiers={"host-0": Tier.HOST}, **said,
    )  # fmt: skip


def both(path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Spans, Spans]:
    general = read_run(path)
    with monkeypatch.context() as only_here:
        only_here.setattr(otlp, "MANY_BYTES", 0)
        return general, read_run(path)


def assert_same(one: Spans, other: Spans) -> None:
    assert len(one.table) == len(other.table)
    for column in SPAN.names or ():
        if column in (*TEXTS, "store"):
            texts = [
                [spans.names[number] if number >= 0 else None for number in spans.table[column]]
                for spans in (one, other)
            ]
            assert texts[0] == texts[1], column
        else:
            assert one.table[column].tolist() == other.table[column].tolist(), column
    for said in ("runs", "tiers", "dropped", "sampled_out", "torn_lines", "damaged_lines"):
        assert getattr(one, said) == getattr(other, said), said


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_every_kind_of_row_gives_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    writer = SpanWriter(tmp_path / "trace-n0.jsonl", node="n0", run="r1", emulated=("hbm: x",))
    for number in range(4):
        writer.write(batch(10 * seed + number, 200, dropped=number))
    writer.write(RowBatch(store="host-0", tier=Tier.HOST, dropped=2))  # a line without a span
    writer.close()
    general, scanned = both(tmp_path, monkeypatch)
    assert len(general.table) == 800
    assert_same(general, scanned)


@settings(max_examples=60)
@given(
    at=st.integers(0, 10**6),
    letter=st.sampled_from(list(b'{}[]",:\\0-9aeZ \n\x00')),
    cut=st.booleans(),
)
def test_a_damaged_line_is_never_read_as_another(
    tmp_path_factory: pytest.TempPathFactory, at: int, letter: int, *, cut: bool
) -> None:
    path = tmp_path_factory.mktemp("t") / "trace-n0.jsonl"
    writer = SpanWriter(path, node="n0", run="r1")
    writer.write(batch(5, 12))
    writer.close()
    text = bytearray(path.read_bytes())
    at %= len(text)
    if cut:
        del text[at:]
    else:
        text[at] = letter
    path.write_bytes(bytes(text))
    with pytest.MonkeyPatch.context() as patch:
        general, scanned = both(path, patch)
    if len(general.table) or not len(scanned.table):
        assert_same(general, scanned)
        return
    # Beyond what the scan looks at (values of keys that are not known) it may read what the general
    # decoder refuses; a value that it gives is the one that stands there.
    assert len(scanned.table) <= 12


def test_other_spellings_are_left_to_the_general_decoder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "trace-n0.jsonl"
    writer = SpanWriter(path, node="n0", run="r1")
    writer.write(batch(5, 30))
    writer.close()
    line = json.loads(path.read_text())
    spans = line["resourceSpans"][0]["scopeSpans"][0]["spans"]
    for span in spans[:10]:
        span["startTimeUnixNano"] = int(span["startTimeUnixNano"])  # a number, as some write it
        span["events"] = [{"name": "x", "attributes": [{"key": "hotset.layer"}]}]
        span["traceState"] = 'a="{[}",b'
    spans.reverse()
    wide = json.dumps(line)
    tight = json.dumps(line, separators=(",", ":"), sort_keys=True, ensure_ascii=False)
    path.write_text(f"{wide}\n{tight}\n{tight}", encoding="utf-8")
    general, scanned = both(path, monkeypatch)
    assert len(general.table) == 90
    assert_same(general, scanned)
