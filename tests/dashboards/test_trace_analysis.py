"""`trace analyze` against brute force, on files that the span writer wrote."""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hotset.actors.spans import RowBatch, SpanWriter
from hotset.dashboards.trace import Analysis, analyze
from hotset.dashboards.trace_text import render_text, to_json
from hotset.errors import ConfigError
from hotset.policies.types import Tier
from hotset.transport.records import NO_NAME, ROW, Code, Kind

if TYPE_CHECKING:
    from pathlib import Path

STORES = {"worker-0": Tier.HBM, "worker-1": Tier.HBM, "host-0": Tier.HOST}
NAMES = (*STORES, "storage")
T0 = 1_790_000_000_000_000_000


class Event(NamedTuple):
    """One row in short; `source` indexes NAMES, `waits_for` is 0 without a link."""

    store: str
    kind: Kind
    start: int
    length: int
    source: int = NO_NAME
    waits_for: int = 0
    nbytes: int = 0
    code: Code = Code.OK
    used: int = 0


def write_run(folder: Path, events: list[Event], *, dropped: int = 0, node: str = "n0") -> Path:
    with_emulation = ["cxl-0: paced to 28 GB/s"]
    writer = SpanWriter(
        folder / f"trace-{node}.jsonl", node=node, run="r1", emulated=with_emulation
    )
    for store, tier in STORES.items():
        mine = [(number, one) for number, one in enumerate(events, 1) if one.store == store]
        rows = np.zeros(len(mine), ROW)
        rows["reason"] = NO_NAME
        for row, (number, one) in zip(rows, mine, strict=True):
            row["row_id"], row["kind"], row["code"] = number, one.kind, one.code
            row["source"], row["waits_for"], row["used"] = one.source, one.waits_for, one.used
            row["nbytes"], row["start_ns"] = one.nbytes, T0 + one.start
            row["end_ns"] = T0 + one.start + one.length
        writer.write(
            RowBatch(
                store=store,
                tier=tier,
                rows=rows.tobytes(),
                names=NAMES,
                tiers=STORES,
                dropped=dropped if store == "worker-0" else 0,
            )
        )
    assert writer.written == len(events)
    writer.close()
    return folder


events = st.lists(
    st.builds(
        Event,
        store=st.sampled_from(list(STORES)),
        kind=st.sampled_from(list(Kind)),
        start=st.integers(0, 40),
        length=st.integers(0, 15),
        source=st.sampled_from([0, 1, 2, 3]),
        waits_for=st.integers(0, 3),
        nbytes=st.integers(0, 9),
        code=st.sampled_from([Code.OK, Code.OK, Code.FAILED]),
        used=st.integers(0, 1),
    ),
    min_size=1,
    max_size=14,
)


def times(found: list[Event]) -> set[int]:
    return {at for one in found for at in range(one.start, one.start + one.length)}


def brute_force(found: list[Event], device: str) -> dict[str, int]:
    mine = [one for one in found if one.store == device]
    waiting = times([one for one in mine if one.kind == Kind.WAIT and one.waits_for])
    computing = times([one for one in mine if one.kind in (Kind.STEP, Kind.LAYER)]) - waiting
    moving = times(
        [
            one
            for one in found
            if one.kind == Kind.TRANSFER and device in (one.store, NAMES[one.source])
        ]
    )
    return {
        "stall_ns": len(waiting),
        "hidden_ns": len(computing & moving),
        "exposed_ns": len(moving - computing),
        "transfer_ns": len(moving),
        "compute_ns": len(computing),
        "spans": len(mine),
        "moved_bytes": sum(
            one.nbytes for one in mine if one.kind == Kind.TRANSFER and one.code == Code.OK
        ),
    }


