"""`hotset bench transport`: every backend next to its bounds and to Ray, in one run.

Starts the parts, asks them in turns, and hands what they measured to the report. In each round
every lane has one turn, so that all see the same machine; the first round warms and is dropped.
It must not know how a part measures.

Invariants: a part that fails, dies or hangs becomes rows with the reason and the rest goes on;
stores live for one case and are ended before the next; with `--quick` nothing begins that cannot
end in time.
"""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click
import numpy as np

from hotset.cluster.bench_transport_bounds import region_bytes
from hotset.cluster.bench_transport_case import (
    MIB,
    QUICK_SIZES,
    SIZES,
    Case,
    Lane,
    Results,
    choose_lanes,
    parse_case,
)
from hotset.cluster.bench_transport_process import Part, end_all
from hotset.cluster.bench_transport_report import show
from hotset.cluster.bench_transport_stores import Visit
from hotset.cluster.local import THREAD_ENV
from hotset.errors import ClusterError, ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

_STORES: Final = "hotset.cluster.bench_transport_stores:"
_BOUNDS: Final = "hotset.cluster.bench_transport_bounds:"
_RAY: Final = "hotset.cluster.bench_transport_ray:RayPart"
LOOPBACK: Final = {"UCX_NET_DEVICES": "lo"}
TCP_ONLY: Final = {**LOOPBACK, "UCX_TLS": "tcp"}
LEAST_ROUNDS: Final = 5
LATE_ROUNDS: Final = 3  # of a case that has used its share of a quick run's time
READS: Final = 40  # at most, in one turn
LONG_BYTES: Final = 32 * MIB  # a read so long that waking up is no part of it
MOST_FAILURES: Final = 2  # of one group; then it is left out


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """Patience and effort of a run. Times in seconds, `visit_ns` for one turn of a lane."""

    rounds: int
    visit_ns: int
    start_s: float
    answer_s: float
    total_s: float | None  # None: as long as it takes


QUICK: Final = Limits(rounds=LEAST_ROUNDS, visit_ns=20_000_000, start_s=22, answer_s=8, total_s=35)


@dataclass(slots=True)
class _Group:
    """The processes of some lanes: `reader` is asked, `others` serve it."""

    name: str
    lasting: bool
    reader: Part | None = None
    others: list[Part] = field(default_factory=list)
    failures: int = 0
    reason: str = ""

    def fail(self, reason: str) -> None:
        """End the processes because one of them failed."""
        _drop_all([self])
        self.failures += 1
        self.reason = reason


def run_bench(  # noqa: PLR0913 - the options of the command
    *,
    quick: bool,
    sizes: str | None,
    backends: str | None,
    repeat: int,
    with_ray: bool,
    plot: Path | None,
    as_json: bool,
) -> None:
    """Measure and print. Raises ConfigError for options that cannot work."""
    for name, value in THREAD_ENV.items():  # one thread each, and none that spins
        os.environ.setdefault(name, value)
    names = sizes.split(",") if sizes else list(QUICK_SIZES if quick else SIZES)
    cases = tuple(sorted({parse_case(name) for name in names}, key=lambda case: case.order))
    if repeat < LEAST_ROUNDS:
        raise ConfigError(
            f"{repeat} rounds are too few for a median", remedy=f"use at least {LEAST_ROUNDS}"
        )
    if plot is not None:
        from hotset.cluster.bench_transport_plot import require_matplotlib

        require_matplotlib(plot)
    limits = (
        QUICK
        if quick
        else Limits(rounds=repeat, visit_ns=60_000_000, start_s=60, answer_s=30, total_s=None)
    )
    lanes = choose_lanes(backends or "", ray=with_ray)
    bench = Bench(lanes, cases, limits, say=lambda text: click.echo(f"hotset: {text}", err=True))
    results = bench.run()
    show(results, as_json=as_json, ray_call_ns=bench.ray_call_ns)
    if plot is not None:
        from hotset.cluster.bench_transport_plot import draw

        draw(results, plot)


