"""Ten minutes of everything: four processes read each other, are stopped, killed, restarted.

    python -m tests.transport.soak --minutes 10

Members 0 and 1 let NIXL choose its way (shared memory, and TCP to the others), members 2 and 3
have it on TCP alone; each also has a store that chooses by itself and one over plain sockets.
Every block that ends DONE is compared with its seed byte by byte; one that differs fails the run.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Final

from tests.transport.leaks import Footprint, footprint, leaked
from tests.transport.member import COUNTS, READ_KIB, STATUSES, Member, Station, mapped
from tests.transport.processes import Child
from tests.transport.stores import QUIET, TCP, missing

if TYPE_CHECKING:
    from hotset.transport.base import PeerInfo

MEMBERS: Final = 4
LATE_US: Final = 3_000_000  # a member may be stopped for .5 s and share its processor with six
LEAKS_S: Final = 120.0  # a shorter run has not touched every slot when it begins to count
STOP_S: Final = (0.02, 0.5)


@dataclass(slots=True)
class Result:
    """What a soak showed; `wrong` is empty when all is well."""

    seconds: float = 0.0
    kinds: tuple[str, ...] = ()
    counts: dict[str, dict[str, int]] = field(default_factory=dict)
    stops: int = 0
    kills: int = 0
    growth: dict[str, str] = field(default_factory=dict)
    wrong: list[str] = field(default_factory=list)

    def total(self, name: str) -> int:
        """A count over all kinds."""
        return sum(row[name] for row in self.counts.values())


class _Seat(Child):
    """A member's process, whichever incarnation sits in it now."""

    def __init__(self, station: Station) -> None:
        super().__init__(Member, station, name=station.name)
        self.station = station
        self.since = time.monotonic()
        self.first: Footprint | None = None
        self.infos: list[PeerInfo] = self.ready()


