"""Walk recorded routing through a residency policy, and count what it cost.

Decides nothing: it does what a worker does, on a trace. Two ways: `timely`, where every transfer
ends at once (what could prediction and eviction reach?), and over a `Link`, where transfers take
time and a prefetch that lands late is waited for. Must not know files; the clock that times the
policy comes from the caller.

Per layer of a step: experts that are here compute first; missing ones are fetched, most tokens
first, and compute as they land. An expert that has computed may be evicted for the next one, so a
layer may need more experts than there are slots. The time of compute is `layer_ns`, spent after
the last one has landed; that the first could have computed meanwhile is left out. A fetch claims
its slot when the link is about to start it, demands first, and a prefetch that has not started
when its layer is routed is withdrawn. All of this holds for every policy alike.

Invariants: loads = demand + prefetched; the policy's books hold (`validate` at the end); with the
same trace, policy and link, every number but the policy's time is the same.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from hotset.policies.choose import prefetch_bar
from hotset.policies.linkmodel import Link
from hotset.policies.rivals.classic import Future
from hotset.policies.types import Reason, State

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    from hotset.policies.linkmodel import Landing, LinkSpec
    from hotset.policies.plan import LayerPlan, ResidencyPolicy

SLOT_BYTES = 2
"""Bytes of a block in the policy's books: replays count slots, the link counts `expert_bytes`."""
_AHEAD = 3
"""Layers ahead for which a fetch that fits into one layer's time may start."""
_IN_THE_WAY = 0.5
"""A prefetch in vain holds up demands for a chunk only; the rest of its time is lost to other
prefetches. So the link counts as half as busy as demand makes it."""
_AT_ONCE = 2
"""Transfers that hold slots: the one on the wire and the one after it."""
_GAIN = 0.05
"""Weight of the newest layer in the averages that steer prefetching, as in the worker."""


class Visit(NamedTuple):
    """One layer of one step: the distinct experts needed, and by how many tokens each."""

    row: int
    experts: list[int]
    counts: list[int]


class Steps(NamedTuple):
    """Requests side by side: `visits` in order, `rows` to a step."""

    visits: list[Visit]
    rows: int
    steps: int
    tokens: int
    requests: list[int]  # of each step; one request at a time only with batch 1


@dataclass(slots=True, kw_only=True)
class ReplayScore:
    """What a policy cost on a trace; times are ns, counts are totals."""

    visits: int = 0
    tokens: int = 0
    needs: int = 0
    hits: int = 0
    late: int = 0
    demand: int = 0
    prefetched: int = 0
    prefetch_used: int = 0
    withdrawn: int = 0
    stall_ns: int = 0
    total_ns: int = 0
    policy_ns: list[int] = field(default_factory=list)

    @property
    def hit_ratio(self) -> float:
        """Share of needed experts that were here in time."""
        return self.hits / max(1, self.needs)

    @property
    def demand_per_layer_step(self) -> float:
        """Fetches that compute had to ask for, by layer and step."""
        return self.demand / max(1, self.visits)

    @property
    def loads_per_layer_step(self) -> float:
        """All fetches, by layer and step."""
        return (self.demand + self.prefetched) / max(1, self.visits)

    @property
    def loads_per_token(self) -> float:
        """All fetches, by token."""
        return (self.demand + self.prefetched) / max(1, self.tokens)

    @property
    def stall_ns_per_token(self) -> float:
        """Time in which compute waited, by token."""
        return self.stall_ns / max(1, self.tokens)

    @property
    def prefetch_precision(self) -> float:
        """Share of prefetches that were used before they were evicted; 0 when there were none."""
        return self.prefetch_used / max(1, self.prefetched)

    @property
    def policy_ns_per_layer_step(self) -> int:
        """Median time of the policy's decisions for one layer of one step."""
        return int(np.median(self.policy_ns)) if self.policy_ns else 0


