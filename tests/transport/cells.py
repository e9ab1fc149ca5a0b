"""The cells of the kill matrix: one event each, done to a transfer that is under way.

A `Pair` is a source and a sink in processes of their own. An event takes a pair through one round:
a read begins, something happens while its bytes land, the result is judged, every slot that was
given back is reused at once and watched, and a further read must be good. A round ends with the
list of what was wrong; nothing is asserted here, so the long run counts and the tests judge.
"""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Final

import msgspec

from tests.transport.netlab import DEVICE, Flipper
from tests.transport.stores import SLACK_NS, TCP, Begun, Report, Shape, StoreProcess, Strike

if TYPE_CHECKING:
    from tests.transport.netlab import NetLab

NBYTES: Final = 4 << 20
BLOCKS: Final = 8  # 32 MiB a read: 5 to 30 ms
SPARE: Final = 6  # slots beside the destinations
GOOD_S: Final = 10.0
SETTLE_S: Final = 25.0  # an abandoned transfer has ended by then, even by a keepalive


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


class Pair:
    """A source and a sink that read it; either can be replaced by a new incarnation."""

    def __init__(self, kind: str, *, lab: NetLab | None = None) -> None:
        """Start both, over a cable when there is a lab, and read once."""
        self.kind = kind
        self.lab = lab
        self._incarnation = 0
        self._coming: dict[str, StoreProcess] = {}
        self.ends: list[str] = []
        self.seed = 1000
        self.source = self._start("source")
        self.sink = self._start("sink")
        self.source.ready()
        self.sink.ready()
        self.meet()

    def _start(self, name: str) -> StoreProcess:
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
        return StoreProcess(shape)

    def meet(self) -> str:
        """Let the sink know the source; '' or the error."""
        error: str = self.sink.call("connect", self.source.info)
        return error

    def prepare(self, name: str) -> None:
        """Start the next incarnation, so that it is there when the present one is dead."""
        self._coming[name] = self._start(name)

    def replace(self, name: str) -> str:
        """Put the next incarnation in the place of a killed store; '' or what was wrong."""
        old: StoreProcess = getattr(self, name)
        code = old.exit_code()
        setattr(self, name, self._coming.pop(name).ready())
        wrong = "" if code == -signal.SIGKILL else f"the killed {name} ended with {code}"
        return self.meet() or wrong

    def refresh(self) -> None:
        """Ask the source for its present copies."""
        self.source.info, self.source.copies = self.source.call("describe")

    def begin(self, *, seconds: float, strike: Strike | None = None) -> Begun:
        """Read all copies; returns when bytes land and the strike is done."""
        begun: Begun = self.sink.call("read", "source", self.source.copies, seconds, strike)
        return begun

    def good(self, *, name: str = "a further read") -> list[str]:
        """Read everything; what is wrong with it."""
        self.begin(seconds=GOOD_S)
        report: Report = self.sink.call("wait")
        if set(report.statuses) == {"done"} and not report.corrupt:
            return []
        return [f"{name} ended as {report.statuses}, {report.corrupt} corrupt: {report.errors}"]

    def close(self) -> list[str]:
        """End both in good order, the reader first; what went wrong."""
        stores = [self.sink, self.source, *self._coming.values()]
        try:
            return [text for text in (store.ready().end() for store in stores) if text]
        finally:
            self.discard()

    def discard(self) -> None:
        """End both whatever their state."""
        for store in (self.sink, self.source, *self._coming.values()):
            store.discard()
        if self.lab is not None:
            self.lab.repair()


def _reuse(pair: Pair, result: Round) -> None:
    """Give every slot that came back to a canary, at once."""
    pair.sink.call("paint")
    result.wrong += pair.sink.call("check")


def _settle(pair: Pair, result: Round) -> None:
    """Every abandoned transfer ends and its slots return; no canary was touched meanwhile."""
    result.settle_s = pair.sink.call("settle", SETTLE_S)
    if result.settle_s < 0:
        result.wrong.append(f"slots are still in quarantine after {SETTLE_S:.0f} s")
    result.wrong += pair.sink.call("check")


def _after(pair: Pair, result: Round) -> Round:
    """A further read is good, and what was reused is still untouched, now and a round later."""
    result.wrong += pair.good()
    pair.sink.call("paint")
    result.wrong += pair.sink.call("check")
    result.wrong += [f"source: {text}" for text in pair.source.call("check")]
    return result


