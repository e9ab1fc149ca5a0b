"""What `hotset doctor` tries for real, each in a process of its own: `python -m ... NAME FOLDER`.

A probe moves one block between two stores of its process, or reads one from a file, and prints what
it found as one JSON line. It may hang, crash, or load a library that clashes with another probe's;
the doctor bounds its time and looks at what it left. It must not know how findings are shown.
"""

from __future__ import annotations

import ctypes
import json
import os
import secrets
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from hotset.errors import DependencyError, HotsetError

if TYPE_CHECKING:
    from collections.abc import Callable

    from hotset.transport.base import Backend

BLOCK_BYTES: Final = 1 << 20
READ_NS: Final = 4_000_000_000
BROKEN: Final = 1
ABSENT: Final = 2
"""Exit codes: it does not work, it is not installed."""
_READ_ME: Final = b"read me if you may"


def move_block(make: Callable[[], Backend]) -> str:
    """Read one block from a store into another of this process; says how long it took."""
    from hotset.transport.base import PostState, Span
    from hotset.transport.slab import Slab

    slabs, backends = [], []
    for name in ("doctor-source", "doctor-sink"):
        slab = Slab(
            capacity_bytes=2 * BLOCK_BYTES,
            slot_payload_bytes=BLOCK_BYTES,
            name=name,
            incarnation=1,
        )
        backend = make()
        backend.register(slab)
        slabs.append(slab)
        backends.append(backend)
    data = secrets.token_bytes(BLOCK_BYTES)
    slabs[0].memory.write(0, data)
    sink = backends[1]
    sink.connect(backends[0].info(name="doctor-source", incarnation=1))
    elapsed_ns = 0
    for _ in range(2):  # the first one connects
        begin = time.monotonic_ns()
        handle = sink.post(
            "doctor-source", [Span(local_offset=0, remote_offset=0, nbytes=BLOCK_BYTES)]
        )
        tick = threading.Event()
        while sink.poll(handle)[0] is PostState.PENDING:
            if time.monotonic_ns() - begin > READ_NS:
                raise HotsetError("a block of 1 MiB does not arrive", remedy="see OPERATIONS.md")
            tick.wait(0.0001)
        state, error = sink.poll(handle)
        if state is not PostState.DONE:
            raise HotsetError(error)
        sink.release(handle)
        elapsed_ns = time.monotonic_ns() - begin
    if bytes(slabs[1].memory.read(0, BLOCK_BYTES)) != data:
        raise HotsetError("the block that arrived is not the one that was sent")
    for backend in reversed(backends):
        backend.close()
    return f"read a block of 1 MiB in {elapsed_ns / 1e6:.1f} ms"


def nixl(_folder: Path) -> str:
    """NIXL between two agents."""
    from hotset.transport.nixl import NixlBackend

    return move_block(NixlBackend)


def ucx(_folder: Path) -> str:
    """UCX messages between two workers, with ucxx or ucx-py."""
    from hotset.transport.ucx import UcxBackend
    from hotset.transport.ucx_bindings import choose

    return f"{move_block(UcxBackend)} with {choose().__name__.strip('_').lower()}"


def shm(_folder: Path) -> str:
    """A mapping of a store's memory."""
    from hotset.transport.shm import ShmBackend

    return move_block(ShmBackend)


def tcp(_folder: Path) -> str:
    """Plain sockets over loopback."""
    from hotset.transport.tcp import TcpBackend

    return move_block(TcpBackend)


def loopback(_folder: Path) -> str:
    """Memory copies within one process."""
    from hotset.transport.loopback import LoopbackBackend, LoopbackNetwork

    network = LoopbackNetwork()
    return move_block(lambda: LoopbackBackend(network))


def storage(folder: Path) -> str:
    """A file in `folder`, past the page cache where that is possible."""
    from hotset.transport.base import FileRange
    from hotset.transport.storage import StorageReader

    path = folder / f".hotset-doctor-{os.getpid()}"
    data = secrets.token_bytes(BLOCK_BYTES)
    try:
        with path.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        into = bytearray(BLOCK_BYTES)
        reader = StorageReader(threads=1, direct=True)
        begin = time.monotonic_ns()
        ranges = [FileRange(path=str(path), offset=0, nbytes=BLOCK_BYTES)]
        reader.read_ranges(ranges, memoryview(into))
        elapsed_ns = time.monotonic_ns() - begin
        how, reason = "with O_DIRECT", reader.buffered_reason
        reader.close()
    finally:
        path.unlink(missing_ok=True)
    if into != data:
        raise HotsetError("the file does not hold what was written")
    how = f"through the page cache: {reason}" if reason else how
    return f"read 1 MiB in {folder} in {elapsed_ns / 1e6:.1f} ms, {how}"


class _Range(ctypes.Structure):
    _fields_ = (("address", ctypes.c_void_p), ("nbytes", ctypes.c_size_t))


def cma(_folder: Path) -> str:
    """Let a child read this process's memory as a peer would: not its child, but its parent."""
    secret = ctypes.create_string_buffer(_READ_ME)
    address = ctypes.addressof(secret)
    command = [sys.executable, "-m", __spec__.name, "peek", str(os.getpid()), str(address)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=4, check=False)
    if done.returncode:
        scope = Path("/proc/sys/kernel/yama/ptrace_scope")
        value = scope.read_text(encoding="ascii").strip() if scope.exists() else "absent"
        raise HotsetError(
            f"a process may not read another one's memory ({done.stderr.strip()}; "
            f"ptrace_scope {value})",
            remedy="sysctl kernel.yama.ptrace_scope=0, or give the container SYS_PTRACE; NIXL "
            "takes TCP otherwise",
        )
    return "processes of this user may read each other's memory"


def peek(pid: int, address: int) -> int:
    """Read `_READ_ME` in another process; the exit code."""
    libc = ctypes.CDLL(None, use_errno=True)
    into = ctypes.create_string_buffer(len(_READ_ME))
    here = _Range(ctypes.addressof(into), len(_READ_ME))
    there = _Range(address, len(_READ_ME))
    count = libc.process_vm_readv(
        pid, ctypes.byref(here), 1, ctypes.byref(there), 1, ctypes.c_ulong(0)
    )
    if count != len(_READ_ME) or into.raw != _READ_ME:
        print(os.strerror(ctypes.get_errno()), file=sys.stderr)
        return BROKEN
    return 0


PROBES: Final[dict[str, Callable[[Path], str]]] = {
    "nixl": nixl,
    "ucx": ucx,
    "shm": shm,
    "tcp": tcp,
    "storage": storage,
    "loopback": loopback,
    "cma": cma,
}


def main(arguments: list[str]) -> int:
    """Run one probe and print `{"text", "remedy"}`; the exit code says how it went."""
    if arguments[0] == "peek":
        return peek(int(arguments[1]), int(arguments[2]))
    found: dict[str, Any] = {"remedy": ""}
    code = 0
    try:
        found["text"] = PROBES[arguments[0]](Path(arguments[1]))
    except HotsetError as error:
        found = {"text": error.what, "remedy": error.remedy}
        code = ABSENT if isinstance(error, DependencyError) else BROKEN
    except Exception as error:  # noqa: BLE001 - whatever breaks is a finding
        found = {"text": f"{type(error).__name__}: {error}", "remedy": ""}
        code = BROKEN
    print(json.dumps(found), flush=True)
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
