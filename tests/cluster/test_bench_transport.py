"""The transport benchmark: its arithmetic on made-up times, its processes and output for real."""

from __future__ import annotations

import json
import os
import signal
import time
from typing import TYPE_CHECKING, Any

import pytest
from click.testing import CliRunner

from hotset.cluster import cli
from hotset.cluster.bench_transport import Bench, Limits
from hotset.cluster.bench_transport_case import (
    LANES,
    MEMCPY,
    MIB,
    QUICK_SIZES,
    SIZES,
    Case,
    Results,
    choose_lanes,
    parse_case,
)
from hotset.cluster.bench_transport_plot import draw, require_matplotlib
from hotset.cluster.bench_transport_process import Part, end_all
from hotset.cluster.bench_transport_report import as_row, tables, targets
from hotset.cluster.bench_transport_stores import Visit, timed
from hotset.cluster.bench_transport_targets import TARGETS, judge
from hotset.errors import ClusterError, ConfigError

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.slow  # starts processes

FIELDS = {"backend", "op", "nbytes", "batch", "bytes_per_s", "ratio_to_memcpy", "ratio_to_raw"}
COPIES = "hotset.cluster.bench_transport_bounds:Copies"


# --- cases and lanes ---


@pytest.mark.parametrize("text", [*SIZES, *QUICK_SIZES])
def test_a_size_is_read_back_as_it_is_shown(text: str) -> None:
    case = parse_case(text)
    assert case.label.replace(" ", "") == text
    assert parse_case(case.label) == case


