"""What `hotset bench transport` measures: cases, lanes, samples, ratios. Values and arithmetic.

A case is a size and a count of blocks. A lane is one way of moving them; its `raw` is the lane
that a row of it is held against, which does the same job without hotset. Knows no process and no
clock.

Invariant: a ratio is the median over rounds of the quotient within one round, so that both sides
saw the same machine; it is not the quotient of two medians.
"""

from __future__ import annotations

import statistics
from dataclasses import dataclass, field
from typing import Final

from hotset.errors import ConfigError

KIB: Final = 1 << 10
MIB: Final = 1 << 20
WORKING_SET_BYTES: Final = 64 * MIB  # of each side: far beyond L2, so no lane reads a warm line
UNITS: Final = {"KiB": KIB, "MiB": MIB}
MEMCPY: Final = "memcpy/copy"


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """`batch` blocks of `nbytes` that are asked for at once."""

    batch: int
    nbytes: int

    @property
    def total(self) -> int:
        """Payload bytes of one read."""
        return self.nbytes * self.batch

    @property
    def slots(self) -> int:
        """Blocks of one side, read in turns: the working set, and no block twice in a read."""
        return max(self.batch, -(-WORKING_SET_BYTES // self.nbytes))

    @property
    def order(self) -> tuple[int, int]:
        """Small blocks first."""
        return self.nbytes, self.batch

    @property
    def label(self) -> str:
        """As `64 x 1 MiB`."""
        size = next(
            f"{self.nbytes // unit} {name}"
            for name, unit in reversed(UNITS.items())
            if self.nbytes % unit == 0 or unit == KIB
        )
        return size if self.batch == 1 else f"{self.batch} x {size}"


def parse_case(text: str) -> Case:
    """Read `64KiB`, `1MiB` or `64x1MiB`. Raises ConfigError."""
    count, _, size = text.replace(" ", "").rpartition("x")
    unit = next((name for name in UNITS if size.endswith(name)), "")
    number = size.removesuffix(unit)
    good = bool(unit) and number.isdigit() and (count.isdigit() or not count)
    if not good or int(number) == 0 or count == "0":
        raise ConfigError(
            f"{text!r} is not a size", remedy="write for instance 64KiB, 12MiB or 64x1MiB"
        )
    return Case(nbytes=int(number) * UNITS[unit], batch=int(count or 1))


@dataclass(frozen=True, slots=True, kw_only=True)
class Lane:
    """One way of moving bytes. `group` names the processes that it runs in."""

    backend: str
    op: str
    group: str
    raw: str = ""

    @property
    def key(self) -> str:
        """Unique name."""
        return f"{self.backend}/{self.op}"


LANES: Final = (
    Lane(backend="memcpy", op="copy", group="bounds"),
    Lane(backend="torch", op="copy", group="bounds", raw=MEMCPY),
    Lane(backend="raw-nixl", op="read", group="nixl"),
    Lane(backend="nixl", op="read", group="nixl", raw="raw-nixl/read"),
    Lane(backend="shm", op="read", group="shm", raw=MEMCPY),
    Lane(backend="node", op="read", group="node", raw=MEMCPY),
    Lane(backend="socket", op="receive", group="socket"),
    Lane(backend="tcp", op="read", group="tcp", raw="socket/receive"),
    Lane(backend="ucx", op="read", group="ucx", raw="socket/receive"),
    Lane(backend="raw-nixl-tcp", op="read", group="nixl-tcp"),
    Lane(backend="nixl-tcp", op="read", group="nixl-tcp", raw="raw-nixl-tcp/read"),
    Lane(backend="preadv", op="read-warm", group="storage"),
    Lane(backend="storage", op="read-warm", group="storage", raw="preadv/read-warm"),
    Lane(backend="preadv", op="read-cold", group="storage"),
    Lane(backend="storage", op="read-cold", group="storage", raw="preadv/read-cold"),
    Lane(backend="ray-store", op="return", group="ray", raw="raw-nixl/read"),
    Lane(backend="rdt-nixl", op="return", group="ray", raw="raw-nixl/read"),
    Lane(backend="rdt-gloo", op="return", group="ray", raw="raw-nixl/read"),
)
NOT_BY_DEFAULT: Final = frozenset({"node"})  # on one host it is shm, between hosts NIXL
BOUNDS: Final = frozenset({"memcpy", "torch", "raw-nixl", "raw-nixl-tcp", "socket", "preadv"})
SIZES: Final = ("64KiB", "1MiB", "12MiB", "64MiB", "256MiB", "8x70KiB", "64x1MiB")
QUICK_SIZES: Final = ("1MiB", "64x1MiB", "64MiB")


def choose_lanes(backends: str, *, ray: bool) -> tuple[Lane, ...]:
    """Lanes of the named backends (all by default) with the bounds they are held against."""
    known = dict.fromkeys(lane.backend for lane in LANES)
    names = set(backends.split(",")) if backends else set(known) - NOT_BY_DEFAULT
    unknown = sorted(names - set(known))
    if unknown:
        raise ConfigError(
            f"unknown backend {unknown[0]!r}", remedy=f"choose from {', '.join(known)}"
        )
    chosen = {lane.key for lane in LANES if lane.backend in names}
    if not ray:
        chosen -= {lane.key for lane in LANES if lane.group == "ray"}
    chosen |= {lane.raw for lane in LANES if lane.key in chosen and lane.raw} | {MEMCPY}
    if "nixl-tcp/read" in chosen:
        chosen.add("socket/receive")  # a target holds it against the socket
    return tuple(lane for lane in LANES if lane.key in chosen)


@dataclass(slots=True, kw_only=True)
class Row:
    """What one lane did in one case; `rounds_ns` has the time of a read in each round."""

    lane: Lane
    case: Case
    rounds_ns: dict[int, int] = field(default_factory=dict)
    failed: str = ""

    @property
    def median_ns(self) -> int:
        """Median over rounds; 0 when there is none."""
        return int(statistics.median(self.rounds_ns.values())) if self.rounds_ns else 0

    @property
    def bytes_per_s(self) -> float:
        """Payload bytes in a second, of the median."""
        return self.case.total / self.median_ns * 1e9 if self.median_ns else 0.0


class Results:
    """All rows of a run, and their ratios."""

    def __init__(
        self, lanes: tuple[Lane, ...], cases: tuple[Case, ...], *, quick: bool = False
    ) -> None:
        """Start with an empty row for each lane and case; `quick` spares Ray the batches."""
        self.lanes, self.cases = lanes, cases
        self.rows = {
            (lane.key, case): Row(lane=lane, case=case)
            for case in cases
            for lane in lanes
            if not (quick and lane.group == "ray" and case.batch > 1)
        }

    def of_case(self, case: Case) -> list[Row]:
        """The rows of a case, in the order of the lanes."""
        return [row for (_, one), row in self.rows.items() if one == case]

    def row(self, key: str, case: Case) -> Row | None:
        """The row of a lane; None when it was not asked for."""
        return self.rows.get((key, case))

    def ratios(self, key: str, other: str, case: Case) -> list[float]:
        """In each round that both ran: how fast `key` was, with `other` at 1."""
        mine, theirs = self.row(key, case), self.row(other, case)
        if mine is None or theirs is None:
            return []
        return [
            theirs.rounds_ns[number] / ns
            for number, ns in mine.rounds_ns.items()
            if number in theirs.rounds_ns
        ]

    def ratio(self, key: str, other: str, case: Case) -> float | None:
        """Median of `ratios`; None when no round has both."""
        found = self.ratios(key, other, case) if other else []
        return statistics.median(found) if found else None
