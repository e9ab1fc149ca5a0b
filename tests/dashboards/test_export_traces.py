"""Exports are what other tools read: lanes without overlap, arrows with two ends, same figures."""

from __future__ import annotations

import csv
import json
from collections import Counter, defaultdict
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from hotset.actors.controllog import ControlLog
from hotset.actors.spans import RowBatch, SpanWriter
from hotset.cluster import cli
from hotset.dashboards.columns import COLUMNS
from hotset.dashboards.lanes import lanes
from hotset.dashboards.trace import analyze
from hotset.dashboards.trace_diff import diff
from hotset.policies.types import PublishEpoch, Reason, Tick, Tier
from hotset.transport.records import ROW, Kind

if TYPE_CHECKING:
    from pathlib import Path

T0 = 1_790_000_000_000_000_000
STORES = {"worker-0": Tier.HBM, "worker-1": Tier.HBM, "host-0": Tier.HOST}
NAMES = ("host-0", "storage", "demand")


def write_run(folder: Path, *, steps: int, seed: int, stretch: int = 1) -> Path:
    """Steps of two devices, each with waits for transfers that begin before and overlap."""
    folder.mkdir(exist_ok=True)
    rng = np.random.default_rng(seed)
    writer = SpanWriter(folder / "trace-n0.jsonl", node="n0", run=f"r{seed}")
    first = 1
    for store in ("worker-0", "worker-1"):
        rows = np.zeros(4 * steps, ROW)
        rows["kind"] = np.tile([Kind.STEP, Kind.TRANSFER, Kind.TRANSFER, Kind.WAIT], steps)
        rows["row_id"] = first + np.arange(4 * steps)
        first += 4 * steps
        begin = np.repeat(np.cumsum(rng.integers(900_000, 1_500_000, steps)), 4)
        shift = rng.integers(-300_000, 600_000, 4 * steps)
        length = rng.integers(100_000, 900_000, 4 * steps) * stretch
        step, wait = rows["kind"] == Kind.STEP, rows["kind"] == Kind.WAIT
        rows["start_ns"] = T0 + begin + np.where(step, 0, shift)
        rows["end_ns"] = rows["start_ns"] + np.where(step, 850_001, length)
        rows["end_ns"][wait] = rows["start_ns"][wait] + 70_003
        rows["waits_for"] = np.where(wait, rows["row_id"] - np.uint64(1), 0)
        rows["parent"] = np.where(wait, rows["row_id"] - np.uint64(3), 0)
        rows["source"] = rng.integers(0, 2, 4 * steps)
        rows["reason"], rows["nbytes"] = 2, np.where(rows["kind"] == Kind.TRANSFER, 4096, 0)
        writer.write(
            RowBatch(store=store, tier=Tier.HBM, rows=rows.tobytes(), names=NAMES, tiers=STORES)
        )
    log = ControlLog(first_row_id=1 << 50, nbytes={})
    published = PublishEpoch(epoch=1, cause="x", reason=Reason.REBALANCE)
    log.handled(Tick(now_ns=1), [published], epoch=1, start_ns=T0 + 5, end_ns=T0 + 905)
    writer.write(log.take())
    writer.close()
    return folder


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return write_run(tmp_path / "run", steps=30, seed=1)


def call(*args: str | Path) -> str:
    result = CliRunner().invoke(cli.main, ["trace", *map(str, args)])
    assert result.exit_code == 0, result.output
    return result.stdout


@given(st.lists(st.tuples(st.integers(0, 40), st.integers(0, 15)), max_size=20))
def test_lanes_do_not_overlap_and_are_as_few_as_can_be(spans: list[tuple[int, int]]) -> None:
    starts = np.array([start for start, _ in spans], np.int64)
    ends = np.array([start + length for start, length in spans], np.int64)
    lane = lanes(starts, ends).tolist()
    busy: Counter[tuple[int, int]] = Counter()
    moments: Counter[int] = Counter()
    for (start, length), mine in zip(spans, lane, strict=True):
        for at in range(start, start + max(1, length)):
            busy[mine, at] += 1
            moments[at] += 1
    assert max(busy.values(), default=1) == 1
    assert len(set(lane)) == max(moments.values(), default=0)


