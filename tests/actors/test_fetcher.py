"""A block comes from the next source when one fails; each fetch ends once, with the right bytes."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from hotset.actors import fetcher as fetcher_module
from hotset.blocks.checkpoint import Catalog
from hotset.blocks.families import make_random_checkpoint
from hotset.policies.types import STORAGE, BlockId, Format, Reason, Tier
from hotset.transport.loopback import Fault
from tests.actors.node import Endings, Node, closing, truth

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from hotset.transport.loopback import LoopbackNetwork

BLOCKS = [BlockId(layer, expert) for layer in range(3) for expert in (0, 5)]


@pytest.fixture
def pair(catalog: Catalog, network: LoopbackNetwork) -> Iterator[tuple[Node, Node]]:
    """A pool that holds the blocks, and a worker that knows of them."""
    pool = Node("pool", catalog=catalog, network=network, slots=8, tier=Tier.HOST)
    worker = Node("worker", catalog=catalog, network=network, slots=10)
    with closing(worker, pool):
        pool.bring(*BLOCKS)
        worker.meet(pool)
        yield worker, pool


def assert_right(node: Node, block: BlockId) -> None:
    slot = node.store.pin(block, Format.BF16)
    assert slot is not None
    assert node.payload(slot) == truth(node.catalog, block)
    node.store.unpin(slot)


def test_storage_has_every_block(catalog: Catalog, network: LoopbackNetwork) -> None:
    node = Node("only", catalog=catalog, network=network, slots=8)
    with closing(node):
        landings = node.bring(*BLOCKS)
        assert {landing.source for landing in landings} == {STORAGE}
        for block in BLOCKS:
            assert_right(node, block)
        assert node.fetcher.bytes_by_link == {STORAGE: len(BLOCKS) * catalog.block_nbytes}


def test_a_pool_is_read_before_storage(pair: tuple[Node, Node]) -> None:
    worker, _ = pair
    assert {landing.source for landing in worker.bring(*BLOCKS)} == {"pool"}
    for block in BLOCKS:
        assert_right(worker, block)
    ours = {copy.block: copy.checksum for copy in worker.store.copies()}
    assert ours == {c.block: c.checksum for c in pair[1].store.copies()}


def test_a_stale_copy_sends_to_the_next_source(pair: tuple[Node, Node]) -> None:
    worker, pool = pair
    pool.store.drop(BLOCKS[0], Format.BF16, reason=Reason.EVICT)
    pool.bring(BlockId(1, 7))  # another block in that very slot
    landings = {landing.block: landing.source for landing in worker.bring(*BLOCKS[:2])}
    assert landings == {BLOCKS[0]: STORAGE, BLOCKS[1]: "pool"}
    assert_right(worker, BLOCKS[0])
    assert not worker.directory.copies(BLOCKS[0])  # not tried again
    assert worker.directory.copies(BLOCKS[2])


@pytest.mark.parametrize("fault", [Fault.GONE, Fault.ERROR, Fault.FLIP], ids=lambda f: f.value)
def test_a_failing_peer_sends_to_storage(
    pair: tuple[Node, Node], network: LoopbackNetwork, fault: Fault
) -> None:
    worker, _ = pair
    network.script(fault, source="pool")
    (landing,) = worker.bring(BLOCKS[0])
    assert landing.source == STORAGE
    assert_right(worker, BLOCKS[0])


def test_a_dead_peer_is_forgotten_whole(pair: tuple[Node, Node], network: LoopbackNetwork) -> None:
    worker, _ = pair
    network.kill("pool")
    worker.bring(BLOCKS[0])
    assert not any(worker.directory.copies(block) for block in BLOCKS)
    posts = network.posts
    assert {landing.source for landing in worker.bring(*BLOCKS[1:])} == {STORAGE}
    assert network.posts == posts


def test_a_hung_peer_costs_its_deadline_and_a_slot(
    pair: tuple[Node, Node], network: LoopbackNetwork, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fetcher_module, "_DEADLINE_FLOOR_NS", 100_000_000)
    worker, _ = pair
    network.script(Fault.DELAY, source="pool")
    (landing,) = worker.bring(BLOCKS[0])
    assert landing.source == STORAGE
    assert worker.engine.quarantined == 1  # the slot that may still be written to
    assert worker.engine.quarantined_bytes == worker.catalog.block_nbytes
    network.release()
    assert_right(worker, BLOCKS[0])  # what landed late changed nothing


def test_no_slot_for_the_next_source_is_said(
    catalog: Catalog, network: LoopbackNetwork, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fetcher_module, "_DEADLINE_FLOOR_NS", 100_000_000)
    pool = Node("pool", catalog=catalog, network=network, slots=2, tier=Tier.HOST)
    worker = Node("worker", catalog=catalog, network=network, slots=1)
    with closing(worker, pool):
        pool.bring(BLOCKS[0])
        worker.meet(pool)
        network.script(Fault.DELAY, source="pool")
        (landing,) = worker.bring(BLOCKS[0])
        assert landing.slot is None
        assert landing.no_slot
        network.release()


def test_a_format_that_nobody_holds_ends_at_once(pair: tuple[Node, Node]) -> None:
    worker, _ = pair
    ended = Endings()
    worker.fetcher.start([worker.want(BLOCKS[0], ended, Format.INT8)])
    (landing,) = ended.wait(1)
    assert landing.slot is None
    assert "no source" in landing.error


def test_files_that_are_gone_end_the_fetch(tmp_path: Path, network: LoopbackNetwork) -> None:
    path = make_random_checkpoint("olmoe", tmp_path, seed=2)
    node = Node("only", catalog=Catalog.open(path), network=network, slots=2)
    (path / "model.safetensors").unlink()
    with closing(node):
        (landing,) = node.bring(BLOCKS[0])
        assert landing.slot is None
        assert not landing.no_slot
        assert "model.safetensors" in landing.error
        assert node.slab.used_bytes == 0


def test_a_command_names_its_sources(pair: tuple[Node, Node]) -> None:
    worker, _ = pair
    ended = Endings()
    worker.fetcher.start([worker.want(BLOCKS[0], ended, allow=frozenset({STORAGE}))])
    (landing,) = ended.wait(1)
    assert landing.source == STORAGE
    assert landing.slot is not None
    worker.store.adopt(landing)
    worker.store.unpin(landing.slot)
