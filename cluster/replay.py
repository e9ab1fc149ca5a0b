"""Replay recorded routing through policies, and say what came of it.

Puts trace, device and link together and renders; decisions are the policies', numbers those of
`policies.replay`.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from hotset.dashboards.routertrace import read_trace
from hotset.dashboards.text import table
from hotset.errors import ConfigError
from hotset.policies.linkmodel import link_named
from hotset.policies.replay import SLOT_BYTES, Replay, ReplayScore, Timing, future_of, line_up
from hotset.policies.residency import (
    OFFLINE_POLICIES,
    POLICIES,
    DeviceResidency,
    DeviceShape,
    make_policy,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from hotset.dashboards.routertrace import RouterTrace
    from hotset.policies.charge import Charge
    from hotset.policies.plan import ResidencyPolicy
    from hotset.policies.replay import Steps
    from hotset.policies.routing import RoutingAnalysis

_REFERENCE = "lru"
"""Loads are shown relative to this policy's."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplayOptions:
    """What to replay, on which device and link."""

    resident: float
    batch: int
    timing: Timing

    def shape(self, trace: RouterTrace) -> DeviceShape:
        """The device. Raises ConfigError when it holds no expert."""
        slots = int(trace.layers * trace.num_experts * self.resident)
        return DeviceShape(
            layers=tuple(range(trace.layers)),
            num_experts=trace.num_experts,
            full_nbytes=SLOT_BYTES,
            reduced_nbytes=SLOT_BYTES // 2,
            capacity_bytes=slots * SLOT_BYTES,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicyResult:
    """One policy on one trace: `timely` without a link, `linked` over it."""

    policy: str
    timely: ReplayScore
    linked: ReplayScore
    expert_bytes: int
    charges: tuple[Charge, ...] = ()

    def predictors(self) -> list[dict[str, object]]:
        """Each predictor's account over the link, of one pass; empty where none was kept."""
        return [{**one._asdict(), "pays": one.pays} for one in self.charges]

    def numbers(self) -> dict[str, float]:
        """The figures of `--json`: stall over the link, all else with timely transfers."""
        timely = self.timely
        return {
            "hit_ratio": round(timely.hit_ratio, 6),
            "demand_per_layer_step": round(timely.demand_per_layer_step, 6),
            "loads_per_layer_step": round(timely.loads_per_layer_step, 6),
            "bytes_per_token": round(timely.loads_per_token * self.expert_bytes),
            "stall_ns_per_token": round(self.linked.stall_ns_per_token),
            "prefetch_precision": round(timely.prefetch_precision, 6),
            "policy_ns_per_layer_step": timely.policy_ns_per_layer_step,
        }


def replay_policy(
    name: str, trace: RouterTrace, steps: Steps, options: ReplayOptions
) -> PolicyResult:
    """Run one policy both ways. Raises ConfigError for an unknown name."""
    shape = options.shape(trace)
    future = future_of(steps, num_experts=trace.num_experts) if name in OFFLINE_POLICIES else None
    timely, linked = (
        Replay(
            _charged(make_policy(name, shape, future=future)),
            steps,
            num_experts=trace.num_experts,
            timing=timing,
            clock=time.perf_counter_ns,
        )
        for timing in (None, options.timing)
    )
    scores = [timely.run(), linked.run()]
    policy = linked.policy
    return PolicyResult(
        policy=name,
        timely=scores[0],
        linked=scores[1],
        expert_bytes=options.timing.expert_bytes,
        charges=policy.charges() if isinstance(policy, DeviceResidency) else (),
    )


def _charged(policy: ResidencyPolicy) -> ResidencyPolicy:
    """Keep accounts of predictors; nothing is switched off, so that a replay can be repeated."""
    if isinstance(policy, DeviceResidency):
        policy.charge_predictors(time.perf_counter_ns, switch=False)
    return policy


def _rows(results: list[PolicyResult]) -> Iterator[tuple[str, ...]]:
    reference = next((r for r in results if r.policy == _REFERENCE), None)
    base = reference.timely.loads_per_layer_step if reference is not None else 0.0
    for result in results:
        timely, linked = result.timely, result.linked
        loads = timely.loads_per_layer_step
        yield (
            result.policy,
            f"{timely.hit_ratio:.3f}",
            f"{timely.demand_per_layer_step:.3f}",
            f"{loads:.3f}",
            f"{loads / base:.2f}" if base else "-",
            f"{timely.prefetch_precision:.2f}" if timely.prefetched else "-",
            f"{linked.stall_ns_per_token / 1e6:.3f}",
            f"{linked.late / max(1, linked.needs):.3f}",
            f"{linked.loads_per_layer_step:.3f}",
            f"{timely.policy_ns_per_layer_step / 1e3:.1f}",
        )


_HEADER = (
    "policy",
    "hits",
    "demand",
    "loads",
    f"x {_REFERENCE}",
    "precision",
    "stall ms/token",
    "late hits",
    "loads on link",
    "policy us",
)


def render_replay(
    trace: RouterTrace, options: ReplayOptions, results: list[PolicyResult], *, profile: str
) -> str:
    """A table; demand and loads are by layer and step."""
    timing = options.timing
    size = f"{trace.layers} layers x {trace.num_experts} experts, top {trace.top_k}"
    head = (
        f"{trace.name}: {trace.tokens} tokens, {size}; "
        f"{100 * options.resident:g} % resident, batch {options.batch}\n"
        f"stall, late hits and loads on link: {profile} (modelled), expert of "
        f"{timing.expert_bytes / 1e6:.1f} MB, {timing.layer_ns / 1e6:g} ms a layer; "
        "the rest: transfers end at once\n"
    )
    lines = table(_HEADER, list(_rows(results)))
    for result in results:
        accounts = [
            f"{one.name} {one.spent_ns / 1e3:.0f} us for {one.saved_ns / 1e3:.0f}"
            for one in result.charges
        ]
        if accounts:
            lines.append(f"predictors of {result.policy}, a token: {', '.join(accounts)} us saved")
    return head + "\n".join(lines)


def run_replay(  # noqa: PLR0913 - one argument for each option of the command
    path: Path,
    *,
    policies: tuple[str, ...],
    resident: float,
    batch: int,
    profile: str,
    layer_ns: int,
    expert_bytes: int,
    tokens: int | None,
    say: Callable[[str], None],
) -> tuple[list[PolicyResult], str]:
    """Replay; return the results and the table. Raises ConfigError, before anything is read."""
    for name in policies:
        if name not in POLICIES:
            raise ConfigError(
                f"unknown residency policy {name!r}", remedy=f"choose one of {', '.join(POLICIES)}"
            )
    timing = Timing(link=link_named(profile), expert_bytes=expert_bytes, layer_ns=layer_ns)
    options = ReplayOptions(resident=resident, batch=batch, timing=timing)
    trace = read_trace(path).head(tokens)
    options.shape(trace)
    steps = line_up(trace.experts, trace.seq, batch=batch)
    results = []
    for name in policies or POLICIES:
        say(f"{name} ...")
        results.append(replay_policy(name, trace, steps, options))
    return results, render_replay(trace, options, results, profile=profile)


def render_analysis(trace: RouterTrace, found: RoutingAnalysis) -> str:
    """What `hotset analyze-routing` prints."""
    size = f"{found.layers} layers x {found.num_experts} experts, top {found.top_k}"
    busiest = f"busiest expert {found.skew_ratio:.2f} x the mean, busiest tenth"
    srp = (f"{value:.3f} over {length} tokens" for length, value in found.srp.items())
    lines = [
        f"{trace.name}: {found.tokens} tokens in {found.sequences} sequences, {size}",
        f"entropy of use      {found.entropy_ratio:.3f} of uniform",
        f"skew                {busiest} {100 * found.top_tenth_ratio:.0f} % of uses",
        f"repeated            {100 * found.repeat_ratio:.0f} % of uses were the last token's, too",
        f"SRP                 {', '.join(srp)}",
    ]
    for length, shares in found.sch.items():
        said = ", ".join(f"{value:.3f} with {slots}" for slots, value in shares.items())
        lines.append(f"SCH over {length:3d} tokens {said} experts a layer")
    ladder = sorted({round(found.num_experts * share / 100) for share in (10, 25, 50, 75)})
    said = ", ".join(f"{found.lru_hit_ratio[slots]:.3f} with {slots}" for slots in ladder)
    lines += [f"LRU hits            {said}", found.verdict]
    return "\n".join(lines)
