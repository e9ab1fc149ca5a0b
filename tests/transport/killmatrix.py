"""The kill matrix as a program: many rounds of each cell, a table, and what the survivors leaked.

    python -m tests.transport.killmatrix --rounds 1000

Rounds are spread over the events of each backend and direction; a pair of stores lives through all
of them, one of the two being replaced where the event kills it. Nothing is judged before all rounds
are done.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections import Counter
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Final

from tests.transport.cells import CABLE_EVENTS, EVENTS, Event
from tests.transport.leaks import Footprint, descriptors, footprint, leaked
from tests.transport.netlab import NetLab, why_not
from tests.transport.pair import Pair, Round
from tests.transport.stores import missing

if TYPE_CHECKING:
    from collections.abc import Mapping

WARM_ROUNDS: Final = 2
LOCAL: Final = ("shm", "nixl", "nixl-tcp", "tcp")
CABLE: Final = ("nixl-tcp", "tcp")


@dataclass(slots=True)
class Cell:
    """What the rounds of one event over one backend showed."""

    kind: str
    event: str
    writes: bool = False
    rounds: int = 0
    mid: int = 0
    statuses: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    latest_ns: int = -(10**18)
    settle_s: float = 0.0
    most_quarantined: int = 0
    seconds: float = 0.0
    growth: dict[str, Footprint] = field(default_factory=dict)

    def add(self, result: Round) -> None:
        """Count one round."""
        self.rounds += 1
        self.mid += result.mid
        self.statuses.update(result.statuses)
        self.wrong += [f"round {self.rounds}: {text}" for text in result.wrong]
        self.latest_ns = max(self.latest_ns, result.late_ns) if result.late_ns else self.latest_ns
        self.settle_s = max(self.settle_s, result.settle_s)
        self.most_quarantined = max(self.most_quarantined, result.quarantined)


def run_cell(pair: Pair, name: str, event: Event, *, rounds: int, warm: int = WARM_ROUNDS) -> Cell:
    """Do warm-up rounds, measure the survivors, do the rounds, measure again."""
    cell = Cell(kind=pair.kind, event=name, writes=pair.writes)
    begin = time.monotonic()
    for _ in range(warm):
        cell.wrong += [f"warming up: {text}" for text in event.do(pair).wrong]
    survivors = [store for store in ("source", "sink") if store != event.kills]
    pids = {store: getattr(pair, store).pid for store in survivors}
    before = {store: (footprint(pid), descriptors(pid)) for store, pid in pids.items()}
    for _ in range(rounds):
        cell.add(event.do(pair))
    for store, pid in pids.items():
        if getattr(pair, store).pid != pid:  # UCX's abort was survived, and a new process came
            continue
        cell.growth[store] = footprint(pid).since(before[store][0])
        leak = leaked(cell.growth[store], rounds=rounds)
        if leak and warm:  # what the first round takes, it keeps
            new = set(descriptors(pid).items()) - set(before[store][1].items())
            cell.wrong.append(f"the {store} leaks {leak} {sorted(new)[:8]}")
    missed = event.must.get(pair.kind, set()) - set(cell.statuses)
    if missed and cell.mid and not (pair.writes and event.reads_must):
        cell.wrong.append(f"never ended as {' or '.join(sorted(missed))}")
    cell.seconds = time.monotonic() - begin
    return cell


def run_kind(
    kind: str, events: Mapping[str, Event], *, rounds: int, writes: bool, lab: NetLab | None
) -> list[Cell]:
    """All events of one backend in one direction with one pair of stores."""
    pair = Pair(kind, writes=writes, lab=lab)
    cells: list[Cell] = []
    try:
        for name, event in events.items():
            if not event.fits(kind, writes=writes):
                continue
            try:
                warm = 1 if lab else WARM_ROUNDS  # over a cable a round takes many seconds
                cells.append(run_cell(pair, name, event, rounds=rounds, warm=warm))
            except (RuntimeError, OSError, EOFError, AssertionError) as error:  # a store broke
                cells.append(
                    Cell(
                        kind=kind,
                        event=name,
                        writes=writes,
                        wrong=[f"{type(error).__name__}: {error}{pair.deaths()}"],
                    )
                )
                pair.discard()
                pair = Pair(kind, writes=writes, lab=lab)
            _print(cells[-1])
        cells[-1].wrong += pair.close()
    finally:
        pair.discard()
    return cells


HEAD: Final = (
    f"{'backend':<9} {'':<5} {'event':<25} {'rounds':>6} {'mid':>5} {'ms':>6} {'late ms':>8} "
    f"{'settle':>7} {'quar':>4}  results; growth of the survivors"
)


def _print(cell: Cell) -> None:
    counts = ", ".join(f"{count} {status}" for status, count in sorted(cell.statuses.items()))
    grew = "; ".join(f"{store} {growth}" for store, growth in cell.growth.items())
    late = f"{cell.latest_ns / 1e6:8.1f}" if cell.latest_ns > -(10**17) else f"{'-':>8}"
    each = 1e3 * cell.seconds / max(1, cell.rounds + WARM_ROUNDS)
    print(
        f"{cell.kind:<9} {'WRITE' if cell.writes else 'READ':<5} {cell.event:<25} "
        f"{cell.rounds:>6} {cell.mid:>5} {each:>6.0f} {late} "
        f"{cell.settle_s:>7.2f} {cell.most_quarantined:>4}  {counts}; {grew}",
        flush=True,
    )
    for text in cell.wrong[:6]:
        print(f"    WRONG {text}", flush=True)


def main() -> int:
    """Run what was asked for; 1 when any cell was wrong."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=90, help="of each backend and direction")
    parser.add_argument("--backends", default=",".join(LOCAL))
    parser.add_argument(
        "--events", default="", help="words that an event's name must contain one of"
    )
    parser.add_argument("--cable-rounds", type=int, default=2, help="of each event; 0: none")
    parser.add_argument("--directions", default="read,write")
    parser.add_argument("--json", type=Path, help="write the cells here")
    options = parser.parse_args()
    kinds = options.backends.split(",")
    words = options.events.split(",")
    directions = [word == "write" for word in options.directions.split(",")]
    cells: list[Cell] = []
    print(HEAD)
    chosen = {n: e for n, e in EVENTS.items() if any(word in n for word in words)}
    cable = {n: e for n, e in CABLE_EVENTS.items() if any(word in n for word in words)}
    for kind in kinds:
        if missing(kind):
            print(f"{kind:<9} skipped: {missing(kind)}")
        elif chosen:
            each = -(-options.rounds // len(chosen))
            for writes in directions:
                cells += run_kind(kind, chosen, rounds=each, writes=writes, lab=None)
    reason = "" if options.cable_rounds and cable else "not asked for"
    reason = reason or why_not()
    for kind in (kind for kind in CABLE if kind in kinds and not missing(kind)):
        if reason:
            print(f"{kind:<9} over a cable skipped: {reason}")
            continue
        with ExitStack() as stack:
            lab = stack.enter_context(NetLab())
            for writes in directions:
                each = options.cable_rounds
                cells += run_kind(kind, cable, rounds=each, writes=writes, lab=lab)
    if options.json:
        rows = [  # `asdict` of Python 3.11 makes no Counter
            asdict(replace(cell, statuses=Counter())) | {"statuses": dict(cell.statuses)}
            for cell in cells
        ]
        options.json.write_text(json.dumps(rows, indent=1))
    wrong = sum(bool(cell.wrong) for cell in cells)
    print(f"{sum(cell.rounds for cell in cells)} rounds, {len(cells)} cells, {wrong} wrong")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
