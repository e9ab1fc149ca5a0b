"""One link's schedule: windows by earliest deadline, three services, admission.

Decides which transfer a link carries next, which it refuses, and when background work pauses. Must
not know what a block is for, clocks or how bytes move: all times are given. The same schedule runs
in the brain (which drains can still be kept?) and in the simulation (as the link itself).

Earliest deadline first (Liu and Layland 1973), preempted at chunks. Services in order:

    IMMINENT    compute waits or will wait in this layer; never refused
    STAGING     must land by a deadline: prefetches, drains; refused when it cannot
    BACKGROUND  whenever the link is free: spills, replicas, rebalancing; paused under pressure

Admission is the processor demand test (Baruah, Rosier, Howell 1990): at each deadline the work that
has to be done by then must fit into the share of the time that the service may book. What staging
may not book stays free for imminent promotions, so that one that comes later finds room.

Invariants: an imminent transfer waits for lower services for one chunk at most; each transfer ends
once, landed or cancelled; without later imminent work, all that was admitted lands in time; the
same calls give the same times.
"""

from __future__ import annotations

import heapq
from collections import Counter
from dataclasses import dataclass
from enum import IntEnum
from typing import TYPE_CHECKING, NamedTuple

from hotset.policies.linkmodel import CHUNK_BYTES, Landing
from hotset.policies.types import Reason

if TYPE_CHECKING:
    from hotset.policies.linkmodel import LinkSpec

_PERMILLE = 1000


class Service(IntEnum):
    """How urgent a transfer is; lower goes first."""

    IMMINENT = 0
    STAGING = 1
    BACKGROUND = 2


_SERVICES = {
    Reason.DEMAND: Service.IMMINENT,
    Reason.PREFETCH: Service.STAGING,
    Reason.DRAIN: Service.STAGING,
    Reason.LOST: Service.STAGING,
    Reason.WARM: Service.STAGING,
    Reason.JOINED: Service.STAGING,
}


def service_of(reason: Reason) -> Service:
    """Return the service of a transfer; what nobody waits for is background."""
    return _SERVICES.get(reason, Service.BACKGROUND)


class Window(NamedTuple):
    """A transfer must run within it: `start_ns` is the latest start, `end_ns` the next use."""

    start_ns: int
    end_ns: int


class Refused(NamedTuple):
    """A transfer that was not admitted, and the bound that this protects."""

    reason: Reason
    bound: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ScheduleConfig:
    """Shares of a link and the bounds of pressure, in thousandths; a test's window in ns."""

    imminent_share: int = 250
    """What staging and background may not book, kept for imminent promotions."""
    staging_share: int = 250
    """What background with a deadline may not book either, kept for staging."""
    margin: int = 100
    """Added to each estimate of a transfer's time."""
    pause_at: int = 700
    """Share of a window that imminent transfers occupy above which background work pauses."""
    resume_at: int = 500
    """Share below which it goes on: hysteresis, so that it does not flutter at the bound."""
    window_ns: int = 10_000_000
    """Time over which pressure is measured."""
    chunk_bytes: int = CHUNK_BYTES
    """What an imminent transfer may have to wait for."""


@dataclass(slots=True)
class _Job:
    key: int
    service: Service
    due_ns: int
    serial: int
    left_ns: int

    def order(self) -> tuple[int, int, int]:
        return (self.service, self.due_ns, self.serial)


_NEVER = 1 << 62


