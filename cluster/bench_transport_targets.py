"""The speeds that transport promises, held against what a run measured.

Pure: results in, verdicts out. A target that its case or contender was left out of is "not
measured", never met.
"""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from hotset.cluster.bench_transport_case import MEMCPY, MIB, Case

if TYPE_CHECKING:
    from hotset.cluster.bench_transport_case import Results

_BATCH: Final = Case(nbytes=MIB, batch=64)
_ONE_MIB: Final = Case(nbytes=MIB, batch=1)
_LARGE: Final = Case(nbytes=64 * MIB, batch=1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """`lane` must reach `least` times the speed of `peer`."""

    text: str
    lane: str
    peer: str
    least: float
    case: Case


def _targets() -> tuple[Target, ...]:
    bounds = (
        ("nixl of raw NIXL", "nixl/read", "raw-nixl/read", 0.95),
        ("shm of memcpy", "shm/read", MEMCPY, 0.8),
        ("storage warm of preadv", "storage/read-warm", "preadv/read-warm", 0.9),
        ("NIXL over TCP of a plain socket", "nixl-tcp/read", "socket/receive", 0.8),
    )
    found = [
        Target(text=text, lane=lane, peer=peer, least=least, case=case)
        for text, lane, peer, least in bounds
        for case in (_BATCH, _LARGE)
    ]
    found += [
        Target(
            text="nixl against Ray's object store",
            lane="nixl/read",
            peer="ray-store/return",
            least=least,
            case=case,
        )
        for case, least in ((_ONE_MIB, 20.0), (_LARGE, 10.0))
    ]
    found += [
        Target(
            text=f"nixl against Ray Direct Transport over {backend}",
            lane="nixl/read",
            peer=f"rdt-{backend.lower()}/return",
            least=50.0,
            case=_ONE_MIB,
        )
        for backend in ("NIXL", "gloo")
    ]
    return tuple(found)


TARGETS: Final = _targets()
LEAST_ROUNDS: Final = 3  # fewer say nothing


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """What became of a target. `measured` is None when it was not measured."""

    target: Target
    measured: float | None
    low: float = 0.0
    high: float = 0.0
    why: str = ""

    @property
    def word(self) -> str:
        """`met`, `missed` or `not measured`."""
        if self.measured is None:
            return "not measured"
        return "met" if self.measured >= self.target.least else "missed"


def judge(results: Results) -> list[Verdict]:
    """Hold every target against the run."""
    return [_judge(target, results) for target in TARGETS]


def _judge(target: Target, results: Results) -> Verdict:
    ratios = results.ratios(target.lane, target.peer, target.case)
    if len(ratios) < LEAST_ROUNDS:
        return Verdict(target=target, measured=None, why=_why(target, results))
    return Verdict(
        target=target, measured=statistics.median(ratios), low=min(ratios), high=max(ratios)
    )


def _why(target: Target, results: Results) -> str:
    for key in (target.lane, target.peer):
        row = results.row(key, target.case)
        if row is None:
            return f"{target.case.label} of {key.partition('/')[0]} was left out"
        if row.failed:
            return f"{key.partition('/')[0]}: {row.failed}"
    return "there was time for too few rounds"
