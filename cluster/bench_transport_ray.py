"""Ray's own ways for the transport benchmark: object store, and Direct Transport over NIXL or gloo.

Runs in a process of its own with a private cluster on loopback. What is timed: one actor returns
tensors that it has, another receives them as an argument and answers with their count; from the
first call until that answer, at the process that calls. So each time is a new object that the
receiver has not seen, and two actor calls are included; `baseline_ns` is their cost without bytes.

An actor that has used NIXL through Ray keeps a thread that polls without pause and takes a whole
core. That pair is stopped (SIGSTOP) whenever another lane is measured, or everybody's figures
would suffer, those of the object store first.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import time
from typing import TYPE_CHECKING, Any, Final

import ray

from hotset.cluster.bench_transport_stores import timed
from hotset.cluster.local import quiet_environment, stay_on_loopback
from hotset.errors import ClusterError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from hotset.cluster.bench_transport_case import Case
    from hotset.cluster.bench_transport_stores import Visit

CALL_S: Final = 20
_WARM_BYTES: Final = 1024
_PR_SET_PDEATHSIG: Final = 1
_ALLOCATOR: Final = "MALLOC_MMAP_THRESHOLD_"
_NICENESS: Final = "RAY_worker_niceness"


class Holder:
    """An actor that has tensors and gives them in three ways."""

    def __init__(self) -> None:
        """Compute with one thread, as all contenders; die with the raylet, also while stopped."""
        import torch

        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        torch.set_num_threads(1)
        self._torch = torch
        self._tensors: list[Any] = []

    def pid(self) -> int:
        """Process id."""
        return os.getpid()

    def prepare(self, nbytes: int, batch: int) -> None:
        """Make the tensors that later calls return."""
        self._tensors = [self._torch.ones(nbytes, dtype=self._torch.uint8) for _ in range(batch)]

    def store(self) -> list[Any]:
        """Return them through the object store."""
        return self._tensors

    @ray.method(tensor_transport="nixl")
    def nixl(self) -> list[Any]:
        """Return them through Direct Transport over NIXL."""
        return self._tensors

    @ray.method(tensor_transport="gloo")
    def gloo(self) -> list[Any]:
        """Return them through Direct Transport over gloo."""
        return self._tensors

    def take(self, tensors: list[Any]) -> int:
        """Receive: bytes that came."""
        return sum(one.nbytes for one in tensors)


class RayPart:
    """The private cluster, one pair of actors for store and gloo, one for NIXL."""

    def __init__(
        self, *, folder: str, store_bytes: int, backends: tuple[str, ...], move_s: float
    ) -> None:
        """Start cluster and actors; a way that fails, or needs over `move_s`, is given up alone."""
        self._move_s = move_s
        os.environ[_NICENESS] = "0"  # Ray's 15 would starve its actors beside others
        allocator = os.environ.get(_ALLOCATOR)
        quiet_environment()
        if allocator is None:
            del os.environ[_ALLOCATOR]  # ours saves memory; it would cost Ray page faults
        stay_on_loopback()
        self._broken: dict[str, str] = {}
        ray.init(
            address="local",
            num_cpus=2,
            num_gpus=0,
            include_dashboard=False,
            object_store_memory=store_bytes,
            log_to_driver=False,
            logging_level="ERROR",
            _temp_dir=folder,
        )
        remote = ray.remote(Holder)
        pairs = {kind: kind == "nixl" for kind in ("plain", "nixl")}
        if "rdt-nixl" not in backends:
            del pairs["nixl"]
        options = {"num_cpus": 0, "enable_tensor_transport": True}
        self._pairs = {
            kind: [remote.options(**options).remote() for _ in range(2)] for kind in pairs
        }
        self._pids = {
            kind: ray.get([one.pid.remote() for one in pair], timeout=3 * CALL_S)
            for kind, pair in self._pairs.items()
        }
        self._total = 0
        self._warm(backends)

    def _warm(self, backends: tuple[str, ...]) -> None:
        """First use of each way: gloo's group, NIXL's agents (a second)."""
        from ray.experimental.collective import create_collective_group

        for kind, pair in self._pairs.items():
            ray.get(pair[0].prepare.remote(_WARM_BYTES, 1), timeout=CALL_S)
            self._total = _WARM_BYTES
            for backend in backends:
                if (backend == "rdt-nixl") != (kind == "nixl"):
                    continue
                try:
                    if backend == "rdt-gloo":
                        create_collective_group(pair, backend="torch_gloo")
                    self._move(backend)
                except Exception as error:  # noqa: BLE001 - Ray's errors of any kind become a row
                    self._broken[backend] = _reason(error)
        self._signal("nixl", signal.SIGSTOP)

    def hello(self) -> str:
        """Say which Ray answers."""
        return str(ray.__version__)

    def build(self, case: Case) -> None:
        """Make tensors of another size in both givers."""
        self._total = case.total
        with self._awake("nixl"):
            ray.get(
                [pair[0].prepare.remote(case.nbytes, case.batch) for pair in self._pairs.values()],
                timeout=CALL_S,
            )

    def run(self, backend: str, visit: Visit) -> list[int] | str:
        """Take one turn, or say why this way cannot work here."""
        if backend in self._broken:
            return self._broken[backend]
        try:
            with self._awake("nixl" if backend == "rdt-nixl" else ""):
                return timed(lambda: self._move(backend), visit)
        except ray.exceptions.RayError as error:  # a hung transfer is one, too
            self._broken[backend] = _reason(error)
            return self._broken[backend]

    def baseline_ns(self, count: int) -> int:
        """Least cost of the two calls in ns, with an empty list through the object store."""
        giver, taker = self._pairs["plain"]
        ray.get(giver.prepare.remote(0, 0), timeout=CALL_S)
        found = []
        for _ in range(count):
            begin = time.perf_counter_ns()
            ray.get(taker.take.remote(giver.store.remote()), timeout=CALL_S)
            found.append(time.perf_counter_ns() - begin)
        return sorted(found)[len(found) // 2]

    def _move(self, backend: str) -> int:
        giver, taker = self._pairs["nixl" if backend == "rdt-nixl" else "plain"]
        give = {"ray-store": giver.store, "rdt-nixl": giver.nixl, "rdt-gloo": giver.gloo}[backend]
        begin = time.perf_counter_ns()
        came = ray.get(taker.take.remote(give.remote()), timeout=self._move_s)
        elapsed = time.perf_counter_ns() - begin
        if came != self._total:
            raise ClusterError(f"{came} bytes came of {self._total}", remedy="run again")
        return elapsed

    @contextlib.contextmanager
    def _awake(self, kind: str) -> Iterator[None]:
        self._signal(kind, signal.SIGCONT)
        try:
            yield
        finally:
            self._signal(kind, signal.SIGSTOP)

    def _signal(self, kind: str, number: signal.Signals) -> None:
        for pid in self._pids.get(kind, ()):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)

    def close(self) -> None:
        """End actors and cluster."""
        self._signal("nixl", signal.SIGKILL)
        ray.shutdown()


def _reason(error: Exception) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[-1].strip()[:200] if lines else ''}"
