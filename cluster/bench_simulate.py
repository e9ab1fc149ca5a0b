"""`hotset bench simulate`: a live run of the demo against its simulation.

One deployment serves a request to warm up and then requests in turns: one to calibrate, one to
test, and again, so that a machine that grows slower does so for both. Prices come from the traces
of the calibrating ones (`bench_simulate_prices`). The routing of all requests is simulated with
them in the order in which they were served, from the copies that the stores then had; step time and
stall of the tested ones are held against what was measured. Nothing of those but their routing
reaches the simulation.

What no model can foresee stands beside the errors: how much longer or shorter a fetch of the tested
requests made compute wait than one of the calibrating requests, live against live.
"""

from __future__ import annotations

import statistics
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from hotset.actors import names
from hotset.cluster.bench_simulate_prices import (
    holdings_of,
    prices_of,
    requests_of,
    steps_of,
)
from hotset.dashboards.otlp import read_run
from hotset.dashboards.text import table
from hotset.policies.config import PolicyConfig
from hotset.policies.simspec import ClusterSpec, StoreSpec
from hotset.policies.simulate import Simulation
from hotset.policies.types import Tier

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from hotset.cluster.bench_simulate_prices import Prices
    from hotset.cluster.launch import Deployment
    from hotset.policies.simspec import SimScore

