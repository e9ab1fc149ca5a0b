"""The thin form of the whole mission, one test an item.

Formats and floors, workers that come and go, metrics, traces, status and why.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import threading
import urllib.request
from collections import Counter
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest
import ray

from hotset.actors import names
from hotset.cluster.front import Front
from hotset.cluster.inspect import live_story
from tests.cluster.world import assert_sound, deployed, eventually, prompts

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from hotset.cluster.launch import Deployment
    from hotset.cluster.local import LocalCluster

pytestmark = [pytest.mark.ray, pytest.mark.nixl]

TOKENS = 48
FLOORED = 2


@pytest.fixture(scope="module")
def run(
    cluster: LocalCluster,
    models: Callable[[str], Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Deployment]:
    assert cluster.address
    folder = tmp_path_factory.mktemp("run")
    with deployed(models("demo"), folder, workers=2, hbm_ratio=0.25) as deployment:
        yield deployment


def hotset(*arguments: str) -> str:
    """What the command line prints."""
    done = subprocess.run(
        [sys.executable, "-m", "hotset", *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


# --- formats and floors ---------------------------------------------------------------------------


def test_int8_copies_respect_the_floor_of_a_layer(
    cluster: LocalCluster, models: Callable[[str], Path], tmp_path: Path
) -> None:
    assert cluster.address
    options = {"default_floor": "int8", "floors": {FLOORED: "bf16"}, "reduced_ratio": 0.5}
    with deployed(models("demo"), tmp_path, workers=2, hbm_ratio=0.4, **options) as deployment:
        status = eventually(
            lambda: (found := deployment.status())["states"]["S2"] > 0 and found,
            what="blocks in int8",
        )
        reduced = [store for store in status["stores"] if store["blocks"].get("int8")]
        assert {store["tier"] for store in reduced} == {"hbm"}
        assert status["vetoes"]["veto_precision"] > 0
        reduced_by_layer: Counter[int] = Counter()
        refusals = 0
        for block in deployment.catalog.blocks:
            story, copies = live_story(deployment.controller, block)
            reduced_by_layer[block.layer] += any(copy.format == "int8" for copy in copies)
            refused = [line for line in story if line.reason == "veto_precision"]
            assert not refused or block.layer == FLOORED
            refusals += len(refused)
        assert reduced_by_layer.pop(FLOORED) == 0
        assert sum(reduced_by_layer.values()) >= status["states"]["S2"]
        assert refusals == status["vetoes"]["veto_precision"]  # counted, with the reason and where
        for prompt in prompts(4):
            served = Front(deployment).generate(prompt, max_new_tokens=TOKENS)
            assert len(served.tokens) == TOKENS  # computed with int8 copies where they are
        assert_sound(deployment)


# --- workers that come and go ---------------------------------------------------------------------


def test_a_worker_joins_and_another_leaves_while_text_is_generated(
    run: Deployment, models: Callable[[str], Path], expected: Callable[..., Any]
) -> None:
    (prompt,) = prompts(1, seed=31)
    (wanted,) = expected(models("demo"), [prompt], count=TOKENS)
    added = threading.Event()
    left = threading.Event()
    errors: list[BaseException] = []

    def change() -> None:
        try:
            assert run.add_worker(node="node2") == "worker-2"
            added.set()
            run.drain_worker("worker-1")
            left.set()
        except BaseException as error:
            errors.append(error)
            raise

    changing = threading.Thread(target=change)
    served = []
    while not left.is_set() and not errors:  # requests follow one another until both are done
        served.append(
            Front(run).generate(
                prompt,
                max_new_tokens=TOKENS,
                on_tokens=lambda _tokens: changing.ident or changing.start(),
            )
        )
    changing.join(timeout=60)
    assert not errors
    assert added.is_set()
    assert all(one.tokens == wanted for one in served)
    assert not any(one.replays for one in served)
    assert set(run.workers) == {"worker-0", "worker-2"}
    present = {store["name"] for store in run.status()["stores"]}
    assert present == {"worker-0", "worker-2", "host-0", "cxl-0"}
    last = Front(run).generate(prompt, max_new_tokens=TOKENS, worker="worker-2")
    assert (last.tokens, last.workers) == (wanted, ["worker-2"])
    assert_sound(run)


# --- metrics --------------------------------------------------------------------------------------


def test_metrics_are_in_rays_prometheus_endpoint(run: Deployment) -> None:
    Front(run).generate(prompts(1, seed=32)[0], max_new_tokens=TOKENS)
    shown = {
        names.TRANSFER_BYTES, names.TRANSFER_SECONDS, names.TRANSFERS, names.STALL_SECONDS,
        names.EXPERT_HITS, names.EXPERT_QUERIES, names.RESIDENT_BYTES, names.CAPACITY_BYTES,
        names.TOKENS_SERVED, names.EPOCH_NUMBER, names.BLOCKS,
    }  # fmt: skip

    def all_there() -> list[Sample]:
        found = [sample for sample in scrape() if sample.value > 0]
        return found if {metric.name for metric in shown} <= {one.name for one in found} else []

    samples = eventually(all_there, deadline_s=60, what="every metric above 0")
    # Ray keeps gauges of a process for half a minute; each controller's states add up.
    by_process: Counter[str] = Counter()
    for one in samples:
        if one.name == names.BLOCKS.name:
            by_process[one.process] += int(one.value)
    assert set(by_process.values()) == {len(run.catalog.blocks)}


class Sample(NamedTuple):
    """One line of the endpoint."""

    name: str
    process: str
    value: float


def scrape() -> list[Sample]:
    """Our metrics on all nodes."""
    found = []
    for node in ray.nodes():
        if not node["Alive"]:
            continue
        url = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
        try:
            with urllib.request.urlopen(url, timeout=5) as answer:
                text = answer.read().decode()
        except OSError:
            continue
        for line in text.splitlines():
            match = re.match(r"ray_(hotset_\w+)\{(.*)\} ([0-9.e+-]+)$", line)
            if match:
                process = re.search(r'WorkerId="(\w+)"', match[2])
                found.append(Sample(match[1], process[1] if process else "", float(match[3])))
    return found


# --- status and why -------------------------------------------------------------------------------


def test_status_and_why_of_a_live_run(run: Deployment, cluster: LocalCluster) -> None:
    status = json.loads(hotset("status", "--address", cluster.address, "--json"))
    assert status["run"] == run.run
    assert sum(status["states"].values()) == status["blocks"]
    assert {store["name"] for store in status["stores"]} == {*run.workers, *run.pools}
    text = hotset("status", "--address", cluster.address)
    assert "cxl-0" in text
    assert "EMULATED" in text
    story = json.loads(hotset("why", "0.0", "--address", cluster.address, "--json"))
    assert story["block"] == "0.0"
    assert story["copies"]
    assert any("landed" in line["what"] for line in story["story"])
    assert "expert 0 of layer 0" in hotset("why", "0.0", "--address", cluster.address)


# --- a recorded run -------------------------------------------------------------------------------


class Recorded(NamedTuple):
    """A run that has ended, and what its actors said before."""

    folder: Path
    stall_ns: int
    tokens: int
    spans: int


@pytest.fixture(scope="module")
def recorded(
    cluster: LocalCluster,
    models: Callable[[str], Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> Recorded:
    assert cluster.address
    folder = tmp_path_factory.mktemp("recorded")
    asked = prompts(3, seed=33)
    with deployed(models("demo"), folder, workers=2, hbm_ratio=0.2) as deployment:
        for prompt in asked:
            Front(deployment).generate(prompt, max_new_tokens=TOKENS)
        totals = deployment.totals()
        status = eventually(
            lambda: (found := deployment.status())["tokens"] == totals.tokens and found,
            what="the workers' own counters",
        )
        assert_sound(deployment)
    return Recorded(folder, status["stall_ns"], totals.tokens, totals.spans)


def test_trace_analysis_agrees_with_the_workers_counters(recorded: Recorded) -> None:
    said = json.loads(hotset("trace", "analyze", str(recorded.folder), "--format", "json"))
    total = said["total"]
    assert total["dropped"] == 0
    assert total["hidden_ns"] + total["exposed_ns"] == total["transfer_ns"] > 0
    assert total["stall_ns"] == pytest.approx(recorded.stall_ns, rel=0.01)
    assert total["spans"] >= recorded.spans > 0
    assert total["steps"] == recorded.tokens  # a step a token, the prompt's pass gives the first
    assert not said["torn_lines"]
    assert "total" in hotset("trace", "analyze", str(recorded.folder))


def test_why_of_a_recorded_run(recorded: Recorded) -> None:
    story = json.loads(hotset("why", "0.0", "--run", str(recorded.folder), "--json"))
    assert story["block"] == "0.0"
    assert any("landed from storage" in line["what"] for line in story["story"])