@pytest.mark.parametrize("text", ["", "1", "MiB", "0MiB", "0x1MiB", "x1MiB1", "-1MiB", "1.5MiB"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="is not a size"):
        parse_case(text)


@pytest.mark.parametrize("text", SIZES)
def test_blocks_do_not_stay_in_the_cache_and_fit_a_read(text: str) -> None:
    case = parse_case(text)
    assert case.slots >= case.batch
    assert case.slots * case.nbytes >= 64 * MIB


def test_a_backend_brings_what_it_is_held_against() -> None:
    lanes = {lane.key for lane in choose_lanes("storage,nixl-tcp", ray=True)}
    assert lanes == {
        MEMCPY, "socket/receive", "raw-nixl-tcp/read", "nixl-tcp/read", "preadv/read-warm",
        "storage/read-warm", "preadv/read-cold", "storage/read-cold",
    }  # fmt: skip


def test_ray_can_be_left_out_and_unknown_backends_are_refused() -> None:
    assert any(lane.group == "ray" for lane in choose_lanes("", ray=True))
    assert not any(lane.group == "ray" for lane in choose_lanes("", ray=False))
    with pytest.raises(ConfigError, match="unknown backend 'infiniband'"):
        choose_lanes("infiniband", ray=True)


def test_every_target_names_lanes_and_sizes_that_exist() -> None:
    keys = {lane.key for lane in LANES}
    measured = {parse_case(size) for size in QUICK_SIZES} & {parse_case(size) for size in SIZES}
    for target in TARGETS:
        assert {target.lane, target.peer} <= keys
        assert target.case in measured


# --- arithmetic ---


def results_of(case: Case, **rounds: list[int]) -> Results:
    """Results with these times by lane (`nixl_read`), one for each round."""
    lanes = tuple(lane for lane in LANES if lane.key.replace("/", "_").replace("-", "_") in rounds)
    results = Results(lanes, (case,))
    for lane in lanes:
        times = rounds[lane.key.replace("/", "_").replace("-", "_")]
        results.rows[lane.key, case].rounds_ns = dict(enumerate(times, start=1))
    return results


ONE = Case(nbytes=MIB, batch=1)


def test_a_ratio_compares_within_rounds() -> None:
    # The machine was ten times slower in the second round, for both.
    results = results_of(ONE, nixl_read=[200, 2000, 200], raw_nixl_read=[100, 1000, 100])
    assert results.ratios("nixl/read", "raw-nixl/read", ONE) == [0.5, 0.5, 0.5]
    assert results.ratio("nixl/read", "raw-nixl/read", ONE) == 0.5


def test_a_round_that_one_side_missed_does_not_count() -> None:
    results = results_of(ONE, nixl_read=[100, 100], raw_nixl_read=[50])
    assert results.ratios("nixl/read", "raw-nixl/read", ONE) == [0.5]
    assert results.ratio("nixl/read", "socket/receive", ONE) is None


@pytest.mark.parametrize(("ns", "word"), [(100, "met"), (105, "met"), (106, "missed")])
def test_a_target_is_met_or_missed_by_what_was_measured(ns: int, word: str) -> None:
    case = Case(nbytes=64 * MIB, batch=1)
    verdicts = judge(results_of(case, nixl_read=[ns] * 3, raw_nixl_read=[100] * 3))
    found = {verdict.target.text: verdict for verdict in verdicts if verdict.target.case == case}
    assert found["nixl of raw NIXL"].word == word
    assert found["shm of memcpy"].word == "not measured"


def test_each_way_of_rays_direct_transport_is_a_peer() -> None:
    results = results_of(
        ONE, nixl_read=[100] * 3, rdt_nixl_return=[9000] * 3, rdt_gloo_return=[4000] * 3
    )  # fmt: skip
    verdicts = [v for v in judge(results) if "Direct Transport" in v.target.text]
    assert [(v.measured, v.word) for v in verdicts] == [(90.0, "met"), (40.0, "missed")]


def test_two_rounds_are_too_few_for_a_verdict() -> None:
    case = Case(nbytes=64 * MIB, batch=1)
    results = results_of(case, shm_read=[100, 100], memcpy_copy=[100, 100])
    verdict = next(
        v for v in judge(results) if v.target.lane == "shm/read" and v.target.case == case
    )
    assert (verdict.word, verdict.why) == ("not measured", "there was time for too few rounds")


def test_a_failed_lane_is_a_row_with_its_reason() -> None:
    results = results_of(ONE, memcpy_copy=[100], nixl_read=[], raw_nixl_read=[50])
    row = results.rows["nixl/read", ONE]
    row.failed = "it hung"
    assert as_row(results, row)["bytes_per_s"] is None
    assert as_row(results, row)["failed"] == "it hung"
    assert any("nixl read" in line and "it hung" in line for line in tables(results))
    assert targets(results) == [line for line in targets(results) if "not measured" in line]


def test_a_turn_keeps_at_least_one_read_and_stops_in_time() -> None:
    calls: list[int] = []

    def read() -> int:
        calls.append(1)
        return len(calls)

    assert timed(read, Visit(reads=5, budget_ns=0, warm=True)) == [2]
    assert len(timed(read, Visit(reads=5, budget_ns=10**12, warm=False))) == 5


# --- processes ---


@pytest.fixture
def part() -> Any:
    one = Part(COPIES, name="copies", nbytes=MIB, torch=False)
    yield one
    end_all([one])


def test_a_part_measures_and_ends(part: Part) -> None:
    assert part.answer(timeout_s=30) == "ready"
    part.call("build", Case(nbytes=64 << 10, batch=1), timeout_s=10)
    found = part.call("run", "memcpy", Visit(reads=3, budget_ns=10**9, warm=True), timeout_s=10)
    assert len(found) == 3
    assert all(ns > 0 for ns in found)
    assert end_all([part]) == []


def test_a_killed_part_is_a_reason(part: Part) -> None:
    part.answer(timeout_s=30)
    os.kill(part.pid, signal.SIGKILL)
    with pytest.raises(ClusterError, match="was ended by signal 9"):
        part.answer(timeout_s=10)


def test_a_hung_part_is_ended_at_its_deadline(part: Part) -> None:
    part.answer(timeout_s=30)
    os.kill(part.pid, signal.SIGSTOP)
    begin = time.monotonic()
    with pytest.raises(ClusterError, match="did not answer in 0 s"):
        part.call("build", ONE, timeout_s=0.2)
    assert time.monotonic() - begin < 5
    assert part.join(0)


def test_a_part_that_raises_says_why(part: Part) -> None:
    part.answer(timeout_s=30)
    with pytest.raises(ClusterError, match="copies: StopIteration"):
        part.call("run", "memcpy", Visit(reads=1, budget_ns=0, warm=False), timeout_s=10)
    with pytest.raises(ClusterError):
        part.call("build", ONE, timeout_s=10)


def test_a_contender_that_dies_or_hangs_becomes_rows_and_the_rest_goes_on() -> None:
    small = (Case(nbytes=64 << 10, batch=1), Case(nbytes=128 << 10, batch=1))
    limits = Limits(rounds=5, visit_ns=0, start_s=30, answer_s=1, total_s=None)
    bench = Bench(choose_lanes("shm,socket", ray=False), small, limits, say=lambda _text: None)
    build = bench._start

    def start_and_harm(groups: list[Any], case: Case | None) -> None:
        build(groups, case)
        for group in groups:
            if group.name == "shm" and case == small[0]:
                os.kill(group.reader.pid, signal.SIGKILL)
            if group.name == "socket":
                os.kill(group.others[0].pid, signal.SIGSTOP)

    bench._start = start_and_harm  # type: ignore[method-assign] # harm comes from outside
    results = bench.run()
    died, came_back = (results.rows["shm/read", case] for case in small)
    assert "was ended by signal 9" in died.failed
    assert (came_back.failed, len(came_back.rounds_ns)) == ("", 5)
    for case in small:
        assert "did not answer in 1 s" in results.rows["socket/receive", case].failed
        assert len(results.rows[MEMCPY, case].rounds_ns) == 5


# --- the command ---


def test_wrong_options_are_refused_before_anything_starts() -> None:
    runner = CliRunner()
    for options, text in (
        (["--repeat", "3"], "too few"),
        (["--sizes", "1GB"], "is not a size"),
        (["--backends", "carrier-pigeon"], "unknown backend"),
        (["--plot", "figure.txt"], "end the name"),
    ):
        result = runner.invoke(cli.main, ["bench", "transport", *options])
        assert result.exit_code == 2, result.output
        assert text in result.output


def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *options: str) -> list[dict[str, Any]]:
    monkeypatch.setenv("HOTSET_BENCH", str(tmp_path))
    result = CliRunner().invoke(cli.main, ["bench", "transport", "--json", *options])
    assert result.exit_code == 0, result.output
    rows: list[dict[str, Any]] = json.loads(result.stdout)
    assert all(set(row) > FIELDS for row in rows)
    assert "target shm of memcpy" in result.stderr
    return rows