def line_up(experts: NDArray[np.integer], seq: NDArray[np.integer], *, batch: int) -> Steps:
    """Let `batch` sequences run side by side; a lane takes the next sequence when its own ends.

    `experts` is [tokens, L, k], `seq` [tokens] names the sequence; tokens of one are contiguous.
    """
    tokens, rows, _ = experts.shape
    cuts = [0, *(np.flatnonzero(np.diff(seq)) + 1).tolist(), tokens]
    waiting = [(start, end) for start, end in pairwise(cuts) if end > start]
    waiting.reverse()
    lanes: list[tuple[int, int]] = []
    visits: list[Visit] = []
    requests: list[int] = []
    steps = 0
    while True:
        lanes = [(at, end) for at, end in lanes if at < end]
        while waiting and len(lanes) < batch:
            lanes.append(waiting.pop())
        if not lanes:
            break
        here = experts[[at for at, _ in lanes]]
        visits += [_visit(row, here[:, row, :]) for row in range(rows)]
        requests.append(int(seq[lanes[0][0]]) if batch == 1 else 0)
        lanes = [(at + 1, end) for at, end in lanes]
        steps += 1
    return Steps(visits, rows, steps, tokens, requests)


def _visit(row: int, chosen: NDArray[np.integer]) -> Visit:
    if len(chosen) == 1:
        experts = chosen[0].tolist()
        if len(set(experts)) == len(experts):
            return Visit(row, experts, [1] * len(experts))
    counts: dict[int, int] = {}
    for expert in chosen.reshape(-1).tolist():
        counts[expert] = counts.get(expert, 0) + 1
    return Visit(row, list(counts), list(counts.values()))


def future_of(steps: Steps, *, num_experts: int) -> Future:
    """Return what offline policies may know of the line-up."""
    never = len(steps.visits) + 1
    uses = np.zeros((steps.rows, num_experts), dtype=np.int64)
    last = np.full((steps.rows, num_experts), never, dtype=np.int64)
    next_visit: list[NDArray[np.int64]] = []
    for at in range(len(steps.visits) - 1, -1, -1):
        row, experts, _ = steps.visits[at]
        next_visit.append(last[row, experts])
        last[row, experts] = at
        uses[row, experts] += 1
    next_visit.reverse()
    return Future(uses=uses, next_visit=next_visit)


@dataclass(frozen=True, slots=True, kw_only=True)
class Timing:
    """What takes how long: the link, the bytes of an expert on it, and compute of one layer."""

    link: LinkSpec
    expert_bytes: int = 12 << 20
    layer_ns: int = 400_000