class LinkSchedule:
    """Transfers on one link; `key` names a transfer and is used once at a time."""

    def __init__(self, spec: LinkSpec, *, config: ScheduleConfig | None = None) -> None:
        """Start idle at time 0."""
        self.spec = spec
        self.config = config or ScheduleConfig()
        self.free_ns = 0
        """When the chunk on the wire ends; nothing else can start before."""
        self.busy_ns = 0
        self.demand_ns = 0
        self.paused = False
        self._jobs: dict[int, _Job] = {}
        self._order: list[tuple[tuple[int, int, int], int]] = []  # heap; ended jobs lie in it
        self._left: Counter[tuple[Service, int]] = Counter()  # ns by service and deadline
        self._landed: Landing | None = None
        self._serial = 0
        chunk = self.config.chunk_bytes
        self.chunk_ns = max(1, -(-chunk * 1_000_000_000 // spec.bandwidth_bytes_per_s))
        self._window_end_ns = self.config.window_ns
        self._window_demand_ns = 0

    # --- asking ---------------------------------------------------------------------------------

    def __len__(self) -> int:
        """Transfers queued or on the wire."""
        return len(self._jobs) + (self._landed is not None)

    def __contains__(self, key: int) -> bool:
        """Whether this transfer has not ended yet."""
        return key in self._jobs or (self._landed is not None and self._landed.key == key)

    def window(self, nbytes: int, *, due_ns: int, decode_ns: int = 0) -> Window:
        """Transfer, decode and margin before the next use at `due_ns`."""
        return Window(due_ns - self._estimate_ns(nbytes) - decode_ns, due_ns)

    def can(
        self,
        service: Service,
        *,
        nbytes: int,
        now_ns: int,
        due_ns: int = 0,
        victim_due_ns: int | None = None,
    ) -> Refused | None:
        """Say why a transfer is not admitted; None: it is. Call `advance` up to `now_ns` first.

        `due_ns` 0: it has no deadline. `victim_due_ns` is the next use of what it would displace.
        """
        if victim_due_ns is not None and victim_due_ns <= (due_ns or _NEVER):
            return Refused(
                Reason.VETO_SOONER,
                f"what it would displace is needed at {victim_due_ns} ns, before {due_ns or '-'}",
            )
        if service is Service.IMMINENT or not due_ns:
            return None
        need_ns = self._estimate_ns(nbytes)
        start_ns = max(now_ns, self.free_ns)
        first = sum(left_ns for (other, _), left_ns in self._left.items() if other < service)
        rivals = sorted(
            (rival_due_ns, left_ns)
            for (other, rival_due_ns), left_ns in self._left.items()
            if other == service and rival_due_ns < _NEVER
        )
        share = self._share(service)
        work_ns = first + need_ns
        for rival_due_ns, left_ns in rivals:
            if rival_due_ns <= due_ns:
                work_ns += left_ns
        refused = self._late(start_ns, work_ns, due_ns, now_ns=now_ns, share=share)
        for rival_due_ns, left_ns in rivals:
            if refused is not None or rival_due_ns <= due_ns:
                continue
            work_ns += left_ns
            refused = self._late(start_ns, work_ns, rival_due_ns, now_ns=now_ns, share=share)
        return refused

    # --- changing -------------------------------------------------------------------------------

    def add(self, key: int, service: Service, *, nbytes: int, now_ns: int, due_ns: int = 0) -> None:
        """Queue a transfer. Call `advance` up to `now_ns` first: what has landed is not lost."""
        assert key not in self, f"{key} is on its way"  # noqa: S101 - our own bug
        self._serial += 1
        if not self._jobs:
            self.free_ns = max(self.free_ns, now_ns)
        left_ns = self.spec.transfer_ns(nbytes)
        self._enter(_Job(key, service, due_ns or _NEVER, self._serial, left_ns))

    def hasten(self, key: int) -> None:
        """Compute waits for a queued transfer now; what has been carried stays carried."""
        job = self._jobs.get(key)
        if job is not None:
            self._leave(job)
            job.service = Service.IMMINENT
            self._enter(job)

    def cancel(self, key: int) -> bool:
        """Take back a transfer; False when it has landed or is unknown. A chunk ends first."""
        job = self._jobs.get(key)
        if job is not None:
            self._leave(job)
        return job is not None

    def measured(self, spec: LinkSpec) -> None:
        """The link has turned out to be this fast; what is queued keeps its estimate."""
        self.spec = spec
        chunk = self.config.chunk_bytes
        self.chunk_ns = max(1, -(-chunk * 1_000_000_000 // spec.bandwidth_bytes_per_s))

    def next_landing_ns(self) -> int | None:
        """When the next transfer lands if nothing is added; None: nothing will.

        With nothing but paused work: when its pause may end.
        """
        if self._landed is not None:
            return self._landed.at_ns
        job = self._pick()
        if job is None:
            return max(self.free_ns, self._window_end_ns) if self._jobs else None
        return self.free_ns + job.left_ns

    def advance(self, until_ns: int) -> Landing | None:
        """Run until a transfer has landed, at most until `until_ns`; None: none has by then.

        Stops at the end of the chunk that is on the wire at `until_ns`.
        """
        if self._landed is not None:
            return self._hand_over(until_ns)
        while self.free_ns < until_ns or (self.free_ns == until_ns and self._ready()):
            job = self._pick()
            if job is None:  # idle, or all that is left is paused: then look again in time
                soon_ns = min(until_ns, self._window_end_ns) if self._jobs else until_ns
                self.free_ns = max(self.free_ns, soon_ns)
                self._measure(self.free_ns)
                if self._jobs and self.free_ns < until_ns:
                    continue
                return None
            spell_ns = job.left_ns
            if self.free_ns + spell_ns > until_ns:
                chunks = -(-(until_ns - self.free_ns) // self.chunk_ns)
                spell_ns = min(spell_ns, chunks * self.chunk_ns)
            self._carry(job, spell_ns)
            if not job.left_ns:
                self._leave(job)
                self._landed = Landing(job.key, self.free_ns)
                return self._hand_over(until_ns)
        return None

    def pressure(self, busy_permille: int) -> None:
        """Pause or resume background work by the share of time that imminent work takes."""
        bound = self.config.resume_at if self.paused else self.config.pause_at
        self.paused = busy_permille > bound

    # --- inside ---------------------------------------------------------------------------------

    def _ready(self) -> bool:
        job = self._pick()
        return job is not None and job.left_ns == 0

    def _hand_over(self, until_ns: int) -> Landing | None:
        landing = self._landed
        if landing is None or landing.at_ns > until_ns:
            return None
        self._landed = None
        return landing

    def _enter(self, job: _Job) -> None:
        self._jobs[job.key] = job
        self._left[job.service, job.due_ns] += job.left_ns
        heapq.heappush(self._order, (job.order(), job.key))

    def _leave(self, job: _Job) -> None:
        del self._jobs[job.key]
        self._take_off(job, job.left_ns)

    def _take_off(self, job: _Job, ns: int) -> None:
        group = (job.service, job.due_ns)
        self._left[group] -= ns
        if not self._left[group]:
            del self._left[group]

    def _pick(self) -> _Job | None:
        while self._order:
            order, key = self._order[0]
            job = self._jobs.get(key)
            if job is not None and job.order() == order:
                return None if self.paused and job.service is Service.BACKGROUND else job
            heapq.heappop(self._order)
        return None

    def _carry(self, job: _Job, spell_ns: int) -> None:
        job.left_ns -= spell_ns
        self._take_off(job, spell_ns)
        self.free_ns += spell_ns
        self.busy_ns += spell_ns
        if job.service is Service.IMMINENT:
            self.demand_ns += spell_ns
            self._window_demand_ns += spell_ns
        self._measure(self.free_ns)

    def _measure(self, now_ns: int) -> None:
        """Compare a window's demand with the bounds once the window is over."""
        if now_ns < self._window_end_ns:
            return
        window_ns = self.config.window_ns
        span_ns = window_ns + now_ns - self._window_end_ns
        self.pressure(self._window_demand_ns * _PERMILLE // span_ns)
        self._window_demand_ns = 0
        self._window_end_ns = now_ns + window_ns

    def _estimate_ns(self, nbytes: int) -> int:
        plain_ns = self.spec.transfer_ns(nbytes)
        return plain_ns + plain_ns * self.config.margin // _PERMILLE

    def _share(self, service: Service) -> int:
        kept = self.config.imminent_share
        if service is Service.BACKGROUND:
            kept += self.config.staging_share
        return _PERMILLE - kept

    def _late(
        self, start_ns: int, work_ns: int, due_ns: int, *, now_ns: int, share: int
    ) -> Refused | None:
        """Whether work up to a deadline exceeds the time, or the share of it that may be booked."""
        left_ns = min(due_ns - start_ns, (due_ns - now_ns) * share // _PERMILLE)
        if work_ns <= left_ns:
            return None
        return Refused(
            Reason.VETO_LATE,
            f"{work_ns} ns of transfers are due at {due_ns} ns, {max(0, left_ns)} ns may be booked",
        )
