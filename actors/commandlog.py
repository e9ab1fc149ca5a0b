"""The brain's commands beside its journal, so that a replay can be held against what was done.

Moves packed commands into a file of frames, one frame for each event that led to any. Must not know
what they say. `check_replay` feeds the journal to a fresh brain and compares byte for byte.

Invariants: the frame of an event carries its number in the journal; a torn tail of either file
shortens what can be compared, and is no difference.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import msgspec

from hotset.actors.frames import read_frames
from hotset.actors.journal import JournalWriter
from hotset.actors.messages import pack, unpack_event

if TYPE_CHECKING:
    import os
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from hotset.policies.brain import ClusterBrain
    from hotset.policies.types import Command

FILE = "commands.msgpack"


class Replayed(NamedTuple):
    """How a replay went: `differs_at` is the number of the first event with other commands."""

    events: int
    commands: int
    compared: int
    differs_at: int | None


def encode_commands(number: int, commands: Sequence[Command]) -> bytes:
    """The frame of the event with this number."""
    return msgspec.msgpack.encode([number, [pack(command) for command in commands]])


class CommandLog:
    """Appends the commands of each event."""

    def __init__(self, path: str | os.PathLike[str], *, events: int = 0) -> None:
        """`events`: how many the journal holds already."""
        self._writer = JournalWriter(path)
        self._events = events

    def handled(self, commands: Sequence[Command]) -> None:
        """The next event has led to these commands."""
        if commands:
            self._writer.append(encode_commands(self._events, commands))
        self._events += 1

    def close(self) -> None:
        """Flush and close."""
        self._writer.close()


def check_replay(run_dir: Path, make_brain: Callable[[], ClusterBrain]) -> Replayed:
    """Replay a run's journal and compare its commands with the recorded ones, byte for byte."""
    told: dict[int, bytes] = {}
    path = run_dir / FILE
    for frame in read_frames(path) if path.exists() else ():
        number, _ = msgspec.msgpack.decode(frame)
        told[number] = frame
    brain = make_brain()
    events = commands = compared = 0
    differs_at: int | None = None
    last = max(told, default=-1)
    for frame in read_frames(run_dir / "journal.msgpack"):
        given = brain.handle(unpack_event(msgspec.msgpack.decode(frame)))
        commands += len(given)
        if events <= last:
            compared += 1
            same = told.get(events, b"") == (encode_commands(events, given) if given else b"")
            if not same and differs_at is None:
                differs_at = events
        events += 1
    return Replayed(events, commands, compared, differs_at)
