"""The flight recorder: the last seconds of a node's rows, in a file when something is wrong.

Decides what an anomaly is and when to write; must not know Ray. The trace file has the same rows
while it is whole; the recorder keeps them where a collector is sampled or the file is switched
off, and a dump is small enough to mail.

An anomaly: a transfer, step or dispatch that failed or timed out (a cancelled or stale one is how
races are meant to end), a wait of at least `stall_ns`, or rows that a ring lost. An alert of the
progress watchdog (`alarm`) is dumped too, with a ration of its own: a slow step just before it
would else take its dump away.

Invariants: what is kept, and so each dump, is bounded in time and in bytes; anomalies and alerts
each get at most one dump in `pause_ns`, and `most_dumps` a run and node, also when the process was
restarted meanwhile; more count as `passed_over`.
"""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, Final

import numpy as np

from hotset.actors import watch
from hotset.actors.spans import SpanWriter
from hotset.transport.records import Code, Kind

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from hotset.actors.batches import RowBatch

KEEP_NS: Final = 10_000_000_000
STALL_NS: Final = 1_000_000_000
MOST_BYTES: Final = 16 << 20
"""Of rows: 13 s of 10,000 a second. A dump spells each of its 128 bytes in about 600."""

_EXPECTED: Final = (Code.OK, Code.STALE, Code.CANCELLED)


class FlightRecorder:
    """Recent batches of a node, and the dumps made of them. One thread only."""

    def __init__(  # noqa: PLR0913 - where to write, and four bounds
        self,
        folder: Path,
        *,
        node: str,
        run: str,
        emulated: Sequence[str] = (),
        keep_ns: int = KEEP_NS,
        stall_ns: int = STALL_NS,
        pause_ns: int = 60_000_000_000,
        most_dumps: int = 10,
        most_bytes: int = MOST_BYTES,
    ) -> None:
        """Nothing is written before the first anomaly."""
        self._folder = folder
        self._node, self._run, self._emulated = node, run, tuple(emulated)
        self._keep_ns, self._stall_ns = keep_ns, stall_ns
        self._pause_ns, self._most_dumps, self._most_bytes = pause_ns, most_dumps, most_bytes
        self._recent: deque[tuple[int, RowBatch]] = deque()
        self._nbytes = 0
        self._last_ns: dict[bool, int] = {}  # by whether it was an alert
        self.dumps = sorted(folder.glob(f"flight-{node}-*.jsonl"))  # of a predecessor
        self.passed_over = 0

    def take(self, batch: RowBatch, *, now_ns: int) -> Path | None:
        """Remember a batch; the dump's path when it holds an anomaly and a dump is due."""
        if batch.rows or batch.dropped:
            self._recent.append((now_ns, batch))
            self._nbytes += len(batch.rows)
        while self._recent and (
            self._recent[0][0] < now_ns - self._keep_ns or self._nbytes > self._most_bytes
        ):
            self._nbytes -= len(self._recent.popleft()[1].rows)
        why = anomaly(batch, stall_ns=self._stall_ns)
        return self.alarm(why, now_ns=now_ns) if why else None

    def alarm(self, why: str, *, now_ns: int) -> Path | None:
        """Dump now, unless a dump was made just before; `why` is part of the file's name."""
        alert = why.startswith(watch.DUMP)
        last_ns = self._last_ns.get(alert)
        recently = last_ns is not None and now_ns - last_ns < self._pause_ns
        made = sum(_is_alert(path) == alert for path in self.dumps)
        if recently or made >= self._most_dumps or not self._recent:
            self.passed_over += 1
            return None
        self._last_ns[alert] = now_ns
        path = self._folder / f"flight-{self._node}-{now_ns}-{why}.jsonl"
        writer = SpanWriter(path, node=self._node, run=self._run, emulated=self._emulated)
        for _, batch in self._recent:
            writer.write(batch)
        writer.close()
        self.dumps.append(path)
        return path


def _is_alert(dump: Path) -> bool:
    return dump.stem.rpartition("-")[2].startswith(watch.DUMP)


def anomaly(batch: RowBatch, *, stall_ns: int) -> str:
    """Why a batch is worth a dump, in one word; empty when it is not."""
    if batch.dropped:
        return "dropped"
    rows = batch.table()
    bad = rows["code"][~np.isin(rows["code"], _EXPECTED)]
    if len(bad):
        worst = int(np.max(bad))
        return Code(worst).name.lower() if worst <= max(Code) else "damaged"
    waits = rows["kind"] == Kind.WAIT
    if waits.any() and int((rows["end_ns"] - rows["start_ns"])[waits].max()) >= stall_ns:
        return "stall"
    return ""
