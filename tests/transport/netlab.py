"""Two hosts for tests: network namespaces joined by one cable, which can be cut and slowed.

Needs root and iproute2; `why_not` says what is missing. A process moves into a host with `enter`,
before it opens a socket or loads UCX.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import socket
import subprocess
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final, Self

if TYPE_CHECKING:
    from types import TracebackType

DEVICE: Final = "hs0"
CARRIER_S: Final = 10
_CLONE_NEWNET: Final = 0x40000000
_CLONE_NEWNS: Final = 0x00020000
_MS_REC_PRIVATE: Final = 0x4000 | 0x40000
_MNT_DETACH: Final = 2


def why_not() -> str:
    """'' when network namespaces can be made here, else the reason."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    missing = [tool for tool in ("ip", "tc") if shutil.which(tool) is None]
    if missing:
        return f"{' and '.join(missing)} missing: apt-get install iproute2"
    name = f"hs{os.getpid()}try"
    made = subprocess.run(["ip", "netns", "add", name], check=False, capture_output=True, text=True)
    if made.returncode:
        return f"no network namespace can be made ({made.stderr.strip()})"
    _run("ip", "netns", "del", name)
    return ""


def _run(*command: str) -> str:
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=20)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: {done.stderr.strip()}")
    return done.stdout


@dataclass(frozen=True, slots=True, kw_only=True)
class Host:
    """One end of the cable: a namespace and its address."""

    netns: str
    address: str


