"""The live check on a real model: what served in cheap formats is told from what served in full."""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING, Any

import pytest

from hotset.actors.cache import HotCache
from hotset.actors.canary import Canary, FullExperts
from hotset.actors.weights import WeightViews
from hotset.blocks.experts import run_expert
from hotset.blocks.generate import generate
from hotset.blocks.hf import load_skeleton
from hotset.blocks.local import LocalRunner
from hotset.blocks.sensitivity import rounded
from hotset.policies.device import DeviceShape
from hotset.policies.live_share import LiveShare, ShareBounds
from hotset.policies.residency import make_policy
from hotset.transport.inbox import Inbox
from tests.actors.node import DEADLINE_S, Node

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    import torch

    from hotset.blocks.checkpoint import Catalog
    from hotset.policies.types import BlockId, DriftMeasured
    from hotset.transport.loopback import LoopbackNetwork

PROMPT = list(range(3, 23))
TOKENS = 24
SLOTS = 3


class Cheap(LocalRunner):
    """Serves every expert in `form`, as a worker would that holds nothing else."""

    form = "int2"

    def _payload(self, block: BlockId) -> torch.Tensor:
        return rounded(super()._payload(block), self._catalog.layout, form=self.form)


class World:
    """A model, a store with a hot cache, a canary around the runner that serves."""

    def __init__(
        self, path: Path, node: Node, *, runner: LocalRunner, bounds: ShareBounds | None = None
    ) -> None:
        self.node, self.runner = node, runner
        catalog = node.catalog
        self.skeleton = load_skeleton(path, catalog=catalog)
        self.policy = make_policy(
            "hotset",
            DeviceShape(
                layers=catalog.layers, num_experts=catalog.num_experts, full_nbytes=node.stride,
                reduced_nbytes=node.stride // 2,
                capacity_bytes=node.slab.capacity_bytes - node.stride,  # the canary's own slot
            ),
        )  # fmt: skip
        self.cache = HotCache(
            store=node.store, fetcher=node.fetcher, policy=self.policy, payload_nbytes=node.nbytes
        )
        full = FullExperts(
            catalog=catalog, cache=self.cache, fetcher=node.fetcher, slab=node.slab,
            compute=run_expert, reference="eager",
            views=WeightViews(catalog=catalog, slab=node.slab, directory=node.directory),
        )  # fmt: skip
        self.requests, self.waiting = 1, False
        self.canary = Canary(
            self.skeleton.model, served=runner, full=full, share=LiveShare(bounds), store="worker",
            requests=lambda: self.requests, waiting=lambda: self.waiting,
        )  # fmt: skip
        self.skeleton.bind(self.canary)
        self._local = threading.local()
        self.skeleton.model.register_forward_pre_hook(self._before, with_kwargs=True)
        self.skeleton.model.register_forward_hook(self._after)

    def _before(self, _module: Any, _args: Any, kwargs: dict[str, Any]) -> None:
        if not self.canary.mine:
            self._local.began_ns = time.monotonic_ns()
            self.canary.step(self._local.request, kwargs["input_ids"])

    def _after(self, _module: Any, _args: Any, output: Any) -> None:
        if not self.canary.mine:
            step_ns = time.monotonic_ns() - self._local.began_ns
            self.canary.stepped(self._local.request, output.logits, step_ns=step_ns)

    def serve(self, request: int, *, tokens: int = TOKENS) -> list[int]:
        self._local.request = request
        found = generate(self.skeleton.model, PROMPT, max_new_tokens=tokens)
        self.canary.ended(request)
        return found

    def measured(self, *, pairs: int) -> list[DriftMeasured]:
        """Events until there are so many pairs."""
        found: list[DriftMeasured] = []
        end, pace = time.monotonic() + DEADLINE_S, threading.Event()
        while sum(len(event.kl) for event in found) < pairs:
            assert time.monotonic() < end, f"{found}"
            found += self.canary.take_events()
            pace.wait(0.01)
        return found

    def close(self) -> None:
        self.canary.close()
        self.runner.reader.close()
        self.node.slab.check_integrity()
        assert self.node.slab.used_bytes == sum(
            self.node.stride for _ in self.node.store.copies()
        ), "every slot of the canary's is free again"
        self.node.close()