@given(events, st.integers(0, 3))
@settings(max_examples=50)
def test_figures_agree_with_brute_force(
    tmp_path_factory: pytest.TempPathFactory, found: list[Event], dropped: int
) -> None:
    run = write_run(tmp_path_factory.mktemp("run"), found, dropped=dropped)
    shown = json.loads(to_json(analyze(run)))
    total = shown["total"]
    computes = {one.store for one in found if one.kind == Kind.STEP}
    present = {one.store for one in found} | ({"worker-0"} if dropped else set())
    devices = computes | (present & {"worker-0", "worker-1"})
    assert set(shown["devices"]) == devices
    for device in devices:
        for key, value in brute_force(found, device).items():
            assert shown["devices"][device][key] == value, (device, key)
    for key in ("stall_ns", "hidden_ns", "exposed_ns", "transfer_ns"):
        assert total[key] == sum(brute_force(found, device)[key] for device in devices)
    assert total["hidden_ns"] + total["exposed_ns"] == total["transfer_ns"]
    assert (total["spans"], total["dropped"]) == (len(found), dropped)
    if total["transfer_ns"]:
        assert total["overlap_ratio"] == total["hidden_ns"] / total["transfer_ns"]
    for name, link in shown["links"].items():
        source, store = name.split("->")
        arrived = [
            one
            for one in found
            if (one.store, NAMES[one.source], one.kind, one.code)
            == (store, source, Kind.TRANSFER, Code.OK)
        ]
        assert link["bytes"] == sum(one.nbytes for one in arrived)
        assert (link["transfers"], link["busy_ns"]) == (len(arrived), len(times(arrived)))


STALLED = [
    Event("worker-0", Kind.STEP, 0, 100),
    Event("worker-0", Kind.WAIT, 30, 20, source=2, waits_for=3),
    Event("worker-0", Kind.TRANSFER, 20, 30, source=2, nbytes=1000, used=1),
    Event("worker-0", Kind.TRANSFER, 60, 10, source=3, nbytes=500),
    Event("worker-0", Kind.TRANSFER, 95, 15, source=3, nbytes=7, code=Code.TIMED_OUT),
    Event("host-0", Kind.TRANSFER, 500, 100, source=3, nbytes=9000),
]


@pytest.fixture
def stalled(tmp_path: Path) -> Path:
    return write_run(tmp_path, STALLED, dropped=2)


def test_a_wait_is_stall_and_not_compute(stalled: Path) -> None:
    found = analyze(stalled)
    one = found.devices["worker-0"]
    assert (one.stall_ns, one.compute_ns) == (20, 80)
    assert (one.hidden_ns, one.exposed_ns, one.transfer_ns) == (25, 30, 55)
    assert one.idle_ns == 10
    assert (one.useful_ratio, one.moved_bytes) == (1000 / 1500, 1500)
    assert found.failed_transfers == 1
    assert found.unresolved_links == found.unlinked_waits == 0
    assert list(found.devices) == ["worker-0"], "filling a pool is nobody's exposed transfer"
    assert found.links["storage->host-0"].bytes == 9000
    assert found.links["host-0->worker-0"].bytes_per_s == pytest.approx(1000 / 30e-9)


def test_json_has_the_keys_that_scripts_read(stalled: Path) -> None:
    shown = json.loads(to_json(analyze(stalled)))
    assert set(shown["total"]) >= {
        "stall_ns", "hidden_ns", "exposed_ns", "transfer_ns", "overlap_ratio", "dropped", "spans",
    }  # fmt: skip
    assert shown["total"].keys() == shown["devices"]["worker-0"].keys()
    assert set(shown["links"]["host-0->worker-0"]) >= {
        "bytes", "busy_ns", "transfers", "bytes_per_s", "use_ratio",
    }  # fmt: skip


def test_text_shows_losses_and_emulation_beside_the_figures(stalled: Path) -> None:
    text = render_text(analyze(stalled))
    lines = text.splitlines()
    assert "6 spans" in lines[0]
    assert "2 dropped" in lines[0]
    assert any("EMULATED" in line and "cxl-0: paced to 28 GB/s" in line for line in lines)
    total, _window = [line.split() for line in lines if line.startswith("total")]
    assert total[1:3] == ["20", "ns"]
    assert "45.5 %" in text
    assert "every figure is a lower bound" in text
    assert "1 transfers ended without their bytes" in text
    assert max(map(len, lines)) <= 80


def shape(found: Analysis) -> tuple[Any, ...]:
    return found.total, found.devices, found.links


