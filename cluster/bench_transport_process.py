"""A part of the transport benchmark in a process of its own, asked over a pipe.

Starts it, calls it, ends it; must not know what a part measures. A part is a class named by its
path; the class is imported in the child, after its environment is set, because UCX reads the
environment when it is loaded. Children come from multiprocessing's fork server, which has the
imports that all share and no threads: each child is a clean process for the price of a fork.

Invariants: every call has a deadline; a part that misses it, dies or raises is ended and raises
ClusterError with the reason here; nothing of a part outlives `end_all`.
"""

from __future__ import annotations

import contextlib
import importlib
import multiprocessing as mp
import os
import signal
import threading
import time
from typing import TYPE_CHECKING, Any, Final

from hotset.errors import ClusterError, HotsetError

if TYPE_CHECKING:
    from collections.abc import Iterable
    from multiprocessing.connection import Connection

END_S: Final = 2.0
SHARED_IMPORTS: Final = ("hotset.cluster.bench_transport_stores", "hotset.transport.nixl")


def _main(
    pipe: Connection, where: str, environment: dict[str, str], config: dict[str, Any]
) -> None:
    """Run in the child: build the part, obey, close it whatever happens."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends us
    threading.Thread(target=_follow_parent, daemon=True, name="bench-parent").start()
    os.environ.update(environment)
    part = None
    try:
        module, _, name = where.partition(":")
        part = getattr(importlib.import_module(module), name)(**config)
        pipe.send(("ok", part.hello()))
        while (message := pipe.recv())[0] != "end":
            order, arguments = message
            pipe.send(("ok", getattr(part, order)(*arguments)))
    except EOFError:
        pass  # the parent is gone
    except Exception as error:  # noqa: BLE001 - told to the parent, which makes it a row
        with contextlib.suppress(OSError):
            pipe.send(("error", _one_line(error)))
    finally:
        if part is not None:
            part.close()


def _follow_parent() -> None:
    """End with the parent, even from within a call that hangs."""
    parent = mp.parent_process()
    assert parent is not None  # noqa: S101 - this runs in a child
    parent.join()
    threading.Event().wait(END_S)  # the pipe tells the main thread as well; it closes its part
    os._exit(1)


def _one_line(error: Exception) -> str:
    text = error.what if isinstance(error, HotsetError) else f"{type(error).__name__}: {error}"
    return " ".join(text.split())[:300]


class Part:
    """The parent's end of a part."""

    def __init__(
        self, where: str, *, name: str, environment: dict[str, str] | None = None, **config: Any
    ) -> None:
        """Start the process; `hello` waits until it is ready."""
        self.name = name
        context = mp.get_context("forkserver")
        context.set_forkserver_preload(list(SHARED_IMPORTS))
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(
            target=_main, args=(theirs, where, environment or {}, config), daemon=True, name=name
        )
        self._process.start()
        theirs.close()

    @property
    def pid(self) -> int:
        """Process id."""
        return self._process.pid or 0

    def send(self, order: str, *arguments: Any) -> None:
        """Ask without waiting. Raises ClusterError when the part has ended."""
        try:
            self._pipe.send((order, arguments))
        except OSError as error:
            raise self._ended() from error

    def answer(self, *, timeout_s: float) -> Any:
        """Wait for one answer. Raises ClusterError; then the part has ended."""
        if not self._pipe.poll(max(0.0, timeout_s)):
            self.kill()
            raise ClusterError(
                f"{self.name} did not answer in {timeout_s:.0f} s and was ended",
                remedy="measure on a quieter machine, or leave it out with --backends",
            )
        try:
            word, value = self._pipe.recv()
        except (EOFError, OSError) as error:
            raise self._ended() from error
        if word == "error":
            self.kill()
            raise ClusterError(f"{self.name}: {value}", remedy="see `hotset doctor`")
        return value

    def call(self, order: str, *arguments: Any, timeout_s: float) -> Any:
        """Ask and wait. Raises ClusterError."""
        self.send(order, *arguments)
        return self.answer(timeout_s=timeout_s)

    def ask_to_end(self) -> None:
        """Let it close what it has; nothing happens when it has ended."""
        with contextlib.suppress(OSError):
            self._pipe.send(("end", ()))

    def kill(self) -> None:
        """End it now."""
        self._process.kill()
        self._process.join(END_S)

    def join(self, timeout_s: float) -> bool:
        """Whether it ended by itself in time."""
        self._process.join(max(0.0, timeout_s))
        return not self._process.is_alive()

    def _ended(self) -> ClusterError:
        self._process.join(END_S)
        code = self._process.exitcode or 0
        how = f"was ended by signal {-code}" if code < 0 else f"ended with code {code}"
        return ClusterError(f"the process of {self.name} {how}", remedy="see `hotset doctor`")


def end_all(parts: Iterable[Part], *, timeout_s: float = END_S) -> list[str]:
    """End parts together; returns the names of those that had to be killed."""
    waiting = list(parts)
    for part in waiting:
        part.ask_to_end()
    end = time.monotonic() + timeout_s
    late = [part for part in waiting if not part.join(end - time.monotonic())]
    for part in late:
        part.kill()
    return [part.name for part in late]
