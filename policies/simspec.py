"""What a simulation is made of: stores, links and faults, and the totals that come out.

Decides nothing. Must not know how a simulation runs. `slot_bytes` is what a block occupies in the
brain's books and in a policy's, so that both count alike.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

from hotset.policies.books import Sizes
from hotset.policies.config import PolicyConfig
from hotset.policies.linkload import LinkLoad
from hotset.policies.types import BlockId, BlockInfo, Reason, Tier

if TYPE_CHECKING:
    from collections.abc import Sequence

    from hotset.policies.linkmodel import LinkSpec
    from hotset.policies.plan import ResidencyPolicy


class ReadSample(NamedTuple):
    """A measured read of a visit: from asking until compute could use it.

    Until `cover_ns` after asking compute had something else to do; both are of one read, because
    what slows the one slows the other. A read that was in time has covered all of it.
    """

    took_ns: int
    cover_ns: int


MeasuredVisit = tuple[ReadSample, ...]
"""The demand reads of one layer of one step, in the order in which they landed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TierSpec:
    """A tier's link, and what a read of it costs beside the link."""

    link: LinkSpec
    overhead_ns: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class StoreSpec:
    """A store of the simulated cluster; `slots` are full blocks.

    `holds` are the blocks that it brings along, oldest first. Where stores bring none, the brain
    fills them all in no time.
    """

    name: str
    tier: Tier
    node: str
    slots: int
    holds: tuple[BlockId, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """A store dies at `at_ns` and comes back empty `back_ns` later (0: never)."""

    at_ns: int
    store: str
    back_ns: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterSpec:
    """What is simulated; `layer_ns[row]` is compute of a layer, dense part included.

    `fetch_ns` is what each block that a device fetches adds to its own compute. `visits` were
    measured: a layer draws one (by `seed`) of those with as many reads as it needs, and its reads
    take what those took, the wait for each other included. Without them a read takes its link's
    time and its tier's `overhead_ns`, which is also the price by which sources compete.
    """

    layers: tuple[int, ...]
    num_experts: int
    block_bytes: int
    stores: tuple[StoreSpec, ...]
    tiers: dict[Tier, TierSpec]
    layer_ns: tuple[int, ...]
    experts_permille: int = 500  # of layer_ns, what experts take
    fetch_ns: int = 0
    visits: tuple[MeasuredVisit, ...] = ()
    seed: int = 0
    dispatch_ns: int = 0  # round trip of tokens to a peer and its compute; 0: tokens stay
    report_ns: int = 200_000_000
    faults: tuple[Fault, ...] = ()


@dataclass(slots=True, kw_only=True)
class SimScore:
    """Totals of a run; times are ns."""

    steps: int = 0
    step_ns: int = 0
    stall_ns: int = 0
    hits: int = 0
    needs: int = 0
    fetched: dict[str, int] = field(default_factory=dict)  # tier -> demand fetches
    dispatched: int = 0
    prefetched: int = 0
    moved_bytes: int = 0
    commands: int = 0
    plans: int = 0  # put in force
    plans_refused: int = 0
    events: int = 0
    end_ns: int = 0
    lost: int = 0


class SimFlight(NamedTuple):
    """A read on its way."""

    reader: str
    flat: int
    source: str
    reason: Reason
    overhead_ns: int


@dataclass(slots=True)
class SimWorker:
    """A worker's place in its tokens, and what it waits for."""

    name: str
    policy: ResidencyPolicy
    visits: Sequence[Sequence[Sequence[int]]]  # [token][row] -> experts
    at: int = 0
    row: int = 0
    began_ns: int = 0
    step_began_ns: int = 0
    step_stall_ns: int = 0
    waiting: set[int] = field(default_factory=set)
    unclaimed: list[int] = field(default_factory=list)
    usual: int = 0  # needs of a decode step
    tokens: int = 1  # of the step; 2 stand for a prefill
    prefetching: int = 0
    load: LinkLoad = field(default_factory=LinkLoad)
    layer_began_ns: int = 0
    fetches: int = 0  # of the layer: asked for, and started in all
    started: int = 0
    busy_ns: int = 0  # until then compute has something to do without what it waits for
    stall_ns: int = 0
    drawn: MeasuredVisit = ()  # for the layer's reads
    covers: dict[int, int] = field(default_factory=dict)  # flat -> until then it is not missed
    coming: dict[int, int] = field(default_factory=dict)  # flat -> flight
    counts: dict[int, int] = field(default_factory=dict)
    steps_told: int = 0
    told_ns: int = 0
    alive: bool = True


def slot_bytes(spec: ClusterSpec, config: PolicyConfig | None = None) -> int:
    """Bytes of a slot with a full copy, as the brain counts them."""
    block = BlockInfo(
        block=BlockId(0, 0), nbytes=spec.block_bytes, reduced_nbytes=max(1, spec.block_bytes // 2)
    )
    return int(Sizes([block], config=config or PolicyConfig()).full[0])
