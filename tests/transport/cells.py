"""The cells of the kill matrix: one event each, done to a transfer that is under way.

An event takes a pair of stores through one round: a read or a write begins, something happens while
its bytes land, the result is judged, every slot that was given back is reused at once and watched,
and a further transfer must be good. A round ends with the list of what was wrong; nothing is
asserted here, so the long run counts and the tests judge.
"""

from __future__ import annotations

import signal
import threading
import time
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Final

import msgspec

from tests.transport.netlab import Flipper
from tests.transport.pair import BLOCKS, NBYTES, Pair, Round
from tests.transport.stores import Begun, Report, Strike

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.transport.netlab import NetLab

SETTLE_S: Final = 25.0  # an abandoned transfer has ended by then, even by a keepalive


def _reuse(pair: Pair, result: Round) -> None:
    """Give every slot that came back to a canary, at once."""
    pair.sink.call("paint")
    result.wrong += pair.sink.call("check")


def _settle(pair: Pair, result: Round) -> None:
    """Every abandoned transfer ends and its slots return; no canary was touched meanwhile."""
    result.settle_s = pair.sink.call("settle", SETTLE_S)
    if result.settle_s < 0:
        held = pair.sink.call("holds")
        raise RuntimeError(f"slots have not returned after {SETTLE_S:.0f} s: {held}, {result}")
    result.wrong += pair.sink.call("check")


def _after(pair: Pair, result: Round) -> Round:
    """A further read is good, and what was reused is still untouched, now and a round later."""
    wrong = pair.good(tries=3 if pair.writes and pair.lab else 1)
    if wrong and pair.source.call("fault"):
        result.statuses.append("parked")
        wrong = pair.renew_source() + pair.good()
    result.wrong += wrong
    pair.sink.call("paint")
    result.wrong += pair.sink.call("check")
    result.wrong += [f"source: {text}" for text in pair.source.call("check")]
    return result


def source_killed(pair: Pair) -> Round:
    result = Round()
    pair.prepare("source")
    begun = pair.begin(seconds=2.0, strike=Strike(signal.SIGKILL, pair.source.pid))
    result.mid = begun.landing and begun.open
    result.take(pair.report(source_lives=False), allowed={"done", "failed"})
    _reuse(pair, result)
    _settle(pair, result)
    error = pair.replace("source")
    result.wrong += [error] if error else []
    return _after(pair, result)


def destination_killed(pair: Pair) -> Round:
    result = Round(statuses=["-"], mid=True)
    pair.prepare("sink")
    pair.launch(seconds=2.0, strike=Strike(signal.SIGKILL, 0))
    if pair.writes:
        result.take(pair.report(sink_lives=False), allowed={"done", "failed", "timed_out"})
    error = pair.replace("sink")
    result.wrong += [error] if error else []
    return _after(pair, result)


def source_stopped(pair: Pair) -> Round:
    result = Round()
    begun = pair.begin(seconds=0.3, strike=Strike(signal.SIGSTOP, pair.source.pid))
    result.mid = begun.landing and begun.open
    if not pair.source.stopped():
        result.wrong.append("the source did not stop")
    if pair.writes:  # the sink alone can tell until the source runs again
        _pass(time.monotonic_ns() + 400_000_000)
        pair.source.thaw()
        result.take(pair.report(), allowed={"done", "timed_out"})
        _reuse(pair, result)
    else:
        result.take(pair.report(), allowed={"done", "timed_out"})
        _reuse(pair, result)
        pair.source.thaw()
    _settle(pair, result)
    return _after(pair, result)


def destination_stopped(pair: Pair) -> Round:
    result = Round()
    seconds = 0.3
    begin = time.monotonic_ns()
    pair.launch(seconds=seconds, strike=Strike(signal.SIGSTOP, 0))
    if not pair.sink.stopped():
        result.wrong.append("the sink did not stop")
    _pass(begin + int((seconds + 0.05) * 1e9))
    asleep_ns = time.monotonic_ns() - begin - int(seconds * 1e9)
    pair.sink.thaw()
    begun: Begun = pair.sink.answer()
    result.mid = begun.landing and begun.open
    result.take(pair.report(), allowed={"done", "timed_out"}, excuse_ns=asleep_ns)
    _reuse(pair, result)
    _settle(pair, result)
    return _after(pair, result)


