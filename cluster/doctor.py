"""`hotset doctor`: which parts work on this machine, tried for real, and why the others do not.

Decides what is needed (its absence fails the exit code) and what is optional. Ways to move blocks
are tried by `doctor_probes.py` in processes of their own, at the same time, each for at most
PROBE_S: a library that hangs, crashes or clashes with another one is a finding, not the end.
"""

from __future__ import annotations

import fcntl
import importlib.metadata
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Final

import hotset
from hotset.cluster.doctor_probes import ABSENT

if TYPE_CHECKING:
    from collections.abc import Sequence

PROBE_S: Final = 8.0
NEEDED: Final = ("ray", "torch", "transformers", "nixl", "msgspec", "xxhash", "opentelemetry-sdk")
REQUIRED_WAYS: Final = ("nixl", "shm", "tcp", "storage", "loopback")
OPTIONAL_WAYS: Final = ("ucx", "cma")
_ROOT: Final = str(Path(hotset.__file__).parents[1])  # probes find this hotset from any folder
_PATHS: Final = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
_MEMORY: Final = Path("/sys/kernel/mm")
_SEALS: Final = ("F_SEAL_SHRINK", "F_SEAL_GROW", "F_SEAL_SEAL")
_PREFIXES: Final = ("HOTSET_", "UCX_")
_ROOM_BYTES: Final = 512 << 20


class State(Enum):
    """How a part is."""

    OK = "ok"
    NOTE = "-"  # optional and absent, or a fact worth knowing
    FAIL = "FAIL"


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One part of this machine, or one way to move blocks."""

    name: str
    state: State
    text: str
    remedy: str = ""

    def line(self) -> str:
        """As it is printed."""
        told = f"{self.state.value:<6}{self.name}: {self.text}"
        return f"{told}; {self.remedy}" if self.remedy and self.state is not State.OK else told

    def row(self) -> dict[str, str]:
        """As it stands in JSON."""
        state = self.state.name.lower()
        return {"name": self.name, "state": state, "text": self.text, "remedy": self.remedy}


def examine() -> tuple[list[Finding], bool]:
    """What was found, and whether everything that a local run needs is there."""
    ways = (*REQUIRED_WAYS, *OPTIONAL_WAYS)
    with ThreadPoolExecutor(len(ways)) as pool:  # they wait for processes
        tried = pool.map(probe, ways)
        findings = [*_packages(), _device(), _shared_memory(), _seals(), _huge_pages(), _locked()]
        findings += [*tried, *_environment()]
    return findings, all(found.state is not State.FAIL for found in findings)


def probe(way: str, *, command: Sequence[str] = (), seconds: float = PROBE_S) -> Finding:
    """Try one way in a process of its own; `command` replaces the probe's."""
    full = list(command) or [
        sys.executable,
        "-m",
        "hotset.cluster.doctor_probes",
        way,
        str(_here()),
    ]
    bad = State.FAIL if way in REQUIRED_WAYS else State.NOTE
    child = subprocess.Popen(
        full,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join([_ROOT, *_PATHS])},
    )
    try:
        told, complaint = child.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        os.killpg(child.pid, signal.SIGKILL)  # its group is of our making
        child.communicate()
        return Finding(
            name=way,
            state=bad,
            text=f"hangs; it was ended after {seconds:.0f} s",
            remedy="check UCX_TLS and UCX_NET_DEVICES, or use another backend",
        )
    lines = told.strip().splitlines()
    try:
        found = json.loads(lines[-1])
    except (IndexError, json.JSONDecodeError):
        cause = f"signal {-child.returncode}" if child.returncode < 0 else "no answer"
        last = complaint.strip().splitlines()[-1:]
        return Finding(name=way, state=bad, text=": ".join([f"its probe died ({cause})", *last]))
    state = bad if child.returncode else State.OK
    text = found["text"]
    if child.returncode == ABSENT:
        text = f"not installed ({text})"
    return Finding(name=way, state=state, text=text, remedy=found["remedy"])


