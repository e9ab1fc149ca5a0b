"""The simulated cluster: known times, contention, faults, and sums that add up."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from routing_traces import markov_trace

from hotset.policies.config import PolicyConfig
from hotset.policies.device import DeviceShape
from hotset.policies.linkmodel import LinkSpec
from hotset.policies.residency import make_policy
from hotset.policies.simspec import (
    ClusterSpec,
    Fault,
    ReadSample,
    SimScore,
    StoreSpec,
    TierSpec,
    slot_bytes,
)
from hotset.policies.simulate import Simulation
from hotset.policies.types import BlockId, Tier

LAYERS, EXPERTS, K = 4, 8, 2
BLOCK = 1 << 20
LINK = TierSpec(link=LinkSpec(bandwidth_bytes_per_s=BLOCK * 1_000_000, latency_ns=0))  # 1 us
SLOW = TierSpec(link=LinkSpec(bandwidth_bytes_per_s=BLOCK * 100_000, latency_ns=0))  # 10 us
TIERS = {Tier.HBM: LINK, Tier.HOST: LINK, Tier.CXL: SLOW, Tier.STORAGE: SLOW}


def cluster(
    *, workers: int = 1, slots: int = 8, host: int = 32, cxl: int = 0,
    faults: tuple[Fault, ...] = (), dispatch_ns: int = 0, tiers: dict[Tier, TierSpec] = TIERS,
) -> ClusterSpec:  # fmt: skip
    stores = [
        StoreSpec(name=f"worker-{at}", tier=Tier.HBM, node=f"n{at}", slots=slots)
        for at in range(workers)
    ]
    if host:
        stores.append(StoreSpec(name="host-0", tier=Tier.HOST, node="n0", slots=host))
    if cxl:
        stores.append(StoreSpec(name="cxl-0", tier=Tier.CXL, node="n0", slots=cxl))
    return ClusterSpec(
        layers=tuple(range(LAYERS)), num_experts=EXPERTS, block_bytes=BLOCK, stores=tuple(stores),
        tiers=tiers, layer_ns=(3000,) * LAYERS, faults=faults, dispatch_ns=dispatch_ns,
        report_ns=100_000,
    )  # fmt: skip


def simulate(spec: ClusterSpec, **more: Any) -> SimScore:
    return make(spec, **more).run()


def make(
    spec: ClusterSpec, *, policy: str = "lru", tokens: int = 60, seed: int = 1,
    kind: type[Simulation] = Simulation, **more: Any,
) -> Simulation:  # fmt: skip
    slot = slot_bytes(spec)
    workers = [store for store in spec.stores if store.tier is Tier.HBM]
    visits = {
        store.name: markov_trace(seed + at, tokens=tokens, layers=LAYERS, experts=EXPERTS, k=K)
        .tolist()
        for at, store in enumerate(workers)
    }  # fmt: skip
    return kind(
        spec,
        policies=lambda store: make_policy(
            policy,
            DeviceShape(
                layers=spec.layers, num_experts=EXPERTS, full_nbytes=slot,
                reduced_nbytes=slot // 2, capacity_bytes=store.slots * slot,
            ),
        ),
        visits=visits,
        **{"config": PolicyConfig(tick_ns=200_000, min_dwell_ns=500_000, cool_down_ns=500_000)}
        | more,
    )  # fmt: skip


class Plain(Simulation):
    """Asks the brain's directory each time and compares all sources: what the index must equal."""

    def __init__(self, spec: ClusterSpec, **more: Any) -> None:
        super().__init__(spec, **more)
        self._idle_ns = 0

    def _cheapest(self, reader: str, flat: int) -> Any:
        copies = self.brain.copies(BlockId(*self._block(flat)))
        found = [self._sources[copy.store] for copy in copies if copy.store != reader]
        return min([*found, self._storage[reader]], key=lambda one: (one.wait_ns(), one.name))

    def _peer(self, reader: str, flat: int) -> str | None:
        for copy in self.brain.copies(BlockId(*self._block(flat))):
            if copy.store in self._workers and copy.store != reader:
                return copy.store
        return None


def test_without_misses_a_step_is_its_compute() -> None:
    score = simulate(cluster(slots=LAYERS * EXPERTS))
    assert score.stall_ns == 0
    assert score.hits == score.needs == 60 * LAYERS * K
    assert score.step_ns == 60 * LAYERS * 3000
    assert score.moved_bytes == 0


@pytest.mark.parametrize("policy", ["lru", "hotset", "load-on-demand", "fate"])
def test_time_is_compute_and_stall(policy: str) -> None:
    score = simulate(cluster(), policy=policy)
    assert score.step_ns == score.steps * LAYERS * 3000 + score.stall_ns
    assert score.stall_ns > 0
    assert score.hits < score.needs
    assert score.moved_bytes >= sum(score.fetched.values()) * BLOCK
    assert (score.prefetched > 0) == (policy in {"hotset", "fate"})


def test_the_same_input_gives_the_same_figures() -> None:
    assert simulate(cluster(workers=3), policy="hotset") == simulate(
        cluster(workers=3), policy="hotset"
    )


def test_readers_of_one_link_contend() -> None:
    peers = {**TIERS, Tier.HBM: SLOW}  # so that all read host memory
    one = simulate(cluster(workers=1, tiers=peers), seed=4)
    four = simulate(cluster(workers=4, tiers=peers), seed=4)
    assert four.stall_ns / four.steps > 1.2 * one.stall_ns / one.steps