def test_small_reads_through_shared_memory_and_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ("--backends", "shm,storage", "--sizes", "64KiB,4x64KiB", "--repeat", "5")
    rows = run(tmp_path, monkeypatch, *options)
    assert [row["failed"] for row in rows] == [""] * len(rows)
    assert all(row["rounds"] == 5 and row["bytes_per_s"] > 0 for row in rows)
    found = {(row["backend"], row["op"], row["batch"]): row for row in rows}
    assert found["memcpy", "copy", 4]["ratio_to_memcpy"] == 1.0
    assert found["memcpy", "copy", 4]["ratio_to_raw"] is None
    assert found["storage", "read-warm", 1]["raw"] == "preadv/read-warm"
    assert found["storage", "read-warm", 1]["ratio_to_raw"] > 0


@pytest.mark.nixl
@pytest.mark.ray
@pytest.mark.slow
def test_quick_ends_in_time_with_every_contender(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begin = time.monotonic()
    plot = tmp_path / "figure.svg"
    rows = run(tmp_path, monkeypatch, "--quick", "--plot", str(plot))
    assert time.monotonic() - begin < 40
    wanted = {lane.backend for lane in choose_lanes("", ray=True)}
    assert {row["backend"] for row in rows} == wanted
    working = {row["backend"] for row in rows if row["rounds"]}
    assert {"memcpy", "raw-nixl", "nixl", "nixl-tcp", "shm", "tcp", "storage"} <= working
    for row in rows:
        assert row["rounds"] or row["failed"]
    assert plot.read_text(encoding="utf-8").startswith("<?xml")


def test_a_plot_is_drawn_from_what_there_is(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    results = results_of(ONE, memcpy_copy=[100, 120], nixl_read=[200, 210], ray_store_return=[])
    for name in ("one.svg", "deep/one.png"):
        require_matplotlib(tmp_path / name)
        draw(results, tmp_path / name)
        assert (tmp_path / name).stat().st_size > 5000
