"""`hotset bench simulate`: a live run of the demo against its simulation.

One deployment serves three prompts. The first warms it up. The second calibrates: compute of a
layer, and what a read from each tier and a dispatch take, all from its trace. The third is the
test: its recorded routing is simulated with those prices, and step time and stall are held against
what was measured. Nothing of the third but its routing reaches the simulation.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from hotset.actors import names
from hotset.dashboards.otlp import read_run
from hotset.dashboards.text import table
from hotset.errors import ClusterError
from hotset.policies.config import PolicyConfig
from hotset.policies.linkmodel import LinkSpec
from hotset.policies.outlook import GUESSES
from hotset.policies.simspec import ClusterSpec, StoreSpec, TierSpec
from hotset.policies.simulate import Simulation
from hotset.policies.types import Tier

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    from hotset.cluster.launch import Deployment
    from hotset.dashboards.otlp import Spans

_WARM = "# The first request in a process pays for what later ones find ready.\n"
_CALIBRATE = "def __init__(self, name, value, **kwargs):\n"
_TEST = "import os\n\nclass Reader:\n"
BOUND = 0.15


@dataclass(frozen=True, slots=True, kw_only=True)
class Compared:
    """One policy: means over decode steps of the last request."""

    policy: str
    steps: int
    live_step_ns: int
    simulated_step_ns: int
    live_stall_ns: int
    simulated_stall_ns: int

    @property
    def step_error(self) -> float:
        """How far the simulated step time is off."""
        return self.simulated_step_ns / max(1, self.live_step_ns) - 1.0

    @property
    def stall_error(self) -> float:
        """How far the simulated stall is off."""
        return self.simulated_stall_ns / max(1, self.live_stall_ns) - 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Steps:
    """Decode steps of one request: means, and its window."""

    count: int
    step_ns: int
    stall_ns: int
    begin_ns: int
    end_ns: int


def steps_of(spans: Spans, request: int) -> Steps:
    """Steps of one token of a request, and what was waited for in them."""
    rows = spans.table
    mine = rows["request"] == request
    steps = rows[mine & spans.where("name", names.SPAN_STEP.name) & (rows["tokens"] == 1)]
    if not len(steps):
        raise ClusterError("the trace holds no decode step", remedy="generate more tokens")
    waits = rows[spans.where("name", names.SPAN_WAIT.name)]
    waits = waits[np.isin(waits["parent"], steps["span_id"])]
    return Steps(
        count=len(steps),
        step_ns=int((steps["end_ns"] - steps["start_ns"]).mean()),
        stall_ns=int((waits["end_ns"] - waits["start_ns"]).sum()) // len(steps),
        begin_ns=int(steps["start_ns"].min()),
        end_ns=int(steps["end_ns"].max()),
    )


def prices_of(spans: Spans, window: Steps, *, worker: str) -> tuple[dict[Tier, TierSpec], int]:
    """What a read from each tier takes in the window, and a dispatch (0: there was none).

    A read occupies its link for the bytes alone; the rest of its median time is software.
    """
    rows = spans.table
    inside = (rows["start_ns"] >= window.begin_ns) & (rows["end_ns"] <= window.end_ns)
    inside &= spans.where("store", worker)
    reads = rows[inside & spans.where("name", names.SPAN_TRANSFER.name) & (rows["nbytes"] > 0)]
    tiers: dict[Tier, TierSpec] = {}
    slowest = 0
    for tier, guess in GUESSES.items():
        from_tier = np.array(
            [
                spans.tiers.get(spans.names[source], "storage") == tier.name.lower()
                for source in reads["source"]
            ],
            dtype=bool,
        )
        part = reads[from_tier]
        link = LinkSpec(bandwidth_bytes_per_s=guess.bandwidth_bytes_per_s, latency_ns=0)
        if len(part):
            spent_ns = int(np.median(part["end_ns"] - part["start_ns"]))
            overhead_ns = max(0, spent_ns - link.transfer_ns(int(np.median(part["nbytes"]))))
            slowest = max(slowest, overhead_ns)
            tiers[tier] = TierSpec(link=link, overhead_ns=overhead_ns)
        else:
            tiers[tier] = TierSpec(link=link, overhead_ns=-1)
    for tier, spec in tiers.items():  # what was never read is not cheaper than what was
        if spec.overhead_ns < 0:
            tiers[tier] = TierSpec(link=spec.link, overhead_ns=slowest)
    sent = rows[inside & spans.where("name", names.SPAN_DISPATCH.name)]
    dispatch_ns = int(np.median(sent["end_ns"] - sent["start_ns"])) if len(sent) else 0
    return tiers, dispatch_ns


def requests_of(spans: Spans) -> list[int]:
    """Requests in the order in which they began."""
    rows = spans.table[spans.where("name", names.SPAN_STEP.name)]
    order = rows[np.argsort(rows["start_ns"], kind="stable")]
    return list(dict.fromkeys(int(one) for one in order["request"]))


def compare(policy: str, *, tokens: int, say: Callable[[str], None]) -> Compared:
    """Serve, calibrate, simulate."""
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
    prompts = [encode_prompt(tokenizer, text) for text in (_WARM, _CALIBRATE, _TEST)]
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
    spans = read_run(deployment.run_dir)
    _, first, second = (steps_of(spans, one) for one in requests_of(spans)[:3])
    lengths = [len(prompt) for prompt in prompts]
    visits, skip = lay_out(routing.experts, routing.seq, prefills=lengths)
    spec = _spec(deployment, spans, first)
    score = simulate_visits(spec, policy=policy, visits=visits, skip=skip)
    return Compared(
        policy=policy,
        steps=second.count,
        live_step_ns=second.step_ns,
        simulated_step_ns=score[0],
        live_stall_ns=second.stall_ns,
        simulated_stall_ns=score[1],
    )


def simulate_visits(
    spec: ClusterSpec, *, policy: str, visits: list[list[list[int]]], skip: int
) -> tuple[int, int]:
    """Mean step time and stall of the steps after the first `skip`."""
    from hotset.cluster.simulate import policy_maker

    score = Simulation(
        spec, policies=policy_maker(policy, spec), visits={"worker-0": visits},
        config=PolicyConfig(), skip_steps=skip,
    ).run()  # fmt: skip
    return score.step_ns // max(1, score.steps), score.stall_ns // max(1, score.steps)


def lay_out(
    experts: NDArray[np.uint16], seq: NDArray[np.int64], *, prefills: list[int]
) -> tuple[list[list[list[int]]], int]:
    """Passes of all requests: a prefill is one pass that needs all its tokens' experts.

    Returns the passes, and how many come before the last request's decode steps.
    """
    visits: list[list[list[int]]] = []
    skip = 0
    for request, length in zip(dict.fromkeys(seq.tolist()), prefills, strict=True):
        rows = experts[seq == request]
        visits.append([np.unique(rows[:length, row]).tolist() for row in range(rows.shape[1])])
        skip = len(visits)
        visits += rows[length:].tolist()
    return visits, skip


def _spec(deployment: Deployment, spans: Spans, first: Steps) -> ClusterSpec:
    catalog, sizes, config = deployment.catalog, deployment.sizes, deployment.config
    tiers, dispatch_ns = prices_of(spans, first, worker="worker-0")
    compute_ns = max(1, (first.step_ns - first.stall_ns) // len(catalog.layers))
    stores = [
        StoreSpec(name=name, tier=tier, node="n0", slots=nbytes // sizes.slot_bytes)
        for names_of, tier, nbytes in (
            ([f"worker-{at}" for at in range(config.workers)], Tier.HBM, sizes.hbm_bytes),
            ([f"host-{at}" for at in range(config.host_pools)], Tier.HOST, sizes.host_bytes),
            ([f"cxl-{at}" for at in range(config.cxl_pools)], Tier.CXL, sizes.cxl_bytes),
        )
        for name in names_of
    ]
    return ClusterSpec(
        layers=catalog.layers, num_experts=catalog.num_experts, block_bytes=catalog.block_nbytes,
        stores=tuple(stores), tiers=tiers, layer_ns=(compute_ns,) * len(catalog.layers),
        dispatch_ns=dispatch_ns,
    )  # fmt: skip


def render(found: list[Compared]) -> str:
    """A table: measured, simulated, and how far apart."""
    head = ("policy", "steps", "live step ms", "simulated", "off", "live stall ms", "simulated",
            "off", f"within {BOUND:.0%}")  # fmt: skip
    rows = [
        (
            one.policy, str(one.steps), f"{one.live_step_ns / 1e6:.3f}",
            f"{one.simulated_step_ns / 1e6:.3f}", f"{one.step_error:+.0%}",
            f"{one.live_stall_ns / 1e6:.3f}", f"{one.simulated_stall_ns / 1e6:.3f}",
            f"{one.stall_error:+.0%}",
            "yes" if max(abs(one.step_error), abs(one.stall_error)) <= BOUND else "no",
        )
        for one in found
    ]  # fmt: skip
    return "\n".join(table(head, rows))