def _while_landing(pair: Pair, *, allowed: set[str], order: str, argument: Any) -> Round:
    """The source does something while its copies are under way."""
    result = Round()
    begun = pair.begin(seconds=2.0)
    pair.source.send(order, argument)
    result.mid = begun.landing and begun.open
    if pair.writes:  # it tells of its offers after that
        pair.source.answer()
    result.take(pair.report(), allowed=allowed)
    _reuse(pair, result)
    if not pair.writes:
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
    pair.source.call("flip", False)
    return _after(pair, result)


def bit_flipped_on_the_wire(pair: Pair) -> Round:
    """A proxy between the two flips one bit; only plain sockets have no checksum of their own."""
    result, direct = Round(), pair.source.info
    host, port = msgspec.msgpack.decode(direct.backend_metadata)
    with Flipper((host, port), after_bytes=BLOCKS * NBYTES // 2) as proxy:
        pair.source.info = replace(direct, backend_metadata=msgspec.msgpack.encode(proxy.address))
        pair.meet()
        begun = pair.begin(seconds=5.0)
        report: Report = pair.report()
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
    begun = pair.begin(seconds=0.03 if pair.writes else 0.008)
    result.mid = begun.landing and begun.open
    result.take(pair.report(), allowed={"done", "timed_out"})
    _reuse(pair, result)
    _settle(pair, result)
    return _after(pair, result)


def cancelled(pair: Pair) -> Round:
    result = Round()
    begun = pair.begin(seconds=2.0)
    pair.sink.call("cancel")
    result.mid = begun.landing and begun.open
    result.take(pair.report(), allowed={"done", "cancelled"})
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
    report = pair.report()
    result.take(report, allowed={"done", "timed_out", "failed"})
    if set(report.statuses) == {"done"}:
        result.wrong.append("everything arrived over a link that could not carry it in time")
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
    result.take(pair.report(), allowed={"done", "failed"})
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
    reads_only: bool = False
    reads_must: bool = False  # of writes nothing is demanded: only the source knew, or it depends

    def fits(self, kind: str, *, writes: bool) -> bool:
        """Whether the event makes sense there."""
        return (not self.kinds or kind in self.kinds) and not (writes and self.reads_only)


_EMULATED: Final = ("nixl-tcp", "tcp")  # reads that need the source's processor
_STALE: Final = {"nixl": {"stale"}, "nixl-tcp": {"stale"}, "tcp": {"stale"}}

EVENTS: Final[dict[str, Event]] = {
    "source killed": Event(
        do=source_killed,
        kills="source",
        reads_must=True,
        must={kind: {"failed"} for kind in _EMULATED},
    ),
    "destination killed": Event(do=destination_killed, kills="sink"),
    "source stopped": Event(
        do=source_stopped,
        reads_must=True,
        must={kind: {"timed_out"} for kind in _EMULATED} | {"shm": {"done"}, "nixl": {"done"}},
    ),
    "destination stopped": Event(do=destination_stopped),
    "source reuses": Event(do=source_reuses, must=_STALE),
    "source frees": Event(do=source_frees, must=_STALE),
    "byte flipped": Event(do=byte_flipped, must=_STALE),
    "bit flipped on the wire": Event(
        do=bit_flipped_on_the_wire, must={"tcp": {"stale"}}, kinds=("tcp",), reads_only=True
    ),
    "deadline passes": Event(
        do=deadline_passes, reads_must=True, must={kind: {"timed_out"} for kind in _EMULATED}
    ),
    "cancelled": Event(
        do=cancelled, reads_only=True, must={kind: {"cancelled"} for kind in _EMULATED}
    ),
}

CABLE_EVENTS: Final[dict[str, Event]] = {
    "link cut shortly": Event(do=link_cut_shortly),
    "link cut for long": Event(do=link_cut_for_long),
    "link cut within deadline": Event(do=link_cut_within_deadline),
    "link slowed": Event(do=link_slowed),
}
