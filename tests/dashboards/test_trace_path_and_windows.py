"""Windows that add up, critical paths without gaps, stories of stalls: against brute force."""

from __future__ import annotations

import json
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hotset.actors.kinds import ControlKind
from hotset.dashboards.critical import KINDS, critical_path, walk
from hotset.dashboards.intervals import union
from hotset.dashboards.trace import analyze, load
from hotset.dashboards.trace_html import render_html, stall_bins
from hotset.dashboards.trace_text import render_text, to_json
from hotset.transport.records import Code, Kind
from tests.dashboards.rows import NAMES, PREFETCH, Event, some_events, write_run

if TYPE_CHECKING:
    from pathlib import Path

events = some_events([*Kind, Kind.STEP, Kind.WAIT, Kind.WAIT, ControlKind.USE], most=18)


@given(events)
@settings(max_examples=40)
def test_parts_of_a_window_are_disjoint_and_add_up(
    tmp_path_factory: pytest.TempPathFactory, found: list[Event]
) -> None:
    run = write_run(tmp_path_factory.mktemp("run"), found)
    shown = analyze(run)
    for device, figures in shown.devices.items():
        mine = [one for one in found if one.store == device]
        window = range(
            min((one.start for one in mine), default=0),
            max((one.start + one.length for one in mine), default=0),
        )
        waiting, for_peer, working, moving = (
            {
                at
                for one in rows
                for at in range(one.start, one.start + one.length)
            }
            for rows in (
                [one for one in mine if one.kind == Kind.WAIT and one.waits_for],
                [
                    one
                    for one in mine
                    if one.kind == Kind.WAIT
                    and 0 < one.waits_for <= len(found)
                    and found[one.waits_for - 1].kind == Kind.DISPATCH
                ],
                [one for one in mine if one.kind in (Kind.STEP, Kind.LAYER)],
                [
                    one
                    for one in found
                    if one.kind == Kind.TRANSFER and device in (one.store, NAMES[one.source])
                ],
            )
        )  # fmt: skip
        computing, idle = working - waiting, set(window) - working - waiting
        parts = figures.breakdown
        assert parts.compute_alone_ns == len(computing - moving)
        assert parts.compute_hiding_ns == len(computing & moving)
        assert parts.stall_peer_ns == len(for_peer)
        assert parts.stall_transfer_ns == len(waiting - for_peer)
        assert parts.idle_moving_ns == len(idle & moving)
        assert parts.idle_quiet_ns == len(idle - moving)
        assert parts.sum_ns == figures.window_ns == len(window)
    assert shown.total.breakdown.sum_ns == shown.total.window_ns


@given(events)
@settings(max_examples=60)
def test_the_critical_path_has_no_gap_and_only_what_there_is(
    tmp_path_factory: pytest.TempPathFactory, found: list[Event]
) -> None:
    view = load(write_run(tmp_path_factory.mktemp("run"), found))
    for device in view.devices:
        steps = [one for one in found if one.store == device and one.kind == Kind.STEP]
        path = walk(view, device)
        if not steps:
            assert path == []
            continue
        begin, end = min(s.start for s in steps), max(s.start + s.length for s in steps)
        assert sum(part.end_ns - part.start_ns for part in path) == end - begin
        for later, earlier in pairwise(path):
            assert later.start_ns == earlier.end_ns
        for part in path:
            assert part.end_ns > part.start_ns
            if part.kind == "idle":
                assert part.row == -1
            if part.kind == "compute":
                row = view.table[part.row]
                assert row["start_ns"] <= part.start_ns
                assert part.end_ns <= row["end_ns"]
    whole = critical_path(view)
    if whole is not None:
        assert tuple(whole.by_kind) == KINDS
        assert sum(whole.by_kind.values()) == whole.length_ns


