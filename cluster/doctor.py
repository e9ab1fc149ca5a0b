"""`hotset doctor`: which parts work on this machine, tried for real, and why the others do not."""

from __future__ import annotations

import importlib
import importlib.metadata
import shutil
from pathlib import Path

NEEDED = ("ray", "torch", "transformers", "nixl", "msgspec", "xxhash", "opentelemetry-sdk")
OPTIONAL = {"ucxx-cu12": "UCX two-sided transport"}


def examine() -> tuple[list[str], bool]:
    """Lines to print, and whether everything that a local run needs is there."""
    lines, good = [], True
    for name in NEEDED:
        version = _version(name)
        good = good and version is not None
        lines.append(f"ok    {name} {version}" if version else f"MISS  {name}: pip install {name}")
    for name, use in OPTIONAL.items():
        version = _version(name)
        lines.append(
            f"ok    {name} {version}" if version else f"-     {name} is not installed ({use})"
        )
    for text, fine in (_nixl(), _device(), _shared_memory()):
        good = good and fine
        lines.append(("ok    " if fine else "FAIL  ") + text)
    return lines, good


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _nixl() -> tuple[str, bool]:
    try:
        reason = importlib.import_module("hotset.transport.nixl").NixlBackend.available()
    except ImportError as error:
        reason = str(error)
    return (f"NIXL agent: {reason}", False) if reason else ("NIXL agent starts", True)


def _device() -> tuple[str, bool]:
    import torch

    if torch.cuda.is_available():
        return f"device: {torch.cuda.get_device_name()}", True
    return "device: cpu (a worker's HBM is emulated: a byte budget in host memory)", True


def _shared_memory() -> tuple[str, bool]:
    path = Path("/dev/shm")  # noqa: S108 - Ray's object store lives there
    if not path.exists():
        return "no /dev/shm: Ray needs it", False
    free = shutil.disk_usage(path).free
    return f"shared memory: {free >> 20} MiB free", free > 512 << 20