def _here() -> Path:
    """Where a file can be written to try storage: here if possible."""
    here = Path.cwd()
    return here if os.access(here, os.W_OK) else Path("/tmp")  # noqa: S108 - one short-lived file


def _packages() -> list[Finding]:
    return [_package(name) for name in NEEDED]


def _package(name: str) -> Finding:
    try:
        version = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return Finding(
            name=name, state=State.FAIL, text="not installed", remedy=f"pip install {name}"
        )
    return Finding(name=name, state=State.OK, text=version)


def _device() -> Finding:
    try:
        import torch
    except ImportError as error:
        return Finding(
            name="device", state=State.FAIL, text=f"unknown ({error})", remedy="pip install torch"
        )
    text = "cpu (a worker's HBM is emulated: a byte budget in host memory)"
    if torch.cuda.is_available():
        text = torch.cuda.get_device_name()
    return Finding(name="device", state=State.OK, text=text)


def _shared_memory() -> Finding:
    path = Path("/dev/shm")  # noqa: S108 - Ray's object store lives there
    if not path.exists():
        return Finding(
            name="shared memory",
            state=State.FAIL,
            text=f"no {path}",
            remedy="mount it: Ray needs it",
        )
    free = shutil.disk_usage(path).free
    return Finding(
        name="shared memory",
        state=State.OK if free > _ROOM_BYTES else State.FAIL,
        text=f"{free >> 20} MiB free",
        remedy="" if free > _ROOM_BYTES else "remount it with a larger size: Ray needs it",
    )


def _seals() -> Finding:
    """A store's memory is sealed against shrinking, so that its readers are safe from SIGBUS."""
    try:
        handle = os.memfd_create("hotset-doctor", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    except OSError as error:
        return Finding(
            name="memfd",
            state=State.FAIL,
            text=f"no memory files ({error.strerror})",
            remedy="hotset needs Linux 3.17 and a sandbox that allows memfd_create",
        )
    try:
        os.ftruncate(handle, 4096)
        for seal in _SEALS:
            fcntl.fcntl(handle, fcntl.F_ADD_SEALS, getattr(fcntl, seal))
    except OSError as error:
        return Finding(
            name="memfd",
            state=State.NOTE,
            text=f"memory files cannot be sealed ({error.strerror})",
            remedy="peers of this host are then read without a mapping",
        )
    finally:
        os.close(handle)
    return Finding(name="memfd", state=State.OK, text="memory files can be sealed")


def _huge_pages() -> Finding:
    def number(name: str) -> int:
        try:
            return int((_MEMORY / "hugepages/hugepages-2048kB" / name).read_text(encoding="ascii"))
        except (OSError, ValueError):
            return -1

    total, free = number("nr_hugepages"), number("free_hugepages")
    if free > 0:
        return Finding(name="hugepages", state=State.OK, text=f"{free} of {total} x 2 MiB free")
    return Finding(
        name="hugepages",
        state=State.NOTE,
        text="this kernel has none of 2 MiB" if total < 0 else f"none of {total} free",
        remedy="" if total < 0 else "sysctl vm.nr_hugepages=N, if stores are to use them",
    )


def _locked() -> Finding:
    """RDMA and CUDA pin registered memory, within this limit."""
    soft, hard = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    if soft == resource.RLIM_INFINITY:
        return Finding(name="ulimit -l", state=State.OK, text="unlimited")
    can = "unlimited" if hard == resource.RLIM_INFINITY else f"{hard >> 20} MiB"
    return Finding(
        name="ulimit -l",
        state=State.NOTE,
        text=f"{soft >> 20} MiB may be locked, at most {can}",
        remedy="RDMA needs `ulimit -l unlimited` (limits.conf, or the container's ulimits)",
    )


def _environment() -> list[Finding]:
    """Variables that change how blocks move; a token is not shown."""
    return [
        Finding(
            name=name, state=State.NOTE, text="is set" if "TOKEN" in name else f"is set to {value}"
        )
        for name, value in sorted(os.environ.items())
        if name.startswith(_PREFIXES)
    ]
