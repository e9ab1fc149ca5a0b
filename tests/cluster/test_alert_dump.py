"""An alert of the progress watchdog makes every node keep its last seconds, once."""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING

import pytest

from hotset.actors.messages import Heartbeat, encode
from hotset.cluster.front import Front
from hotset.dashboards.trace import load
from tests.cluster.world import call, deployed, eventually, prompts

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from hotset.cluster.local import LocalCluster

pytestmark = pytest.mark.ray

HUNG_NS = 40_000_000_000


def test_an_alert_dumps_the_last_seconds_of_each_node(
    cluster: LocalCluster, models: Callable[[str], Path], tmp_path: Path
) -> None:
    assert cluster.nodes
    with deployed(models("demo"), tmp_path, workers=2, transport="auto") as run:
        front = Front(run)
        store = next(one for one in run.status()["stores"] if one["name"] == "worker-0")
        late = Heartbeat(
            store="worker-0", incarnation=store["incarnation"], directory_version=-1,
            membership_version=-1, events=[], gauges={"oldest_transfer_ns": HUNG_NS},
        )  # fmt: skip

        over, pace = threading.Event(), threading.Event()

        def serve() -> None:
            while not over.is_set():
                front.generate_many(prompts(2), max_new_tokens=2)

        def dumps(why: str = "alert_transfer") -> list[Path]:
            return sorted(tmp_path.glob(f"flight-*-{why}.jsonl"))

        def nodes(why: str = "alert_transfer") -> list[str]:
            return [path.name.split("-")[1] for path in dumps(why)]

        def stumble() -> bool:
            """An anomaly of its own at each node: it must not take the alert's dump away."""
            call(run.telemetry["node0"].alarm, "stall")
            return set(nodes("stall")) >= both

        def hang() -> bool:
            """Beat as a worker whose transfer hangs, for a while, then as it does by itself."""
            end = time.monotonic() + 2.5
            while time.monotonic() < end and not set(nodes()) >= both:
                call(run.controller.heartbeat, encode(late))
                pace.wait(0.05)
            return set(nodes()) >= both or pace.wait(1.5)

        both = {"node0", "node1"}
        serving = threading.Thread(target=serve)
        serving.start()
        try:
            eventually(stumble, deadline_s=60, what="an earlier dump of each node")
            eventually(hang, deadline_s=120, what="dumps of both nodes")
        finally:
            over.set()
            serving.join()
        found = nodes()
        assert len(found) == len(set(found)), "dumps of a node are a minute apart"
        assert all(len(load(path).table) for path in dumps()), "each has the spans of its node"
