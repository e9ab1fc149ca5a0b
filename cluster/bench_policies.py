"""`hotset bench policies`: the demo served under several residency policies, in one run.

One deployment a policy, all on one cluster at the same time and alike in everything but the policy.
Requests go to them in turns, one at a time: the same prompt to each, in an order that turns round,
so that a machine that grows slower does so for all. Figures come from the runs' own traces, decode
steps only: stall is the sum of waits. A round is one request of each policy; comparisons are by
round.

Decides nothing. Steps of over ten medians were interrupted from outside; they are left out and
counted.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from hotset.actors import names
from hotset.cluster.bench_simulate_prices import requests_of, steps_of
from hotset.cluster.config import RunConfig
from hotset.cluster.console import machine
from hotset.cluster.front import Front
from hotset.cluster.local import local_cluster, quiet_environment
from hotset.dashboards.otlp import read_run
from hotset.errors import ClusterError, ConfigError
from hotset.policies.types import Reason

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from hotset.cluster.bench_simulate_prices import Steps
    from hotset.cluster.launch import Deployment
    from hotset.dashboards.otlp import Spans

PROMPTS = (
    "def __init__(self, name, value, **kwargs):\n",
    "import os\n\nclass Reader:\n",
    "The history of the town begins with",
    "for line in open(path):\n    parts = line.split()\n",
    "#include <stdio.h>\n\nint main(void)\n{\n",
    "The file is read in blocks, and each block",
    "    for index, value in enumerate(",
    "class Parser:\n    def parse(self, text",
)
_WORKER = "worker-0"


@dataclass(slots=True, kw_only=True)
class Side:
    """One policy; lists have an entry for each measured round."""

    policy: str
    stall_ns: list[int] = field(default_factory=list)  # a decode step
    step_ns: list[int] = field(default_factory=list)
    waits: list[float] = field(default_factory=list)  # a decode step
    demands: list[float] = field(default_factory=list)  # blocks fetched while compute needs them
    prefetches: list[float] = field(default_factory=list)
    dispatches: list[float] = field(default_factory=list)
    text: list[list[int]] = field(default_factory=list)
    interrupted: int = 0

    def won(self, other: Side) -> int:
        """Rounds in which this policy stalled less than the other."""
        return sum(a < b for a, b in zip(self.stall_ns, other.stall_ns, strict=True))


@dataclass(frozen=True, slots=True, kw_only=True)
class Policies:
    """All sides of one run."""

    model: str
    tokens: int
    rounds: int
    sides: tuple[Side, ...]
    machine: str
    emulated: tuple[str, ...]

    @property
    def same_tokens(self) -> bool:
        """Whether all policies gave the same text."""
        return all(side.text == self.sides[0].text for side in self.sides)


def run_bench(  # noqa: PLR0913 - the options of the command
    policies: Sequence[str],
    *,
    model: Path,
    tokens: int,
    rounds: int,
    options: dict[str, Any] | None = None,
    say: Callable[[str], None],
) -> Policies:
    """Serve in turns and read the traces. `options` are those of `RunConfig`, for all sides."""
    if len(set(policies)) < len(policies):
        raise ConfigError("a policy is named twice", remedy="name each policy once")
    quiet_environment()
    from hotset.cluster.launch import plan_nodes, prepare
    from hotset.cluster.serve import encode_prompt, load_tokenizer, new_run_id

    configs = {
        name: RunConfig.build(model=model, policy=name, **(options or {})) for name in policies
    }
    runs = {
        name: prepare(config, run=f"{new_run_id()}-{name}", say=lambda _text: None)
        for name, config in configs.items()
    }
    tokenizer = load_tokenizer(str(model))
    prompts = [encode_prompt(tokenizer, text) for text in PROMPTS]
    sides = {name: Side(policy=name) for name in policies}
    with local_cluster(plan_nodes(configs[policies[0]]), say=say):
        try:
            for name, run in runs.items():
                say(f"starting the run under {name}")
                run.start()
                run.wait_settled()
            for number in range(rounds + 1):
                say(f"round {number} of {rounds}" + ("" if number else ", warm-up"))
                _serve(runs, sides, prompts[number % len(prompts)], tokens=tokens, turn=number)
        finally:
            for run in runs.values():
                run.stop()
    for name, run in runs.items():
        measure(sides[name], read_run(run.run_dir))
    first = runs[policies[0]]
    return Policies(
        model=model.name, tokens=tokens, rounds=rounds, sides=tuple(sides.values()),
        machine=machine(), emulated=first.emulated,
    )  # fmt: skip


def _serve(
    runs: dict[str, Deployment],
    sides: dict[str, Side],
    prompt: list[int],
    *,
    tokens: int,
    turn: int,
) -> None:
    """One request of each policy; who is first changes from round to round."""
    order = list(runs)
    first = turn % len(order)
    for name in order[first:] + order[:first]:
        front = Front(runs[name])
        sides[name].text.append(
            front.generate(prompt, max_new_tokens=tokens, worker=_WORKER).tokens
        )


def measure(side: Side, spans: Spans) -> None:
    """Fill a side from its trace. The first request warmed up and counts nowhere."""
    for request in requests_of(spans)[1:]:
        found = steps_of(spans, [request])
        count = len(found.steps)
        side.stall_ns.append(found.stall_ns)
        side.step_ns.append(found.step_ns)
        side.waits.append(len(found.waits) / count)
        demands, prefetches = _fetched(spans, found)
        side.demands.append(demands / count)
        side.prefetches.append(prefetches / count)
        side.dispatches.append(_children(spans, found, names.SPAN_DISPATCH.name).sum() / count)
        side.interrupted += found.interrupted
    if not side.stall_ns:
        raise ClusterError(
            f"the trace of the run under {side.policy} holds no measured request",
            remedy="run it again with more rounds",
        )


def _children(spans: Spans, found: Steps, name: str) -> Any:
    return spans.where("name", name) & np.isin(spans.table["parent"], found.steps["span_id"])


def _fetched(spans: Spans, found: Steps) -> tuple[int, int]:
    """Blocks that these steps demanded, and those that they fetched ahead."""
    reads = _children(spans, found, names.SPAN_TRANSFER.name)
    reads &= spans.table["nbytes"] > 0
    return (
        int((reads & spans.where("reason", Reason.DEMAND.value)).sum()),
        int((reads & spans.where("reason", Reason.PREFETCH.value)).sum()),
    )
