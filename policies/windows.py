"""Windows of what the brain has asked for, on the links of the stores that it is read from.

Decides what is admitted: a read that cannot land by its deadline in the share of the link that its
service may book, or that would displace a copy needed sooner, is refused with the bound. Must not
know stores, blocks or why a read is wanted. Each source's link is a `schedule.LinkSchedule`, fed
with what readers have measured; demand is not modelled, its share is kept free instead.

Invariants: a booking ends with its read, however that ends; a paused link carries no background
work; equal calls give equal answers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from hotset.policies.schedule import LinkSchedule, Refused, ScheduleConfig, Service
from hotset.policies.types import Format, Reason

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator

    from hotset.policies.linkmodel import LinkSpec

_CONFIG = ScheduleConfig(window_ns=1 << 60)  # who is pressed is told from outside


class Key(NamedTuple):
    """A read: who gets which block in which format."""

    store: str
    flat: int
    format: Format


class Read(NamedTuple):
    """What a read asks of a link. `due_ns` 0: whenever the link is free."""

    source: str
    spec: LinkSpec
    service: Service
    nbytes: int
    due_ns: int = 0


class Windows:
    """Bookings by read."""

    def __init__(self) -> None:
        """Nothing is booked."""
        self._links: dict[str, LinkSchedule] = {}
        self._booked: dict[Key, tuple[str, int]] = {}
        self._serial = 0

    def __iter__(self) -> Iterator[Key]:
        """Reads that are booked."""
        return iter(self._booked)

    def __contains__(self, key: Key) -> bool:
        """Whether this read is booked."""
        return key in self._booked

    def admit(self, key: Key, read: Read, *, now_ns: int, judged: bool) -> Refused | None:
        """Book a read, or say why not; with `judged` off it is booked in any case."""
        link = self._link(read, now_ns=now_ns)
        if judged:
            refused = link.can(read.service, nbytes=read.nbytes, now_ns=now_ns, due_ns=read.due_ns)
            if refused is not None:
                return refused
        self.end(key)
        self._serial += 1
        link.add(self._serial, read.service, nbytes=read.nbytes, now_ns=now_ns, due_ns=read.due_ns)
        self._booked[key] = (read.source, self._serial)
        return None

    def end(self, key: Key) -> None:
        """A read has ended, or is not wanted any more."""
        source, serial = self._booked.pop(key, ("", 0))
        if serial:
            self._links[source].cancel(serial)

    def end_all(self, store: str) -> None:
        """Nothing is read by this store any more."""
        for key in [key for key in self._booked if key.store == store]:
            self.end(key)

    def pause(self, pressed: Collection[str], *, now_ns: int) -> None:
        """Compute keeps these sources busy: their background work waits from now on."""
        for source, link in self._links.items():
            _run(link, now_ns=now_ns)
            link.paused = source in pressed

    def _link(self, read: Read, *, now_ns: int) -> LinkSchedule:
        link = self._links.get(read.source)
        if link is None:
            link = self._links[read.source] = LinkSchedule(read.spec, config=_CONFIG)
        _run(link, now_ns=now_ns)
        if link.spec != read.spec:
            link.measured(read.spec)
        return link


def sooner(next_use_ns: int, *, victim_use_ns: int) -> Refused | None:
    """Refuse a copy that would displace one whose next use comes before its own."""
    if victim_use_ns > next_use_ns:
        return None
    return Refused(
        Reason.VETO_SOONER,
        f"what it would displace is used every {victim_use_ns} ns, it itself every {next_use_ns}",
    )


def _run(link: LinkSchedule, *, now_ns: int) -> None:
    """Let time pass on a link; what lands by the model is still waited for."""
    while link.advance(now_ns) is not None:
        pass
