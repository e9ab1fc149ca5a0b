"""Lets a process outlive an abort of UCX in the thread that serves NIXL's reads.

UCX answers reads over TCP in the process that is read, in a thread of NIXL's. When the reader dies
while an answer is on its way, UCX may call `abort` there (`ucp_request_try_send`: a reply that
fails is fatal). Nothing is wrong then but this one connection, yet the whole process would go. Here
that thread is put to sleep for good instead, with whatever locks it holds: the process goes on with
everything but being read, and leaves in good order (`Engine.fault`).

A handler of SIGABRT looks at who aborts. It must not take memory, locks or the GIL, for it also
runs when a corrupted heap aborts; so it is a few lines of LLVM's language, compiled by numba's own
library. It must not know NIXL. Any other thread's abort goes on to the handler that was there
before, and the process dies as it would have.

Invariants: a thread that is not watched always dies of its abort; a parked thread never runs again.
"""

from __future__ import annotations

import contextlib
import ctypes
import logging
import signal
import threading
from pathlib import Path
from typing import Final, Self

MOST_WATCHED: Final = 64
_ACTION_BYTES: Final = 256  # room for struct sigaction, which has 152 bytes on 64-bit Linux
_CODE: Final = f"""
@watched = global [{MOST_WATCHED} x i32] zeroinitializer   ; thread ids; negative: parked
@before = global [{_ACTION_BYTES} x i8] zeroinitializer    ; the action that was there before

declare i32 @gettid()
declare i32 @pause()
declare i32 @raise(i32)
declare i32 @sigaction(i32, ptr, ptr)

define void @on_abort(i32 %number) {{
entry:
  %me = call i32 @gettid()
  br label %look
look:
  %i = phi i32 [ 0, %entry ], [ %next, %more ]
  %place = getelementptr [{MOST_WATCHED} x i32], ptr @watched, i32 0, i32 %i
  %id = load volatile i32, ptr %place
  %mine = icmp eq i32 %id, %me
  br i1 %mine, label %park, label %more
more:
  %next = add i32 %i, 1
  %over = icmp eq i32 %next, {MOST_WATCHED}
  br i1 %over, label %die, label %look
park:
  %gone = sub i32 0, %me
  store volatile i32 %gone, ptr %place
  br label %sleep
sleep:
  %woken = call i32 @pause()
  br label %sleep
die:                                 ; SIGABRT is blocked here: it comes when this returns
  %restored = call i32 @sigaction(i32 %number, ptr @before, ptr null)
  %raised = call i32 @raise(i32 %number)
  ret void
}}
"""

_log = logging.getLogger(__name__)


class AbortGuard:
    """The threads of this process that are parked when they abort."""

    def __init__(self) -> None:
        """Guard nothing; the first `watch` installs the handler."""
        self._lock = threading.Lock()
        self._watched: ctypes.Array[ctypes.c_int32] | None = None
        self._kept: object = None  # the compiled code

    def watch(self, thread_id: int) -> bool:
        """Park this thread when it aborts; False when that cannot be had here.

        `thread_id` is the kernel's. There is room for 64 threads at once.
        """
        with self._lock:
            if self._watched is None:
                try:
                    self._install()
                except Exception as error:  # noqa: BLE001 - whatever is missing, it is as without
                    _log.info("an abort of UCX will end the process: %s", error)
            watched = self._watched
            if watched is None:
                return False
            alive = _threads()
            for place, known in enumerate(watched):
                if known >= 0 and known not in alive:
                    watched[place] = thread_id
                    return True
        return False

    def is_parked(self, thread_id: int) -> bool:
        """Whether this thread has aborted and sleeps."""
        return self._watched is not None and -thread_id in self._watched

    def _install(self) -> None:
        from llvmlite import binding

        binding.initialize_native_target()
        binding.initialize_native_asmprinter()
        machine = binding.Target.from_default_triple().create_target_machine()
        engine = binding.create_mcjit_compiler(binding.parse_assembly(_CODE), machine)
        engine.finalize_object()
        libc = ctypes.CDLL(None, use_errno=True)
        libc.signal.restype = ctypes.c_void_p
        libc.signal.argtypes = (ctypes.c_int, ctypes.c_void_p)
        libc.sigaction.argtypes = (ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p)
        before = engine.get_global_value_address("before")
        watched = engine.get_global_value_address("watched")
        if libc.sigaction(signal.SIGABRT, None, before):
            raise OSError(ctypes.get_errno(), "the handler of SIGABRT cannot be read")
        libc.signal(signal.SIGABRT, engine.get_function_address("on_abort"))
        self._kept = engine
        self._watched = (ctypes.c_int32 * MOST_WATCHED).from_address(watched)


ABORT_GUARD: Final = AbortGuard()


class NewThreads:
    """Finds the kernel threads that begin while it is entered and that are not Python's."""

    def __enter__(self) -> Self:
        """Note who is there."""
        self._before = _threads()
        self.found: list[int] = []
        return self

    def __exit__(self, *_: object) -> None:
        """Look who has come."""
        python = {thread.native_id for thread in threading.enumerate()}
        self.found = sorted(_threads() - self._before - python)


def thread_name(thread_id: int) -> str:
    """The kernel's name of a thread of this process; '' when it has ended."""
    try:
        return Path(f"/proc/self/task/{thread_id}/comm").read_text(encoding="ascii").strip()
    except OSError:
        return ""


def name_thread(thread_id: int, name: str) -> None:
    """Give a thread of this process a name for `top -H` and debuggers, of 15 characters at most."""
    with contextlib.suppress(OSError):
        Path(f"/proc/self/task/{thread_id}/comm").write_text(name, encoding="ascii")


def _threads() -> set[int]:
    return {int(path.name) for path in Path("/proc/self/task").iterdir()}
