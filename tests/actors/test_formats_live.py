"""Copies in every format, in one process: made, fetched, swapped, standing in, going back."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

from hotset.actors.assembly import Counters
from hotset.actors.cache import Held, HotCache
from hotset.actors.context import RowIds
from hotset.actors.formatchoice import FormatChoice
from hotset.actors.kinds import ControlKind
from hotset.actors.packing import Packer
from hotset.actors.pool import PoolCore
from hotset.actors.reformer import Reformer
from hotset.actors.tokenpath import PathConfig, TokenPath
from hotset.actors.weights import WeightViews
from hotset.blocks.experts import run_expert, view_weights
from hotset.policies.allocate import Costs
from hotset.policies.device import DeviceShape
from hotset.policies.drift import Budget, DriftMeter
from hotset.policies.residency import make_policy
from hotset.policies.standin import StandInPurse
from hotset.policies.types import (
    STORAGE,
    BlockId,
    CopyDropped,
    CopyLanded,
    Format,
    Reason,
    StartTransfer,
    State,
    Tier,
    TransferFailed,
)
from hotset.transport.base import LinkProfile
from hotset.transport.inbox import Inbox
from hotset.transport.loopback import Fault
from hotset.transport.records import ROW, Ring
from hotset.transport.slots import part_bytes, slot_parts
from tests.actors.node import DEADLINE_S, Node, truth, until
from tests.blocks.expert_modules import Silu

if TYPE_CHECKING:
    from collections.abc import Iterator

    from hotset.blocks.checkpoint import Catalog
    from hotset.policies.types import Event
    from hotset.transport.loopback import LoopbackNetwork

LOSSY = (Format.FP8, Format.INT8, Format.NF4, Format.INT4, Format.INT3, Format.INT2)
ERROR = {
    Format.FP8: 0.05, Format.INT8: 0.02, Format.NF4: 0.15, Format.INT4: 0.2,
    Format.INT3: 0.35, Format.INT2: 0.7,
}  # fmt: skip
"""Most relative error of the weights: root mean square over that of the weights."""
SLOW = LinkProfile(bandwidth_bytes_per_s=1_000, latency_ns=0, emulated=True)
BLOCK = BlockId(0, 3)


class Worker:
    """The parts of a GPU worker that know formats."""

    def __init__(self, node: Node, planned: dict[BlockId, Format] | None = None) -> None:
        self.node = node
        self.policy = make_policy(
            "hotset",
            DeviceShape(
                layers=node.catalog.layers,
                num_experts=node.catalog.num_experts,
                full_nbytes=node.stride,
                reduced_nbytes=node.stride // 2,
                capacity_bytes=node.slab.capacity_bytes,
                nbytes={form: slot_bytes(node, form) for form in LOSSY},
            ),
        )
        self.choice = FormatChoice(planned or {}, directory=node.directory)
        self.cache = HotCache(
            store=node.store, fetcher=node.fetcher, policy=self.policy, payload_nbytes=node.nbytes,
            choose=self.choice.fetched,
            arrived=lambda landing: self.reformer.arrived(landing),  # noqa: PLW0108 - made below
        )  # fmt: skip
        self.views = WeightViews(catalog=node.catalog, slab=node.slab, directory=node.directory)
        self.reformer = Reformer(
            catalog=node.catalog, store=node.store, cache=self.cache, choice=self.choice,
            views=self.views,
        )  # fmt: skip

    def ask(self, block: BlockId = BLOCK) -> Inbox[Any]:
        inbox: Inbox[Any] = Inbox()
        self.cache.fetch(block.layer, [block.index], inbox=inbox, trace=(0, 0), parent=0)
        return inbox

    def get(self, block: BlockId = BLOCK) -> Held:
        held = self.ask(block).get(int(DEADLINE_S * 1e9))
        assert isinstance(held, Held), held
        return held

    def release(self, held: Held) -> None:
        """As the token path gives a copy back."""
        self.cache.done(held)
        self.reformer.released(held)

    def holds(self, form: Format, block: BlockId = BLOCK) -> bool:
        return self.node.store.holds(block, form)

    def error(self, block: BlockId = BLOCK) -> float:
        """Relative error of the weights that compute would read now, for many rows."""
        held = self.cache.hold(block.layer, block.index)
        assert held is not None
        found = flat(self.views.of(held, rows=64))
        self.cache.done(held)
        right = flat(view_weights(payload_of(self.node.catalog, block), self.node.catalog.layout))
        return float((found - right).norm() / right.norm())

    def check(self) -> None:
        self.policy.validate()
        self.node.slab.check_integrity()
        listed = {(copy.block, copy.format) for copy in self.node.store.copies()}
        assert listed == {(BlockId(r.layer, r.expert), r.format) for r in self.policy.residents()}


def slot_bytes(node: Node, form: Format) -> int:
    return part_bytes(slot_parts(node.nbytes[form], stride=node.stride), stride=node.stride)


def flat(weights: Any) -> torch.Tensor:
    return torch.cat([weights.gate_up.flatten(), weights.down.flatten()]).float()


def payload_of(catalog: Catalog, block: BlockId) -> torch.Tensor:
    return torch.frombuffer(bytearray(truth(catalog, block)), dtype=torch.uint8)


@pytest.fixture
def worker(catalog: Catalog, network: LoopbackNetwork) -> Iterator[Worker]:
    made = Worker(Node("worker", catalog=catalog, network=network, slots=6, formats=LOSSY))
    yield made
    made.check()
    made.node.close()


def pool_of(catalog: Catalog, network: LoopbackNetwork, name: str = "pool") -> Node:
    return Node(
        name, catalog=catalog, network=network, slots=24, formats=LOSSY, tier=Tier.HOST
    )  # fmt: skip


def core_of(node: Node, *, link: LinkProfile | None = None) -> PoolCore:
    return PoolCore(
        store=node.store, fetcher=node.fetcher, directory=node.directory, nbytes=node.nbytes,
        packer=lambda: Packer(node.catalog.layout, link=link), packs=link is not None,
    )  # fmt: skip


def order(form: Format, *sources: str) -> StartTransfer:
    return StartTransfer(
        epoch=1, store="pool", block=BLOCK, format=form, sources=(*sources, STORAGE),
        cause="test", reason=Reason.STAGE,
    )  # fmt: skip


def ended(core: PoolCore, node: Node) -> list[Event]:
    until(lambda: not core.pending, what="the pool's work")
    return node.store.take_events()


# --- in place -------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", LOSSY)
def test_a_copy_is_demoted_in_place_and_goes_back_without_a_gap(
    worker: Worker, catalog: Catalog, form: Format
) -> None:
    worker.cache.done(worker.get())
    worker.reformer.demote(BLOCK, form)
    until(lambda: worker.holds(form), what=f"a copy in {form}")
    assert not worker.holds(Format.BF16)
    assert worker.policy.state(0, 3) is State.REDUCED
    assert worker.node.slab.used_bytes == slot_bytes(worker.node, form)
    assert 0 < worker.error() < ERROR[form]
    worker.node.store.take_events()
    worker.reformer.promote(BLOCK)
    until(lambda: not worker.holds(form), what="the full copy")
    events = worker.node.store.take_events()
    assert [type(event) for event in events] == [CopyLanded, CopyDropped]  # made before broken
    held = worker.cache.hold(0, 3)
    assert held is not None
    assert worker.node.payload(held.slot) == truth(catalog, BLOCK)
    worker.cache.done(held)


def test_a_copy_is_compressed_and_unpacked_in_place_with_every_bit(
    worker: Worker, catalog: Catalog
) -> None:
    worker.cache.done(worker.get())
    worker.reformer.demote(BLOCK, Format.BF16Z)
    until(lambda: worker.holds(Format.BF16Z), what="a compressed copy")
    assert worker.policy.state(0, 3) is State.COMPRESSED
    assert worker.error() == 0
    worker.choice.keep_full(BLOCK)
    held = worker.cache.hold(0, 3)
    assert held is not None
    assert worker.reformer.unpacked(held, worker.views.decoded(held))
    assert worker.holds(Format.BF16)
    held = worker.cache.hold(0, 3)
    assert held is not None
    assert worker.node.payload(held.slot) == truth(catalog, BLOCK)
    worker.cache.done(held)


def test_a_lossy_copy_is_never_made_from_another_lossy_one(worker: Worker) -> None:
    worker.reformer.demote(BLOCK, Format.INT8)
    until(lambda: worker.holds(Format.INT8), what="an int8 copy")
    worker.node.store.take_events()
    worker.reformer.demote(BLOCK, Format.INT4)
    failures: list[Event] = []
    until(lambda: bool(failures.extend(worker.node.store.take_events()) or failures), what="end")
    assert isinstance(failures[0], TransferFailed)
    assert (failures[0].format, failures[0].reason) == (Format.INT4, Reason.STALE)
    assert worker.holds(Format.INT8)


def test_cheap_copies_let_more_blocks_in(catalog: Catalog, network: LoopbackNetwork) -> None:
    planned = dict.fromkeys(catalog.blocks, Format.INT4)
    made = Worker(Node("worker", catalog=catalog, network=network, slots=4, formats=LOSSY), planned)
    blocks = list(catalog.blocks)[:9]
    for block in blocks:
        made.release(made.get(block))
        until(partial(made.holds, Format.INT4, block), what=f"{block} in int4")
    assert all(made.holds(Format.INT4, block) for block in blocks)  # three in a slot
    made.check()
    made.node.close()


def test_a_full_copy_takes_one_super_slot_and_leaves_the_others(
    catalog: Catalog, network: LoopbackNetwork
) -> None:
    blocks = list(catalog.blocks)
    planned = dict.fromkeys(blocks[:12], Format.INT4)
    made = Worker(Node("worker", catalog=catalog, network=network, slots=4, formats=LOSSY), planned)
    for block in blocks[:9]:
        made.release(made.get(block))
        until(partial(made.holds, Format.INT4, block), what=f"{block} in int4")
    held = [made.get(block) for block in blocks[12:14]]  # the second finds no super-slot free
    assert sum(made.holds(Format.INT4, block) for block in blocks[:9]) == 6
    for one in held:
        made.release(one)
    made.check()
    made.node.close()


# --- over the link --------------------------------------------------------------------------------


def test_a_pool_encodes_once_and_readers_fetch_what_their_plan_says(
    catalog: Catalog, network: LoopbackNetwork
) -> None:
    pool, second = pool_of(catalog, network), pool_of(catalog, network, "second")
    core, other = core_of(pool), core_of(second)
    core.command(order(Format.INT4))
    landed = [event.copy for event in ended(core, pool) if isinstance(event, CopyLanded)]
    assert [(copy.block, copy.format) for copy in landed] == [(BLOCK, Format.INT4)]
    second.meet(pool)
    other.command(order(Format.INT4, "pool"))
    ended(other, second)
    assert second.fetcher.bytes_by_link == {"pool": pool.nbytes[Format.INT4]}
    worker = Worker(
        Node("worker", catalog=catalog, network=network, slots=6, formats=LOSSY),
        {BLOCK: Format.INT4},
    )
    worker.node.meet(pool)
    held = worker.get()
    assert held.format is Format.INT4
    assert worker.node.fetcher.bytes_by_link == {"pool": pool.nbytes[Format.INT4]}
    worker.cache.done(held)
    assert 0 < worker.error() < ERROR[Format.INT4]
    worker.check()
    for node in (worker.node, second, pool):
        node.close()


def test_a_cheap_copy_that_is_gone_is_followed_by_the_full_one(
    catalog: Catalog, network: LoopbackNetwork
) -> None:
    pool = pool_of(catalog, network)
    core = core_of(pool)
    core.command(order(Format.INT4))
    ended(core, pool)
    worker = Worker(
        Node("worker", catalog=catalog, network=network, slots=6, formats=LOSSY),
        {BLOCK: Format.INT4},
    )
    worker.node.meet(pool)
    assert pool.store.drop(BLOCK, Format.INT4, reason=Reason.EVICT)  # the directory is stale
    held = worker.get()
    assert held.format is Format.BF16
    assert worker.node.payload(held.slot) == truth(catalog, BLOCK)
    worker.release(held)
    until(lambda: worker.holds(Format.INT4), what="the plan's format, made here")
    worker.check()
    worker.node.close()
    pool.close()


def test_without_a_plan_nothing_lossy_is_fetched(
    worker: Worker, catalog: Catalog, network: LoopbackNetwork
) -> None:
    pool = pool_of(catalog, network)
    core = core_of(pool)
    core.command(order(Format.INT4))
    ended(core, pool)
    worker.node.meet(pool)
    held = worker.get()
    assert held.format is Format.BF16
    assert worker.node.payload(held.slot) == truth(catalog, BLOCK)
    worker.cache.done(held)
    pool.close()


def test_a_slow_link_carries_packed_bytes_and_every_bit(
    worker: Worker, catalog: Catalog, network: LoopbackNetwork
) -> None:
    pool = pool_of(catalog, network)
    core = core_of(pool, link=SLOW)
    core.command(order(Format.BF16))
    events = ended(core, pool)
    assert [type(event) for event in events] == [CopyLanded, CopyDropped, CopyLanded]
    (copy,) = pool.store.copies()
    assert copy.format is Format.BF16Z
    assert copy.nbytes < 0.95 * catalog.block_nbytes
    core.command(order(Format.BF16))  # it has the block, and says so
    (again,) = ended(core, pool)
    assert isinstance(again, CopyLanded)
    assert again.copy == copy
    worker.node.meet(pool)
    for _ in range(20):  # storage has been slow here
        worker.node.directory.cost(STORAGE).observe(nbytes=1000, elapsed_ns=10_000_000)
    held = worker.get()
    assert worker.node.fetcher.bytes_by_link == {"pool": copy.nbytes}
    full = worker.views.decoded(held)
    assert full.numpy().tobytes() == truth(catalog, BLOCK)
    worker.release(held)
    until(lambda: worker.holds(Format.BF16), what="the full copy")  # by itself, once it is free
    assert worker.error() == 0
    pool.close()


def test_a_fast_link_is_left_alone(catalog: Catalog, network: LoopbackNetwork) -> None:
    fast = LinkProfile(bandwidth_bytes_per_s=10**15, latency_ns=0, emulated=True)
    pool = pool_of(catalog, network)
    core = core_of(pool, link=fast)
    core.command(order(Format.BF16))
    ended(core, pool)
    (copy,) = pool.store.copies()
    assert copy.format is Format.BF16
    pool.close()


# --- stand-ins ------------------------------------------------------------------------------------


@pytest.mark.parametrize("allowed", [True, False])
def test_a_cheap_copy_stands_in_only_if_it_may(
    catalog: Catalog,
    network: LoopbackNetwork,
    allowed: bool,  # noqa: FBT001 - both rows
) -> None:
    pool = pool_of(catalog, network)
    pool.bring(BLOCK)
    worker = Worker(Node("worker", catalog=catalog, network=network, slots=6, formats=LOSSY))
    worker.reformer.demote(BLOCK, Format.INT4)
    until(lambda: worker.holds(Format.INT4), what="a cheap copy")
    worker.node.meet(pool)
    network.script(Fault.DELAY, source="pool")
    worker.reformer.promote(BLOCK)
    assert network.wait_posts(1)
    inbox: Inbox[Any] = Inbox()
    asked: list[tuple[BlockId, Format]] = []

    def may(block: BlockId, form: Format) -> bool:
        asked.append((block, form))
        return allowed

    ready, plan = worker.cache.begin(0, [3], [1], step=1, request=1, inbox=inbox, may_stand_in=may)
    assert asked == [(BLOCK, Format.INT4)]
    assert not plan.missing
    if allowed:
        (held,) = ready
        assert (held.format, held.stands_in) == (Format.INT4, True)
        network.release()
        until(lambda: worker.holds(Format.BF16), what="the full copy")
        assert flat(worker.views.of(held, rows=64)).isfinite().all()  # still pinned, still whole
        assert inbox.empty()
    else:
        assert ready == []
        network.release()
        held = inbox.get(int(DEADLINE_S * 1e9))
        assert held.format is Format.BF16
        assert worker.node.payload(held.slot) == truth(catalog, BLOCK)
    worker.cache.done(held)
    until(lambda: not worker.holds(Format.INT4), what="the cheap copy's end")
    worker.check()
    worker.node.close()
    pool.close()


class Nobody:
    """No peer takes tokens."""

    def compute(self, store: str, **_asked: Any) -> dict[int, torch.Tensor | None]:
        raise AssertionError(f"{store} was asked to compute")


@pytest.mark.parametrize("budget", [0.0, 0.5])
def test_the_token_path_pays_for_stand_ins_and_tells_of_them(
    catalog: Catalog, network: LoopbackNetwork, budget: float
) -> None:
    """The full copy is held back until the layer has asked for it: with a budget nobody waits."""
    pool = pool_of(catalog, network)
    pool.bring(BLOCK)
    worker = Worker(Node("worker", catalog=catalog, network=network, slots=6, formats=LOSSY))
    worker.reformer.demote(BLOCK, Format.INT4)
    until(lambda: worker.holds(Format.INT4), what="a cheap copy")
    worker.node.meet(pool)
    network.script(Fault.DELAY, source="pool")
    worker.reformer.promote(BLOCK)
    assert network.wait_posts(1)
    ring, counters = Ring(), Counters(hits={})
    path = TokenPath(
        catalog=catalog, views=worker.views, cache=worker.cache, choice=worker.choice,
        reformer=worker.reformer, purse=StandInPurse(meter(catalog, budget)),
        directory=worker.node.directory, peers=Nobody(), ring=ring, counters=counters,
        row_ids=RowIds(1), config=PathConfig(move="weights"),
    )  # fmt: skip
    path.begin_request(1, trace=(1, 2))
    path.begin_step(100)
    if not budget:
        network.release()  # exact mode waits for the full copy, so it has to come
    hidden = torch.ones(1, catalog.layout.fields[0].shape[1], dtype=torch.bfloat16)
    found = path.run(0, Silu(), hidden, torch.tensor([[3]]), torch.tensor([[0.5]]))
    stood_in = [row for row in np.frombuffer(ring.drain(), dtype=ROW) if row["kind"] == _USE]
    full = view_weights(payload_of(catalog, BLOCK), catalog.layout)
    right = 0.5 * run_expert(Silu(), hidden, full)
    if budget:
        assert counters.hits == {"stand-in": 1}
        assert [ring.names()[row["reason"]] for row in stood_in] == [Reason.STAND_IN.value]
        assert not torch.equal(found, right)
        network.release()
    else:
        assert "stand-in" not in counters.hits
        assert stood_in == []
        assert torch.equal(found, right.to(found.dtype))
    until(lambda: worker.holds(Format.BF16), what="the full copy")
    until(lambda: not worker.holds(Format.INT4), what="the cheap copy's end")
    worker.check()
    worker.node.close()
    pool.close()


_USE = int(ControlKind.USE)


def meter(catalog: Catalog, nats: float) -> DriftMeter:
    """All blocks alike: int4 costs a little."""
    shape = (len(catalog.layers), catalog.num_experts)
    damage = np.zeros((*shape, 2))
    damage[..., 1] = 1e-6
    return DriftMeter(
        Costs(formats=("bf16", "int4"), nbytes=np.array([100, 27]), nats=damage),
        layers=catalog.layers, frequency=np.full(shape, 0.5), budget=Budget(nats=nats),
    )  # fmt: skip
