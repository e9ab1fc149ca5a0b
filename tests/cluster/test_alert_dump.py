"""An alert of the progress watchdog makes every node keep its last seconds, once."""

from __future__ import annotations

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

        def dumps() -> list[Path]:
            front.generate_many(prompts(2), max_new_tokens=2)
            run.totals()
            call(run.controller.heartbeat, encode(late))  # as a worker whose transfer hangs
            return sorted(tmp_path.glob("flight-*-alert_transfer.jsonl"))

        def nodes() -> list[str]:
            return [path.name.split("-")[1] for path in dumps()]

        eventually(lambda: set(nodes()) >= {"node0", "node1"}, what="dumps of both workers' nodes")
        found = nodes()
        assert len(found) == len(set(found)), "dumps of a node are a minute apart"
        for path in dumps():
            if path.name.startswith(("flight-node0", "flight-node1")):
                assert "hotset.compute.step" in names(path)


def names(path: Path) -> list[str]:
    view = load(path)
    return [view.name(number) for number in view.table["name"].tolist()]
