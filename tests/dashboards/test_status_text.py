"""`hotset status` and `hotset why`: content of text and JSON."""

from __future__ import annotations

import dataclasses
import json

import msgspec

from hotset.dashboards.status import Status, StoreStatus, StoryLine, render, render_why, why_json
from hotset.policies.types import BlockId, Copy, Format

STATUS = Status(
    run="r1",
    model="demo",
    digest="ab12",
    blocks=1024,
    states={"S1": 300, "S4": 700, "S5": 24, "S2": 0},
    stores=(
        StoreStatus(
            name="worker-0", tier="hbm", node="n0", incarnation=3, capacity_bytes=400 << 20,
            resident_bytes=300 << 20, blocks={"bf16": 300, "int8": 3}, in_flight=2,
        ),
        StoreStatus(
            name="cxl-0", tier="cxl", node="n1", incarnation=1, capacity_bytes=0,
            resident_bytes=0, blocks={}, state="draining", quarantined_bytes=1 << 20,
            emulated="paced to 28 GB/s",
        ),
    ),
    epoch=4,
    epoch_age_ns=3 * 10**9,
    requests_in_flight=2,
    tokens=12_000,
    vetoes={"veto_precision": 3},
    alerts=("cxl-0 missed 2 heartbeats",),
    dropped=5,
    predictors=("worker-0: prefetching; 3 ahead OFF costs 12 us a pass, saves 4 us",),
)  # fmt: skip


def test_status_tells_stores_states_and_alerts() -> None:
    text = render(STATUS)
    assert "4, 3.00 s old" in text
    assert "1,024: 300 full precision (S1), 700 staged (S4), 24 in storage" in text
    assert "reduced" not in text, "empty states are left out"
    assert "MISMATCH" not in text
    assert "2 in flight, 12,000 tokens served" in text
    assert "3 veto_precision" in text
    assert "5 rows dropped" in text
    [worker] = [line for line in text.splitlines() if line.startswith("worker-0")]
    assert "300 bf16, 3 int8; 2 coming" in worker
    assert "75.0 %" in worker
    [pool] = [line for line in text.splitlines() if line.startswith("cxl-0")]
    assert "DRAINING" in pool
    assert "1.0 MiB quarantined" in pool
    assert "cxl-0: paced to 28 GB/s" in text
    assert "cxl-0 missed 2 heartbeats" in text
    assert "3 ahead OFF costs 12 us a pass" in text


def test_states_that_do_not_add_up_are_told() -> None:
    text = render(dataclasses.replace(STATUS, states={"S1": 1000}))
    [line] = [line for line in text.splitlines() if line.startswith("MISMATCH")]
    assert "states add up to 1,000" in line


def test_status_without_stores_says_so() -> None:
    assert "no store has joined" in render(dataclasses.replace(STATUS, stores=()))


def test_status_json_round_trips() -> None:
    line = STATUS.to_json()
    assert "\n" not in line
    assert msgspec.json.decode(line, type=Status) == STATUS
    assert msgspec.convert(json.loads(line), Status) == STATUS


BLOCK = BlockId(3, 17)
COPIES = [
    Copy(
        block=BLOCK, format=Format.BF16, store="worker-0", offset=0, nbytes=12 << 20, generation=4,
        checksum=2**64 - 1, incarnation=1,
    )
]  # fmt: skip
STORY = [
    StoryLine(
        at_ns=10**18, store="worker-0", what="fetch from host-0", reason="demand", cause="step 12"
    ),
    StoryLine(at_ns=10**18 + 5_000_000, store="worker-0", what="landed", reason="demand", epoch=2),
]


def test_why_tells_copies_and_story_in_order() -> None:
    text = render_why(BLOCK, story=STORY, copies=COPIES)
    assert "block 3.17: expert 17 of layer 3" in text
    assert "ffffffffffffffff" in text
    assert "12.0 MiB" in text
    assert "-5.00 ms" in text
    assert text.index("fetch from host-0 (demand, because of step 12; epoch 0)") < text.index(
        "landed (demand; epoch 2)"
    )


def test_why_of_a_block_that_never_moved() -> None:
    text = render_why(BLOCK, story=[], copies=[])
    assert "in storage only" in text
    assert "nothing has happened" in text


def test_why_json() -> None:
    shown = json.loads(why_json(BLOCK, story=STORY, copies=COPIES))
    assert shown["block"] == "3.17"
    assert shown["copies"][0]["checksum"] == 2**64 - 1
    assert shown["copies"][0]["block"] == "3.17"
    assert [line["what"] for line in shown["story"]] == ["fetch from host-0", "landed"]