def source_killed(pair: Pair) -> Round:
    result = Round()
    pair.prepare("source")
    begun = pair.begin(seconds=2.0, strike=Strike(signal.SIGKILL, pair.source.pid))
    result.mid = begun.landing and begun.open
    result.take(pair.sink.call("wait"), allowed={"done", "failed"})
    _reuse(pair, result)
    _settle(pair, result)
    error = pair.replace("source")
    result.wrong += [error] if error else []
    return _after(pair, result)


def destination_killed(pair: Pair) -> Round:
    result = Round(statuses=["-"], mid=True)
    pair.prepare("sink")
    pair.sink.send("read", "source", pair.source.copies, 2.0, Strike(signal.SIGKILL, 0))
    error = pair.replace("sink")
    result.wrong += [error] if error else []
    return _after(pair, result)


def source_stopped(pair: Pair) -> Round:
    result = Round()
    begun = pair.begin(seconds=0.3, strike=Strike(signal.SIGSTOP, pair.source.pid))
    result.mid = begun.landing and begun.open
    if not pair.source.stopped():
        result.wrong.append("the source did not stop")
    result.take(pair.sink.call("wait"), allowed={"done", "timed_out"})
    _reuse(pair, result)
    pair.source.thaw()
    _settle(pair, result)
    return _after(pair, result)


def destination_stopped(pair: Pair) -> Round:
    result = Round()
    seconds = 0.3
    begin = time.monotonic_ns()
    pair.sink.send("read", "source", pair.source.copies, seconds, Strike(signal.SIGSTOP, 0))
    if not pair.sink.stopped():
        result.wrong.append("the sink did not stop")
    _pass(begin + int((seconds + 0.05) * 1e9))
    asleep_ns = time.monotonic_ns() - begin - int(seconds * 1e9)
    pair.sink.thaw()
    begun: Begun = pair.sink.answer()
    result.mid = begun.landing and begun.open
    result.take(pair.sink.call("wait"), allowed={"done", "timed_out"}, excuse_ns=asleep_ns)
    _reuse(pair, result)
    _settle(pair, result)
    return _after(pair, result)


def _while_landing(pair: Pair, *, allowed: set[str], order: str, argument: Any) -> Round:
    """The source does something while it is read."""
    result = Round()
    begun = pair.begin(seconds=2.0)
    pair.source.send(order, argument)
    result.mid = begun.landing and begun.open
    result.take(pair.sink.call("wait"), allowed=allowed)
    _reuse(pair, result)
    pair.source.answer()
    _settle(pair, result)
    pair.refresh()
    return result


def source_reuses(pair: Pair) -> Round:
    pair.seed += 100
    result = _while_landing(pair, allowed={"done", "stale"}, order="reuse", argument=pair.seed)
    return _after(pair, result)


def source_frees(pair: Pair) -> Round:
    pair.seed += 100
    result = _while_landing(pair, allowed={"done", "stale"}, order="free", argument=pair.seed)
    return _after(pair, result)


def byte_flipped(pair: Pair) -> Round:
    result = _while_landing(pair, allowed={"done", "stale"}, order="flip", argument=True)
    pair.source.call("flip", False)  # noqa: FBT003 - an order's argument
    return _after(pair, result)


