"""kill -9 of any process while text is generated: the same tokens, and the cluster heals.

One deployment for all tests: each one starts when every store is back, so healing is tested too.
"""

from __future__ import annotations

import ctypes
import os
import signal
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from hotset.cluster.front import Front
from hotset.transport.nixl import SERVER_THREAD
from tests.cluster.world import assert_sound, call, deployed, eventually, prompts

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from hotset.cluster.front import Served
    from hotset.cluster.launch import Deployment
    from hotset.cluster.local import LocalCluster

pytestmark = [pytest.mark.ray, pytest.mark.nixl]

TOKENS = 120
KILL_AFTER = 20
STORES = {"worker-0", "worker-1", "worker-2", "host-0", "cxl-0"}
(PROMPT,) = prompts(1, seed=11)


@pytest.fixture(scope="module")
def run(
    cluster: LocalCluster,
    models: Callable[[str], Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Deployment]:
    assert cluster.address
    folder = tmp_path_factory.mktemp("run")
    with deployed(models("demo"), folder, workers=3, hbm_ratio=0.2) as deployment:
        Front(deployment).generate(PROMPT, max_new_tokens=8)  # popular blocks go to the host pool
        eventually(lambda: stores(deployment)["host-0"]["blocks"], what="host copies")
        yield deployment


@pytest.fixture(autouse=True)
def whole(run: Deployment) -> Iterator[None]:
    """Every store is there before a test, and again after it."""
    eventually(lambda: set(stores(run)) == STORES, what="all stores")
    yield
    eventually(lambda: set(stores(run)) == STORES, deadline_s=90, what="all stores back")
    for actor in (*run.workers.values(), *run.pools.values()):
        eventually(lambda actor=actor: call(actor.pid), deadline_s=60, what="an actor that answers")
    assert_sound(run)


@pytest.fixture(scope="module")
def wanted(models: Callable[[str], Path], expected: Callable[..., Any]) -> list[int]:
    tokens: list[int] = expected(models("demo"), [PROMPT], count=TOKENS)[0]
    return tokens


def stores(run: Deployment) -> dict[str, dict[str, Any]]:
    return {store["name"]: store for store in run.status()["stores"]}


def kill(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)


def abort_nixl(pid: int) -> None:
    """Let the thread of a process that serves NIXL's reads abort, as UCX does over TCP."""
    threads = Path(f"/proc/{pid}/task").iterdir()
    [server] = [t for t in threads if (t / "comm").read_text().strip() == SERVER_THREAD]
    assert ctypes.CDLL(None).tgkill(pid, int(server.name), signal.SIGABRT) == 0


def generate_and_kill(
    run: Deployment, pid: int, *, worker: str = "worker-0", strike: Callable[[int], None] = kill
) -> Served:
    """Serve a request; its 20th token kills the process."""
    came: list[int] = []
    killed = False

    def on_tokens(tokens: list[int]) -> None:
        nonlocal killed
        came.extend(tokens)
        if len(came) >= KILL_AFTER and not killed:
            killed = True
            strike(pid)

    served = Front(run).generate(PROMPT, max_new_tokens=TOKENS, on_tokens=on_tokens, worker=worker)
    assert killed
    assert came == served.tokens  # nothing was delivered twice or left out
    return served


@pytest.mark.parametrize("pool", ["host-0", "cxl-0"])
def test_a_pool_dies(run: Deployment, wanted: list[int], pool: str) -> None:
    before = stores(run)[pool]
    served = generate_and_kill(run, call(run.pools[pool].pid))
    assert served.tokens == wanted
    assert not served.replays
    eventually(
        lambda: stores(run).get(pool, before)["incarnation"] > before["incarnation"],
        deadline_s=90,
        what=f"a new incarnation of {pool}",
    )
    if pool == "cxl-0":  # it held what no other pool holds: filled again from storage
        eventually(lambda: stores(run)[pool]["blocks"], deadline_s=60, what="copies")


def test_a_peer_of_the_serving_worker_dies(run: Deployment, wanted: list[int]) -> None:
    before = stores(run)["worker-1"]
    served = generate_and_kill(run, call(run.workers["worker-1"].pid))
    assert served.tokens == wanted
    assert not served.replays
    eventually(
        lambda: stores(run).get("worker-1", before)["incarnation"] > before["incarnation"],
        deadline_s=90,
        what="a new incarnation of worker-1",
    )
    eventually(lambda: call(run.workers["worker-1"].pid), what="worker-1 answers")
    again = Front(run).generate(PROMPT, max_new_tokens=TOKENS, worker="worker-1")
    assert again.tokens == wanted
    assert again.workers == ["worker-1"]


def test_the_serving_worker_dies(run: Deployment, wanted: list[int]) -> None:
    served = generate_and_kill(run, call(run.workers["worker-2"].pid), worker="worker-2")
    assert served.tokens == wanted
    assert served.replays == 1
    assert served.workers[0] == "worker-2" != served.workers[1]


def test_ucx_aborts_in_the_serving_worker(run: Deployment, wanted: list[int]) -> None:
    before = stores(run)["worker-1"]
    pid = call(run.workers["worker-1"].pid)
    served = generate_and_kill(run, pid, worker="worker-1", strike=abort_nixl)
    assert served.tokens == wanted
    assert not served.replays  # it has outlived that
    eventually(
        lambda: stores(run).get("worker-1", before)["incarnation"] > before["incarnation"],
        deadline_s=90,
        what="a new incarnation of worker-1",
    )


def test_the_controller_dies(run: Deployment, wanted: list[int]) -> None:
    before = run.status()
    pid = call(run.controller.pid)
    served = generate_and_kill(run, pid)
    assert served.tokens == wanted
    assert not served.replays
    eventually(lambda: call(run.controller.pid) != pid, what="a new controller")
    assert call(run.controller.replayed) > 0
    after = eventually(
        lambda: (
            (status := run.status())
            and {store["name"] for store in status["stores"]} == STORES
            and status
        ),
        what="all stores joined the new controller",
    )
    assert after["epoch"] >= before["epoch"]
    assert sum(after["states"].values()) == after["blocks"]
    incarnations = {store["name"]: store["incarnation"] for store in before["stores"]}
    assert incarnations == {store["name"]: store["incarnation"] for store in after["stores"]}
    again = Front(run).generate(PROMPT, max_new_tokens=TOKENS)
    assert again.tokens == wanted
