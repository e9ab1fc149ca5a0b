"""The hot cache delivers each block once to each waiter, pinned, and never over its budget."""

from __future__ import annotations

import random
import threading
from typing import TYPE_CHECKING, Any

import pytest

from hotset.actors.cache import Held, HotCache, Lost
from hotset.blocks.checkpoint import Catalog
from hotset.blocks.families import make_random_checkpoint
from hotset.policies.device import DeviceShape
from hotset.policies.residency import make_policy
from hotset.policies.types import BlockId, CopyDropped, CopyLanded, Format, Reason, TransferFailed
from hotset.transport.inbox import Inbox
from hotset.transport.loopback import Fault
from tests.actors.node import DEADLINE_S, Node, truth

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from hotset.transport.loopback import LoopbackNetwork

SLOTS = 4


class Hot:
    """A cache on a node, with its policy."""

    def __init__(self, node: Node, policy: str = "hotset") -> None:
        self.node = node
        self.policy = make_policy(
            policy,
            DeviceShape(
                layers=node.catalog.layers,
                num_experts=node.catalog.num_experts,
                full_nbytes=node.stride,
                reduced_nbytes=node.stride // 2,
                capacity_bytes=node.slab.capacity_bytes,
            ),
        )
        self.cache = HotCache(
            store=node.store, fetcher=node.fetcher, policy=self.policy, payload_nbytes=node.nbytes
        )

    def fetch(self, layer: int, *experts: int) -> Inbox[Any]:
        inbox: Inbox[Any] = Inbox()
        self.cache.fetch(layer, experts, inbox=inbox, trace=(0, 0), parent=0)
        return inbox

    def get(self, layer: int, expert: int) -> Held:
        held = self.fetch(layer, expert).get(int(DEADLINE_S * 1e9))
        assert isinstance(held, Held)
        return held

    def check(self) -> None:
        """Policy, store and slab tell the same story."""
        self.policy.validate()  # type: ignore[attr-defined] # the table's own check
        self.node.slab.check_integrity()
        listed = {(copy.block, copy.format) for copy in self.node.store.copies()}
        residents = self.policy.residents()  # type: ignore[attr-defined] # as above
        assert listed == {(BlockId(r.layer, r.expert), r.format) for r in residents}


@pytest.fixture
def hot(catalog: Catalog, network: LoopbackNetwork) -> Iterator[Hot]:
    made = Hot(Node("worker", catalog=catalog, network=network, slots=SLOTS))
    yield made
    made.check()
    made.node.close()


def of_kind(node: Node, kind: type[Any]) -> list[Any]:
    return [event for event in node.store.take_events() if isinstance(event, kind)]


def test_one_fetch_serves_all_who_wait(
    hot: Hot, network: LoopbackNetwork, catalog: Catalog
) -> None:
    pool = Node("pool", catalog=catalog, network=network, slots=2)
    pool.bring(BlockId(0, 3))
    hot.node.meet(pool)
    network.script(Fault.DELAY, source="pool")
    inboxes = [hot.fetch(0, 3) for _ in range(5)]
    assert network.wait_posts(1)
    network.release()
    held = [inbox.get(int(DEADLINE_S * 1e9)) for inbox in inboxes]
    assert network.posts == 1
    assert len({one.slot for one in held}) == 1
    assert hot.node.slab.pins(held[0].slot) == len(inboxes)
    assert hot.node.payload(held[0].slot) == truth(catalog, BlockId(0, 3))
    for one in held:
        hot.cache.done(one)
    assert hot.node.slab.pins(held[0].slot) == 0
    pool.close()


def test_the_least_useful_makes_way_and_the_budget_holds(hot: Hot, catalog: Catalog) -> None:
    for expert in range(catalog.num_experts):
        hot.cache.done(hot.get(1, expert))
        assert hot.node.slab.used_bytes <= hot.node.slab.capacity_bytes
    events = hot.node.store.take_events()
    landed = [event for event in events if isinstance(event, CopyLanded)]
    dropped = [event for event in events if isinstance(event, CopyDropped)]
    assert len(landed) == catalog.num_experts
    assert len(dropped) == catalog.num_experts - SLOTS
    generations = {event.copy.block: event.copy.generation for event in landed}
    for event in dropped:
        assert event.generation == generations[event.block]
        assert event.incarnation == hot.node.store.info.incarnation


def test_who_finds_all_slots_pinned_waits_in_line(hot: Hot) -> None:
    held = [hot.get(0, expert) for expert in range(SLOTS)]
    first, second = hot.fetch(0, 6), hot.fetch(0, 7)
    assert not hot.cache.prefetch([(1, 1)])  # nobody overtakes the line
    assert first.empty()
    hot.cache.done(held.pop())
    got = first.get(int(DEADLINE_S * 1e9))
    assert got.expert == 6
    assert second.empty()
    hot.cache.done(got)
    hot.cache.done(second.get(int(DEADLINE_S * 1e9)))
    for one in held:
        hot.cache.done(one)


def test_a_warm_up_takes_free_room_only(hot: Hot) -> None:
    kept = [hot.get(0, expert) for expert in range(SLOTS - 1)]
    for one in kept:
        hot.cache.done(one)
    assert not hot.cache.prefetch([(2, 0), (2, 1)], reason=Reason.WARM)
    hot.cache.done(hot.get(2, 0))
    assert all(hot.node.store.holds(BlockId(0, one.expert), Format.BF16) for one in kept)


def test_a_copy_in_use_is_not_dropped(hot: Hot) -> None:
    held = hot.get(0, 1)
    assert not hot.cache.drop(BlockId(0, 1), reason=Reason.REBALANCE)
    hot.cache.done(held)
    assert hot.cache.drop(BlockId(0, 1), reason=Reason.REBALANCE)
    assert not hot.cache.drop(BlockId(0, 1), reason=Reason.REBALANCE)
    assert hot.cache.hold(0, 1) is None