def test_the_perfetto_file_is_valid_and_drawn_without_overlap(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "trace.json"
    call("export", run, "--format", "perfetto", "--out", out)
    found = json.loads(out.read_text())
    events = found["traceEvents"]
    slices = [one for one in events if one["ph"] == "X"]
    assert len(slices) == 2 * 30 * 4 + 1
    threads: dict[tuple[int, int], list[tuple[int, int]]] = defaultdict(list)
    for one in slices:
        threads[one["pid"], one["tid"]].append((ns(one["ts"]), ns(one["ts"]) + ns(one["dur"])))
    for spans in threads.values():
        assert all(before[1] <= after[0] for before, after in pairwise(sorted(spans)))
    named = {(e["pid"], e["tid"]) for e in events if e["ph"] == "M" and e["name"] == "thread_name"}
    assert named == threads.keys(), "every lane has a name, and no name is without a lane"
    ends = {phase: [e for e in events if e["ph"] == phase] for phase in "sf"}
    assert len(ends["s"]) == len(ends["f"]) == 2 * 30
    assert {e["id"] for e in ends["s"]} == {e["id"] for e in ends["f"]}
    assert len({e["id"] for e in ends["s"]}) == 2 * 30
    for one in (*ends["s"], *ends["f"]):
        spans = threads[one["pid"], one["tid"]]
        at = ns(one["ts"])
        assert any(begin <= at < end for begin, end in spans), "an arrow ends inside a slice"
    assert {one["name"] for one in slices} == {"compute.step", "transfer", "wait", "plan"}


def ns(us: float) -> int:
    return round(us * 1000)


def test_no_nanosecond_is_lost_on_the_way_to_perfetto(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "trace.json"
    call("export", run, "--format", "perfetto", "--out", out)
    slices = [e for e in json.loads(out.read_text())["traceEvents"] if e["ph"] == "X"]
    steps = sum(ns(one["dur"]) for one in slices if one["name"] == "compute.step")
    assert steps == 2 * 30 * 850_001


def test_csv_has_a_line_for_each_span(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "spans.csv"
    call("export", run, "--format", "csv", "--out", out)
    with out.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert tuple(rows[0]) == COLUMNS
    assert len(rows) == 2 * 30 * 4 + 1
    waits = [row for row in rows if row["name"] == "hotset.wait"]
    assert sum(int(row["duration_ns"]) for row in waits) == 2 * 30 * 70_003
    ids = {row["span_id"] for row in rows}
    assert {row["link"] for row in waits} <= ids


def test_sql_answers_from_the_same_spans(run: Path) -> None:
    pytest.importorskip("duckdb", reason="needs the extra sql")
    asked = "select store, sum(duration_ns)::bigint ns from waits group by store order by store"
    answer = json.loads(call("sql", asked, "--run", run, "--format", "json"))
    assert answer == [{"store": f"worker-{n}", "ns": 30 * 70_003} for n in (0, 1)]
    joined = (
        "select count(*) n from waits w join transfers t on w.link = t.span_id "
        "where t.source in ('host-0', 'storage')"
    )
    assert call("sql", joined, "--run", run).split()[-1] == "60"


@pytest.mark.parametrize(
    ("statement", "message"),
    [
        ("select wrong from spans", "the table `spans` has name, store"),
        ("select * from read_csv('/etc/hostname')", "SQL: Permission Error"),
        ("select", "SQL: Parser Error"),
    ],
)
def test_sql_that_cannot_work_says_so(run: Path, statement: str, message: str) -> None:
    pytest.importorskip("duckdb", reason="needs the extra sql")
    result = CliRunner().invoke(cli.main, ["trace", "sql", statement, "--run", str(run)])
    assert result.exit_code == 2
    assert message in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_diff_states_both_figures_and_the_change(tmp_path: Path, run: Path) -> None:
    other = write_run(tmp_path / "other", steps=30, seed=2, stretch=2)
    a, b = analyze(run), analyze(other)
    found = {one.figure: one for one in diff(a, b).total}
    moved = found["transfer_ns"]
    assert (moved.a, moved.b) == (a.total.transfer_ns, b.total.transfer_ns)
    assert moved.change_ratio == (b.total.transfer_ns - a.total.transfer_ns) / a.total.transfer_ns
    assert found["stall_ns / step"].a == a.total.stall_ns / 60
    same = diff(a, a)
    assert all(one.change_ratio in (0, None) for one in same.total)
    assert set(same.devices) == {"worker-0", "worker-1"}
    shown = call("diff", run, other)
    assert "A r1" in shown
    assert "B r2" in shown
    assert json.loads(call("diff", run, other, "--format", "json"))["a"] == "r1"


def test_analyze_writes_a_page_beside_its_text(run: Path, tmp_path: Path) -> None:
    page = tmp_path / "run.html"
    text = call("analyze", run, "--html", page, "--stalls", "3")
    assert "the 3 costliest stalls" in text
    assert page.read_text().startswith("<!doctype html>")


def test_kineto_files_are_one_a_device_with_disjoint_compute(run: Path, tmp_path: Path) -> None:
    call("export", run, "--format", "kineto", "--out", tmp_path / "k")
    for rank in (0, 1):
        found = json.loads((tmp_path / "k" / f"rank-{rank}.json").read_text())
        assert found["distributedInfo"]["rank"] == rank
        compute = kernels(found, "hotset_compute")
        assert all(a[1] <= b[0] for a, b in pairwise(compute))
        figures = analyze(run).devices[f"worker-{rank}"]
        assert sum(end - begin for begin, end in compute) == figures.compute_ns


def kernels(trace: dict[str, Any], name: str) -> list[tuple[int, int]]:
    return sorted(
        (ns(one["ts"]), ns(one["ts"]) + ns(one["dur"]))
        for one in trace["traceEvents"]
        if one["cat"] == "kernel" and one["name"] == name
    )


@pytest.mark.slow
def test_holistic_trace_analysis_finds_the_same_overlap(run: Path, tmp_path: Path) -> None:
    """HTA truncates to microseconds: each edge of a merged span may move by one."""
    pytest.importorskip("hta", reason="needs HolisticTraceAnalysis from PyPI")
    from hta.trace_analysis import TraceAnalysis

    call("export", run, "--format", "kineto", "--out", tmp_path / "k")
    files = {rank: str(tmp_path / "k" / f"rank-{rank}.json") for rank in (0, 1)}
    table = TraceAnalysis(trace_files=files, trace_dir="").get_comm_comp_overlap(visualize=False)
    theirs = dict(zip(table["rank"], table["comp_comm_overlap_pctg"], strict=True))
    for rank in (0, 1):
        figures = analyze(run).devices[f"worker-{rank}"]
        assert figures.overlap_ratio is not None
        edges = 2 * (2 * 30 + 2 * 30)
        bound = 100 * edges * 1000 / figures.transfer_ns + 0.01
        assert abs(theirs[rank] - 100 * figures.overlap_ratio) <= bound
