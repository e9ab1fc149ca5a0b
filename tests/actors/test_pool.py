"""A pool carries out what the controller asks and reports every end of it."""

from __future__ import annotations

import threading
import time
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest

from hotset.actors.pool import MOST_IN_FLIGHT, PoolCore
from hotset.policies.types import (
    STORAGE,
    BlockId,
    CopyDropped,
    CopyLanded,
    DropCopy,
    Format,
    Reason,
    StartTransfer,
    TransferFailed,
)
from tests.actors.node import DEADLINE_S, Node

if TYPE_CHECKING:
    from collections.abc import Iterator

    from hotset.blocks.checkpoint import Catalog
    from hotset.policies.types import Event
    from hotset.transport.loopback import LoopbackNetwork

SLOTS = 12


@pytest.fixture
def node(catalog: Catalog, network: LoopbackNetwork) -> Iterator[Node]:
    made = Node("host-0", catalog=catalog, network=network, slots=SLOTS, incarnation=8)
    yield made
    made.close()


def core_of(node: Node) -> PoolCore:
    return PoolCore(
        store=node.store, fetcher=node.fetcher, directory=node.directory, nbytes=node.nbytes
    )


def asked(block: BlockId) -> StartTransfer:
    return StartTransfer(
        epoch=1, store="host-0", block=block, format=Format.BF16, sources=(STORAGE,),
        cause="test", reason=Reason.WARM,
    )  # fmt: skip


def ended(core: PoolCore, node: Node) -> list[Event]:
    """Events of the pool once nothing is pending."""
    pace = threading.Event()
    for _ in range(int(DEADLINE_S / 0.005)):
        if not core.pending:
            return node.store.take_events()
        pace.wait(0.005)
    raise AssertionError("transfers are still pending")


def test_it_fetches_what_fits_and_refuses_the_rest(node: Node, catalog: Catalog) -> None:
    core = core_of(node)
    for block in list(catalog.blocks)[: SLOTS + 3]:
        core.command(asked(block))
    events = ended(core, node)
    landed = [event for event in events if isinstance(event, CopyLanded)]
    failed = [event for event in events if isinstance(event, TransferFailed)]
    assert len(landed) == SLOTS
    assert {event.source for event in landed} == {STORAGE}
    assert {event.reason for event in failed} == {Reason.VETO_MEMORY}
    assert {event.incarnation for event in failed} == {8}
    every = {event.copy.block for event in landed} | {event.block for event in failed}
    assert every == set(list(catalog.blocks)[: SLOTS + 3])  # each one's end is told
    assert not any(node.slab.pins(node.store._slots[key]) for key in node.store._slots)


def test_it_drops_and_may_fill_again(node: Node, catalog: Catalog) -> None:
    core = core_of(node)
    block = next(iter(catalog.blocks))
    core.command(asked(block))
    (landed,) = ended(core, node)
    core.command(
        DropCopy(
            epoch=2, store="host-0", block=block, format=Format.BF16, cause="test",
            reason=Reason.REBALANCE,
        )
    )  # fmt: skip
    (dropped,) = ended(core, node)
    assert isinstance(landed, CopyLanded)
    assert isinstance(dropped, CopyDropped)
    assert dropped.generation == landed.copy.generation
    assert node.slab.used_bytes == 0
    core.command(asked(block))
    core.command(asked(block))  # twice asked, once fetched
    again, *twice = ended(core, node)
    assert isinstance(again, CopyLanded)
    assert again.copy.generation > landed.copy.generation
    assert all(isinstance(one, CopyLanded) and one.copy == again.copy for one in twice)


def test_a_copy_that_is_here_is_told_again_when_it_is_asked_for(
    node: Node, catalog: Catalog
) -> None:
    core = core_of(node)
    block = next(iter(catalog.blocks))
    core.command(asked(block))
    (landed,) = ended(core, node)
    core.command(asked(block))  # the directory has lost it
    (again,) = ended(core, node)
    assert isinstance(landed, CopyLanded)
    assert isinstance(again, CopyLanded)
    assert again.copy == landed.copy


def test_a_window_that_has_passed_is_refused_and_the_urgent_go_first(
    node: Node, catalog: Catalog
) -> None:
    core = core_of(node)
    late, soon, some_time = list(catalog.blocks)[:3]
    core._flying = {(block, Format.INT8) for block in list(catalog.blocks)[:MOST_IN_FLIGHT]}
    now_ns = time.time_ns()
    core.command(replace(asked(some_time), reason=Reason.STAGE))
    core.command(replace(asked(soon), due_ns=now_ns + 10**12))
    core.command(replace(asked(late), due_ns=now_ns - 1))
    assert [one.block for one in core._queue] == [late, soon, some_time]
    core._flying.clear()
    core._pump()
    events = ended(core, node)
    (failed,) = [one for one in events if isinstance(one, TransferFailed)]
    assert (failed.block, failed.reason) == (late, Reason.VETO_LATE)
    assert {one.copy.block for one in events if isinstance(one, CopyLanded)} == {soon, some_time}
