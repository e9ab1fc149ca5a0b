"""A cluster in discrete events: the same brain and the same device policies, on modelled links.

Decides nothing itself: workers ask their residency policy, the brain is told what happens and its
commands are carried out, links follow `LinkSchedule`. Must not know files, clocks or Ray; all
randomness comes from the seed of the workload it is given.

A worker runs one request: layer by layer it asks its policy, fetches what is missing from the
cheapest store that holds it (or sends the tokens to a peer), computes what is here, waits for the
rest and computes it as it lands. Stall is what it waits when it has nothing left to compute. A
store's link serves one transfer at a time, so readers contend. What a read costs beside the link
(software at both ends) is its overhead: it delays the landing and occupies nothing. Prefetching is
steered by the same `LinkLoad` as in a worker, trial included, fed with simulated times. The first
fill takes no time: runs are compared once they are warm.

Invariants: no event happens before one that has happened; every transfer ends once; bytes that were
sent are bytes that arrived, or belong to a lost store; the same input gives the same figures.
"""

from __future__ import annotations

import heapq

from hotset.policies.simcluster import SimCluster
from hotset.policies.simspec import (
    Fault,
    SimScore,
    SimWorker,
)
from hotset.policies.types import (
    BlockId,
    Concurrency,
    Format,
    LayerTimes,
    Reason,
    Replan,
    RouterCounts,
    State,
    StoreLost,
    Tick,
)

_AT_ONCE_PREFETCHES = 4
"""Prefetches of one worker on their way at once; those that wait are withdrawn when their layer
comes."""