@given(
    st.lists(st.tuples(st.integers(0, 50), st.integers(0, 20)), max_size=12),
    st.lists(st.tuples(st.integers(-5, 60), st.integers(-5, 30)), max_size=6),
)
def test_the_part_of_a_set_within_spans(
    parts: list[tuple[int, int]], asked: list[tuple[int, int]]
) -> None:
    starts = np.array([start for start, _ in parts], np.int64)
    ends = np.array([start + length for start, length in parts], np.int64)
    covered = {at for start, length in parts for at in range(start, start + length)}
    begin = np.array([start for start, _ in asked], np.int64)
    over = np.array([start + length for start, length in asked], np.int64)
    expected = [len(covered & set(range(start, start + length))) for start, length in asked]
    assert union(starts, ends).within(begin, over).tolist() == expected


# Step 1 computes 0-40, waits 40-70 for transfer 3 (asked at 10: queue 20, wire 30, check 5, then
# 2 until its end at 67, 3 to wake), computes 70-100. Step 5 follows 10 later and waits for a peer.
STORY = [
    Event("worker-0", Kind.STEP, 0, 100),
    Event("worker-0", Kind.WAIT, 40, 30, source=2, waits_for=3, parent=1, reason=PREFETCH,
          layer=3, index=7),
    Event("worker-0", Kind.TRANSFER, 10, 57, source=2, parent=1, nbytes=4096, reason=PREFETCH,
          phases=(20, 30, 5), layer=3, index=7),
    Event("worker-0", ControlKind.USE, 67, 3, waits_for=3, used=1, reason=PREFETCH),
    Event("worker-0", Kind.STEP, 110, 90),
    Event("worker-0", Kind.DISPATCH, 120, 30, source=1, parent=5),
    Event("worker-0", Kind.WAIT, 130, 21, waits_for=6, parent=5),
    Event("worker-0", Kind.TRANSFER, 150, 20, source=2, nbytes=100, reason=PREFETCH, layer=1,
          index=2),
    Event("worker-0", ControlKind.USE, 170, 10, waits_for=8, used=0, reason=PREFETCH),
    Event("worker-0", Kind.TRANSFER, 20, 30, source=2, nbytes=10, reason=PREFETCH),
    Event("worker-0", ControlKind.USE, 50, 8, waits_for=10, used=1, reason=PREFETCH),
    Event("worker-0", Kind.TRANSFER, 190, 5, source=2, nbytes=10, reason=PREFETCH),
]  # fmt: skip


@pytest.fixture
def story(tmp_path: Path) -> Path:
    return write_run(tmp_path, STORY, link_bytes_per_s=0)


def test_the_path_goes_through_waits_to_what_was_waited_for(story: Path) -> None:
    path = analyze(story).critical_path
    assert path is not None
    assert (path.device, path.length_ns, path.steps, path.waits) == ("worker-0", 200, 2, 2)
    assert {kind: ns for kind, ns in path.by_kind.items() if ns} == {
        "compute": 10 + 30 + 10 + 49, "queue": 20, "wire": 30, "check": 5, "other": 2, "wake": 3,
        "peer": 31, "idle": 10,
    }  # fmt: skip
    assert path.by_source == {"host-0": 60, "worker-1": 31}
    assert path.blocks == {"3.7": 60, "0.0": 31}


def test_prefetches_are_judged_by_what_became_of_them(story: Path) -> None:
    found = analyze(story).prefetch
    assert (found.transfers, found.used, found.wasted, found.unread) == (4, 2, 1, 1)
    assert found.precision_ratio == 2 / 3
    assert (found.late, found.late_ns, found.late_max_ns, found.slack_p50_ns) == (1, 30, 30, 8)
    assert found.wasted_bytes == 100


def test_useful_counts_what_was_read(story: Path) -> None:
    one = analyze(story).devices["worker-0"]
    assert (one.used_bytes, one.moved_bytes) == (4106, 4216)
    assert one.useful_ratio == 4106 / 4216