def test_a_reduced_copy_takes_half_of_the_room(hot: Hot) -> None:
    reduced = memoryview(bytes(hot.node.reduced_nbytes))
    for expert in range(SLOTS):
        assert hot.cache.replace(hot.get(0, expert), Format.INT8, reduced)
    assert hot.node.slab.used_bytes == hot.node.slab.capacity_bytes // 2
    held = hot.cache.hold(0, 0)
    assert held is not None
    assert held.format is Format.INT8
    hot.cache.done(held)


def test_a_copy_that_others_hold_is_not_replaced(hot: Hot) -> None:
    one, other = hot.get(0, 0), hot.get(0, 0)
    assert not hot.cache.replace(one, Format.INT8, memoryview(bytes(hot.node.reduced_nbytes)))
    assert hot.node.store.holds(BlockId(0, 0), Format.BF16)
    hot.cache.done(other)


def test_a_failed_layer_gives_everything_back(hot: Hot) -> None:
    held = [hot.get(0, 0)]
    inbox = hot.fetch(0, 1, 2, 3, 4, 5)
    hot.cache.abandon(inbox, held)
    for expert in range(SLOTS):  # every slot can be had again
        hot.cache.done(hot.get(1, expert))


def test_a_block_that_no_source_delivers_is_told_to_all(
    tmp_path: Path, network: LoopbackNetwork
) -> None:
    path = make_random_checkpoint("olmoe", tmp_path, seed=2)
    node = Node("worker", catalog=Catalog.open(path), network=network, slots=SLOTS)
    hot = Hot(node)
    (path / "model.safetensors").unlink()
    lost = hot.fetch(0, 3).get(int(DEADLINE_S * 1e9))
    assert isinstance(lost, Lost)
    assert "model.safetensors" in lost.error
    (failure,) = of_kind(node, TransferFailed)
    assert (failure.block, failure.reason) == (BlockId(0, 3), Reason.LOST)
    assert failure.incarnation == node.store.info.incarnation
    hot.check()
    node.close()


@pytest.mark.parametrize("policy", ["hotset", "lru", "load-on-demand"])
@pytest.mark.parametrize("seed", [1, 2])
def test_threads_and_faults(
    catalog: Catalog, network: LoopbackNetwork, seed: int, policy: str
) -> None:
    """Four requests at once against a pool whose reads go wrong now and then."""
    pool = Node("pool", catalog=catalog, network=network, slots=24)
    pool.bring(*list(catalog.blocks)[:20])
    node = Node("worker", catalog=catalog, network=network, slots=SLOTS)
    node.meet(pool)
    hot = Hot(node, policy)
    right = {block: truth(catalog, block) for block in catalog.blocks}
    wrong: list[str] = []

    def request(number: int) -> None:
        try:
            serve(hot, right, pool=pool, network=network, dice=random.Random(100 * seed + number))
        except Exception as error:  # noqa: BLE001 - asserted on by the main thread
            wrong.append(repr(error))

    threads = [threading.Thread(target=request, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert not any(thread.is_alive() for thread in threads)
    assert not wrong
    settle(hot)
    hot.check()
    assert not any(node.slab.pins(slot) for slot in slots_of(node))
    node.close()
    pool.close()


def serve(
    hot: Hot,
    right: dict[BlockId, bytes],
    *,
    pool: Node,
    network: LoopbackNetwork,
    dice: random.Random,
) -> None:
    """One request: layers with a few experts each, as the token path asks for them."""
    number = dice.randrange(1 << 30)
    for step in range(60):
        # A failed read makes the worker forget the pool; the next epoch names it again.
        hot.node.directory.replace(pool.store.copies(), epoch=step, version=step)
        for layer in hot.node.catalog.layers:
            if dice.random() < 0.2:
                network.script(dice.choice([Fault.ERROR, Fault.FLIP]), source="pool")
            experts = sorted(dice.sample(range(hot.node.catalog.num_experts), 2))
            inbox: Inbox[Any] = Inbox()
            ready, plan = hot.cache.begin(
                layer, experts, [1, 1], step=step, request=number, inbox=inbox
            )
            hot.cache.fetch(layer, plan.missing, inbox=inbox, trace=(0, 0), parent=0)
            hot.cache.prefetch(plan.prefetch)
            waiting = set(experts)
            for held in ready:
                use(hot, held, right, waiting)
            while waiting:
                use(hot, inbox.get(int(DEADLINE_S * 1e9)), right, waiting)
            assert inbox.empty()


def use(hot: Hot, held: Any, right: dict[BlockId, bytes], waiting: set[int]) -> None:
    assert isinstance(held, Held), held
    assert hot.node.payload(held.slot) == right[BlockId(held.layer, held.expert)]
    waiting.remove(held.expert)  # delivered once
    hot.cache.done(held)


def slots_of(node: Node) -> list[Any]:
    slots = []
    for copy in node.store.copies():
        slot = node.store.pin(copy.block, copy.format)
        assert slot is not None
        node.store.unpin(slot)
        slots.append(slot)
    return slots


def settle(hot: Hot) -> None:
    """Wait for prefetches that nobody waited for."""
    until(lambda: hot.node.engine.in_flight == 0 and not hot.cache._flights)


def until(condition: Callable[[], bool]) -> None:
    pace = threading.Event()
    for _ in range(int(DEADLINE_S / 0.005)):
        if condition():
            return
        pace.wait(0.005)
    raise AssertionError("it did not come true")
