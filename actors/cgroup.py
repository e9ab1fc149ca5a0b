"""Putting this process under a memory cgroup: how a benchmark's limit reaches a worker."""

from __future__ import annotations

import os
from pathlib import Path

ENV = "HOTSET_MEMORY_CGROUP"
"""Environment variable of a worker: folder of the cgroup to join before it loads anything."""


def join(group: str) -> None:
    """Move this process into the cgroup: what it allocates from now on counts."""
    (Path(group) / "cgroup.procs").write_text(str(os.getpid()), encoding="ascii")