@pytest.fixture
def node(catalog: Catalog, network: LoopbackNetwork) -> Node:
    return Node("worker", catalog=catalog, network=network, slots=SLOTS)


@pytest.fixture
def cheap(olmoe: Path, catalog: Catalog, node: Node) -> Iterator[World]:
    made = World(olmoe, node, runner=Cheap(catalog))
    yield made
    made.close()


def test_cheap_experts_show_and_every_pair_has_its_place(cheap: World) -> None:
    began_ns = time.time_ns()
    tokens = cheap.serve(1)
    found = cheap.measured(pairs=len(tokens) // 2)
    kl = [value for event in found for value in event.kl]
    assert sum(kl) / len(kl) > 1e-3
    assert all(event.store == "worker" and event.since_ns >= began_ns for event in found)
    assert all(len(event.kl) == len(event.flips) and event.spent_ns > 0 for event in found)
    assert cheap.canary.given_up == 0


def test_full_experts_served_differ_by_rounding_alone(
    olmoe: Path, catalog: Catalog, node: Node
) -> None:
    world = World(olmoe, node, runner=LocalRunner(catalog))
    world.serve(1)
    kl = [value for event in world.measured(pairs=12) for value in event.kl]
    assert sum(kl) / len(kl) < 1e-4
    world.close()


def test_nothing_hot_is_evicted_and_resident_blocks_are_used(
    cheap: World, network: LoopbackNetwork, catalog: Catalog
) -> None:
    pool = Node("pool", catalog=catalog, network=network, slots=len(catalog.blocks))
    pool.bring(*sorted(catalog.blocks))
    cheap.node.meet(pool)
    held = []
    for expert in (0, 1):
        inbox: Any = Inbox()
        cheap.cache.fetch(0, [expert], inbox=inbox, trace=(0, 0), parent=0)
        held.append(inbox.get(int(DEADLINE_S * 1e9)))
    before = cheap.node.store.copies()
    for one in held:
        cheap.cache.done(one)
    cheap.serve(1)
    cheap.measured(pairs=12)
    assert cheap.node.store.copies() == before
    assert cheap.node.fetcher.bytes_by_link["pool"] > 2 * catalog.block_nbytes
    pool.close()


def test_the_share_of_time_holds(olmoe: Path, catalog: Catalog, node: Node) -> None:
    world = World(
        olmoe, node, runner=Cheap(catalog), bounds=ShareBounds(ratio=0.001, least=4, most_kept=64)
    )
    for request in range(6):
        world.serve(request)
    world.measured(pairs=1)
    share = world.canary.share
    assert not share.may_begin(), "the first pass cost more than it may, so the next one waits"
    assert world.canary.pairs < 6 * TOKENS
    world.close()


def test_load_makes_it_wait(cheap: World) -> None:
    cheap.waiting = True
    cheap.serve(1)
    assert not cheap.canary.take_events()
    assert cheap.canary.pairs == 0
    cheap.waiting = False
    assert cheap.measured(pairs=12)


def test_tokens_served_are_the_same_with_and_without(
    olmoe: Path, catalog: Catalog, cheap: World
) -> None:
    alone = load_skeleton(olmoe, catalog=catalog)
    runner = Cheap(catalog)
    alone.bind(runner)
    assert cheap.serve(1) == generate(alone.model, PROMPT, max_new_tokens=TOKENS)
    runner.reader.close()


def test_a_source_that_dies_costs_pairs_and_no_slot(
    cheap: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cheap.node.slab, "allocate", lambda _nbytes: None)
    monkeypatch.setattr("hotset.actors.canary._SLOT_S", 0.0)
    cheap.serve(1)
    end, pace = time.monotonic() + DEADLINE_S, threading.Event()
    while not cheap.canary.given_up:
        assert time.monotonic() < end
        pace.wait(0.01)
    assert cheap.canary.pairs == 0