def test_nodes_files_make_one_run(tmp_path: Path, stalled: Path) -> None:
    before = analyze(stalled)
    (stalled / "trace-n1.jsonl").write_bytes((stalled / "trace-n0.jsonl").read_bytes())
    both = analyze(stalled)
    assert both.files == 2
    assert both.total.spans == 2 * before.total.spans
    assert both.total.stall_ns == before.total.stall_ns, "a union counts a moment once"
    assert shape(analyze(tmp_path / "trace-n1.jsonl")) == shape(before)


def test_a_torn_tail_loses_one_line_at_most(stalled: Path) -> None:
    path = stalled / "trace-n0.jsonl"
    raw = path.read_bytes()
    last_line = len(raw.splitlines(keepends=True)[-1])
    for cut in range(1, last_line, 97):
        os.truncate(path, len(raw) - cut)
        found = analyze(stalled)
        assert found.devices["worker-0"].stall_ns == 20
        assert found.total.spans >= 5
        assert found.torn_lines == (1 if found.total.spans == 5 else 0)
        path.write_bytes(raw)


def test_a_damaged_line_is_counted_and_told(stalled: Path) -> None:
    path = stalled / "trace-n0.jsonl"
    path.write_bytes(b'{"resourceSpans":[{]}\n' + path.read_bytes())
    found = analyze(stalled)
    assert found.damaged_lines == 1
    assert found.total.stall_ns == 20
    assert "1 lines are damaged" in render_text(found)


def test_a_wait_for_a_lost_transfer_still_counts(tmp_path: Path) -> None:
    run = write_run(
        tmp_path,
        [
            Event("worker-0", Kind.STEP, 0, 50),
            Event("worker-0", Kind.WAIT, 10, 5, waits_for=999),
            Event("worker-0", Kind.WAIT, 20, 5),
        ],
    )
    found = analyze(run)
    assert found.total.stall_ns == 5
    assert (found.unresolved_links, found.unlinked_waits) == (1, 1)
    assert found.total.overlap_ratio is None
    assert "waits name no transfer" in render_text(found)


def test_waiting_for_a_peers_result_is_told_apart(tmp_path: Path) -> None:
    run = write_run(
        tmp_path,
        [
            Event("worker-0", Kind.STEP, 0, 50),
            Event("worker-0", Kind.DISPATCH, 5, 20, source=1),
            Event("worker-0", Kind.TRANSFER, 5, 30, source=2),
            Event("worker-0", Kind.WAIT, 10, 15, waits_for=2),
            Event("worker-0", Kind.WAIT, 25, 10, waits_for=3),
        ],
    )
    total = analyze(run).total
    assert (total.stall_ns, total.dispatch_stall_ns, total.dispatch_ns) == (25, 15, 20)
    assert "waited for a peer's result" in render_text(analyze(run))


def test_errors_say_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no run at .*: give the folder"):
        analyze(tmp_path / "nothing")
    with pytest.raises(ConfigError, match=r"holds no trace-\*\.jsonl: give the folder of a run"):
        analyze(tmp_path)
    (tmp_path / "trace-n0.jsonl").write_text("")
    with pytest.raises(ConfigError, match="holds no span: let the run"):
        analyze(tmp_path)


@pytest.mark.slow
def test_a_long_trace_reads_within_seconds(tmp_path: Path) -> None:
    """200,000 spans of 100 s; 1,000,000 take five times that."""
    count = 50_000
    row = np.zeros(4 * count, ROW)
    row["kind"] = np.tile([Kind.TRANSFER, Kind.WAIT, Kind.LAYER, Kind.STEP], count)
    row["row_id"] = 1 + np.arange(4 * count)
    row["waits_for"] = np.where(row["kind"] == Kind.WAIT, row["row_id"] - 1, 0)
    row["start_ns"] = T0 + np.repeat(np.arange(count), 4) * 1000
    row["end_ns"] = row["start_ns"] + np.tile([600, 400, 900, 900], count)
    writer = SpanWriter(tmp_path / "trace-n0.jsonl", node="n0", run="r1", max_rows=10**6)
    writer.write(RowBatch(store="w", tier=Tier.HBM, rows=row.tobytes(), names=("host-0",)))
    found = analyze(tmp_path)
    assert found.total.spans == 4 * count
    assert found.total.stall_ns == 400 * count
    assert (found.total.hidden_ns, found.total.exposed_ns) == (200 * count, 400 * count)