def test_software_at_both_ends_delays_and_occupies_nothing() -> None:
    late = {**TIERS, Tier.HOST: TierSpec(link=LINK.link, overhead_ns=5000)}
    plain, slow = simulate(cluster(), seed=2), simulate(cluster(tiers=late), seed=2)
    assert slow.fetched == plain.fetched
    layers_with_stall = (slow.stall_ns - plain.stall_ns) / 5000
    assert layers_with_stall == int(layers_with_stall)
    assert 0 < layers_with_stall <= 60 * LAYERS


def test_tokens_go_to_a_peer_where_that_is_cheaper() -> None:
    spec = cluster(workers=4, host=0, dispatch_ns=500)
    score = simulate(spec)
    assert score.dispatched > 0
    assert "hbm" not in score.fetched


def test_stall_is_what_compute_had_nothing_to_do_for() -> None:
    one = (ReadSample(took_ns=5000, cover_ns=4000),)
    two = (ReadSample(took_ns=6000, cover_ns=6000), ReadSample(took_ns=9000, cover_ns=6500))
    score = simulate(replace(cluster(), visits=(one, two)))
    pairs = (score.stall_ns - 1000 * sum(score.fetched.values())) / 500
    assert pairs == int(pairs), "a lone read is missed for 1000 ns, a pair for 2500"
    assert 0 < pairs < score.needs / 2


def test_a_visit_that_nobody_has_measured_is_like_the_nearest() -> None:
    alone = replace(cluster(), visits=((ReadSample(took_ns=5000, cover_ns=4000),),))
    score = simulate(alone)
    assert score.stall_ns % 1000 == 0, "of two reads that take as long, the first is missed"
    assert 0 < score.stall_ns < 1000 * sum(score.fetched.values())


def test_each_fetch_adds_to_the_compute_of_its_device() -> None:
    plain, dear = simulate(cluster()), simulate(replace(cluster(), fetch_ns=700))
    assert dear.fetched == plain.fetched
    assert dear.stall_ns == plain.stall_ns
    assert dear.step_ns - plain.step_ns == 700 * sum(plain.fetched.values())


def test_stores_start_with_what_they_bring() -> None:
    spec = cluster(slots=LAYERS * EXPERTS)
    half = tuple(BlockId(layer, index) for layer in range(LAYERS) for index in range(EXPERTS // 2))
    stores = tuple(replace(store, holds=half) for store in spec.stores)
    score = simulate(replace(spec, stores=stores))
    assert set(score.fetched) == {"storage"}, "nobody brought the other half"
    assert sum(score.fetched.values()) <= LAYERS * EXPERTS // 2


@pytest.mark.parametrize("policy", ["lru", "hotset"])
@pytest.mark.parametrize("dispatch_ns", [0, 500, 4000])
@pytest.mark.parametrize("seed", [1, 2])
def test_the_index_of_copies_is_the_brains_directory(
    *, policy: str, dispatch_ns: int, seed: int
) -> None:
    faults = (
        Fault(at_ns=200_000, store="host-0", back_ns=150_000),
        Fault(at_ns=300_000, store="worker-2"),
    )
    spec = cluster(workers=4, cxl=32, dispatch_ns=dispatch_ns, faults=faults)
    fast, plain = (make(spec, policy=policy, seed=seed, kind=kind) for kind in (Simulation, Plain))
    assert fast.run() == plain.run()
    for flat, holders in enumerate(fast._holders):
        block = BlockId(*divmod(flat, EXPERTS))
        assert set(holders) == {copy.store for copy in fast.brain.copies(block)}


def test_steps_before_the_start_are_not_scored() -> None:
    whole, late = simulate(cluster()), simulate(cluster(), unscored=range(20))
    assert late.steps == whole.steps - 20
    assert 0 < late.stall_ns < whole.stall_ns


def test_lost_stores_cost_time_and_nothing_else() -> None:
    faults = (
        Fault(at_ns=200_000, store="host-0", back_ns=150_000),
        Fault(at_ns=300_000, store="worker-2"),
    )
    whole = simulate(cluster(workers=3, cxl=32))
    score = simulate(cluster(workers=3, cxl=32, faults=faults))
    assert score.lost == 2
    assert score.steps < whole.steps, "the dead worker's request is gone"
    assert score.stall_ns / score.steps > whole.stall_ns / whole.steps
    assert sum(score.fetched.values()) > 0


def test_the_planner_replicates_what_all_ask_one_worker_for() -> None:
    few = PolicyConfig(
        tick_ns=200_000, plan_ns=2_000_000, popularity_half_life_tokens=64, plan_gain=0.001,
        min_dwell_ns=500_000, cool_down_ns=500_000,
    )  # fmt: skip
    spec = replace(cluster(workers=4, slots=10, host=0, dispatch_ns=500), experts_permille=900)
    spec = replace(spec, layer_ns=(300_000,) * LAYERS)
    planned, plain = (
        make(spec, tokens=120, config=config) for config in (few, replace(few, plan_ns=0))
    )
    scores = [one.run() for one in (planned, plain)]
    assert scores[0].plans > 0
    assert scores[1].plans == scores[1].plans_refused == 0
    assert planned.brain.plan_epoch > 0
