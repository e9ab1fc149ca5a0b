"""A child process that obeys: one object in it, one method for each order, an answer for each.

Children are forked from a server that has numpy and hotset loaded but neither NIXL nor UCX, which
must not be forked: 15 ms instead of 300. Every answer has a deadline, so a child that hangs fails a
test instead of the run; SIGUSR1 makes it tell where it hangs.
"""

from __future__ import annotations

import contextlib
import faulthandler
import multiprocessing as mp
import os
import signal
import time
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from multiprocessing.connection import Connection

ANSWER_S: Final = 45.0
PRELOAD: Final = ("tests.transport.offering", "tests.transport.member", "hotset.transport.tcp")


def _serve(pipe: Connection, kind: type[Any], config: Any) -> None:
    faulthandler.register(signal.SIGUSR1)
    try:
        made = kind(config)
        pipe.send(("", made.describe()))
    except Exception:  # noqa: BLE001 - told to the parent
        pipe.send((traceback.format_exc(), None))
        return
    while True:
        order, arguments = pipe.recv()
        try:
            answer = ("", getattr(made, order)(*arguments))
        except Exception:  # noqa: BLE001 - told to the parent
            answer = (traceback.format_exc(), None)
        pipe.send(answer)
        if order == "close":
            return


class Child:
    """The parent's end. `kind(config)` is made in the child; its `describe` is the first answer."""

    def __init__(self, kind: type[Any], config: Any, *, name: str) -> None:
        """Start it; `ready` waits until it is up."""
        made = mp.get_context("forkserver")
        made.set_forkserver_preload(list(PRELOAD))
        self.name = name
        self._pipe, theirs = made.Pipe()
        self.process = made.Process(target=_serve, args=(theirs, kind, config), daemon=True)
        self.process.start()
        theirs.close()
        self._up = False
        self.described: Any = None

    def ready(self) -> Any:
        """What the child says of itself."""
        if not self._up:
            self.described = self.answer()
            self._up = True
        return self.described

    @property
    def pid(self) -> int:
        assert self.process.pid is not None
        return int(self.process.pid)

    def send(self, order: str, *arguments: Any) -> None:
        self._pipe.send((order, arguments))

    def answer(self) -> Any:
        if not self._pipe.poll(ANSWER_S):
            raise TimeoutError(f"{self.name} does not answer")
        try:
            error, value = self._pipe.recv()
        except (EOFError, ConnectionError) as gone:
            raise RuntimeError(f"{self.name} died with {self.exit_code()}") from gone
        if error:
            raise RuntimeError(f"{self.name}: {error}")
        return value

    def call(self, order: str, *arguments: Any) -> Any:
        self.send(order, *arguments)
        return self.answer()

    def kill(self) -> None:
        os.kill(self.pid, signal.SIGKILL)

    def thaw(self) -> None:
        os.kill(self.pid, signal.SIGCONT)

    def stopped(self, seconds: float = 10.0) -> bool:
        """Wait until every thread has stopped; a running one stops when it leaves the kernel."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            states = set()
            for task in Path(f"/proc/{self.pid}/task").glob("*/stat"):
                with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # it just ended
                    states.add(task.read_text(encoding="utf-8").rpartition(")")[2].split()[0])
            if states == {"T"}:
                return True
            os.sched_yield()
        return False

    def exit_code(self, seconds: float = 15.0) -> int | None:
        """Wait for its end; None when it still runs."""
        self.process.join(seconds)
        code = self.process.exitcode
        if code is None:
            return None
        self._pipe.close()
        return int(code)

    def discard(self) -> None:
        """End it whatever its state; for cleaning up."""
        if self.process.is_alive():
            self.kill()
        self.exit_code()
