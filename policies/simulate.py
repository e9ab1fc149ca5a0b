"""A cluster in discrete events: the same brain and the same device policies, on modelled links.

Decides nothing itself: workers ask their residency policy, the brain is told what happens and its
commands are carried out, links follow `LinkSchedule`. Must not know files, clocks or Ray; all
randomness comes from the seed of the workload it is given.

A worker runs one request: layer by layer it asks its policy, fetches what is missing from the
cheapest store that holds it (or sends the tokens to a peer), waits until all is there, computes. A
store's link serves one transfer at a time, so readers contend. What a read costs beside the link
(software at both ends) is `overhead_ns`: it delays the landing and occupies nothing. The first fill
takes no time: runs are compared once they are warm.

Invariants: no event happens before one that has happened; every transfer ends once; bytes that were
sent are bytes that arrived, or belong to a lost store; the same input gives the same figures.
"""

from __future__ import annotations

import heapq
from typing import TYPE_CHECKING, NamedTuple

from hotset.policies.brain import ClusterBrain
from hotset.policies.schedule import LinkSchedule, ScheduleConfig, service_of
from hotset.policies.simspec import ClusterSpec, Fault, SimScore, SimWorker, StoreSpec, slot_bytes
from hotset.policies.types import (
    STORAGE,
    BlockId,
    BlockInfo,
    CancelTransfer,
    ChangeFormat,
    Concurrency,
    Copy,
    CopyDropped,
    CopyLanded,
    DropCopy,
    Format,
    LayerTimes,
    Reason,
    RouterCounts,
    StartTransfer,
    State,
    StoreInfo,
    StoreJoined,
    StoreLost,
    Tick,
    Tier,
    TransferFailed,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from hotset.policies.config import PolicyConfig
    from hotset.policies.plan import ResidencyPolicy
    from hotset.policies.types import Command, Event

_AT_ONCE_PREFETCHES = 4
"""Prefetches of one worker on their way at once; those that wait are withdrawn when their layer
comes."""


class _Flight(NamedTuple):
    reader: str
    flat: int
    source: str
    reason: Reason


class Simulation:
    """One run."""

    def __init__(
        self,
        spec: ClusterSpec,
        *,
        policies: Callable[[StoreSpec], ResidencyPolicy],
        visits: dict[str, Sequence[Sequence[Sequence[int]]]],
        config: PolicyConfig | None = None,
        skip_steps: int = 0,
    ) -> None:
        """`visits[worker][token][row]` are experts; the first `skip_steps` are not scored."""
        self.spec = spec
        self.score = SimScore()
        self.now_ns = 1
        self._skip = skip_steps
        self._layers, self._size = spec.layers, spec.num_experts
        self._rows = {layer: row for row, layer in enumerate(spec.layers)}
        half = max(1, spec.block_bytes // 2)
        infos = [
            BlockInfo(block=BlockId(layer, index), nbytes=spec.block_bytes, reduced_nbytes=half)
            for layer in spec.layers
            for index in range(spec.num_experts)
        ]
        self.brain = ClusterBrain(infos, config=config)
        self._slot_bytes = slot_bytes(spec, self.brain.config)
        self._specs = {store.name: store for store in spec.stores}
        chunks = ScheduleConfig(chunk_bytes=max(1 << 20, spec.block_bytes // 8))
        self._links = {
            name: LinkSchedule(spec.tiers[tier].link, config=chunks)
            for name, tier in (
                *((store.name, store.tier) for store in spec.stores),
                *((f"{STORAGE}@{node}", Tier.STORAGE) for node in {s.node for s in spec.stores}),
            )
        }
        self._flights: dict[int, _Flight] = {}
        self._serial = 0
        self._agenda: list[tuple[int, int, str, object]] = []
        self._wakes: dict[str, int] = {}
        self._incarnation: dict[str, int] = {}
        self._generation = 0
        self._warm = True
        self._workers = {
            store.name: SimWorker(store.name, policies(store), visits[store.name])
            for store in spec.stores
            if store.name in visits
        }
        self._running = len(self._workers)

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

    def _at(self, at_ns: int, kind: str, what: object) -> None:
        self._serial += 1
        heapq.heappush(self._agenda, (at_ns, self._serial, kind, what))

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
            worker, flat = what
            self._arrived(worker, flat)
        elif kind == "fault":
            assert isinstance(what, Fault)  # noqa: S101 - our own bug
            self._fail(what)
        elif kind == "back":
            self._join(self._specs[str(what)])
        else:
            self._tell(Tick(now_ns=self.now_ns))
            self._at(self.now_ns + self.brain.config.tick_ns, "tick", None)

    # --- a worker's layer -----------------------------------------------------------------------

    def _layer(self, worker: SimWorker) -> None:
        if not worker.alive:
            return
        row, experts = worker.row, worker.visits[worker.at][worker.row]
        if row == 0:
            worker.step_began_ns, worker.step_stall_ns = self.now_ns, 0
        counts = [1] * len(experts)
        plan = worker.policy.routed(self._layers[row], experts, counts, step=worker.at, request=1)
        base = row * self._size
        for expert in experts:
            worker.counts[base + expert] = worker.counts.get(base + expert, 0) + 1
        scored = worker.at >= self._skip
        self.score.needs += len(experts) * scored
        self.score.hits += len(plan.resident) * scored
        worker.began_ns = self.now_ns
        worker.waiting = {base + expert for expert in (*plan.arriving, *plan.missing)}
        for expert in plan.arriving:
            self._hasten(worker, base + expert)
        for expert in plan.missing:
            self._demand(worker, base + expert)
        for layer, expert in plan.prefetch:
            self._prefetch(worker, self._rows[layer] * self._size + expert)
        if not worker.waiting:
            self._compute(worker)

    def _demand(self, worker: SimWorker, flat: int) -> None:
        source = self._cheapest(worker.name, flat)
        holder = self._peer(worker.name, flat) if self.spec.dispatch_ns else None
        if holder is not None and self.spec.dispatch_ns < self._wait_ns(source):
            self.score.dispatched += worker.at >= self._skip
            self._at(self.now_ns + self.spec.dispatch_ns, "answer", (worker, flat))
            return
        if not self._claim(worker, flat, Reason.DEMAND):
            worker.unclaimed.append(flat)
            return
        if worker.at >= self._skip:
            tier = self._tier(source).name.lower()
            self.score.fetched[tier] = self.score.fetched.get(tier, 0) + 1
        self._send(worker.name, flat, source, reason=Reason.DEMAND, worker=worker)

    def _prefetch(self, worker: SimWorker, flat: int) -> None:
        if worker.prefetching >= _AT_ONCE_PREFETCHES or worker.unclaimed:
            return
        layer, expert = self._block(flat)
        if worker.policy.state(layer, expert) not in {State.STORED, State.STAGED}:
            return
        source = self._cheapest(worker.name, flat)
        if self._claim(worker, flat, Reason.PREFETCH):
            worker.prefetching += 1
            self.score.prefetched += worker.at >= self._skip
            self._send(worker.name, flat, source, reason=Reason.PREFETCH, worker=worker)

    def _claim(self, worker: SimWorker, flat: int, reason: Reason) -> bool:
        policy = worker.policy
        layer, expert = self._block(flat)
        want_bytes = policy.nbytes(Format.BF16)
        while not policy.room(want_bytes):
            victim = policy.victim(want_bytes)
            if victim is None:
                return False
            policy.dropped(victim.layer, victim.expert)
            self._dropped(worker.name, BlockId(victim.layer, victim.expert), Reason.EVICT)
        policy.in_flight(layer, expert, reason=reason)
        return True

    def _hasten(self, worker: SimWorker, flat: int) -> None:
        number = worker.coming.get(flat)
        flight = self._flights.get(number) if number is not None else None
        if number is not None and flight is not None:
            self._advance(flight.source)
            self._links[flight.source].hasten(number)
            self._wake(flight.source)

    def _arrived(self, worker: SimWorker, flat: int) -> None:
        """Weights or a peer's answer are here; with the last one compute starts."""
        if flat not in worker.waiting or not worker.alive:
            return
        worker.waiting.discard(flat)
        if not worker.waiting:
            self._compute(worker)

    def _compute(self, worker: SimWorker) -> None:
        worker.step_stall_ns += self.now_ns - worker.began_ns
        self._at(self.now_ns + self.spec.layer_ns[worker.row], "computed", worker)

    def _computed(self, worker: SimWorker) -> None:
        if not worker.alive:
            return
        worker.row += 1
        if worker.row == len(self._layers):
            worker.row = 0
            if worker.at >= self._skip:
                self.score.steps += 1
                self.score.step_ns += self.now_ns - worker.step_began_ns
                self.score.stall_ns += worker.step_stall_ns
            worker.at += 1
            self._report(worker)
        if worker.at == len(worker.visits):
            self._running -= 1
            return
        self._layer(worker)

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
        self._tell(LayerTimes(now_ns=now_ns, store=name, steps=steps, times=times))

    # --- links ----------------------------------------------------------------------------------

    def _send(
        self, reader: str, flat: int, source: str, *, reason: Reason, worker: SimWorker | None
    ) -> None:
        self._serial += 1
        number = self._serial
        self._flights[number] = _Flight(reader, flat, source, reason)
        if worker is not None:
            worker.coming[flat] = number
        self._advance(source)
        link = self._links[source]
        link.add(number, service_of(reason), nbytes=self.spec.block_bytes, now_ns=self.now_ns)
        self._wake(source)

    def _advance(self, name: str) -> None:
        overhead_ns = self.spec.tiers[self._tier(name)].overhead_ns
        while (landing := self._links[name].advance(self.now_ns)) is not None:
            self._at(max(self.now_ns, landing.at_ns + overhead_ns), "landed", landing.key)

    def _run_link(self, name: str) -> None:
        if self._wakes.get(name) == self.now_ns:
            del self._wakes[name]
        self._advance(name)
        self._wake(name)

    def _wake(self, name: str) -> None:
        at_ns = self._links[name].next_landing_ns()
        if at_ns is not None and self._wakes.get(name) != at_ns:
            self._wakes[name] = max(at_ns, self.now_ns)
            self._at(self._wakes[name], "link", name)

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
            for flat in waiting:
                self._demand(worker, flat)

    # --- where a block is -----------------------------------------------------------------------

    def _block(self, flat: int) -> tuple[int, int]:
        row, expert = divmod(flat, self._size)
        return self._layers[row], expert

    def _tier(self, source: str) -> Tier:
        return Tier.STORAGE if source.startswith(STORAGE) else self._specs[source].tier

    def _cheapest(self, reader: str, flat: int) -> str:
        names = [f"{STORAGE}@{self._specs[reader].node}"]
        names += [
            copy.store
            for copy in self.brain.copies(BlockId(*self._block(flat)))
            if copy.store != reader and copy.format is Format.BF16
        ]
        return min(names, key=lambda name: (self._wait_ns(name), name))

    def _wait_ns(self, source: str) -> int:
        """Until a read that is asked for now lands, if those before it are of the same size."""
        tier = self.spec.tiers[self._tier(source)]
        wire_ns = tier.link.transfer_ns(self.spec.block_bytes)
        return tier.overhead_ns + wire_ns * (1 + len(self._links[source]))

    def _peer(self, reader: str, flat: int) -> str | None:
        for copy in self.brain.copies(BlockId(*self._block(flat))):
            if copy.store in self._workers and copy.store != reader:
                return copy.store
        return None

    # --- the brain ------------------------------------------------------------------------------

    def _join(self, store: StoreSpec) -> None:
        incarnation = self._incarnation[store.name] = self._incarnation.get(store.name, 0) + 1
        info = StoreInfo(
            name=store.name, tier=store.tier, node=store.node, incarnation=incarnation,
            capacity_bytes=store.slots * self._slot_bytes,
        )  # fmt: skip
        self._tell(StoreJoined(now_ns=self.now_ns, store=info))

    def _tell(self, event: Event) -> None:
        todo = list(reversed(self.brain.handle(event)))
        while todo:
            command = todo.pop()
            self.score.commands += 1
            todo += reversed(self._obey(command))

    def _obey(self, command: Command) -> list[Command]:
        match command:
            case StartTransfer() if self._warm:
                return self._fill(command)
            case StartTransfer():
                self._start(command)
            case CancelTransfer():
                return self._cancel(command)
            case DropCopy() if command.store not in self._workers:
                return self.brain.handle(self._drop_event(command.store, command.block,
                                                          command.reason))  # fmt: skip
            case ChangeFormat():
                return self._refuse(command.store, command.block, command.into, Reason.STALE)
        return []

    def _fill(self, command: StartTransfer) -> list[Command]:
        worker = self._workers.get(command.store)
        if worker is not None:
            at = (command.block.layer, command.block.index)
            if not worker.policy.room(worker.policy.nbytes(Format.BF16)):
                return self._refuse(command.store, command.block, command.format,
                                    Reason.VETO_MEMORY)  # fmt: skip
            worker.policy.in_flight(*at, reason=Reason.WARM)
            worker.policy.landed(*at)
        copy = self._copy(command.store, command.block)
        return self.brain.handle(
            CopyLanded(now_ns=self.now_ns, copy=copy, reason=command.reason, source=STORAGE)
        )

    def _start(self, command: StartTransfer) -> None:
        flat = self._rows[command.block.layer] * self._size + command.block.index
        worker = self._workers.get(command.store)
        state = (
            worker.policy.state(command.block.layer, command.block.index)
            if worker is not None
            else State.STORED
        )
        if worker is not None and (
            state not in {State.STORED, State.STAGED}
            or not worker.policy.room(worker.policy.nbytes(Format.BF16))
        ):
            return  # it manages its own memory: the claim runs out
        if worker is not None:
            worker.policy.in_flight(command.block.layer, command.block.index, reason=Reason.WARM)
        first = command.sources[0]
        source = f"{STORAGE}@{self._specs[command.store].node}" if first == STORAGE else first
        self._send(command.store, flat, source, reason=command.reason, worker=worker)

    def _cancel(self, command: CancelTransfer) -> list[Command]:
        flat = self._rows[command.block.layer] * self._size + command.block.index
        for number, flight in self._flights.items():
            if (flight.reader, flight.flat) == (command.store, flat):
                self._advance(flight.source)
                if command.store not in self._workers and self._links[flight.source].cancel(number):
                    del self._flights[number]
                    return self._refuse(
                        command.store, command.block, command.format, Reason.CANCELLED
                    )
                return []
        return []

    def _refuse(self, store: str, block: BlockId, form: Format, reason: Reason) -> list[Command]:
        return self.brain.handle(
            TransferFailed(
                now_ns=self.now_ns, store=store, block=block, format=form, reason=reason,
                incarnation=self._incarnation[store],
            )
        )  # fmt: skip

    def _copy(self, store: str, block: BlockId) -> Copy:
        self._generation += 1
        return Copy(
            block=block, format=Format.BF16, store=store, offset=0, nbytes=self.spec.block_bytes,
            generation=self._generation, checksum=1, incarnation=self._incarnation[store],
        )  # fmt: skip

    def _copied(self, store: str, block: BlockId, source: str, reason: Reason) -> None:
        copy = self._copy(store, block)
        self._tell(CopyLanded(now_ns=self.now_ns, copy=copy, reason=reason, source=source))

    def _dropped(self, store: str, block: BlockId, reason: Reason) -> None:
        self._tell(self._drop_event(store, block, reason))

    def _drop_event(self, store: str, block: BlockId, reason: Reason) -> CopyDropped:
        return CopyDropped(
            now_ns=self.now_ns, store=store, block=block, format=Format.BF16, reason=reason,
            incarnation=self._incarnation[store],
        )  # fmt: skip

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
            for link in self._links.values():
                link.cancel(number)
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
            self._send(flight.reader, flight.flat, source, reason=flight.reason, worker=reader)
        if fault.back_ns and worker is None:
            self._at(self.now_ns + fault.back_ns, "back", name)
