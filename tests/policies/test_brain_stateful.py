"""Any order of events, stale ones included, keeps the invariants; equal events, equal commands."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from cluster_model import ClusterModel, blocks_of
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    precondition,
    rule,
    run_state_machine_as_test,
)

from hotset.policies.brain import ClusterBrain
from hotset.policies.config import PolicyConfig
from hotset.policies.types import (
    BlockId,
    Concurrency,
    CopyDropped,
    CopyLanded,
    Event,
    Format,
    LayerTimes,
    LinkUse,
    Pressure,
    Reason,
    Replan,
    RouterCounts,
    StoreDraining,
    StoreInfo,
    StoreJoined,
    StoreLost,
    Tick,
    Tier,
    TransferFailed,
)

LAYERS, EXPERTS = 2, 5
TIERS = {"w0": Tier.HBM, "w1": Tier.HBM, "h0": Tier.HOST, "h1": Tier.HOST, "c0": Tier.CXL}
NAMES = st.sampled_from(sorted(TIERS))
BLOCKS = st.builds(BlockId, st.integers(0, LAYERS - 1), st.integers(0, EXPERTS - 1))
FORMATS = st.sampled_from([Format.BF16, Format.INT8])
CONFIG = PolicyConfig(
    popularity_half_life_tokens=16,
    tick_ns=5,
    min_dwell_ns=20,
    cool_down_ns=20,
    background_bytes_in_flight=2500,
    telemetry_ttl_ns=200,
    retry_ns=15,
    transfer_timeout_ns=100,
    bytes_per_tick=4000,
    warm_bytes_in_flight=4000,
    hbm_reduced_ratio=0.4,
    floor={1: Format.INT8},
    changes_kept=30,
)


class BrainWalk(RuleBasedStateMachine):
    """`ClusterModel.send` calls `validate` after every event."""

    @initialize()
    def start(self) -> None:
        self.model = ClusterModel.of(layers=LAYERS, experts=EXPERTS, config=CONFIG)
        self.epoch = 0

    def send(self, event: Event) -> None:
        for command in self.model.send(event):
            epoch = getattr(command, "epoch", self.epoch)
            assert epoch >= self.epoch
            self.epoch = epoch

    @rule(name=NAMES, slots=st.integers(1, 8), held=st.lists(BLOCKS, max_size=10))
    def join(self, name: str, slots: int, held: list[BlockId]) -> None:
        copies = [self.model.copy(block, store=name) for block in held]
        self.model.todo = [command for command in self.model.todo if command.store != name]
        self.model.join(name, TIERS[name], slots=slots, copies=copies)

    @rule(name=NAMES, incarnation=st.integers(0, 3))
    def join_again(self, name: str, incarnation: int) -> None:
        info = StoreInfo(
            name=name,
            tier=TIERS[name],
            node="n0",
            incarnation=incarnation,
            capacity_bytes=3300,
        )
        self.send(StoreJoined(now_ns=self.model.now_ns, store=info))
        known = {store.name: store.incarnation for store in self.model.brain.stores()}
        if name in known:
            self.model.incarnations[name] = known[name]

    @rule(name=NAMES, incarnation=st.integers(0, 4))
    def lose(self, name: str, incarnation: int) -> None:
        self.send(StoreLost(now_ns=self.model.now_ns, store=name, incarnation=incarnation))

    @rule(name=NAMES)
    def drain(self, name: str) -> None:
        self.send(StoreDraining(now_ns=self.model.now_ns, store=name))

    @rule(
        name=NAMES,
        counts=st.lists(st.tuples(BLOCKS, st.integers(0, 1 << 40)), max_size=8),
        tokens=st.integers(0, 100),
    )
    def count(self, name: str, counts: list[tuple[BlockId, int]], tokens: int) -> None:
        self.send(
            RouterCounts(now_ns=self.model.now_ns, store=name, counts=tuple(counts), tokens=tokens)
        )

    @rule(name=NAMES, block=BLOCKS, form=FORMATS, incarnation=st.integers(1, 4))
    def land_unasked(self, name: str, block: BlockId, form: Format, incarnation: int) -> None:
        copy = self.model.copy(block, store=name, form=form)
        self.send(
            CopyLanded(
                now_ns=self.model.now_ns,
                copy=type(copy)(
                    block=block,
                    format=form,
                    store=name,
                    offset=0,
                    nbytes=copy.nbytes,
                    generation=copy.generation,
                    checksum=1,
                    incarnation=incarnation,
                ),
                reason=Reason.DEMAND,
                source="storage",
            )
        )

    @rule(name=NAMES, block=BLOCKS, form=FORMATS, incarnation=st.integers(0, 4))
    def drop_unasked(self, name: str, block: BlockId, form: Format, incarnation: int) -> None:
        self.send(
            CopyDropped(
                now_ns=self.model.now_ns,
                store=name,
                block=block,
                format=form,
                reason=Reason.EVICT,
                incarnation=incarnation,
                generation=incarnation,
            )
        )

    @rule(
        name=NAMES,
        block=BLOCKS,
        form=FORMATS,
        reason=st.sampled_from([Reason.VETO_MEMORY, Reason.STALE]),
    )
    def fail_unasked(self, name: str, block: BlockId, form: Format, reason: Reason) -> None:
        self.send(
            TransferFailed(
                now_ns=self.model.now_ns, store=name, block=block, format=form, reason=reason
            )
        )

    @precondition(lambda self: self.model.todo)
    @rule(data=st.data(), works=st.booleans())
    def carry_out(self, data: st.DataObject, *, works: bool) -> None:
        at = data.draw(st.sampled_from(range(len(self.model.todo))))
        self.model.carry_out(self.model.todo.pop(at), works=works)

    @rule(
        name=NAMES, times=st.lists(st.integers(1, 1000), max_size=LAYERS), steps=st.integers(0, 3)
    )
    def layer_times(self, name: str, times: list[int], steps: int) -> None:
        self.send(
            LayerTimes(
                now_ns=self.model.now_ns, store=name, steps=steps, times=tuple(enumerate(times))
            )
        )

    @rule(
        name=NAMES,
        used_bytes=st.integers(0, 12_000),
        source=NAMES,
        busy=st.integers(0, 2_000_000),
        demand=st.integers(0, 2_000_000),
    )
    def pressure(self, name: str, used_bytes: int, source: str, busy: int, demand: int) -> None:
        use = LinkUse(source=source, span_ns=2_000_000, busy_ns=busy, demand_ns=demand, nbytes=busy)
        self.send(
            Pressure(now_ns=self.model.now_ns, store=name, used_bytes=used_bytes, links=(use,))
        )

    @rule(name=NAMES, steps=st.integers(0, 4), tokens=st.integers(0, 200))
    def concurrency(self, name: str, steps: int, tokens: int) -> None:
        self.send(
            Concurrency(
                now_ns=self.model.now_ns, store=name, requests=1, steps=steps, tokens=tokens
            )
        )

    @rule(name=NAMES, left_ns=st.integers(1, 10_000))
    def drain_by(self, name: str, left_ns: int) -> None:
        now_ns = self.model.now_ns
        self.send(StoreDraining(now_ns=now_ns, store=name, deadline_ns=now_ns + left_ns))

    @rule(later_ns=st.integers(0, 60))
    def tick(self, later_ns: int) -> None:
        self.model.now_ns += later_ns
        self.send(Tick(now_ns=self.model.now_ns))

    @rule(later_ns=st.integers(0, 60))
    def replan(self, later_ns: int) -> None:
        self.model.now_ns += later_ns
        self.send(Replan(now_ns=self.model.now_ns))

    @rule(hot=BLOCKS, steps=st.integers(1, 4))
    def busy_minute(self, hot: BlockId, steps: int) -> None:
        """Both workers say all that a plan needs to know."""
        for _ in range(2):
            self.model.now_ns += 10
            now_ns = self.model.now_ns
            for name in ("w0", "w1"):
                counts = tuple(
                    (BlockId(layer, index), 50 if index == hot.index else 5)
                    for layer in range(LAYERS)
                    for index in range(EXPERTS)
                )
                times = tuple((layer, 40) for layer in range(LAYERS))
                self.send(RouterCounts(now_ns=now_ns, store=name, counts=counts, tokens=70))
                self.send(
                    Concurrency(now_ns=now_ns, store=name, requests=1, steps=steps, tokens=70)
                )
                self.send(
                    LayerTimes(now_ns=now_ns, store=name, steps=steps, times=times, experts_ns=60)
                )
        self.send(Replan(now_ns=self.model.now_ns))

    @rule(version=st.integers(0, 80))
    def read_changes(self, version: int) -> None:
        delta = self.model.brain.changes_since(version)
        listed = set(self.model.brain.directory())
        assert set(delta.added) <= listed
        assert delta.version == self.model.brain.version

    def teardown(self) -> None:
        """Replay the journal: the same commands, byte for byte."""
        model = getattr(self, "model", None)
        if model is None:
            return
        replay = ClusterBrain(blocks_of(LAYERS, EXPERTS), config=CONFIG)
        assert [repr(replay.handle(event)) for event in model.log] == [
            repr(answer) for answer in model.answers
        ]
        assert replay.directory() == model.brain.directory()


BrainWalk.TestCase.settings = settings(max_examples=80, stateful_step_count=40)
TestBrainWalk = BrainWalk.TestCase


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_a_hundred_thousand_events() -> None:
    """The same walk for 100,000 steps; each step is at least one event."""
    run_state_machine_as_test(
        BrainWalk,
        settings=settings(
            max_examples=1000,
            stateful_step_count=100,
            derandomize=True,
            database=None,
            phases=[Phase.generate, Phase.shrink],
            suppress_health_check=list(HealthCheck),
        ),
    )


_JOURNAL = """
import hashlib
from cluster_model import ClusterModel
from hotset.policies.config import PolicyConfig
from hotset.policies.types import *
config = PolicyConfig(tick_ns=1, min_dwell_ns=0, popularity_half_life_tokens=64)
model = ClusterModel.of(layers=6, experts=16, config=config)
for name, tier, slots in (
    ("w0", Tier.HBM, 20), ("w1", Tier.HBM, 20), ("h0", Tier.HOST, 30), ("h1", Tier.HOST, 20),
    ("c0", Tier.CXL, 60),
):
    model.join(name, tier, slots=slots)
    model.settle()
for turn in range(6):
    pairs = [(layer, index) for layer in range(6) for index in range(9)]
    counts = tuple((BlockId(at, (e * 5 + turn) % 16), 100 // (1 + e)) for at, e in pairs)
    model.send(RouterCounts(now_ns=turn, store="w0", counts=counts, tokens=32))
    model.now_ns += 10
    model.send(Tick(now_ns=model.now_ns))
    model.settle()
model.send(StoreDraining(now_ns=99, store="h0"))
model.settle()
model.lose("c0")
model.settle()
print(len(model.log), hashlib.sha256(repr(model.answers).encode()).hexdigest())
"""


def test_commands_do_not_depend_on_the_seed_of_hashes() -> None:
    printed = set()
    for seed in ("1", "2", "77"):
        path = os.pathsep.join([str(Path(__file__).parent), str(Path(__file__).parents[2])])
        done = subprocess.run(
            [sys.executable, "-c", _JOURNAL],
            env={**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": path},
            capture_output=True,
            text=True,
            timeout=60,
            check=True,
        )
        printed.add(done.stdout)
    assert len(printed) == 1
