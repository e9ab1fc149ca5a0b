"""A watched thread sleeps instead of aborting; every other abort ends the process as before."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import threading
from typing import TYPE_CHECKING

import pytest

from hotset.transport.abort_guard import ABORT_GUARD, NewThreads
from tests.transport.processes import Child
from tests.transport.stores import Hands, Shape
from tests.transport.worlds import until

if TYPE_CHECKING:
    from collections.abc import Iterator

_PROGRAM = """
import ctypes, faulthandler, os, sys, threading
faulthandler.enable()
from hotset.transport.abort_guard import ABORT_GUARD
go, told = threading.Event(), []
def abort():
    told.append(threading.get_native_id())
    go.wait()
    ctypes.CDLL(None).abort()
thread = threading.Thread(target=abort, daemon=True)
thread.start()
while not told:
    pass
if "watch" in sys.argv:
    assert ABORT_GUARD.watch(told[0])
else:
    assert ABORT_GUARD.watch(threading.get_native_id())
assert not ABORT_GUARD.is_parked(told[0])
go.set()
while not ABORT_GUARD.is_parked(told[0]):
    thread.join(0.01)
assert thread.is_alive()
print("alive", flush=True)
if "then" in sys.argv:
    go.clear()
    second = threading.Thread(target=lambda: ctypes.CDLL(None).abort())
    second.start()
    second.join()
os._exit(0)
"""


def _run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", _PROGRAM, *arguments],
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip


def test_a_watched_thread_is_parked_and_the_process_goes_on() -> None:
    done = _run("watch")
    assert (done.returncode, done.stdout) == (0, "alive\n"), done.stderr


@pytest.mark.parametrize("arguments", [(), ("watch", "then")])
def test_any_other_abort_ends_the_process_through_the_former_handler(
    arguments: tuple[str, ...],
) -> None:
    done = _run(*arguments)
    assert done.returncode == -signal.SIGABRT
    assert "Fatal Python error: Aborted" in done.stderr  # faulthandler was there before
    assert done.stdout == ("alive\n" if arguments else "")


def test_threads_of_python_are_not_taken_for_new_ones() -> None:
    end = threading.Event()
    with NewThreads() as found:
        thread = threading.Thread(target=end.wait)
        thread.start()
    end.set()
    thread.join()
    assert found.found == []


class Aborting(Hands):
    """A store whose serving thread can be made to abort."""

    def abort(self) -> None:
        server = self.engine._backend._server  # type: ignore[union-attr] # the real thread of NIXL
        assert server
        assert ctypes.CDLL(None).tgkill(os.getpid(), server, signal.SIGABRT) == 0
        assert until(lambda: ABORT_GUARD.is_parked(server))  # when that thread comes to run


@pytest.fixture
def stores() -> Iterator[tuple[Child, Child]]:
    made = [
        Child(
            Aborting,
            Shape(name=name, incarnation=1, kind="nixl-tcp", blocks=2, room=4, nbytes=1 << 20),
            name=name,
        )
        for name in ("a", "b")
    ]
    yield made[0], made[1]
    for child in made:
        child.discard()


@pytest.mark.nixl
def test_a_store_outlives_the_abort_of_the_thread_that_serves_it(
    stores: tuple[Child, Child],
) -> None:
    a, b = stores
    (a_info, a_copies), (b_info, b_copies) = a.ready(), b.ready()
    assert a.call("connect", b_info) == ""
    assert b.call("connect", a_info) == ""
    b.call("read", "a", a_copies, 10.0, None)
    assert b.call("wait").statuses == ["done", "done"]
    a.call("abort")
    fault = a.call("fault")
    assert "nobody can read this store" in fault
    a.call("read", "b", b_copies, 10.0, None)  # its own reads go on
    assert a.call("wait").statuses == ["done", "done"]
    b.call("read", "a", a_copies, 0.3, None)
    assert b.call("wait").statuses == ["timed_out", "timed_out"]
    assert a.call("close") != ""  # it must be left by `os._exit`
    a.send("leave")
    assert a.exit_code() == 0
    assert b.call("settle", 15.0) >= 0  # what b waited for ended with the process
