"""`hotset simulate`: the brain and a residency policy on a modelled cluster, from one YAML file.

Reads and checks the configuration, makes the routing (seeded, or from a recording) and renders what
`policies.simulate` counts. Decides nothing. Everything here is modelled, and the output says so.
"""

from __future__ import annotations

import gc
import os
import time
from dataclasses import asdict
from pathlib import Path  # noqa: TC003 - pydantic reads annotations
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from hotset.dashboards.routertrace import read_trace
from hotset.dashboards.text import field, human_bytes, human_ns
from hotset.errors import ConfigError
from hotset.policies.config import PLAN_NS, PolicyConfig
from hotset.policies.device import DeviceShape
from hotset.policies.linkmodel import LinkSpec
from hotset.policies.residency import LIVE_POLICIES, DeviceResidency, make_policy
from hotset.policies.simspec import ClusterSpec, Fault, StoreSpec, TierSpec, slot_bytes
from hotset.policies.simulate import Simulation
from hotset.policies.types import Tier

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from hotset.policies.foresight import StagedPredictor
    from hotset.policies.plan import ResidencyPolicy
    from hotset.policies.simspec import SimScore

_STICKY = 1.5
"""How much likelier, in logits, a token uses the experts of the token before."""
_BYTES_PER_STATE = 100
"""What a device's books of one block take, about, measured on 320 devices."""
_SKEW = 0.7
"""Spread, in logits, of the popularity of a layer's experts."""


class TierModel(BaseModel):
    """A tier's link, and software at both ends."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    bytes_per_s: int = Field(gt=0)
    latency_ns: int = Field(default=0, ge=0)
    overhead_ns: int = Field(default=0, ge=0)


class FaultModel(BaseModel):
    """A store that dies, and when it is back (0: never)."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    store: str
    at_ns: int = Field(gt=0)
    back_ns: int = Field(default=0, ge=0)


_TIERS = {
    "hbm": TierModel(bytes_per_s=45_000_000_000, latency_ns=3_000),
    "host": TierModel(bytes_per_s=55_000_000_000, latency_ns=5_000),
    "cxl": TierModel(bytes_per_s=25_000_000_000, latency_ns=600),
    "storage": TierModel(bytes_per_s=7_000_000_000, latency_ns=80_000),
}


