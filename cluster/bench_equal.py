"""`hotset bench equal`: mixed formats against full precision only, at equal bytes near compute.

Two runs on one cluster, alike in everything but formats: the same HBM, pool and link bytes, the
same prompts, served in turns. Then the text that the mixed run wrote goes through the experts at
full precision and through its mix, on the same tokens: the drift, beside the budget. Tokens a
second, stall and bytes moved are those of the live runs; medians over rounds, after one warm-up.

Decides nothing. The drift is that of the whole plan, an upper bound: what the worker held less
cheaply counts as the plan says.
"""

from __future__ import annotations

import statistics
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from hotset.cluster.config import RunConfig
from hotset.cluster.console import machine
from hotset.cluster.front import Front
from hotset.cluster.local import local_cluster, quiet_environment
from hotset.errors import ClusterError, ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from contextlib import AbstractContextManager
    from pathlib import Path

    from hotset.blocks.sensitivity_stats import KLSummary
    from hotset.cluster.launch import Deployment
    from hotset.policies.types import BlockId

PROMPTS = (
    "def __init__(self",
    "import os\nimport sys\n\n\ndef main(",
    "class Parser:\n    def parse(self, text",
    "    for index, value in enumerate(",
)


@dataclass(slots=True, kw_only=True)
class Side:
    """One of the two runs; lists have an entry for each measured round."""

    name: str
    tokens_per_s: list[float] = field(default_factory=list)
    stall_ms_per_token: list[float] = field(default_factory=list)
    moved_kb_per_token: list[float] = field(default_factory=list)
    near_ratio: float = 0.0  # look-ups that found the expert near compute
    bits_per_weight: float = 16.0
    held: dict[str, int] = field(default_factory=dict)  # blocks by format at the end
    hits: dict[str, int] = field(default_factory=dict)
    vetoes: dict[str, int] = field(default_factory=dict)
    hbm_bytes: int = 0
    text: list[list[int]] = field(default_factory=list)


@dataclass(frozen=True, slots=True, kw_only=True)
class Equal:
    """Both runs and what the cheaper formats cost."""

    model: str
    hbm_ratio: float
    hbm_bytes: int
    pools: str
    rounds: int
    tokens: int
    full: Side
    mixed: Side
    speed_ratio: float
    stall_ratio: float | None
    budget_nats: float
    drift: KLSummary
    inside: bool
    same_tokens: int
    emulated: tuple[str, ...]
    machine: str

    def to_json(self) -> dict[str, Any]:
        """Everything but the text."""
        row = asdict(self)
        for side in ("full", "mixed"):
            del row[side]["text"]
        return row


def run_bench(  # noqa: PLR0913 - one option each
    model: Path,
    *,
    sensitivity: Path,
    budget_nats: float,
    hbm_ratio: float,
    host_ratio: float,
    cxl_profile: str,
    transport: str,
    tokens: int,
    rounds: int,
    say: Callable[[str], None],
    on: AbstractContextManager[object] | None = None,
) -> Equal:
    """Run both sides in turns and measure the drift. Raises HotsetError.

    `on` is held meanwhile: a cluster that is there already; without it one is started and ended.
    """
    quiet_environment()
    from hotset.cluster.launch import plan_nodes, prepare
    from hotset.cluster.serve import encode_prompt, load_tokenizer, new_run_id

    common: dict[str, Any] = {
        "model": model, "workers": 1, "hbm_ratio": hbm_ratio, "host_ratio": host_ratio,
        "cxl_profile": cxl_profile, "transport": transport,
    }  # fmt: skip
    configs = {
        "bf16": RunConfig.build(**common),
        "mixed": RunConfig.build(**common, sensitivity=sensitivity, quality_budget=budget_nats),
    }
    runs = {
        name: prepare(config, run=f"{new_run_id()}-{name}", say=lambda _text: None)
        for name, config in configs.items()
    }
    tokenizer = load_tokenizer(str(model))
    prompts = [encode_prompt(tokenizer, text) for text in PROMPTS]
    sides = {name: Side(name=name, hbm_bytes=run.sizes.hbm_bytes) for name, run in runs.items()}
    with on or local_cluster(plan_nodes(configs["bf16"]), say=say):
        try:
            for name, run in runs.items():
                say(f"starting the run in {name}")
                run.start()
                run.wait_settled()
            for number in range(rounds + 1):
                say(f"round {number} of {rounds}" + ("" if number else ", warm-up"))
                for name in sorted(runs, reverse=number % 2 == 1):
                    _serve(runs[name], sides[name], prompts, tokens=tokens, measured=number > 0)
            for name, run in runs.items():
                _look(run, sides[name])
        finally:
            for run in runs.values():
                run.stop()
    mixed = runs["mixed"]
    mix = planned(mixed)
    say("the drift of what was written")
    drift = measure_drift(model, mix=mix, prompts=prompts, text=sides["mixed"].text)
    return _result(
        sides, runs=runs, drift=drift, budget_nats=budget_nats, rounds=rounds, tokens=tokens,
        hbm_ratio=hbm_ratio,
    )  # fmt: skip