def bit_flipped_on_the_wire(pair: Pair) -> Round:
    """A proxy between the two flips one bit; only plain sockets have no checksum of their own."""
    result, direct = Round(), pair.source.info
    host, port = msgspec.msgpack.decode(direct.backend_metadata)
    with Flipper((host, port), after_bytes=BLOCKS * NBYTES // 2) as proxy:
        pair.source.info = replace(direct, backend_metadata=msgspec.msgpack.encode(proxy.address))
        pair.meet()
        begun = pair.begin(seconds=5.0)
        report: Report = pair.sink.call("wait")
        result.mid = begun.landing and proxy.flipped.is_set()
        result.take(report, allowed={"done", "stale"})
        if report.statuses.count("stale") != 1:
            result.wrong.append("one flipped bit must make one block stale, and no other")
        _reuse(pair, result)
        _settle(pair, result)
        pair.source.info = direct
        pair.meet()
    return _after(pair, result)


def deadline_passes(pair: Pair) -> Round:
    result = Round()
    begun = pair.begin(seconds=0.008)
    result.mid = begun.landing and begun.open
    result.take(pair.sink.call("wait"), allowed={"done", "timed_out"})
    _reuse(pair, result)
    _settle(pair, result)
    return _after(pair, result)


def cancelled(pair: Pair) -> Round:
    result = Round()
    begun = pair.begin(seconds=2.0)
    pair.sink.call("cancel")
    result.mid = begun.landing and begun.open
    result.take(pair.sink.call("wait"), allowed={"done", "cancelled"})
    _reuse(pair, result)
    _settle(pair, result)
    return _after(pair, result)


def _slowly(pair: Pair, *, cut: bool, seconds: float) -> Round:
    """Begin a read over a slow cable, cut it perhaps, and judge the end."""
    result, lab = Round(), _lab(pair)
    lab.slow(400)  # 32 MiB take .7 s
    begun = pair.begin(seconds=seconds)
    if cut:
        lab.cut()
    result.mid = begun.landing and begun.open
    result.take(pair.sink.call("wait"), allowed={"timed_out", "failed"})
    _reuse(pair, result)
    return result


def link_cut_shortly(pair: Pair) -> Round:
    result, lab = _slowly(pair, cut=True, seconds=0.4), _lab(pair)
    lab.restore()
    lab.fast()
    _settle(pair, result)
    pair.meet()
    return _after(pair, result)


def link_cut_for_long(pair: Pair) -> Round:
    """The abandoned transfer must end although the network does not come back."""
    result, lab = _slowly(pair, cut=True, seconds=0.4), _lab(pair)
    _settle(pair, result)
    lab.restore()
    lab.fast()
    pair.meet()
    return _after(pair, result)


def link_cut_within_deadline(pair: Pair) -> Round:
    """Nobody gives up; the keepalive must end the read as FAILED before its deadline."""
    result, lab = Round(), _lab(pair)
    lab.slow(400)
    begun = pair.begin(seconds=SETTLE_S)
    lab.cut()
    result.mid = begun.landing and begun.open
    result.take(pair.sink.call("wait"), allowed={"failed"})
    _reuse(pair, result)
    _settle(pair, result)
    lab.restore()
    lab.fast()
    pair.meet()
    return _after(pair, result)


def link_slowed(pair: Pair) -> Round:
    result = _slowly(pair, cut=False, seconds=0.3)
    _settle(pair, result)
    _lab(pair).fast()
    return _after(pair, result)


def _lab(pair: Pair) -> NetLab:
    assert pair.lab is not None, "this event needs two network namespaces"
    return pair.lab


def _pass(until_ns: int) -> None:
    """Let time pass; nothing else is waited for."""
    threading.Event().wait(max(0, until_ns - time.monotonic_ns()) / 1e9)


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """One row of the matrix. `kills` names the store that does not survive a round.

    `must`: statuses that have to be seen in a run of several rounds, by kind of backend.
    """

    do: Callable[[Pair], Round]
    kills: str = ""
    must: dict[str, set[str]] = field(default_factory=dict)
    kinds: tuple[str, ...] = ()  # empty: every backend


_EMULATED: Final = ("nixl-tcp", "tcp")  # reads that need the source's processor
_STALE: Final = {"nixl": {"stale"}, "nixl-tcp": {"stale"}, "tcp": {"stale"}}

EVENTS: Final[dict[str, Event]] = {
    "source killed": Event(
        do=source_killed, kills="source", must={kind: {"failed"} for kind in _EMULATED}
    ),
    "destination killed": Event(do=destination_killed, kills="sink"),
    "source stopped": Event(
        do=source_stopped,
        must={kind: {"timed_out"} for kind in _EMULATED} | {"shm": {"done"}, "nixl": {"done"}},
    ),
    "destination stopped": Event(do=destination_stopped),
    "source reuses": Event(do=source_reuses, must=_STALE),
    "source frees": Event(do=source_frees, must=_STALE),
    "byte flipped": Event(do=byte_flipped, must=_STALE),
    "bit flipped on the wire": Event(
        do=bit_flipped_on_the_wire, must={"tcp": {"stale"}}, kinds=("tcp",)
    ),
    "deadline passes": Event(do=deadline_passes, must={kind: {"timed_out"} for kind in _EMULATED}),
    "cancelled": Event(do=cancelled, must={kind: {"cancelled"} for kind in _EMULATED}),
}

CABLE_EVENTS: Final[dict[str, Event]] = {
    "link cut shortly": Event(do=link_cut_shortly),
    "link cut for long": Event(do=link_cut_for_long),
    "link cut within deadline": Event(do=link_cut_within_deadline),
    "link slowed": Event(do=link_slowed),
}
