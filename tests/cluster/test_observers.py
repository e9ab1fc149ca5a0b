"""A live run as the page and `hotset top` see it: by its controller, and by its folder."""

from __future__ import annotations

import subprocess
import sys
import time
from typing import TYPE_CHECKING

import pytest

from hotset.cluster.follow import RaySource
from hotset.cluster.front import Front
from hotset.dashboards.page.folder import FolderSource
from hotset.dashboards.top import render
from tests.cluster.world import deployed, eventually, prompts

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from hotset.cluster.local import LocalCluster

pytestmark = pytest.mark.ray


def test_controller_and_folder_tell_the_same(
    cluster: LocalCluster, models: Callable[[str], Path], tmp_path: Path
) -> None:
    assert cluster.nodes
    folder = tmp_path / "run"
    with deployed(models("demo"), folder, transport="auto") as run:
        Front(run).generate_many(prompts(2), max_new_tokens=4)
        live, recorded = RaySource(run.controller), FolderSource(folder)

        def agree() -> bool:
            live.poll()
            recorded.poll()
            status = live.run.status
            assert status is not None
            now, cells = live.run.moment(at_ns=None, now_ns=time.time_ns(), live=True)
            _, others = recorded.run.moment(at_ns=now.at_ns, now_ns=now.at_ns, live=False)
            told = {store.name: store.blocks for store in status.stores}
            same = cells.shape == others.shape and bool((cells == others).all())
            # Workers report tokens with a heartbeat, some time after a request has ended.
            return {one.name: one.blocks for one in now.stores} == told and same and now.tokens > 0

        eventually(agree, what="the page agrees with the controller's status")
        now, _ = live.run.moment(at_ns=None, now_ns=time.time_ns(), live=True)
        assert now.live
        assert recorded.live
        assert sum(now.states.values()) == live.run.timeline.blocks
        assert now.decisions
        assert live.run.timeline.unknown == 0
        assert not live.run.guessed
        assert run.run in render(now, run=live.run.spec.run)
        asked = subprocess.run(
            [sys.executable, "-m", "hotset", "status", "--address", cluster.address,
             "--run", run.run],
            capture_output=True, text=True, timeout=280, check=False,
        )  # fmt: skip
        assert asked.returncode == 0, asked.stderr
        assert run.run in asked.stdout