_WARM = "# The first request in a process pays for what later ones find ready.\n"
_CALIBRATE = (
    "def __init__(self, name, value, **kwargs):\n",
    "The history of the town begins with",
    "#include <stdio.h>\n\nint main(void)\n{\n",
    "Le programme lit les fichiers",
    "class Node(object):\n    left = None\n",
    "DESCRIPTION\n       The command prints",
    "In the second year of the war the",
    "typedef struct list {\n    struct list *next;\n",
)
_TEST = (
    "import os\n\nclass Reader:\n",
    "for line in open(path):\n    parts = line.split()\n",
    "The file is read in blocks, and each block",
    "static int compare(const void *a, const void *b)\n{\n",
    "Die Datei wird von dem Programm",
    "It was a cold evening when she",
    "OPTIONS\n       -v     be verbose\n",
    "try:\n    value = int(text)\nexcept ValueError:\n",
)
BOUND = 0.15
_SEEDS = 5
"""Simulations with different draws of the measured visits; their mean is what is compared."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Compared:
    """One run under one policy: means over the decode steps of the tested requests.

    `live_wait_error` is live against live, see the module.
    """

    policy: str
    steps: int
    live_step_ns: int
    simulated_step_ns: int
    live_stall_ns: int
    simulated_stall_ns: int
    live_fetches_per_step: float
    simulated_fetches_per_step: float
    live_wait_error: float
    interrupted: int = 0
    runs: int = 1

    @property
    def step_error(self) -> float:
        """How far the simulated step time is off."""
        return self.simulated_step_ns / max(1, self.live_step_ns) - 1.0

    @property
    def stall_error(self) -> float:
        """How far the simulated stall is off."""
        return self.simulated_stall_ns / max(1, self.live_stall_ns) - 1.0

    @property
    def within(self) -> bool:
        """Whether both are off by no more than the bound."""
        return max(abs(self.step_error), abs(self.stall_error)) <= BOUND


class Passes(NamedTuple):
    """The routing of all requests, pass after pass; decode steps of tested ones are `scored`."""

    visits: list[list[list[int]]]
    scored: frozenset[int]


class LiveRun(NamedTuple):
    """What is left of a live run: its trace, routing and sizes."""

    folder: Path
    experts: NDArray[np.uint16]  # [tokens, L, k]
    seq: NDArray[np.int64]
    lengths: list[int]  # of prompts, in order
    layers: tuple[int, ...]
    num_experts: int
    block_bytes: int
    stores: tuple[StoreSpec, ...]


def compare(policy: str, *, tokens: int, rounds: int, say: Callable[[str], None]) -> Compared:
    """Serve, calibrate, simulate."""
    return hold_against(policy, serve(policy, tokens=tokens, rounds=rounds, say=say))


def serve(policy: str, *, tokens: int, rounds: int, say: Callable[[str], None]) -> LiveRun:
    """Run the demo model: one request to warm up, then calibrating and tested ones in turns."""
    from hotset.cluster.cli import DEMO_MODEL
    from hotset.cluster.config import RunConfig
    from hotset.cluster.front import Front
    from hotset.cluster.launch import plan_nodes, prepare
    from hotset.cluster.local import quiet_environment
    from hotset.cluster.record import collect
    from hotset.cluster.serve import encode_prompt, load_tokenizer, new_run_id, on_cluster

    quiet_environment()
    config = RunConfig.build(model=DEMO_MODEL, policy=policy, record=True)
    deployment = prepare(config, run=new_run_id(), say=say)
    tokenizer = load_tokenizer(str(config.model))
    texts = [_WARM]
    for at in range(rounds):
        texts += [_CALIBRATE[at % len(_CALIBRATE)], _TEST[at % len(_TEST)]]
    prompts = [encode_prompt(tokenizer, text) for text in texts]
    with on_cluster(None, plan_nodes(config), say=say):
        try:
            deployment.start()
            deployment.wait_settled()
            front = Front(deployment)
            for prompt in prompts:
                front.generate(prompt, max_new_tokens=tokens, worker="worker-0")
            routing = collect(deployment)
        finally:
            deployment.stop()
    catalog = deployment.catalog
    return LiveRun(
        folder=deployment.run_dir, experts=routing.experts, seq=routing.seq,
        lengths=[len(prompt) for prompt in prompts], layers=catalog.layers,
        num_experts=catalog.num_experts, block_bytes=catalog.block_nbytes,
        stores=_stores(deployment),
    )  # fmt: skip


def hold_against(policy: str, run: LiveRun) -> Compared:
    """Simulate the tested requests of a run with the prices of the others."""
    spans = read_run(run.folder)
    served = requests_of(spans)[1:]
    calibrating, tested = (steps_of(spans, served[first::2]) for first in (0, 1))
    passes = lay_out(run.experts, run.seq, prefills=run.lengths)
    begin_ns = int(spans.table["start_ns"][spans.where("name", names.SPAN_STEP.name)].min())
    stores = tuple(
        replace(store, holds=holdings_of(spans, store=store.name, until_ns=begin_ns))
        for store in run.stores
    )
    run = run._replace(stores=stores)
    seen = [tier for tier in Tier if tier in {s.tier for s in run.stores} | {Tier.STORAGE}]
    prices = prices_of(spans, calibrating, worker="worker-0", layers=len(run.layers), seen=seen)
    scores = [
        simulate_passes(spec_of(run, prices, seed=seed), policy=policy, passes=passes)
        for seed in range(_SEEDS)
    ]
    steps = sum(score.steps for score in scores)
    waits_ns = [one.stall_ns / max(1e-9, one.fetches(spans)) for one in (tested, calibrating)]
    return Compared(
        policy=policy,
        steps=len(tested.steps),
        live_step_ns=tested.step_ns,
        simulated_step_ns=sum(score.step_ns for score in scores) // max(1, steps),
        live_stall_ns=tested.stall_ns,
        simulated_stall_ns=sum(score.stall_ns for score in scores) // max(1, steps),
        live_fetches_per_step=round(tested.fetches(spans), 3),
        simulated_fetches_per_step=round(
            sum(sum(score.fetched.values()) + score.prefetched for score in scores)
            / max(1, steps), 3,
        ),
        live_wait_error=round(waits_ns[0] / max(1.0, waits_ns[1]) - 1.0, 3),
        interrupted=calibrating.interrupted + tested.interrupted,
    )  # fmt: skip


def simulate_passes(spec: ClusterSpec, *, policy: str, passes: Passes) -> SimScore:
    """Totals of the scored passes of worker-0."""
    from hotset.cluster.simulate import policy_maker

    return Simulation(
        spec, policies=policy_maker(policy, spec), visits={"worker-0": passes.visits},
        config=PolicyConfig(), unscored=set(range(len(passes.visits))) - passes.scored,
    ).run()  # fmt: skip


def lay_out(
    experts: NDArray[np.uint16], seq: NDArray[np.int64], *, prefills: Sequence[int]
) -> Passes:
    """Passes of all requests: a prefill is one pass that needs all its tokens' experts.

    The first request is there to warm up; of the others each second one is tested.
    """
    visits: list[list[list[int]]] = []
    scored: set[int] = set()
    for at, (request, length) in enumerate(zip(dict.fromkeys(seq.tolist()), prefills, strict=True)):
        rows = experts[seq == request]
        visits.append([np.unique(rows[:length, row]).tolist() for row in range(rows.shape[1])])
        first = len(visits)
        visits += rows[length:].tolist()
        if at and at % 2 == 0:
            scored.update(range(first, len(visits)))
    return Passes(visits, frozenset(scored))


def spec_of(run: LiveRun, prices: Prices, *, seed: int) -> ClusterSpec:
    """The run's cluster at these prices."""
    return ClusterSpec(
        layers=run.layers, num_experts=run.num_experts, block_bytes=run.block_bytes,
        stores=run.stores, tiers=prices.tiers, visits=prices.visits,
        layer_ns=(prices.layer_ns,) * len(run.layers), fetch_ns=prices.fetch_ns,
        dispatch_ns=prices.dispatch_ns, seed=seed,
    )  # fmt: skip