class Bench:
    """One run over all cases."""

    def __init__(
        self,
        lanes: tuple[Lane, ...],
        cases: tuple[Case, ...],
        limits: Limits,
        *,
        say: Callable[[str], None],
    ) -> None:
        """Nothing starts before `run`."""
        self.results = Results(lanes, cases, quick=limits.total_s is not None)
        self.ray_call_ns = 0
        self._limits = limits
        self._say = say
        self._begin = time.monotonic()
        self._folder = ""
        lasting = {"bounds", "socket", "ray"}
        names = dict.fromkeys(lane.group for lane in lanes)
        self._groups = {name: _Group(name, name in lasting) for name in names}
        self._makers: dict[str, Callable[[_Group, Case], None]] = {
            "bounds": self._make_bounds,
            "socket": self._make_socket,
            "storage": self._make_storage,
            "ray": self._make_ray,
        }

    def run(self) -> Results:
        """Measure every case."""
        with tempfile.TemporaryDirectory(prefix="hotset-", ignore_cleanup_errors=True) as folder:
            self._folder = folder
            try:
                self._start([group for group in self._groups.values() if group.lasting], None)
                self._ask_ray_call()
                self._measure_all()
            finally:
                _drop_all(list(self._groups.values()))
        return self.results

    def _measure_all(self) -> None:
        cases, nbytes = self.results.cases, 0
        passing = [group for group in self._groups.values() if not group.lasting]
        for done, case in enumerate(cases):
            self._say(f"bench transport: {case.label}")
            if case.nbytes != nbytes:  # stores are made for one size of block
                nbytes = case.nbytes
                _drop_all(passing)
                batch = max(one.batch for one in cases if one.nbytes == nbytes)
                self._start(passing, Case(nbytes=nbytes, batch=batch))
            begin = time.monotonic()
            share = self._left_s() * _weight(case) / sum(_weight(one) for one in cases[done:])
            self._measure(case, end=begin + share, last=begin + 1.3 * share)

    # --- time -------------------------------------------------------------------------------------

    def _left_s(self) -> float:
        """Seconds until the run must be over."""
        if self._limits.total_s is None:
            return float("inf")
        return self._limits.total_s - (time.monotonic() - self._begin)

    def _patience(self, seconds: float) -> float:
        return max(0.5, min(seconds, self._left_s()))

    # --- processes --------------------------------------------------------------------------------

    def _start(self, groups: Sequence[_Group], case: Case | None) -> None:
        """Start groups together; one that cannot start is dropped with its reason."""
        wanted = case or self.results.cases[0]
        started = []
        for group in groups:
            if group.failures >= MOST_FAILURES:
                continue
            try:
                self._makers.get(group.name, self._make_pair)(group, wanted)
                started.append(group)
            except ClusterError as error:
                group.fail(error.what)
        end = time.monotonic() + self._patience(self._limits.start_s)
        for group in started:
            self._connect(group, wanted, end=end)

    def _connect(self, group: _Group, case: Case, *, end: float) -> None:
        """Wait for a source, then start and wait for its reader."""
        try:
            greetings = [part.answer(timeout_s=end - time.monotonic()) for part in group.others]
            if group.reader is None:
                group.reader = self._make_reader(group, case, greetings[0])
            group.reader.answer(timeout_s=end - time.monotonic())
        except ClusterError as error:
            group.fail(error.what)

    def _make_pair(self, group: _Group, case: Case) -> None:
        source = Part(
            f"{_STORES}Source",
            name=f"the source of {group.name}",
            environment=_environment(group.name),
            backend=_backend(group.name),
            case=case,
        )
        group.others.append(source)

    def _make_reader(self, group: _Group, case: Case, greeting: Any) -> Part:
        if group.name == "socket":
            return Part(
                f"{_BOUNDS}SocketReader",
                name="socket",
                nbytes=region_bytes(self.results.cases),
                port=greeting,
            )
        return Part(
            f"{_STORES}Reader",
            name=group.name,
            environment=_environment(group.name),
            backend=_backend(group.name),
            case=case,
            offer=greeting,
            raw=group.name.startswith("nixl"),
        )

    def _make_bounds(self, group: _Group, _case: Case) -> None:
        group.reader = Part(
            f"{_BOUNDS}Copies",
            name="memory copies",
            nbytes=region_bytes(self.results.cases),
            torch=any(lane.backend == "torch" for lane in self.results.lanes),
        )

    def _make_socket(self, group: _Group, _case: Case) -> None:
        source = Part(
            f"{_BOUNDS}SocketSource",
            name="the source of socket",
            nbytes=region_bytes(self.results.cases),
        )
        group.others.append(source)

    def _make_storage(self, group: _Group, case: Case) -> None:
        nbytes = 2 * max(64 * MIB, *(one.total for one in self.results.cases)) + MIB
        group.reader = Part(
            f"{_BOUNDS}Storage",
            name="storage",
            path=str(_file(nbytes)),
            file_bytes=nbytes,
            case=case,
        )

    def _make_ray(self, group: _Group, _case: Case) -> None:
        backends = tuple(lane.backend for lane in self.results.lanes if lane.group == "ray")
        largest = max(case.total for case in self.results.cases)
        group.reader = Part(
            _RAY,
            name="Ray",
            environment=LOOPBACK,
            folder=self._folder,
            move_s=self._limits.answer_s / 2,
            store_bytes=4 * largest + 128 * MIB,
            backends=backends,
        )

    # --- measuring --------------------------------------------------------------------------------

    def _ask_ray_call(self) -> None:
        group = self._groups.get("ray")
        if group is None or group.reader is None:
            return
        try:
            self.ray_call_ns = group.reader.call(
                "baseline_ns", 20, timeout_s=self._patience(self._limits.answer_s)
            )
        except ClusterError as error:
            group.fail(error.what)

    def _measure(self, case: Case, *, end: float, last: float) -> None:
        """Take rounds until there are enough; fewer after `end`, as few as one after `last`."""
        for group in self._groups.values():
            if group.reader is not None:
                self._ask(group, "build", case)
        for number in range(self._limits.rounds + 1):
            now = time.monotonic()
            if (now > end and number > LATE_ROUNDS) or (now > last and number > 1):
                break
            self._round(case, number)
        for row in self.results.of_case(case):
            group = self._groups[row.lane.group]
            if not row.rounds_ns and not row.failed:
                row.failed = group.reason or "there was no time left"

    def _round(self, case: Case, number: int) -> None:
        """One turn of every lane; where it begins differs from round to round."""
        rows = self.results.of_case(case)
        first = number * 5 % len(rows)
        reads = max(1, min(READS, 64 * MIB // case.total))
        for row in (*rows[first:], *rows[:first]):
            group = self._groups[row.lane.group]
            if group.reader is None or row.failed or self._left_s() < 1:
                continue
            visit = Visit(
                reads=reads,
                budget_ns=self._limits.visit_ns,
                warm=case.total < LONG_BYTES,
            )
            found = self._ask(group, "run", _name(row.lane), visit)
            if not isinstance(found, list):  # the group is gone, or this lane cannot work
                row.failed = found or group.reason
            elif number:
                row.rounds_ns[number] = int(statistics.median(found))

    def _ask(self, group: _Group, order: str, *arguments: Any) -> Any:
        assert group.reader is not None  # noqa: S101 - the callers looked
        try:
            return group.reader.call(
                order, *arguments, timeout_s=self._patience(self._limits.answer_s)
            )
        except ClusterError as error:
            group.fail(error.what)
            return None


def _drop_all(groups: Sequence[_Group]) -> None:
    """End the processes of groups together: the readers first, then what they read."""
    end_all([group.reader for group in groups if group.reader is not None])
    end_all([part for group in groups for part in group.others])
    for group in groups:
        group.reader, group.others = None, []


def _weight(case: Case) -> int:
    """How long a case takes, roughly, beside others."""
    return 2 if case.total >= LONG_BYTES else 1


def _name(lane: Lane) -> str:
    return lane.key if lane.group == "storage" else lane.backend


def _backend(group: str) -> str:
    return group.partition("-")[0]


def _environment(group: str) -> dict[str, str]:
    return TCP_ONLY if group.endswith("-tcp") else LOOPBACK


def _file(nbytes: int) -> Path:
    """File of random bytes on disk for storage lanes; kept for the next run."""
    folder = Path(os.environ.get("HOTSET_BENCH", ".bench"))
    path = folder / "transport.bin"
    if path.exists() and path.stat().st_size >= nbytes:
        return path.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    rng = np.random.default_rng(1)
    with part.open("wb") as file:
        for start in range(0, nbytes, 16 * MIB):
            file.write(rng.bytes(min(16 * MIB, nbytes - start)))
        file.flush()
        os.fsync(file.fileno())
    part.rename(path)
    return path.resolve()
