"""Two stores in processes of their own, and one transfer between them at a time.

A `Pair` reads (the sink asks) or writes (the source offers). A `Round` collects what one round of
an event showed and what was wrong about it.
"""

from __future__ import annotations

import os
import signal
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from tests.transport.netlab import DEVICE
from tests.transport.offering import Offering
from tests.transport.processes import Child
from tests.transport.stores import SLACK_NS, TCP, Begun, Report, Shape, Strike

if TYPE_CHECKING:
    from hotset.transport.base import PeerInfo
    from tests.transport.netlab import NetLab
    from tests.transport.peer import Source

NBYTES: Final = 4 << 20
BLOCKS: Final = 8  # 32 MiB a transfer: 5 to 30 ms
SPARE: Final = 6  # slots beside the destinations
GOOD_S: Final = 10.0


@dataclass(slots=True)
class Round:
    """What one round showed. `mid`: the event came while bytes landed and some had not yet."""

    statuses: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    mid: bool = False
    late_ns: int = 0
    settle_s: float = 0.0
    quarantined: int = 0

    def take(self, report: Report, *, allowed: set[str], excuse_ns: int = 0) -> None:
        """Judge the end of the read that the event was done to."""
        self.statuses = report.statuses
        self.late_ns = report.after_deadline_ns - excuse_ns
        self.quarantined = report.quarantined
        if not set(report.statuses) <= allowed:
            self.wrong.append(f"ended as {report.statuses}: {report.errors}")
        if self.late_ns > SLACK_NS:
            self.wrong.append(f"ended {self.late_ns / 1e9:.3f} s after its deadline")
        if report.corrupt:
            self.wrong.append(f"{report.corrupt} blocks are DONE with other bytes")
        for status, state in zip(report.statuses, report.held, strict=False):
            fit = {"READY"} if status == "done" else {"FREE", "QUARANTINED"}
            if state not in fit:
                self.wrong.append(f"a slot of an item that is {status} is {state}")


class _Store(Child):
    """One end of a pair."""

    def __init__(self, shape: Shape) -> None:
        super().__init__(Offering, shape, name=shape.name)
        self.info: PeerInfo
        self.copies: list[Source]
        self.address: tuple[str, int]

    def ready(self) -> _Store:
        """Wait until it is up."""
        self.info, self.copies, self.address = super().ready()
        return self

    def end(self) -> str:
        """Close it in good order; '' or what went wrong."""
        if not self.process.is_alive():
            return f"{self.name} had died with {self.exit_code()}"
        error = self.call("close")
        code = self.exit_code()
        return error or ("" if code == 0 else f"{self.name} ended with {code}")


class Pair:
    """A source and a sink that reads it, or that it writes to; either can be replaced."""

    def __init__(self, kind: str, *, writes: bool = False, lab: NetLab | None = None) -> None:
        """Start both, over a cable when there is a lab."""
        self.kind = kind
        self.writes = writes
        self.lab = lab
        self._incarnation = 0
        self._coming: dict[str, _Store] = {}
        self.ends: list[str] = []
        self.seed = 1000
        self.source = self._start("source")
        self.sink = self._start("sink")
        self.source.ready()
        self.sink.ready()
        self.meet()

    def _start(self, name: str) -> _Store:
        self._incarnation += 1
        host = None
        if self.lab is not None:
            host = self.lab.left if name == "source" else self.lab.right
        shape = Shape(
            name=name,
            incarnation=self._incarnation,
            kind=self.kind,
            blocks=BLOCKS if name == "source" else 0,
            room=2 if name == "source" else BLOCKS + SPARE,
            nbytes=NBYTES,
            environment=TCP | {"UCX_NET_DEVICES": DEVICE} if host else {},
            netns=host.netns if host else "",
            address=host.address if host else "",
        )
        return _Store(shape)

    def meet(self) -> str:
        """Let the sink know the source; '' or the error."""
        error: str = self.sink.call("connect", self.source.info)
        return error

    def prepare(self, name: str) -> None:
        """Start the next incarnation, so that it is there when the present one is dead."""
        self._coming[name] = self._start(name)

    def replace(self, name: str) -> str:
        """Put the next incarnation in the place of a killed store; '' or what was wrong."""
        old: _Store = getattr(self, name)
        code = old.exit_code()
        setattr(self, name, self._coming.pop(name).ready())
        wrong = "" if code == -signal.SIGKILL else f"the killed {name} ended with {code}"
        return self.meet() or wrong

    def renew_source(self) -> list[str]:
        """Do what a supervisor does when the source says that nobody can read it any more."""
        self.source.send("leave")
        code = self.source.exit_code()
        self.source = self._start("source").ready()
        error = self.meet()
        return [f"the source left with {code}"] * (code != 0) + [error] * bool(error)

    def refresh(self) -> None:
        """Ask the source for its present copies."""
        self.source.info, self.source.copies, _ = self.source.call("describe")

    def launch(self, *, seconds: float, strike: Strike | None = None) -> None:
        """Transfer all copies; the sink answers when bytes land and the strike is done."""
        if self.writes:
            self.sink.call("room", BLOCKS)
            self.source.call("offer", self.sink.address, seconds)
            self.sink.send("landing", seconds, strike)
        else:
            self.sink.send("read", "source", self.source.copies, seconds, strike)

    def begin(self, *, seconds: float, strike: Strike | None = None) -> Begun:
        """Transfer all copies; returns when bytes land and the strike is done."""
        self.launch(seconds=seconds, strike=strike)
        begun: Begun = self.sink.answer()
        return begun

    def report(self, *, source_lives: bool = True, sink_lives: bool = True) -> Report:
        """How the transfer ended, told by the side that asked for it if that lives."""
        if not self.writes:
            read: Report = self.sink.call("wait")
            if read.statuses == ["hung"]:
                os.kill(self.sink.pid, signal.SIGUSR1)  # its stacks go to stderr
            return read
        end: Report | None = self.source.call("pushed") if source_lives else None
        took: Report | None = self.sink.call("took", 5.0) if sink_lives else None
        if took is None or end is None:
            known = took or end
            assert known is not None, "somebody must live"
            return known
        return end._replace(corrupt=took.corrupt, quarantined=took.quarantined)

    def good(self, *, tries: int = 1) -> list[str]:
        """Transfer everything once more; what is wrong with that.

        Over a cable that was cut, offers that were given up may arrive late and take the room of
        others, which is as it should be; then try again.
        """
        self.begin(seconds=GOOD_S)
        report = self.report()
        if set(report.statuses) == {"done"} and not report.corrupt:
            return []
        if tries > 1:
            self.sink.call("settle", GOOD_S)
            return self.good(tries=tries - 1)
        return [
            f"a further one ended as {report.statuses}, {report.corrupt} corrupt: {report.errors}"
        ]

    def close(self) -> list[str]:
        """End both in good order, the reader first; what went wrong."""
        stores = [self.sink, self.source, *self._coming.values()]
        try:
            return [text for text in (store.ready().end() for store in stores) if text]
        finally:
            self.discard()

    def deaths(self) -> str:
        """Who has died, and how; '' when all live."""
        dead = [s for s in (self.source, self.sink) if not s.process.is_alive()]
        return "".join(f"; the {store.name} died with {store.exit_code()}" for store in dead)

    def discard(self) -> None:
        """End both whatever their state."""
        for store in (self.sink, self.source, *self._coming.values()):
            store.discard()
        if self.lab is not None:
            self.lab.repair()