def planned(run: Deployment) -> dict[BlockId, str]:
    """The planned format of each block that is not at full precision."""
    if run.quality is None:
        raise ConfigError("this run has no plan of formats", remedy="give --sensitivity FILE")
    return {block: str(form) for block, form in run.quality.planned().items()}


def measure_drift(
    model: Path, *, mix: Mapping[BlockId, str], prompts: list[list[int]], text: list[list[int]]
) -> KLSummary:
    """Paired KL of a mix on what it wrote: each request's generated part is a window."""
    import torch

    from hotset.blocks.sensitivity import KLMeter
    from hotset.blocks.sensitivity_stats import PairedKL

    torch.set_num_threads(1)
    meter = KLMeter(model)
    found: PairedKL | None = None
    try:
        for prompt, wrote in zip(prompts, text, strict=True):
            window = torch.tensor([prompt + wrote])
            pair = meter.measure(mix, window)
            first, last = len(prompt) - 1, len(prompt) + len(wrote) - 1
            part = PairedKL(kl=pair.kl[:, first:last], flips=pair.flips[:, first:last])
            found = part if found is None else found.join(part)
    finally:
        meter.close()
    assert found is not None  # noqa: S101 - there are prompts
    return found.summary()


def _serve(
    run: Deployment, side: Side, prompts: list[list[int]], *, tokens: int, measured: bool
) -> None:
    front = Front(run)
    before = run.totals()
    served = [front.generate(prompt, max_new_tokens=tokens) for prompt in prompts]
    after = run.totals()
    count = sum(len(one.tokens) for one in served)
    moved = _into_worker(after.bytes_by_link) - _into_worker(before.bytes_by_link)
    side.text = [one.tokens for one in served]
    side.hits = {tier: number - before.hits.get(tier, 0) for tier, number in after.hits.items()}
    if measured:
        side.tokens_per_s.append(count / (sum(one.wall_ns for one in served) / 1e9))
        side.stall_ms_per_token.append((after.stall_ns - before.stall_ns) / 1e6 / count)
        side.moved_kb_per_token.append(moved / 1e3 / count)


def _into_worker(links: Mapping[str, int]) -> int:
    return sum(moved for link, moved in links.items() if "->worker" in link)


def _look(run: Deployment, side: Side) -> None:
    status = run.status()
    worker = next((store for store in status["stores"] if store["name"] == "worker-0"), None)
    if worker is None:
        raise ClusterError(f"the worker of the run in {side.name} was lost", remedy="run it again")
    side.held = dict(worker["blocks"])
    side.vetoes = dict(status["vetoes"])
    near = side.hits.get("hbm", 0) + side.hits.get("stand-in", 0)
    side.near_ratio = near / max(1, sum(side.hits.values()))
    if run.quality is not None:
        mix, blocks = planned(run), run.catalog.blocks
        size = dict(zip(run.quality.formats, run.quality.nbytes, strict=True))
        nbytes = sum(size[mix.get(block, run.quality.formats[0])] for block in blocks)
        side.bits_per_weight = 16.0 * nbytes / (size[run.quality.formats[0]] * len(blocks))


def _result(  # noqa: PLR0913 - the parts of the answer, by keyword
    sides: dict[str, Side],
    *,
    runs: dict[str, Deployment],
    drift: KLSummary,
    budget_nats: float,
    rounds: int,
    tokens: int,
    hbm_ratio: float,
) -> Equal:
    full, mixed = sides["bf16"], sides["mixed"]
    stalls = [statistics.median(side.stall_ms_per_token) for side in (full, mixed)]
    speeds = [statistics.median(side.tokens_per_s) for side in (full, mixed)]
    sizes = runs["bf16"].sizes
    return Equal(
        model=str(runs["bf16"].config.model),
        hbm_ratio=hbm_ratio,
        hbm_bytes=full.hbm_bytes,
        pools=f"host {sizes.host_bytes} bytes, cxl {sizes.cxl_bytes} bytes each",
        rounds=rounds,
        tokens=tokens * len(full.text),
        full=full,
        mixed=mixed,
        speed_ratio=speeds[1] / speeds[0],
        stall_ratio=stalls[1] / stalls[0] if stalls[0] else None,
        budget_nats=budget_nats,
        drift=drift,
        inside=drift.upper <= budget_nats,
        same_tokens=sum(
            one == other
            for left, right in zip(full.text, mixed.text, strict=True)
            for one, other in zip(left, right, strict=True)
        ),
        emulated=runs["bf16"].emulated,
        machine=machine(),
    )
