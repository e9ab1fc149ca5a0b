"""The stores and links of a simulated cluster, and the brain's commands carried out on them.

Decides nothing: a read goes to the cheapest store that holds the block, a command is done as asked.
Must not know what a worker computes. `simulate` adds the workers, time and faults.

Invariants: a transfer ends once; the brain hears of each end; links never serve two reads at once.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass
from typing import TYPE_CHECKING

from hotset.policies.brain import ClusterBrain
from hotset.policies.schedule import LinkSchedule, ScheduleConfig, service_of
from hotset.policies.simspec import (
    ClusterSpec,
    MeasuredVisit,
    SimFlight,
    SimScore,
    SimWorker,
    StoreSpec,
    slot_bytes,
)
from hotset.policies.types import (
    STORAGE,
    BlockId,
    BlockInfo,
    CancelTransfer,
    ChangeFormat,
    Copy,
    CopyDropped,
    CopyLanded,
    DropCopy,
    Format,
    PlanDecision,
    PublishEpoch,
    Reason,
    StartTransfer,
    State,
    StoreInfo,
    StoreJoined,
    Tier,
    TransferFailed,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Mapping, Sequence

    from hotset.policies.config import PolicyConfig
    from hotset.policies.plan import ResidencyPolicy
    from hotset.policies.types import Command, Event


@dataclass(slots=True, kw_only=True)
class _Source:
    """Where blocks are read from, and what a read of one takes."""

    name: str
    tier: Tier
    link: LinkSchedule
    overhead_ns: int
    wire_ns: int

    def wait_ns(self) -> int:
        """Until a read that is asked for now lands, if those before it are of the same size."""
        return self.overhead_ns + self.wire_ns * (1 + len(self.link))


class _Brain(ClusterBrain):
    """The brain, without the stories of its blocks: nobody reads them here."""

    def _note(self, block: BlockId, event: str, reason: Reason | None, *, store: str) -> None:
        """Forget it."""


class SimCluster:
    """Stores, links, the brain and an agenda of what will happen."""

    def __init__(
        self,
        spec: ClusterSpec,
        *,
        policies: Callable[[StoreSpec], ResidencyPolicy],
        visits: Mapping[str, Sequence[Sequence[Sequence[int]]]],
        config: PolicyConfig | None = None,
        unscored: Collection[int] = (),
    ) -> None:
        """`visits[worker][token][row]` are experts; the steps in `unscored` are not scored."""
        self.spec = spec
        self.score = SimScore()
        self.now_ns = 1
        self._unscored = frozenset(unscored)
        self._layers, self._size = spec.layers, spec.num_experts
        self._rows = {layer: row for row, layer in enumerate(spec.layers)}
        half = max(1, spec.block_bytes // 2)
        infos = [
            BlockInfo(block=BlockId(layer, index), nbytes=spec.block_bytes, reduced_nbytes=half)
            for layer in spec.layers
            for index in range(spec.num_experts)
        ]
        self.brain = _Brain(infos, config=config)
        self._slot_bytes = slot_bytes(spec, self.brain.config)
        self._specs = {store.name: store for store in spec.stores}
        chunks = ScheduleConfig(chunk_bytes=max(1 << 20, spec.block_bytes // 8))
        tier_of = {store.name: store.tier for store in spec.stores}
        tier_of |= {f"{STORAGE}@{store.node}": Tier.STORAGE for store in spec.stores}
        self._sources = {
            name: _Source(
                name=name,
                tier=tier,
                link=LinkSchedule(spec.tiers[tier].link, config=chunks),
                overhead_ns=spec.tiers[tier].overhead_ns,
                wire_ns=spec.tiers[tier].link.transfer_ns(spec.block_bytes),
            )
            for name, tier in tier_of.items()
        }
        self._storage = {
            store.name: self._sources[f"{STORAGE}@{store.node}"] for store in spec.stores
        }
        self._holders: list[dict[str, None]] = [{} for _ in infos]  # stores by block
        used = {store.tier for store in spec.stores} | {Tier.STORAGE}
        self._fetch_ns = min(
            tier.overhead_ns + tier.link.transfer_ns(spec.block_bytes)
            for name, tier in spec.tiers.items()
            if name in used
        )
        self._idle_ns = self._fetch_ns  # no read takes less
        self._flights: dict[int, SimFlight] = {}
        self._serial = 0
        self._agenda: list[tuple[int, int, str, object]] = []
        self._wakes: dict[str, int] = {}
        self._incarnation: dict[str, int] = {}
        self._generation = 0
        self._warm = True
        self._brings = any(store.holds for store in spec.stores)
        self._draws = 0
        self._kept: dict[str, frozenset[tuple[int, int]]] = {}  # by the plan in force
        self._visits: dict[int, list[MeasuredVisit]] = {}
        for visit in spec.visits:
            self._visits.setdefault(len(visit), []).append(visit)
        self._workers = {
            store.name: SimWorker(
                store.name, policies(store), visits[store.name], usual=_usual(visits[store.name])
            )
            for store in spec.stores
            if store.name in visits
        }
        self._running = len(self._workers)

    def _at(self, at_ns: int, kind: str, what: object) -> None:
        self._serial += 1
        heapq.heappush(self._agenda, (at_ns, self._serial, kind, what))

    # --- links ----------------------------------------------------------------------------------

    def _send(
        self, reader: str, flat: int, source: str, *, reason: Reason, worker: SimWorker | None
    ) -> None:
        self._serial += 1
        number = self._serial
        overhead_ns = self._overhead_ns(source, flat, worker=worker)
        self._flights[number] = SimFlight(reader, flat, source, reason, overhead_ns)
        if worker is not None:
            worker.coming[flat] = number
            worker.started += 1
        self._advance(source)
        link = self._sources[source].link
        link.add(number, service_of(reason), nbytes=self.spec.block_bytes, now_ns=self.now_ns)
        self._wake(source)

    def _advance(self, name: str) -> None:
        link = self._sources[name].link
        while (landing := link.advance(self.now_ns)) is not None:
            flight = self._flights.get(landing.key)
            if flight is not None:
                at_ns = landing.at_ns + flight.overhead_ns
                self._at(max(self.now_ns, at_ns), "landed", landing.key)

    def _overhead_ns(self, name: str, flat: int, *, worker: SimWorker | None) -> int:
        """What this read takes beside the link. Measured reads have waited for all there was."""
        source = self._sources[name]
        if worker is None or not self._visits:
            return source.overhead_ns
        if flat in worker.waiting and worker.drawn:
            read = worker.drawn[min(worker.fetches, len(worker.drawn)) - 1]
            worker.covers[flat] = worker.began_ns + read.cover_ns
        else:
            read = self._draw(1)[0]
        return max(0, read.took_ns - source.wire_ns * (1 + len(source.link)))

    def _draw(self, reads: int) -> MeasuredVisit:
        """One of the measured visits of as many reads, or of the nearest number."""
        visits = self._visits.get(reads)
        if visits is None:
            nearest = min(self._visits, key=lambda count: (abs(count - reads), count))
            visits = self._visits[reads] = self._visits[nearest]
        self._draws += 1
        return visits[_mix(self.spec.seed, self._draws) % len(visits)]

    def _run_link(self, name: str) -> None:
        if self._wakes.get(name) == self.now_ns:
            del self._wakes[name]
        self._advance(name)
        self._wake(name)

    def _wake(self, name: str) -> None:
        at_ns = self._sources[name].link.next_landing_ns()
        if at_ns is not None and self._wakes.get(name) != at_ns:
            self._wakes[name] = max(at_ns, self.now_ns)
            self._at(self._wakes[name], "link", name)

    # --- where a block is -----------------------------------------------------------------------

    def _flat(self, block: BlockId) -> int:
        return self._rows[block.layer] * self._size + block.index

    def _block(self, flat: int) -> tuple[int, int]:
        row, expert = divmod(flat, self._size)
        return self._layers[row], expert

    def _cheapest(self, reader: str, flat: int) -> _Source:
        sources = self._sources
        best = self._storage[reader]
        best_ns = best.wait_ns()
        for name in self._holders[flat]:
            source = sources[name]
            wait_ns = source.wait_ns()
            if wait_ns > best_ns or name == reader:
                continue
            if wait_ns < best_ns or name < best.name:
                best, best_ns = source, wait_ns
        return best

    def _peer(self, reader: str, flat: int) -> str | None:
        workers = self._workers
        for name in self._holders[flat]:
            if name in workers and name != reader:
                return name
        return None

    # --- the brain ------------------------------------------------------------------------------

    def _join(self, store: StoreSpec) -> None:
        incarnation = self._incarnation[store.name] = self._incarnation.get(store.name, 0) + 1
        info = StoreInfo(
            name=store.name, tier=store.tier, node=store.node, incarnation=incarnation,
            capacity_bytes=store.slots * self._slot_bytes,
        )  # fmt: skip
        holds = store.holds if self._warm else ()  # who comes back comes back empty
        copies = tuple(self._copy(store.name, block) for block in holds)
        for block in holds:
            self._holders[self._flat(block)][store.name] = None
        worker = self._workers.get(store.name)
        if worker is not None:
            for block in holds:
                worker.policy.in_flight(block.layer, block.index, reason=Reason.JOINED)
                worker.policy.landed(block.layer, block.index)
        self._tell(StoreJoined(now_ns=self.now_ns, store=info, copies=copies))

    def _tell(self, event: Event) -> None:
        todo = list(reversed(self.brain.handle(event)))
        while todo:
            command = todo.pop()
            self.score.commands += 1
            todo += reversed(self._obey(command))

    def _obey(self, command: Command) -> list[Command]:
        match command:
            case StartTransfer() if self._warm and self._brings:
                return self._refuse(command.store, command.block, command.format, Reason.STALE)
            case StartTransfer() if self._warm:
                return self._fill(command)
            case StartTransfer():
                self._start(command)
            case PublishEpoch():
                self._kept = {
                    name: frozenset((block.layer, block.index) for block in self.brain.keeps(name))
                    for name in self._workers
                }
            case PlanDecision():
                self.score.plans += command.reason is Reason.REBALANCE
                self.score.plans_refused += command.reason is not Reason.REBALANCE
            case CancelTransfer():
                return self._cancel(command)
            case DropCopy() if command.store not in self._workers:
                self._holders[self._flat(command.block)].pop(command.store, None)
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
        self._holders[self._flat(command.block)][command.store] = None
        copy = self._copy(command.store, command.block)
        return self.brain.handle(
            CopyLanded(now_ns=self.now_ns, copy=copy, reason=command.reason, source=STORAGE)
        )

    def _start(self, command: StartTransfer) -> None:
        block, flat = command.block, self._flat(command.block)
        worker = self._workers.get(command.store)
        if worker is not None:
            policy = worker.policy
            if policy.state(block.layer, block.index) not in {State.STORED, State.STAGED}:
                return
            if command.reason is Reason.REPLICATE:  # a plan's copies make room for themselves
                if not self._claim(worker, flat, command.reason):
                    return
            elif policy.room(policy.nbytes(Format.BF16)):
                policy.in_flight(block.layer, block.index, reason=Reason.WARM)
            else:
                return  # it manages its own memory: the claim runs out
        first = command.sources[0]
        source = f"{STORAGE}@{self._specs[command.store].node}" if first == STORAGE else first
        self._send(command.store, flat, source, reason=command.reason, worker=worker)

    def _claim(self, worker: SimWorker, flat: int, reason: Reason) -> bool:
        """Make room for a block on its way; what a plan has promised to others stays."""
        policy = worker.policy
        layer, expert = self._block(flat)
        want_bytes = policy.nbytes(Format.BF16)
        while not policy.room(want_bytes):
            victim = policy.victim(want_bytes)
            kept = self._kept.get(worker.name, frozenset())
            if victim is not None and (victim.layer, victim.expert) in kept:
                victim = policy.victim(want_bytes, needed=kept)
            if victim is None:
                return False
            policy.dropped(victim.layer, victim.expert)
            self._dropped(worker.name, BlockId(victim.layer, victim.expert), Reason.EVICT)
        policy.in_flight(layer, expert, reason=reason)
        return True

    def _cancel(self, command: CancelTransfer) -> list[Command]:
        flat = self._flat(command.block)
        for number, flight in self._flights.items():
            if (flight.reader, flight.flat) == (command.store, flat):
                self._advance(flight.source)
                if command.store not in self._workers and self._sources[flight.source].link.cancel(
                    number
                ):
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
        self._holders[self._flat(block)][store] = None
        copy = self._copy(store, block)
        self._tell(CopyLanded(now_ns=self.now_ns, copy=copy, reason=reason, source=source))

    def _dropped(self, store: str, block: BlockId, reason: Reason) -> None:
        self._holders[self._flat(block)].pop(store, None)
        self._tell(self._drop_event(store, block, reason))

    def _drop_event(self, store: str, block: BlockId, reason: Reason) -> CopyDropped:
        return CopyDropped(
            now_ns=self.now_ns, store=store, block=block, format=Format.BF16, reason=reason,
            incarnation=self._incarnation[store],
        )  # fmt: skip


def _usual(steps: Sequence[Sequence[Sequence[int]]]) -> int:
    """Needs of a decode step: prefills are few and need more."""
    needs = sorted(sum(len(experts) for experts in step) for step in steps)
    return needs[len(needs) // 2] if needs else 0


def _mix(seed: int, serial: int) -> int:
    """A number below 2 ** 64 that looks random: SplitMix64 (Steele, Lea, Flood 2014)."""
    mask = (1 << 64) - 1
    mixed = (seed * 0xD1342543DE82EF95 + serial * 0x9E3779B97F4A7C15) & mask
    mixed = ((mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9) & mask
    mixed = ((mixed ^ (mixed >> 27)) * 0x94D049BB133111EB) & mask
    return mixed ^ (mixed >> 31)