class SimConfig(BaseModel):
    """What a configuration file may say."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    layers: int = Field(ge=1, le=1024)
    experts: int = Field(ge=1, le=65536)
    top_k: int = Field(ge=1)
    block_bytes: int = Field(gt=0)
    workers: int = Field(ge=1, le=10_000)
    nodes: int = Field(default=1, ge=1)
    worker_ratio: float = Field(gt=0, le=1)
    host_pools: int = Field(default=0, ge=0)
    host_ratio: float = Field(default=0.5, gt=0, le=1)
    cxl_pools: int = Field(default=0, ge=0)
    cxl_ratio: float = Field(default=1.0, gt=0, le=1)
    layer_ns: int = Field(default=400_000, gt=0)
    dispatch_ns: int = Field(default=0, ge=0)
    tokens: int = Field(default=16, ge=1)
    skip_tokens: int = Field(default=0, ge=0)
    experts_ratio: float = Field(default=0.5, gt=0, le=1)
    plan_ns: int = Field(default=PLAN_NS, ge=0)
    tiers: dict[Literal["hbm", "host", "cxl", "storage"], TierModel] = Field(default_factory=dict)
    faults: tuple[FaultModel, ...] = ()
    router: Path | None = None


def read_config(path: Path) -> SimConfig:
    """Read a configuration. Raises ConfigError with one line for the first thing that is wrong."""
    import yaml

    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
        config = SimConfig.model_validate(values)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        said = " ".join(str(error).split())
        raise ConfigError(f"cannot read {path} ({said})", remedy="give a YAML file") from None
    except ValidationError as error:
        raise _refused(path, error) from None
    if config.top_k > config.experts:
        raise ConfigError(
            f"{path}: top_k {config.top_k} exceeds {config.experts} experts",
            remedy="lower top_k",
        )
    if config.skip_tokens >= config.tokens:
        raise ConfigError(
            f"{path}: skip_tokens {config.skip_tokens} leaves none of {config.tokens} tokens",
            remedy="raise tokens",
        )
    need = config.workers * config.layers * config.experts * _BYTES_PER_STATE
    have = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if need > have:
        raise ConfigError(
            f"{path}: {config.workers} workers with {config.layers} x {config.experts} experts "
            f"need {human_bytes(need)} of memory to simulate, this machine has {human_bytes(have)}",
            remedy="simulate fewer workers, layers or experts",
        )
    return config


def _refused(path: Path, error: ValidationError) -> ConfigError:
    """One line for the first thing that is wrong."""
    first = error.errors()[0]
    place = ".".join(str(part) for part in first["loc"]) or "the file"
    said = first["msg"].lower()
    models: dict[str, type[BaseModel]] = {"tiers": TierModel, "faults": FaultModel}
    model = models.get(str(first["loc"][0]), SimConfig) if len(first["loc"]) > 1 else SimConfig
    match first["type"]:
        case "extra_forbidden":
            return ConfigError(
                f"{path}: {place} is no key", remedy=f"known keys: {', '.join(model.model_fields)}"
            )
        case "missing":
            return ConfigError(f"{path}: {place} is missing", remedy=f"add {place} to the file")
        case _:
            got = str(first["input"])[:60]
            return ConfigError(f"{path}: {place}: {said}, got {got}", remedy=f"correct {place}")


def cluster_of(config: SimConfig) -> ClusterSpec:
    """Stores, links and faults. Raises ConfigError for a fault of a store that is not there."""
    blocks = config.layers * config.experts

    def pool(kind: str, tier: Tier, count: int, ratio: float) -> list[StoreSpec]:
        slots = max(1, int(blocks * ratio / max(1, count)))
        return [
            StoreSpec(name=f"{kind}-{at}", tier=tier, node=f"node{at % config.nodes}", slots=slots)
            for at in range(count)
        ]

    worker_slots = max(config.top_k, int(blocks * config.worker_ratio))
    stores = [
        StoreSpec(
            name=f"worker-{at}", tier=Tier.HBM, node=f"node{at * config.nodes // config.workers}",
            slots=worker_slots,
        )
        for at in range(config.workers)
    ]  # fmt: skip
    stores += pool("host", Tier.HOST, config.host_pools, config.host_ratio)
    stores += pool("cxl", Tier.CXL, config.cxl_pools, config.cxl_ratio)
    names = {store.name for store in stores}
    for fault in config.faults:
        if fault.store not in names:
            raise ConfigError(
                f"fault of {fault.store!r}, which is no store",
                remedy="name worker-0, host-0, cxl-0 and so on",
            )
    models: dict[str, TierModel] = dict(_TIERS)
    models.update(config.tiers.items())
    tiers = {
        Tier[name.upper()]: TierSpec(
            link=LinkSpec(bandwidth_bytes_per_s=one.bytes_per_s, latency_ns=one.latency_ns),
            overhead_ns=one.overhead_ns,
        )
        for name, one in models.items()
    }
    return ClusterSpec(
        layers=tuple(range(config.layers)), num_experts=config.experts,
        block_bytes=config.block_bytes, stores=tuple(stores), tiers=tiers,
        layer_ns=(config.layer_ns,) * config.layers, dispatch_ns=config.dispatch_ns,
        experts_permille=round(1000 * config.experts_ratio),
        faults=tuple(Fault(at_ns=f.at_ns, store=f.store, back_ns=f.back_ns) for f in config.faults),
    )  # fmt: skip


def routing_of(config: SimConfig, *, seed: int) -> dict[str, list[list[list[int]]]]:
    """Experts by worker, token and layer: recorded, else sticky and skewed choices by the seed."""
    if config.router is not None:
        return _recorded(config)
    rng = np.random.default_rng(seed)
    likes = rng.normal(0.0, _SKEW, size=(config.layers, config.experts)).astype(np.float32)
    found: dict[str, list[list[list[int]]]] = {}
    for at in range(config.workers):
        taste = likes + rng.normal(0.0, _SKEW, size=likes.shape).astype(np.float32)
        last: NDArray[np.intp] | None = None
        tokens: list[list[list[int]]] = []
        for _ in range(config.tokens):
            logits = taste + rng.gumbel(size=likes.shape).astype(np.float32)
            if last is not None:
                np.put_along_axis(
                    logits, last, np.take_along_axis(logits, last, axis=1) + _STICKY, axis=1
                )
            last = np.argpartition(-logits, config.top_k - 1, axis=1)[:, : config.top_k]
            tokens.append(last.tolist())
        found[f"worker-{at}"] = tokens
    return found


def _recorded(config: SimConfig) -> dict[str, list[list[list[int]]]]:
    assert config.router is not None  # noqa: S101 - the caller has asked
    trace = read_trace(config.router)
    need = config.workers * config.tokens
    shape = (trace.layers, trace.num_experts, trace.top_k)
    if shape != (config.layers, config.experts, config.top_k) or trace.tokens < need:
        raise ConfigError(
            f"{config.router} has {trace.tokens} tokens of {shape[0]} layers x {shape[1]} experts, "
            f"top {shape[2]}",
            remedy=f"the configuration asks for {need} tokens of its own layers, experts and top_k",
        )
    parts = trace.experts[:need].reshape(config.workers, config.tokens, config.layers, -1)
    return {f"worker-{at}": part.tolist() for at, part in enumerate(parts)}


def policy_maker(name: str, spec: ClusterSpec, config: PolicyConfig | None = None) -> Any:
    """A maker of policies for the stores of a cluster. Raises ConfigError for an unknown name."""
    if name not in LIVE_POLICIES:
        raise ConfigError(
            f"policy {name!r} is unknown or for replays only",
            remedy=f"choose one of {', '.join(LIVE_POLICIES)}",
        )
    slot = slot_bytes(spec, config)
    shared: StagedPredictor | None = None

    def make(store: StoreSpec) -> ResidencyPolicy:
        nonlocal shared
        policy = make_policy(
            name,
            DeviceShape(
                layers=spec.layers, num_experts=spec.num_experts, full_nbytes=slot,
                reduced_nbytes=slot // 2, capacity_bytes=store.slots * slot,
            ),
            predictor=shared,  # a table by device would not fit: devices learn in one
        )  # fmt: skip
        if isinstance(policy, DeviceResidency):
            shared = policy.predictor
        return policy

    return make


def run_simulation(config: SimConfig, *, policy: str, seed: int) -> tuple[SimScore, float]:
    """Simulate; the totals, and the seconds that it took."""
    spec = cluster_of(config)
    maker = policy_maker(policy, spec)
    visits = routing_of(config, seed=seed)
    began = time.perf_counter()
    simulation = Simulation(
        spec, policies=maker, visits=visits, unscored=range(config.skip_tokens),
        config=PolicyConfig(tick_ns=200_000_000, plan_ns=config.plan_ns),
    )  # fmt: skip
    collecting = gc.isenabled()
    gc.disable()  # a run makes no cycles, and to look for them takes a quarter of its time
    try:
        return simulation.run(), time.perf_counter() - began
    finally:
        if collecting:
            gc.enable()


def numbers(score: SimScore) -> dict[str, Any]:
    """The totals, and what a token and a step cost."""
    steps = max(1, score.steps)
    return {
        **asdict(score),
        "hit_ratio": round(score.hits / max(1, score.needs), 6),
        "step_ns_mean": score.step_ns // steps,
        "stall_ns_per_token": score.stall_ns // steps,
    }


def render(config: SimConfig, score: SimScore, *, policy: str, seconds: float) -> str:
    """A few lines for people."""
    found = numbers(score)
    fetched = ", ".join(f"{count:,} from {tier}" for tier, count in sorted(score.fetched.items()))
    rows = (
        ("simulated", (f"{config.workers} workers, {config.layers} x {config.experts} experts, "
                      f"policy {policy}; everything is modelled")),
        ("step", (f"{human_ns(found['step_ns_mean'])}, of it stall "
                 f"{human_ns(found['stall_ns_per_token'])} ({score.steps:,} steps)")),
        ("hits", f"{100 * found['hit_ratio']:.1f} % of {score.needs:,} needs"),
        ("fetched", (f"{fetched or 'nothing'}; {score.dispatched:,} dispatched, "
                    f"{score.prefetched:,} prefetched")),
        ("moved", human_bytes(score.moved_bytes)),
        ("plans", f"{score.plans} in force, {score.plans_refused} not worth it"),
        ("took", f"{seconds:.1f} s for {score.events:,} events and {score.commands:,} commands"),
    )  # fmt: skip
    return "\n".join(line for label, value in rows for line in field(label, value, width=100))