class NetLab:
    """Hosts `left` and `right` and the cable between them; a context manager."""

    def __init__(self, *, tcp_retries2: int = 5) -> None:
        """Name things; nothing is made before `__enter__`.

        `tcp_retries2` is set on both hosts: 5 lets the kernel give up what is not acknowledged
        after 13 s. The usual 15 takes a quarter of an hour, and until then UCX, whose sockets have
        no other limit, says nothing. 0 leaves it alone.
        """
        self._retries = tcp_retries2
        self.left = Host(netns=f"hs{os.getpid()}l", address="10.213.7.1")
        self.right = Host(netns=f"hs{os.getpid()}r", address="10.213.7.2")

    def __enter__(self) -> Self:
        """Make both hosts and join them. Raises RuntimeError."""
        try:
            for host in (self.left, self.right):
                _run("ip", "netns", "add", host.netns)
                _run("ip", "-n", host.netns, "link", "set", "lo", "up")
                if self._retries:
                    rule = f"echo {self._retries} > /proc/sys/net/ipv4/tcp_retries2"
                    _run("ip", "netns", "exec", host.netns, "sh", "-c", rule)
            _run(
                "ip", "-n", self.left.netns, "link", "add", DEVICE, "type", "veth",
                "peer", "name", DEVICE, "netns", self.right.netns,
            )  # fmt: skip
            for host in (self.left, self.right):
                _run("ip", "-n", host.netns, "addr", "add", f"{host.address}/24", "dev", DEVICE)
                _run("ip", "-n", host.netns, "link", "set", DEVICE, "up")
            self._await_carrier()
        except BaseException:
            self._remove()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Remove both hosts; processes in them keep a network that leads nowhere."""
        self._remove()

    def _remove(self) -> None:
        for host in (self.left, self.right):
            subprocess.run(["ip", "netns", "del", host.netns], check=False, capture_output=True)

    def cut(self) -> None:
        """Pull the cable: nothing arrives and nobody is told."""
        _run("ip", "-n", self.left.netns, "link", "set", DEVICE, "down")

    def restore(self) -> None:
        """Put the cable back; returns when both ends have noticed."""
        _run("ip", "-n", self.left.netns, "link", "set", DEVICE, "up")
        self._await_carrier()

    def _await_carrier(self) -> None:
        """The kernel tells of a carrier up to a second late; UCX ignores devices without one."""
        end, tick = time.monotonic() + CARRIER_S, threading.Event()
        for host in (self.left, self.right):
            while "state UP" not in _run("ip", "-n", host.netns, "link", "show", DEVICE):
                if time.monotonic() > end:
                    raise RuntimeError(f"{host.netns} has had no carrier for {CARRIER_S} s")
                tick.wait(0.01)

    def slow(self, mbit_per_s: int) -> None:
        """Let both directions carry at most this much."""
        for host in (self.left, self.right):
            _run(
                "tc", "-n", host.netns, "qdisc", "replace", "dev", DEVICE, "root", "tbf",
                "rate", f"{mbit_per_s}mbit", "burst", "256k", "latency", "200ms",
            )  # fmt: skip

    def fast(self) -> None:
        """Take the limit away."""
        for host in (self.left, self.right):
            _run("tc", "-n", host.netns, "qdisc", "del", "dev", DEVICE, "root")

    def repair(self) -> None:
        """Undo whatever was done to the cable."""
        for host in (self.left, self.right):
            limit = ("tc", "-n", host.netns, "qdisc", "del", "dev", DEVICE, "root")
            subprocess.run(limit, check=False, capture_output=True)
        self.restore()


class Flipper:
    """A proxy on loopback that flips one bit on its way to the client; a context manager.

    It forwards connections to `target` and flips the lowest bit of one byte, once.
    """

    def __init__(self, target: tuple[str, int], *, after_bytes: int) -> None:
        """Flip the byte that comes `after_bytes` after the first."""
        self.flipped = threading.Event()
        self._target = target
        self._left = after_bytes
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._sockets: list[socket.socket] = []
        self._threads = [threading.Thread(target=self._accept, daemon=True)]

    @property
    def address(self) -> tuple[str, int]:
        """Where clients connect."""
        host, port = self._listener.getsockname()
        return host, port

    def __enter__(self) -> Self:
        """Begin to accept."""
        self._threads[0].start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Drop all connections and join the threads."""
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._threads[0].join(10)
        for one in self._sockets:
            with contextlib.suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)
        for thread in self._threads[1:]:
            thread.join(10)
        for one in self._sockets:
            one.close()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
                server = socket.create_connection(self._target, timeout=5)
            except OSError:
                return
            server.settimeout(None)
            self._sockets += [client, server]
            for pump in (
                threading.Thread(target=self._pump, args=(client, server, False), daemon=True),
                threading.Thread(target=self._pump, args=(server, client, True), daemon=True),
            ):
                self._threads.append(pump)
                pump.start()

    def _pump(self, source: socket.socket, sink: socket.socket, flips: bool) -> None:  # noqa: FBT001 - a thread's argument
        buffer = bytearray(256 << 10)
        with contextlib.suppress(OSError):
            while count := source.recv_into(buffer):
                if flips and not self.flipped.is_set():
                    if self._left < count:
                        buffer[self._left] ^= 1
                        self.flipped.set()
                    self._left -= count
                sink.sendall(memoryview(buffer)[:count])
        for one in (source, sink):
            with contextlib.suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)


def enter(netns: str) -> None:
    """Move this process, of one thread, into a namespace, with its own /sys (UCX looks there)."""
    libc = ctypes.CDLL(None, use_errno=True)
    handle = os.open(Path("/run/netns") / netns, os.O_RDONLY | os.O_CLOEXEC)
    try:
        _check(libc.setns(handle, _CLONE_NEWNET), "setns")
    finally:
        os.close(handle)
    _check(libc.unshare(_CLONE_NEWNS), "unshare")
    _check(libc.mount(b"none", b"/", None, ctypes.c_ulong(_MS_REC_PRIVATE), None), "mount /")
    libc.umount2(b"/sys", _MNT_DETACH)
    _check(libc.mount(b"sysfs", b"/sys", b"sysfs", ctypes.c_ulong(0), None), "mount /sys")


def _check(result: int, call: str) -> None:
    if result:
        number = ctypes.get_errno()
        raise OSError(number, f"{call}: {os.strerror(number)}")
