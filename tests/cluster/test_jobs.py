"""`ray job submit` with the repository as working directory, on a head with its dashboard on."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import urllib.error
import urllib.request
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import psutil
import pytest

from tests.cluster.conftest import DEMO
from tests.cluster.world import eventually

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = [pytest.mark.ray, pytest.mark.nixl]

ROOT = Path(__file__).resolve().parents[2]
BIN = Path(sys.executable).parent
MARK = "HOTSET_TEST_HEAD"


class Head(NamedTuple):
    """A Ray head that `ray start` has started."""

    address: str
    dashboard: str
    environment: dict[str, str]


def free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        servers = [
            stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(count)
        ]
        return [server.getsockname()[1] for server in servers]


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Head]:
    """Found again by a mark in the environment: `ray stop` would end others' clusters too."""
    port, dashboard = free_ports(2)
    mark = f"{os.getpid()}-{port}"
    environment = os.environ | {
        "RAY_AUTH_MODE": "disabled",
        "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",  # a job runs the raylet's python
        MARK: mark,
    }
    environment.pop("RAY_ADDRESS", None)
    log = tmp_path_factory.mktemp("head") / "log"
    session = Path(tempfile.mkdtemp(prefix="hs"))  # short: Ray's sockets are in it
    with log.open("w") as out:
        started = subprocess.Popen(
            [
                str(BIN / "ray"), "start", "--head", "--block", "--port", str(port),
                "--node-ip-address", "127.0.0.1", "--dashboard-host", "127.0.0.1",
                "--dashboard-port", str(dashboard), "--include-dashboard", "true",
                "--num-cpus", "2", "--object-store-memory", str(100 << 20),
                "--temp-dir", str(session), "--disable-usage-stats",
            ],
            stdout=out, stderr=out, env=environment, start_new_session=True,
        )  # fmt: skip
    url = f"http://127.0.0.1:{dashboard}"
    try:
        eventually(
            lambda: answers(f"{url}/api/version"), deadline_s=90, what=f"the dashboard ({log})"
        )
        yield Head(f"127.0.0.1:{port}", url, environment)
    finally:
        started.terminate()  # it ends what it started
        with contextlib.suppress(subprocess.TimeoutExpired):
            started.wait(timeout=10)
        kill_marked(mark)
        started.wait(timeout=10)
        shutil.rmtree(session, ignore_errors=True)


def answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5) as answer:  # noqa: S310 - our own head
            return bool(answer.status == 200)
    except (urllib.error.URLError, OSError):
        return False


def kill_marked(mark: str) -> None:
    """End every process that still carries our mark, and no other."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied):
            if process.environ().get(MARK) == mark:
                process.kill()
                found.append(process)
    psutil.wait_procs(found, timeout=10)


def test_generate_as_a_job(head: Head) -> None:
    excludes = [".venv", ".git", "hotset-runs", ".mypy_cache", ".pytest_cache", ".hypothesis"]

    def submit() -> subprocess.CompletedProcess[str] | None:
        done = subprocess.run(
            [
                str(BIN / "ray"), "job", "submit", "--address", head.dashboard,
                "--working-dir", ".", "--runtime-env-json", json.dumps({"excludes": excludes}),
                "--", "python", "-m", "hotset", "generate",
                "--model", str(DEMO.relative_to(ROOT)), "--prompt", "def f(",
                "--max-new-tokens", "16", "--workers", "2", "--json",
            ],
            cwd=ROOT, env=head.environment, capture_output=True, text=True, timeout=240,
            check=False,
        )  # fmt: skip
        return None if "No available agent" in done.stderr else done  # it starts after the head

    done = eventually(submit, deadline_s=120, what="Ray's job agent")
    assert done is not None
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    reports = [line for line in done.stdout.splitlines() if line.startswith('{"text"')]
    report = json.loads(reports[0])
    assert report["identical"] is True
    assert len(report["tokens"]) == 16
    assert report["tokens_per_s"] > 0
    assert {"host-0", "cxl-0", "worker-0", "worker-1"} <= set(report["peak_rss_bytes"])
