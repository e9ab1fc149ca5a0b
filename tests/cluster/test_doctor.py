"""`hotset doctor`: every way is tried for real, and what breaks is told in time."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from typing import TYPE_CHECKING

import pytest

from hotset.cluster import doctor
from hotset.cluster.doctor import State, probe
from hotset.transport.ucx import UcxBackend

if TYPE_CHECKING:
    from pathlib import Path

HANGS = (sys.executable, "-c", "import signal; signal.pause()")
DIES = (sys.executable, "-c", "import os; os.abort()")
BABBLES = (sys.executable, "-c", "print('no json')")


@pytest.mark.parametrize("way", ["shm", "tcp", "storage", "loopback"])
def test_a_way_that_needs_nothing_works(way: str) -> None:
    found = probe(way)
    assert found.state is State.OK, found.line()
    assert "1 MiB in" in found.text


@pytest.mark.nixl
def test_nixl_works() -> None:
    assert probe("nixl").state is State.OK


@pytest.mark.skipif(bool(UcxBackend.available()), reason=f"UCX: {UcxBackend.available()}")
def test_ucx_works() -> None:
    found = probe("ucx")
    assert found.state is State.OK, found.line()
    assert "ucxx" in found.text


def test_an_absent_library_is_told_with_its_remedy() -> None:
    hide = "import sys; sys.modules['ucxx'] = sys.modules['ucp'] = None; "
    run = "from hotset.cluster.doctor_probes import main; sys.exit(main(['ucx', '.']))"
    found = probe("ucx", command=(sys.executable, "-c", hide + run))
    assert found.state is State.NOTE  # optional
    assert found.text.startswith("not installed")
    assert "pip install ucxx-cu12" in found.line()


@pytest.mark.parametrize("way", ["nixl", "ucx"])
def test_a_probe_that_hangs_is_ended_and_told(way: str) -> None:
    begin = time.monotonic()
    found = probe(way, command=HANGS, seconds=0.3)
    assert time.monotonic() - begin < 5
    assert found.state is (State.FAIL if way == "nixl" else State.NOTE)
    assert "hangs" in found.text
    assert found.remedy


def test_a_probe_that_dies_is_told() -> None:
    assert "signal 6" in probe("nixl", command=DIES).text
    assert "no answer" in probe("nixl", command=BABBLES).text


def test_no_direct_reads_are_a_reason_not_a_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    found = probe("storage")
    assert found.state is State.OK
    assert str(tmp_path) in found.text
    assert "O_DIRECT" in found.text or "page cache: " in found.text
    assert not list(tmp_path.iterdir())


def test_facts_of_the_host_have_a_remedy_where_something_is_amiss() -> None:
    for found in (doctor._seals(), doctor._huge_pages(), doctor._locked(), doctor._shared_memory()):
        assert found.text
        assert found.state is State.OK or found.remedy or "none of 2 MiB" in found.text


def test_variables_are_shown_but_no_token(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UCX_TLS", "tcp")
    monkeypatch.setenv("HOTSET_TOKEN", "very-secret-indeed")
    told = " ".join(found.line() for found in doctor._environment())
    assert "UCX_TLS: is set to tcp" in told
    assert "HOTSET_TOKEN" in told
    assert "very-secret" not in told


@pytest.mark.nixl
def test_the_command_ends_in_10_s_and_speaks_json() -> None:
    begin = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-m", "hotset", "doctor", "--json"],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    elapsed = time.monotonic() - begin
    rows = json.loads(done.stdout)
    assert {"nixl", "ucx", "shm", "tcp", "storage", "loopback", "cma"} <= {r["name"] for r in rows}
    assert {row["state"] for row in rows} <= {"ok", "note", "fail"}
    assert (done.returncode == 0) is all(row["state"] != "fail" for row in rows)
    assert elapsed < 10