class Soak:
    """Four members and what happens to them."""

    def __init__(self, folder: str, *, seed: int) -> None:
        self.kinds = tuple(kind for kind in ("node", "nixl", "tcp") if not missing(kind))
        self.result = Result(kinds=self.kinds)
        self._folder = folder
        self._rng = random.Random(seed)
        self._seed = seed
        self._incarnation = 0
        self._warm_s = 0.0
        self.seats = [self._seat(index) for index in range(MEMBERS)]
        for seat in self.seats:
            self._introduce(seat)
        for seat in self.seats:
            seat.call("go")

    def _seat(self, index: int) -> _Seat:
        self._incarnation += 1
        station = Station(
            name=f"member-{index}",
            incarnation=self._incarnation,
            kinds=self.kinds,
            folder=self._folder,
            environment=QUIET | (TCP if index >= MEMBERS // 2 else {}),
            seed=self._seed,
        )
        return _Seat(station)

    def _introduce(self, seat: _Seat) -> None:
        """Tell all others of a member, and it of them."""
        for other in self.seats:
            if other is not seat:
                self.result.wrong += other.call("meet", seat.infos)
                self.result.wrong += seat.call("meet", other.infos)

    def run(self, seconds: float) -> Result:
        """Let them read; stop one every second or two, kill one every ten."""
        begin = time.monotonic()
        next_kill = begin + min(10.0, seconds / 3)
        self._warm_s = min(150.0, seconds / 3)  # until then heaps of three backends grow
        clock = threading.Event()
        while (now := time.monotonic()) < begin + seconds:
            self._note_first()
            if now >= next_kill:
                next_kill = now + 10
                self._kill_one()
            else:
                self._stop_one(clock)
            clock.wait(self._rng.uniform(0.5, 1.5))
        self._finish(time.monotonic() - begin)
        return self.result

    def _note_first(self) -> None:
        for seat in self.seats:
            if seat.first is None and time.monotonic() > seat.since + self._warm_s:
                seat.call("trim")
                seat.first = footprint(seat.pid)

    def _stop_one(self, clock: threading.Event) -> None:
        seat = self._rng.choice(self.seats)
        os.kill(seat.pid, signal.SIGSTOP)
        clock.wait(self._rng.uniform(*STOP_S))
        os.kill(seat.pid, signal.SIGCONT)
        self.result.stops += 1

    def _kill_one(self) -> None:
        index = self._rng.randrange(1, MEMBERS)  # the first one lives through all of it
        self.seats[index].kill()
        code = self.seats[index].exit_code()
        if code != -signal.SIGKILL:
            self.result.wrong.append(f"member-{index} had ended with {code}")
        self.result.kills += 1
        self.seats[index] = self._seat(index)
        self._introduce(self.seats[index])
        self.seats[index].call("go")

    def _finish(self, seconds: float) -> None:
        result = self.result
        result.seconds = seconds
        for seat in self.seats:
            if seat.first is not None:
                seat.call("trim")
                growth = footprint(seat.pid).since(seat.first)
                result.growth[seat.station.name] = str(growth)
                leak = leaked(growth, rounds=result.kills, slabs_kib=READ_KIB)
                if leak and seconds >= LEAKS_S:
                    result.wrong.append(f"{seat.station.name} leaks {leak}")
        for seat in self.seats:
            result.wrong += [f"{seat.station.name}: {text}" for text in seat.call("rest")]
        for seat in self.seats:
            result.wrong += [f"{seat.station.name}: {text}" for text in seat.call("close")]
            code = seat.exit_code()
            if code != 0:
                result.wrong.append(f"{seat.station.name} ended with {code}")
        self._sum_up()

    def _sum_up(self) -> None:
        result = self.result
        for index, kind in enumerate(self.kinds):
            sums: Counter[str] = Counter()
            for seat in self.seats:
                path = Path(self._folder) / f"counts-{seat.station.name}"
                table = mapped(path, "i8", len(COUNTS) * len(self.kinds))
                row = table.reshape(len(self.kinds), len(COUNTS))[index]
                for name, value in zip(COUNTS, row.tolist(), strict=True):
                    sums[name] = (
                        max(sums[name], value) if name == "latest_us" else sums[name] + value
                    )
            result.counts[kind] = dict(sums)
        if result.total("corrupt"):
            result.wrong.append(f"{result.total('corrupt')} blocks are corrupt")
        latest = max(row["latest_us"] for row in result.counts.values())
        if latest > LATE_US:
            result.wrong.append(f"a read ended {latest / 1e6:.2f} s after its deadline")

    def discard(self) -> None:
        """End every process whatever its state."""
        for seat in self.seats:
            seat.discard()


def soak(seconds: float, *, seed: int = 1) -> Result:
    """Run a soak in a folder of its own."""
    with tempfile.TemporaryDirectory(prefix="hotset-soak-") as folder:
        made = Soak(folder, seed=seed)
        try:
            return made.run(seconds)
        finally:
            made.discard()


def show(result: Result) -> None:
    """Print a table."""
    print(f"{result.seconds:.0f} s, {result.stops} stops, {result.kills} kills")
    names = (*STATUSES, "corrupt", "refused", "full", "reuses")
    print(f"{'':<7}" + "".join(f"{name:>10}" for name in names) + f"{'GB':>8}{'late ms':>9}")
    for kind, row in result.counts.items():
        cells = "".join(f"{row[name]:>10}" for name in names)
        print(f"{kind:<7}{cells}{row['bytes'] / 1e9:>8.1f}{row['latest_us'] / 1e3:>9.0f}")
    ended = sum(result.total(name) for name in STATUSES)
    print(f"{ended} blocks ended, {result.total('done')} DONE, {result.total('corrupt')} corrupt")
    for name, growth in result.growth.items():
        print(f"{name}: {growth}")
    for text in result.wrong:
        print(f"WRONG {text}")


def main() -> int:
    """Run, print, and write what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", type=Path, help="write the result here")
    options = parser.parse_args()
    result = soak(60 * options.minutes, seed=options.seed)
    show(result)
    if options.json:
        told = {name: getattr(result, name) for name in Result.__slots__}
        options.json.write_text(json.dumps(told, indent=1), encoding="utf-8")
    return 1 if result.wrong else 0


if __name__ == "__main__":
    sys.exit(main())
