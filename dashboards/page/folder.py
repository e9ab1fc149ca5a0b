"""A run's folder as a source for the page: recorded, or still being written.

Reads `run.json`, `journal.msgpack` and `trace-*.jsonl` on from where it stopped. Writes nothing.
A run counts as live until its end was marked (`trace.jsonl`) or its journal has been silent for
minutes; a live run that is silent for seconds raises the page's alarm instead.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from hotset.actors.control import ControlSpec
from hotset.actors.frames import read_frames
from hotset.actors.messages import unpack_event
from hotset.dashboards.page.run import Run, guess_spec
from hotset.errors import UNREADABLE, ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable

FORGOTTEN_NS = 600_000_000_000
JOURNAL = "journal.msgpack"
CHUNK_BYTES = 16 << 20


class FolderSource:
    """Follows one run's folder. Raises ConfigError when it is not one."""

    def __init__(self, run_dir: Path, *, clock_ns: Callable[[], int] = time.time_ns) -> None:
        """Find the run's shape; `poll` reads."""
        self._dir = Path(run_dir)
        self._clock_ns = clock_ns
        self._offset = 0
        self.run = open_run(self._dir)
        self.live = False

    def poll(self) -> bool:
        """Take in what is new."""
        news = False
        with (self._dir / JOURNAL).open("rb") as file:
            file.seek(self._offset)
            while data := file.read(CHUNK_BYTES):
                self._offset += len(data)
                news = self.run.take(data) > 0 or news
        news = self.run.traces.poll(self._dir) or news
        silent_ns = self._clock_ns() - self.run.timeline.to_ns
        over = (self._dir / "trace.jsonl").exists() or silent_ns > FORGOTTEN_NS
        changed = self.live == over
        self.live = not over
        return news or changed


def open_run(run_dir: Path) -> Run:
    """An empty run with the shape of a folder's. Raises ConfigError that names what is missing."""
    journal = run_dir / JOURNAL
    if not journal.is_file():
        raise ConfigError(
            f"{run_dir} holds no {JOURNAL}",
            remedy="give the folder of a run, as its report names it beside `trace`",
        )
    recorded = run_dir / "run.json"
    if recorded.is_file():
        try:
            return Run.of(msgspec.json.decode(recorded.read_bytes(), type=ControlSpec))
        except UNREADABLE as error:
            raise ConfigError(
                f"{recorded} cannot be read ({error})",
                remedy="remove it: the shape is then guessed from the journal",
            ) from None
    events = (unpack_event(msgspec.msgpack.decode(frame)) for frame in read_frames(journal))
    spec = guess_spec(events, run=run_dir.resolve().name, run_dir=str(run_dir))
    if spec is None:
        raise ConfigError(
            f"the journal of {run_dir} names no block",
            remedy="wait until a store has been filled, or give another run",
        )
    return Run.of(spec, guessed=True)
