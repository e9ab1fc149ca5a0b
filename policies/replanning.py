"""From a proposal for the workers' replicas to a plan in force, or a refusal: the slow loop.

Decides whether a proposal of `replicas` is worth it, and keeps what plans have promised. Must not
know how proposals are found. Shares move no weights, so new copies are judged by what they gain
beyond the best shares of the copies that are there; they must save more time within `payback_ns`
than they take to move (`place_worth.worth_it`), with step times, rates and links as measured. Where
nobody has measured, nothing can be shown to be gained, so nothing is done.

Hysteresis: a plan must gain `plan_gain` in balancedness; new copies start from the plan in force; a
copy that has left a worker is not asked back before `cool_down_ns`; no plan while copies of the one
before are on their way; none without new traffic.

Invariant (with `ClusterBrain.validate`): what is promised of a worker's memory never exceeds
`keep_ratio` of it, and each promise is a copy that is there or asked for.
"""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from hotset.policies.books import Wish
from hotset.policies.orders import Orders
from hotset.policies.origins import Origins
from hotset.policies.outlook import GUESSES
from hotset.policies.place import finish
from hotset.policies.place_check import check_cluster
from hotset.policies.place_score import even_shares, replica_counts
from hotset.policies.place_worth import LinkModel, worth_it
from hotset.policies.replicas import (
    Grid,
    Survey,
    balancedness,
    fill_slots,
    propose,
    shares_of,
)
from hotset.policies.types import (
    STORAGE,
    Format,
    PlanDecision,
    PublishEpoch,
    Reason,
    Share,
    Tier,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from hotset.policies.books import StoreBook
    from hotset.policies.config import PolicyConfig
    from hotset.policies.guard import Guardrail
    from hotset.policies.place_types import Floats, Ints
    from hotset.policies.place_worth import Verdict
    from hotset.policies.replicas import Bools, Option, Promise, Proposal
    from hotset.policies.types import BlockId, BlockInfo

_PPM = 1_000_000
_PERMILLE = 1000
_LEAST_TOKENS = 16
"""A plan looks at one part in this many of popularity's half-life at least, else at noise."""


class Pace(NamedTuple):
    """Time of experts in a forward pass, and passes within which a move must pay."""

    expert_ns: int  # 0: nobody has measured it
    horizon_steps: int | None  # None: likewise


class Replanning(Orders):
    """The brain's plans for the workers' replicas."""

    def __init__(
        self,
        blocks: Sequence[BlockInfo],
        *,
        config: PolicyConfig | None = None,
        guard: Guardrail | None = None,
        epoch: int = 0,
    ) -> None:
        """See `ClusterLedger`."""
        super().__init__(blocks, config=config, guard=guard, epoch=epoch)
        self._grid = Grid(self.blocks)
        self._origins = Origins(
            len(self.blocks), half_life_tokens=self.config.popularity_half_life_tokens
        )
        self._shares: dict[int, dict[str, int]] = {}
        self.plan_epoch = 0
        """Epoch of the plan in force; 0 before there is one."""

    def keeps(self, store: str) -> tuple[BlockId, ...]:
        """Return the blocks that the plan in force asks a worker to keep, in block order."""
        book = self._books.get(store)
        return tuple(self.blocks[flat].block for flat in sorted(book.kept)) if book else ()

    def shares(self) -> tuple[Share, ...]:
        """Return how tokens are split over the holders of blocks that several workers hold."""
        return tuple(
            Share(block=self.blocks[flat].block, store=store, permille=permille)
            for flat, parts in sorted(self._shares.items())
            for store, permille in sorted(parts.items())
        )

    def _replan(self) -> None:
        """Look for a better plan; put it in force, or say why not."""
        workers = [book for book in self._books.values() if book.worker and not book.draining]
        workers.sort(key=lambda book: (book.info.node, book.info.name))
        few = self.config.popularity_half_life_tokens // _LEAST_TOKENS
        if len(workers) < 2 or self._origins.fresh_tokens <= few or _moving(workers):
            return
        self._origins.fold()
        pace = Pace(self._expert_ns(), self._horizon_steps())
        if not pace.expert_ns or pace.horizon_steps is None:
            return
        proposal = propose(self._survey(workers), self._grid)
        if proposal is not None:
            self._judge(proposal, workers, pace)

    def _judge(self, proposal: Proposal, workers: list[StoreBook], pace: Pace) -> None:
        shares, *copies = proposal.options
        before, shared = balancedness(proposal.now.load), balancedness(shares.load)
        cause = f"replan {self._now_ns}"
        gain = self.config.plan_gain
        judged = [
            (self._worth(option, shares, workers, pace), option)
            for option in copies
            if balancedness(option.load) - shared >= gain
        ]
        worth, best = max(judged, key=lambda one: _net_ns(one[0]), default=(None, shares))
        pays = worth is not None and worth.pays and bool(pace.horizon_steps)
        if worth is not None and not pays:
            self._tell(best, worth, reason=Reason.VETO_COST, cause=cause, before=before, pace=pace)
            worth, best = None, shares
        if pays or shared - before >= gain:
            self._enforce(best, proposal.released, workers, cause=cause)
            self._tell(best, worth, reason=Reason.REBALANCE, cause=cause, before=before, pace=pace)
        elif not judged:
            self._tell(best, None, reason=Reason.BALANCED, cause=cause, before=before, pace=pace)

    def _tell(  # noqa: PLR0913 - the parts of a report, by keyword
        self,
        option: Option,
        worth: Verdict | None,
        *,
        reason: Reason,
        cause: str,
        before: float,
        pace: Pace,
    ) -> None:
        self._out.append(
            PlanDecision(
                epoch=self.epoch,
                cause=cause,
                reason=reason,
                before_ppm=round(before * _PPM),
                after_ppm=round(balancedness(option.load) * _PPM),
                moves=len(option.adds),
                nbytes=sum(int(self._sizes.full[flat]) for _, flat in option.adds),
                saved_ns_per_step=worth.saved_ns_per_step if worth else 0,
                move_ns=worth.move_ns if worth else 0,
                horizon_steps=pace.horizon_steps or 0,
            )
        )

    def _enforce(
        self,
        option: Option,
        released: Sequence[Promise],
        workers: list[StoreBook],
        *,
        cause: str,
    ) -> None:
        """Publish the plan, and ask for its copies."""
        self.epoch += 1
        self.plan_epoch = self.epoch
        self._out.append(PublishEpoch(epoch=self.epoch, cause=cause, reason=Reason.REBALANCE))
        for worker, flat in released:
            workers[worker].kept.discard(flat)
        self._shares = {
            flat: {workers[at].info.name: permille for at, permille in parts.items()}
            for flat, parts in shares_of(option.split, option.held, self._grid).items()
        }
        for worker, flat in option.adds:
            due_ns = self._now_ns + self.config.payback_ns
            wish = Wish(flat, Format.BF16, Reason.REPLICATE, cause, due_ns)
            if self._ask_kept(workers[worker], wish):
                workers[worker].kept.add(flat)

    def _survey(self, workers: list[StoreBook]) -> Survey:
        names = tuple(book.info.name for book in workers)
        by_node = [[b.info.node for b in workers].count(b.info.node) for b in workers]
        even = len(set(by_node)) == 1
        held = np.stack([book.full for book in workers])
        return Survey(
            names=names,
            num_nodes=len(workers) // by_node[0] if even else 1,
            held=held,
            kept=np.stack([_flags(book.kept, len(self.blocks)) for book in workers]),
            barred=np.stack([self._barred(book) for book in workers]),
            origin=self._origins.of(names),
            shares=self._shares,
            nbytes=self._sizes.full,
            free_bytes=np.array([_free(book) for book in workers], dtype=np.int64),
            room_bytes=np.array([self._room(book) for book in workers], dtype=np.int64),
            batch_bytes=self.config.background_bytes_in_flight,
        )

    def _barred(self, book: StoreBook) -> Bools:
        """Copies that must not be asked for now: on their way, failed, or gone a moment ago."""
        barred = book.coming | (book.left_ns > self._now_ns - self.config.cool_down_ns)
        for flat, form in book.retry_ns:
            barred[flat] |= form is Format.BF16
        return barred

    def _room(self, book: StoreBook) -> int:
        """Bytes of a worker that may still be promised."""
        promised = sum(int(self._sizes.full[flat]) for flat in book.kept)
        return max(0, int(book.info.capacity_bytes * self.config.keep_ratio) - promised)

    # --- what a plan is worth ------------------------------------------------------------------

    def _expert_ns(self) -> int:
        """Time of experts in a forward pass, as measured; 0: nobody has said."""
        step_ns = self._outlook.step_ns(self._now_ns)
        return step_ns * self._outlook.experts_permille(self._now_ns) // _PERMILLE

    def _horizon_steps(self) -> int | None:
        """Forward passes of a worker in the time within which a move must pay."""
        rate = self._outlook.steps_per_s(self._now_ns)
        return rate * self.config.payback_ns // (1_000_000_000 * _PERMILLE) if rate else None

    def _worth(
        self, option: Option, shares: Option, workers: list[StoreBook], pace: Pace
    ) -> Verdict:
        """Compare new copies with the best shares of those that are there.

        Copies that have to make room for them are fetched again wherever they are needed.
        """
        fetched = ~(option.held.any(axis=0) & shares.held.any(axis=0))
        there = [one.held | fetched for one in (option, shares)]  # as if every worker had them
        slots = fill_slots(there[0] | there[1], spare=0)
        new, old = (_only(slots, held) for held in there)
        load = shares.load.sum(axis=0)
        placement = finish(
            new,
            load[None],
            cluster=check_cluster(
                num_devices=len(workers), num_slots=slots.shape[1], num_nodes=1,
                capacity=None, speed=None, num_experts=load.shape[1],
            ),
            sizes=np.maximum(self._grid.table(self._sizes.full), 1).astype(np.float64),
            current=old,
        )  # fmt: skip
        link = self._links(option, workers)
        fetch_ns = link.start_ns + int(self._sizes.full.max() / link.device_bytes_per_s * 1e9)
        more = max(0.0, option.fetched_ratio - shares.fetched_ratio)
        tokens = self._outlook.tokens_per_step(self._now_ns) / _PERMILLE
        uses = tokens * self._outlook.uses_per_token / _PERMILLE
        return worth_it(
            replace(placement, shares=slot_shares(new, option.load, load)),
            SimpleNamespace(
                physical_to_logical_map=old, shares=slot_shares(old, shares.load, load)
            ),
            step_time_ns=pace.expert_ns,
            link_model=link,
            horizon_steps=max(1, pace.horizon_steps or 0),
            extra_ns_per_step=int(more * uses * fetch_ns),
        )

    def _links(self, option: Option, workers: list[StoreBook]) -> LinkModel:
        """The slowest link that the copies would come over, as readers have measured it."""
        specs = [GUESSES[Tier.HBM]]
        for worker, flat in option.adds:
            book = workers[worker]
            source = self._sources(self.blocks[flat].block, book, Format.BF16)[0]
            tier = Tier.STORAGE if source == STORAGE else self._books[source].info.tier
            specs.append(self._outlook.link(source, tier))
        slowest = min(spec.bandwidth_bytes_per_s for spec in specs)
        return LinkModel(
            device_bytes_per_s=slowest,
            node_bytes_per_s=slowest,
            start_ns=max(spec.latency_ns for spec in specs),
        )


def _only(slots: Ints, held: Bools) -> Ints:
    """The slots of what is held, [L, P]; the others empty."""
    width = slots.shape[1] // held.shape[0]
    layer, slot = np.nonzero(slots >= 0)
    kept = held[slot // width, layer, slots[layer, slot]]
    found = np.full_like(slots, -1)
    found[layer[kept], slot[kept]] = slots[layer[kept], slot[kept]]
    return found


def _net_ns(verdict: Verdict) -> int:
    """Time that a plan saves within the horizon, less what moving takes."""
    return verdict.saved_ns_per_step * verdict.horizon_steps - verdict.move_ns


def _free(book: StoreBook) -> int:
    """Bytes of a worker that nothing occupies or claims."""
    taken = book.used_bytes + book.pending_bytes + book.unknown_bytes
    return max(0, book.info.capacity_bytes - taken)


def slot_shares(slots: Ints, loads: Floats, load: Floats) -> Floats:
    """Loads [D, L, E] as parts of each slot, [L, P]; even where nobody asks."""
    devices, _, experts = loads.shape
    width = slots.shape[1] // devices
    even = even_shares(slots, replica_counts(slots, experts=experts))
    layer, slot = np.nonzero(slots >= 0)
    expert = slots[layer, slot]
    total = load[layer, expert]
    part = loads[slot // width, layer, expert] / np.where(total > 0, total, 1.0)
    even[layer, slot] = np.where(total > 0, part, even[layer, slot])
    return even


def _moving(workers: list[StoreBook]) -> bool:
    """Whether copies of an earlier plan are still on their way."""
    return any(
        pending.reason is Reason.REPLICATE for book in workers for pending in book.pending.values()
    )


def _flags(flats: set[int], size: int) -> Bools:
    found = np.zeros(size, dtype=np.bool_)
    found[sorted(flats)] = True
    return found