class Simulation(SimCluster):
    """One run."""

    def run(self) -> SimScore:
        """Fill, run every worker's tokens, return the totals."""
        for store in sorted(self.spec.stores, key=lambda store: (-store.tier, store.name)):
            self._join(store)
        self._warm = False
        for fault in self.spec.faults:
            self._at(fault.at_ns, "fault", fault)
        for worker in self._workers.values():
            self._at(self.now_ns, "layer", worker)
        self._at(self.now_ns + self.brain.config.tick_ns, "tick", None)
        if self.brain.config.plan_ns:
            self._at(self.now_ns + self.brain.config.plan_ns, "plan", None)
        while self._running and self._agenda:
            at_ns, _, kind, what = heapq.heappop(self._agenda)
            assert at_ns >= self.now_ns, (at_ns, self.now_ns)  # noqa: S101 - our own bug
            self.now_ns = at_ns
            self.score.events += 1
            self._happen(kind, what)
        for worker in self._workers.values():
            worker.policy.validate()
        self.brain.validate()
        self.score.end_ns = self.now_ns
        return self.score

    # --- the agenda -----------------------------------------------------------------------------

    def _happen(self, kind: str, what: object) -> None:
        if isinstance(what, SimWorker):
            (self._layer if kind == "layer" else self._computed)(what)
        elif kind == "link":
            self._run_link(str(what))
        elif kind == "landed":
            assert isinstance(what, int)  # noqa: S101 - our own bug
            self._landed(what)
        elif kind == "answer":
            assert isinstance(what, tuple)  # noqa: S101 - our own bug
            worker, flats = what
            for flat in flats:
                self._arrived(worker, flat)
        elif kind == "fault":
            assert isinstance(what, Fault)  # noqa: S101 - our own bug
            self._fail(what)
        elif kind == "back":
            self._join(self._specs[str(what)])
        elif kind == "plan":
            self._tell(Replan(now_ns=self.now_ns))
            self._at(self.now_ns + self.brain.config.plan_ns, "plan", None)
        else:
            self._tell(Tick(now_ns=self.now_ns))
            self._at(self.now_ns + self.brain.config.tick_ns, "tick", None)

    def _scored(self, worker: SimWorker) -> bool:
        return worker.at not in self._unscored

    # --- a worker's layer -----------------------------------------------------------------------

    def _layer(self, worker: SimWorker) -> None:
        if not worker.alive:
            return
        row, experts = worker.row, worker.visits[worker.at][worker.row]
        if row == 0:
            worker.step_began_ns, worker.step_stall_ns = self.now_ns, 0
        counts = [1] * len(experts)
        self._steer(worker)
        if row == 0:
            needs = sum(len(experts) for experts in worker.visits[worker.at])
            worker.tokens = 1 if needs <= worker.usual else 2
        plan = worker.policy.routed(self._layers[row], experts, counts, step=worker.at, request=1)
        worker.fetches = worker.started = worker.stall_ns = 0
        base = row * self._size
        for expert in experts:
            worker.counts[base + expert] = worker.counts.get(base + expert, 0) + 1
        scored = self._scored(worker)
        self.score.needs += len(experts) * scored
        self.score.hits += len(plan.resident) * scored
        worker.began_ns = self.now_ns
        worker.waiting = {base + expert for expert in (*plan.arriving, *plan.missing)}
        worker.busy_ns = self.now_ns
        worker.covers.clear()
        if self._visits and worker.waiting:
            self._cover(worker, arriving=plan.arriving)
        for expert in plan.arriving:
            self._hasten(worker, base + expert)
        flats = [base + expert for expert in plan.missing]
        sent = [flat for flat in flats if self._demand(worker, flat)]
        if sent:
            self._at(self.now_ns + self.spec.dispatch_ns, "answer", (worker, sent))
        for layer, expert in plan.prefetch:
            self._prefetch(worker, self._rows[layer] * self._size + expert)
        if not worker.waiting:
            self._compute(worker)

    def _cover(self, worker: SimWorker, *, arriving: list[int]) -> None:
        """Draw a measured visit for what this layer waits for; what comes anyway is so covered."""
        worker.drawn = self._draw(len(worker.waiting))
        base = worker.row * self._size
        for expert in arriving:
            worker.covers[base + expert] = self.now_ns + worker.drawn[0].cover_ns

    def _steer(self, worker: SimWorker) -> None:
        """Tell the policy when prefetches pay, as a worker does."""
        if worker.layer_began_ns:
            worker.load.observe(
                layer_ns=self.now_ns - worker.layer_began_ns,
                stall_ns=worker.stall_ns,
                fetches=worker.fetches,
                started=worker.started,
                tokens=worker.tokens,
            )
        worker.layer_began_ns = self.now_ns
        worker.policy.steer(worker.load.bar(fetch_ns=self._fetch_ns))

    def _demand(self, worker: SimWorker, flat: int) -> bool:
        """Fetch the block; True: its tokens go to a peer instead, which costs less."""
        dispatch_ns = self.spec.dispatch_ns
        source = None
        if dispatch_ns and self._peer(worker.name, flat) is not None:
            # What costs less than the cheapest read on an idle link needs no comparison.
            source = None if dispatch_ns < self._idle_ns else self._cheapest(worker.name, flat)
            if source is None or dispatch_ns < source.wait_ns():
                self.score.dispatched += self._scored(worker)
                return True
        source = source or self._cheapest(worker.name, flat)
        if not self._claim(worker, flat, Reason.DEMAND):
            worker.unclaimed.append(flat)
            return False
        if self._scored(worker):
            tier = source.tier.name.lower()
            self.score.fetched[tier] = self.score.fetched.get(tier, 0) + 1
        worker.fetches += 1
        self._send(worker.name, flat, source.name, reason=Reason.DEMAND, worker=worker)
        return False

    def _prefetch(self, worker: SimWorker, flat: int) -> None:
        if worker.prefetching >= _AT_ONCE_PREFETCHES or worker.unclaimed:
            return
        layer, expert = self._block(flat)
        if worker.policy.state(layer, expert) not in {State.STORED, State.STAGED}:
            return
        source = self._cheapest(worker.name, flat)
        if self._claim(worker, flat, Reason.PREFETCH):
            worker.prefetching += 1
            self.score.prefetched += self._scored(worker)
            self._send(worker.name, flat, source.name, reason=Reason.PREFETCH, worker=worker)

    def _hasten(self, worker: SimWorker, flat: int) -> None:
        number = worker.coming.get(flat)
        flight = self._flights.get(number) if number is not None else None
        if number is not None and flight is not None:
            self._advance(flight.source)
            self._sources[flight.source].link.hasten(number)
            self._wake(flight.source)

    def _arrived(self, worker: SimWorker, flat: int) -> None:
        """Weights or a peer's answer are here and compute; with the last one the layer ends."""
        if flat not in worker.waiting or not worker.alive:
            return
        worker.waiting.discard(flat)
        busy_ns = max(worker.busy_ns, worker.covers.get(flat, 0))
        if self.now_ns > busy_ns:
            worker.stall_ns += self.now_ns - busy_ns
            worker.busy_ns = self.now_ns
        if not worker.waiting:
            self._compute(worker)

    def _compute(self, worker: SimWorker) -> None:
        """All is here: the rest of the layer's compute takes its time."""
        worker.step_stall_ns += worker.stall_ns
        compute_ns = self.spec.layer_ns[worker.row] + self.spec.fetch_ns * worker.started
        end_ns = worker.began_ns + worker.stall_ns + compute_ns
        self._at(max(end_ns, self.now_ns), "computed", worker)

    def _computed(self, worker: SimWorker) -> None:
        if not worker.alive:
            return
        worker.row += 1
        if worker.row == len(self._layers):
            worker.row = 0
            self._end_step(worker)
        if worker.at == len(worker.visits):
            self._running -= 1
            return
        self._layer(worker)

    def _end_step(self, worker: SimWorker) -> None:
        step_ns = self.now_ns - worker.step_began_ns
        if self._scored(worker):
            self.score.steps += 1
            self.score.step_ns += step_ns
            self.score.stall_ns += worker.step_stall_ns
        worker.load.step(step_ns=step_ns, tokens=worker.tokens)
        worker.at += 1
        self._report(worker)

    def _report(self, worker: SimWorker) -> None:
        """What a worker's heartbeat says."""
        if self.now_ns - worker.told_ns < self.spec.report_ns:
            return
        steps = worker.at - worker.steps_told
        counts = tuple(
            (BlockId(*self._block(flat)), count) for flat, count in sorted(worker.counts.items())
        )
        worker.counts, worker.steps_told, worker.told_ns = {}, worker.at, self.now_ns
        now_ns, name = self.now_ns, worker.name
        times = tuple(zip(self._layers, self.spec.layer_ns, strict=True))
        self._tell(RouterCounts(now_ns=now_ns, store=name, counts=counts, tokens=steps))
        self._tell(Concurrency(now_ns=now_ns, store=name, requests=1, steps=steps, tokens=steps))
        self._tell(
            LayerTimes(
                now_ns=now_ns, store=name, steps=steps, times=times,
                experts_ns=sum(self.spec.layer_ns) * self.spec.experts_permille // 1000,
            )
        )  # fmt: skip

    def _landed(self, number: int) -> None:
        flight = self._flights.pop(number, None)
        if flight is None:
            return  # its reader or its source died meanwhile
        self.score.moved_bytes += self.spec.block_bytes
        layer, expert = self._block(flight.flat)
        worker = self._workers.get(flight.reader)
        if worker is not None:
            worker.policy.landed(layer, expert)
            worker.coming.pop(flight.flat, None)
            worker.prefetching -= flight.reason is Reason.PREFETCH
        self._copied(flight.reader, BlockId(layer, expert), flight.source, flight.reason)
        if worker is not None:
            self._arrived(worker, flight.flat)
            waiting, worker.unclaimed = worker.unclaimed, []
            sent = [flat for flat in waiting if self._demand(worker, flat)]
            if sent:
                self._at(self.now_ns + self.spec.dispatch_ns, "answer", (worker, sent))

    # --- faults ---------------------------------------------------------------------------------

    def _fail(self, fault: Fault) -> None:
        """A store dies: its reads fail over to other sources, its request is lost."""
        name = fault.store
        self.score.lost += 1
        worker = self._workers.get(name)
        if worker is not None and worker.alive:
            worker.alive = False
            self._running -= 1
        broken = [n for n, f in self._flights.items() if name in {f.source, f.reader}]
        flights = [self._flights.pop(number) for number in broken]
        for number in broken:
            for source in self._sources.values():
                source.link.cancel(number)
        for holders in self._holders:
            holders.pop(name, None)
        self._tell(StoreLost(now_ns=self.now_ns, store=name, incarnation=self._incarnation[name]))
        for flight in flights:
            if flight.reader == name:
                continue
            reader = self._workers.get(flight.reader)
            if reader is None:
                block = BlockId(*self._block(flight.flat))
                self._refuse(flight.reader, block, Format.BF16, Reason.LOST)
                continue
            source = self._cheapest(flight.reader, flight.flat)
            self._send(flight.reader, flight.flat, source.name, reason=flight.reason, worker=reader)
        if fault.back_ns and worker is None:
            self._at(self.now_ns + fault.back_ns, "back", name)