class Replay:
    """One policy on one line-up."""

    def __init__(
        self,
        policy: ResidencyPolicy,
        steps: Steps,
        *,
        num_experts: int,
        timing: Timing | None = None,
        clock: Callable[[], int] | None = None,
    ) -> None:
        """`timing` None: transfers end at once. `clock` counts ns; None: nothing is timed."""
        self.policy = policy
        self.steps = steps
        self.score = ReplayScore()
        self._size = num_experts
        self._layer_ns = timing.layer_ns if timing is not None else 0
        self._clock = clock or (lambda: 0)
        self._link = Link(timing.link, block_bytes=timing.expert_bytes) if timing else None
        self._unused: set[int] = set()  # prefetched, not yet used
        self._demands: deque[int] = deque()  # wanted now, not yet on the link
        self._wishes: dict[int, None] = {}  # prefetches in order, not yet on the link
        self._waiting: set[int] = set()
        self._demand_mean = 0.0
        self._layer_mean_ns = float(max(1, self._layer_ns))
        self._spent = 0

    def run(self) -> ReplayScore:
        """Walk the whole trace."""
        score, rows = self.score, self.steps.rows
        score.tokens = self.steps.tokens
        score.visits = len(self.steps.visits)
        before = None
        for step, request in enumerate(self.steps.requests):
            if before is not None and request != before:
                self.policy.forget(before)
            before = request
            for visit in self.steps.visits[step * rows : (step + 1) * rows]:
                self._layer(visit, step=step, request=request)
        if self._link is not None:
            score.total_ns = self._link.now_ns
        self.policy.validate()
        return score

    # --- one layer of one step --------------------------------------------------------------

    def _layer(self, visit: Visit, *, step: int, request: int) -> None:
        if self._link is not None:
            self._steer(self._link)
        began = self._clock()
        plan = self.policy.routed(
            visit.row, visit.experts, visit.counts, step=step, request=request
        )
        self._spent = self._clock() - began
        self._count(visit, plan)
        base = visit.row * self._size
        if self._link is None:
            self._fetch_at_once(base, plan)
        else:
            self._fetch_over(self._link, base, plan)
        self.score.policy_ns.append(self._spent)

    def _count(self, visit: Visit, plan: LayerPlan) -> None:
        score = self.score
        score.needs += len(visit.experts)
        score.hits += len(plan.resident)
        score.late += len(plan.arriving)
        score.demand += len(plan.missing)
        if self._unused:
            base = visit.row * self._size
            for expert in visit.experts:
                if base + expert in self._unused:
                    self._unused.discard(base + expert)
                    score.prefetch_used += 1

    def _fetch_at_once(self, base: int, plan: LayerPlan) -> None:
        for expert in plan.missing:
            claimed = self._claim(base + expert, Reason.DEMAND)
            assert claimed, "nothing is pinned or on its way"  # noqa: S101 - our own bug
            self.policy.landed(*divmod(base + expert, self._size))
        for layer, expert in plan.prefetch:
            if self._claim(layer * self._size + expert, Reason.PREFETCH):
                self.policy.landed(layer, expert)

    def _fetch_over(self, link: Link, base: int, plan: LayerPlan) -> None:
        start_ns = link.now_ns
        self._withdraw(base)
        if plan.missing or plan.arriving:
            self._land(link.finish_chunk())
        for expert in plan.arriving:
            if self.policy.format(*divmod(base + expert, self._size)) is None:
                self._waiting.add(base + expert)
                link.demand(base + expert)
        self._demands.extend(base + expert for expert in plan.missing)
        self._waiting.update(self._demands)
        for layer, expert in plan.prefetch:
            self._wishes[layer * self._size + expert] = None
        self._feed(link)
        while self._waiting:
            self._land(link.next_landing())
            self._feed(link)
        stall_ns = link.now_ns - start_ns
        self.score.stall_ns += stall_ns
        self._demand_mean += _GAIN * (len(plan.missing) - self._demand_mean)
        self._layer_mean_ns += _GAIN * (self._layer_ns + stall_ns - self._layer_mean_ns)
        end_ns = link.now_ns + self._layer_ns
        while link.now_ns < end_ns:
            self._land(link.next_landing(end_ns))
            self._feed(link)

    def _feed(self, link: Link) -> None:
        """Claim slots for what the link is about to carry."""
        while self._demands and link.demands < _AT_ONCE:
            if not self._claim(self._demands[0], Reason.DEMAND):
                return  # every slot is on its way: one will land
            link.demand(self._demands.popleft())
        while self._wishes and link.transfers < _AT_ONCE:
            flat = next(iter(self._wishes))
            del self._wishes[flat]
            if self._claim(flat, Reason.PREFETCH):
                link.prefetch(flat)

    def _withdraw(self, base: int) -> None:
        """The layer has been routed: what was wished for it is demanded or of no use."""
        row = base // self._size
        stale = [flat for flat in self._wishes if flat // self._size == row]
        for flat in stale:
            del self._wishes[flat]
        self.score.withdrawn += len(stale)

    def _steer(self, link: Link) -> None:
        """Tell the policy what the link bears, as the worker does."""
        block_ns, layer_ns = link.block_ns, self._layer_ns
        busy_ratio = min(1.0, self._demand_mean * block_ns / self._layer_mean_ns)
        chance = prefetch_bar(
            fetch_ns=block_ns, ahead_ns=layer_ns, busy_ratio=_IN_THE_WAY * busy_ratio
        )
        idle_ns = layer_ns - link.queued_ns - len(self._wishes) * block_ns
        most = max(0, -(-idle_ns // block_ns))
        self.policy.steer(
            chance, most=most, ahead=_AHEAD + block_ns // layer_ns, missed_ns=block_ns
        )

    # --- slots ------------------------------------------------------------------------------

    def _claim(self, flat: int, reason: Reason) -> bool:
        """Make room and claim it; False when everything is pinned or on its way."""
        policy = self.policy
        layer, expert = divmod(flat, self._size)
        if reason is Reason.PREFETCH and policy.state(layer, expert) is not State.STORED:
            return False  # it has come, or is coming, since it was wished for
        while not policy.room(SLOT_BYTES):
            began = self._clock()
            victim = policy.victim(SLOT_BYTES)
            self._spent += self._clock() - began
            if victim is None:
                return False
            policy.dropped(victim.layer, victim.expert)
            self._unused.discard(victim.layer * self._size + victim.expert)
        policy.in_flight(layer, expert, reason=reason)
        if reason is Reason.PREFETCH:
            self.score.prefetched += 1
            self._unused.add(flat)
        return True

    def _land(self, landing: Landing | None) -> None:
        """A block has arrived; if compute waited for it, it computes at once."""
        if landing is not None:
            self.policy.landed(*divmod(landing.key, self._size))
            self._waiting.discard(landing.key)