def _stores(deployment: Deployment) -> tuple[StoreSpec, ...]:
    sizes, config = deployment.sizes, deployment.config
    return tuple(
        StoreSpec(name=name, tier=tier, node="n0", slots=nbytes // sizes.slot_bytes)
        for names_of, tier, nbytes in (
            ([f"worker-{at}" for at in range(config.workers)], Tier.HBM, sizes.hbm_bytes),
            ([f"host-{at}" for at in range(config.host_pools)], Tier.HOST, sizes.host_bytes),
            ([f"cxl-{at}" for at in range(config.cxl_pools)], Tier.CXL, sizes.cxl_bytes),
        )
        for name in names_of
    )


def medians(found: Sequence[Compared]) -> list[Compared]:
    """One row for each policy: medians of each figure over its runs."""
    rows = []
    for policy in dict.fromkeys(one.policy for one in found):
        mine = [one for one in found if one.policy == policy]
        rows.append(
            Compared(
                policy=policy,
                steps=sum(one.steps for one in mine),
                live_step_ns=int(statistics.median(one.live_step_ns for one in mine)),
                simulated_step_ns=int(statistics.median(one.simulated_step_ns for one in mine)),
                live_stall_ns=int(statistics.median(one.live_stall_ns for one in mine)),
                simulated_stall_ns=int(statistics.median(one.simulated_stall_ns for one in mine)),
                live_fetches_per_step=statistics.median(o.live_fetches_per_step for o in mine),
                simulated_fetches_per_step=statistics.median(
                    one.simulated_fetches_per_step for one in mine
                ),
                live_wait_error=statistics.median(one.live_wait_error for one in mine),
                interrupted=sum(one.interrupted for one in mine),
                runs=len(mine),
            )
        )
    return rows


def render(found: Sequence[Compared]) -> str:
    """A table: measured, simulated, and how far apart."""
    head = ("policy", "runs", "steps", "live step ms", "simulated", "off", "live stall ms",
            "simulated", "off", "live/live", "live loads", "simulated",
            f"within {BOUND:.0%}")  # fmt: skip
    rows = [
        (
            one.policy, str(one.runs), str(one.steps), f"{one.live_step_ns / 1e6:.3f}",
            f"{one.simulated_step_ns / 1e6:.3f}", f"{one.step_error:+.0%}",
            f"{one.live_stall_ns / 1e6:.3f}", f"{one.simulated_stall_ns / 1e6:.3f}",
            f"{one.stall_error:+.0%}", f"{one.live_wait_error:+.0%}",
            f"{one.live_fetches_per_step:.2f}", f"{one.simulated_fetches_per_step:.2f}",
            "yes" if one.within else "no",
        )
        for one in found
    ]  # fmt: skip
    lines = list(table(head, rows))
    paused = sum(one.interrupted for one in found)
    if paused:
        lines.append(
            f"{paused} steps that took or waited over ten medians were interrupted: left out"
        )
    return "\n".join(lines)
