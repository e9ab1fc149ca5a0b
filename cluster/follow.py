"""A live run on a Ray cluster as a source for the page and for `hotset top`.

Asks the controller for its journal from where it stopped, and for its status; both are reads. Trace
files are read too when the run's folder is visible from here, else stall comes from the status.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec

from hotset.actors.control import Records
from hotset.cluster.inspect import CALL_S, live_status
from hotset.dashboards.page.run import Run


class RaySource:
    """Follows a controller. `poll` raises what Ray raises; the next call goes on."""

    def __init__(self, controller: Any) -> None:
        """Ask for the run's spec. Raises Ray's errors."""
        self._controller = controller
        self._offset = 0
        first = self._records()
        self.run = Run.of(first.spec)
        self.live = True
        self._take(first)

    def poll(self) -> bool:
        """Take in what is new: all of the journal that is there, status, trace files."""
        news = False
        while (found := self._records()).frames:
            self._take(found)
            news = True
        self.run.status = live_status(self._controller)
        folder = Path(self.run.spec.run_dir)
        if folder.is_dir():
            news = self.run.traces.poll(folder) or news
        return news

    def _records(self) -> Records:
        import ray

        data = ray.get(self._controller.records.remote(self._offset), timeout=CALL_S)
        return msgspec.msgpack.decode(data, type=Records)

    def _take(self, found: Records) -> None:
        self._offset = found.offset + len(found.frames)
        self.run.take(found.frames)
