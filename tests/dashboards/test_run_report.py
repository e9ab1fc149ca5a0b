"""The end-of-run report: the keys that scripts read, the facts that people read."""

from __future__ import annotations

import dataclasses
import json

import msgspec
import pytest

from hotset.dashboards.report import RunReport, render
from hotset.dashboards.text import human_bytes, human_ns

REPORT = RunReport(
    text='she said "yes"\n',
    tokens=list(range(64)),
    identical=True,
    tokens_per_s=12.34,
    stall_ns_per_token=1_234_567,
    hits={"storage": 4, "hbm": 900, "cxl": 33, "host": 80},
    bytes_by_link={"host-0->worker-0": 123_456_789, "cxl-0->worker-1": 55_555},
    peak_rss_bytes={"worker-0": 400 << 20, "controller": 90 << 20},
    trace="runs/r1",
    reference="transformers eager, bf16",
    reference_tokens_per_s=24.68,
    emulated=["cxl-0: a process paced to 28 GB/s"],
    requests=2,
    wall_s=5.2,
    model="demo",
    digest="ab12",
    vetoes={"veto_precision": 3},
)


def test_json_has_the_keys_of_the_contract() -> None:
    line = REPORT.to_json()
    shown = json.loads(line)
    assert "\n" not in line
    assert set(shown) >= {
        "text", "tokens", "identical", "tokens_per_s", "stall_ns_per_token", "hits",
        "bytes_by_link", "peak_rss_bytes", "trace",
    }  # fmt: skip
    assert shown["tokens"] == list(range(64))
    assert shown["hits"] == REPORT.hits
    assert msgspec.json.decode(line, type=RunReport) == REPORT


def rows(text: str) -> dict[str, str]:
    return {line.split("  ")[0].strip(): line for line in text.splitlines() if line.strip()}


def test_table_tells_every_fact_in_eighty_columns() -> None:
    text = render(REPORT)
    found = rows(text)
    assert "12.3 tokens/s" in found["speed"]
    assert "0.50x" in found["speed"]
    assert "1.23 ms per token" in found["stall"]
    assert "yes, as transformers eager, bf16" in found["same tokens"]
    assert "88.5 %" in found["hbm"]
    assert "117.7 MiB" in found["host-0->worker-0"]
    assert "123,456,789" in found["host-0->worker-0"]
    assert "400.0 MiB" in found["worker-0"]
    assert "veto_precision" in found
    assert "0 rows dropped" in found["trace"]
    assert text.index("hbm") < text.index("host  ") < text.index("storage")
    assert max(map(len, text.splitlines())) <= 80
    assert "\x1b" not in text


def test_what_is_emulated_is_marked_where_it_counts() -> None:
    found = rows(render(REPORT))
    assert "cxl-0->worker-1 *" in found
    assert "host-0->worker-0" in found
    assert "paced to 28 GB/s" in found["* emulated"]


@pytest.mark.parametrize(
    ("identical", "expected"), [(None, "not compared"), (False, "NO: they differ")]
)
def test_a_difference_is_never_quiet(identical: bool | None, expected: str) -> None:  # noqa: FBT001 - pytest passes it by name
    text = render(dataclasses.replace(REPORT, identical=identical))
    assert expected in text


def test_a_run_that_measured_nothing_renders() -> None:
    text = render(
        RunReport(
            text="", tokens=[], identical=None, tokens_per_s=0.0, stall_ns_per_token=0, hits={},
            bytes_by_link={}, peak_rss_bytes={}, trace="",
        )
    )  # fmt: skip
    assert "0 tokens" in text
    assert "emulated" not in text


def test_long_values_wrap_under_their_column() -> None:
    lines = render(dataclasses.replace(REPORT, emulated=["cxl-0: " + "word " * 40]), width=60)
    assert max(map(len, lines.splitlines())) <= 60


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1536, "1.5 KiB"),
        (5 << 30, "5.0 GiB"),
        (1 << 62, "4096.0 PiB"),
    ],
)
def test_bytes_for_people(value: int, expected: str) -> None:
    assert human_bytes(value) == expected


@pytest.mark.parametrize(
    ("value", "expected"),
    [(0, "0"), (999, "999 ns"), (1_500, "1.50 us"), (61 * 10**9, "61.00 s"), (-2_000, "-2.00 us")],
)
def test_times_for_people(value: int, expected: str) -> None:
    assert human_ns(value) == expected