def test_the_story_of_a_stall(story: Path) -> None:
    first, second = analyze(story).stalls
    assert (first.stall_ns, first.at_ns, first.block, first.lead_ns) == (30, 40, "3.7", 30)
    assert "3.7 came from host-0 (prefetch)" in first.story
    assert "asked for 30 ns before compute needed it" in first.story
    assert "mostly wire" in first.story
    assert "1 other transfers shared the link" in first.story
    assert "it had not been here before" in first.story
    assert "waited for the result of worker-1" in second.story
    assert len(analyze(story, stalls=1).stalls) == 1


def test_interference_compares_steps_with_and_without_transfers(tmp_path: Path) -> None:
    found = [Event("worker-0", Kind.STEP, 200 * n, 100, index=1) for n in range(6)]
    found += [Event("worker-0", Kind.STEP, 2000 + 200 * n, 120, index=1) for n in range(6)]
    found += [Event("worker-0", Kind.STEP, 5000 + 600 * n, 500, index=9) for n in range(5)]
    found.append(Event("worker-0", Kind.TRANSFER, 2000, 1200, source=2))
    one = analyze(write_run(tmp_path, found)).devices["worker-0"]
    assert one.interference_ratio == pytest.approx(0.2), "prompts of nine tokens do not count"


def test_a_link_is_held_against_its_profile_or_the_best_seen(tmp_path: Path) -> None:
    found = [
        Event("worker-0", Kind.STEP, 0, 1000),
        Event("worker-0", Kind.TRANSFER, 0, 100, source=2, nbytes=500, phases=(0, 50, 0)),
        Event("worker-0", Kind.TRANSFER, 200, 100, source=2, nbytes=500, phases=(0, 100, 0)),
        Event("host-0", Kind.TRANSFER, 0, 10, source=3),
    ]
    seen = analyze(write_run(tmp_path, found)).links["host-0->worker-0"]
    assert seen.bound == "seen"
    assert 5e9 <= seen.bound_bytes_per_s <= 10e9
    (tmp_path / "profile").mkdir()
    paced = write_run(tmp_path / "profile", found, link_bytes_per_s=20 * 10**9)
    link = analyze(paced).links["host-0->worker-0"]
    assert (link.bound, link.bound_bytes_per_s) == ("profile", 20e9)
    assert (link.busy_ns, link.bytes_per_s) == (200, 5e9)
    assert link.rate_ratio == 0.25
    assert link.use_ratio == pytest.approx(1000 / (20 * 1000))


def test_text_has_every_part_and_fits(story: Path) -> None:
    text = render_text(analyze(story))
    for part in ("critical path of worker-0", "costliest stalls", "prefetches: 4", "window",
                 "clocks against the controller's: n0 -2 +- 1 us"):  # fmt: skip
        assert part in text
    assert max(map(len, text.splitlines())) <= 80


def test_json_reads_back(story: Path) -> None:
    shown = json.loads(to_json(analyze(story)))
    assert shown["critical_path"]["by_kind"]["queue"] == 20
    assert shown["stalls"][0]["stall_ns"] == 30
    assert shown["clocks"] == {"n0": {"offset_ns": -1500, "error_ns": 700}}


def test_the_page_is_one_file_without_script_or_network(tmp_path: Path) -> None:
    evil = [one._replace(code=Code.OK) for one in STORY]
    run = write_run(tmp_path, evil)
    path = run / "trace-n0.jsonl"
    path.write_text(path.read_text().replace("host-0", "<script>alert(1)</script>"))
    view = load(run)
    page = render_html(analyze(run), view=view)
    assert "<script" not in page
    assert "&lt;script&gt;" in page
    for outside in ("http://", "https://", "src=", "@import", "url("):
        assert outside not in page
    assert page.count("<svg") == 2
    assert "prefers-color-scheme: dark" in page
    assert "aria-label" in page


def test_stall_over_time_adds_up_to_the_stall(story: Path) -> None:
    view = load(story)
    shares = stall_bins(view, ["worker-0"], bins=10)
    assert sum(shares) * 20 == pytest.approx(30 + 21)
    assert shares[2] == 1.0
