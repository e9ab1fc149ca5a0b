"""What a user may say about a run, checked before anything starts.

Decides sizes (ratios become bytes of whole slots) and refuses what cannot work, naming the remedy.
Must not start anything.
"""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from hotset.errors import ConfigError
from hotset.policies.config import PAYBACK_NS, PLAN_NS
from hotset.policies.residency import LIVE_POLICIES
from hotset.transport.base import LinkProfile
from hotset.transport.slots import slot_stride

if TYPE_CHECKING:
    from hotset.blocks.checkpoint import Catalog

PROFILES: dict[str, LinkProfile] = {
    "cxl2x8": LinkProfile(bandwidth_bytes_per_s=25_000_000_000, latency_ns=600, emulated=True),
    "cxl-slow": LinkProfile(bandwidth_bytes_per_s=1_000_000_000, latency_ns=2_000, emulated=True),
    "eth1g": LinkProfile(bandwidth_bytes_per_s=125_000_000, latency_ns=50_000, emulated=True),
    "roce400": LinkProfile(bandwidth_bytes_per_s=45_000_000_000, latency_ns=3_000, emulated=True),
}
"""Links that a pool can be given. A pool cannot be faster than this machine's memory."""


Floor = Literal["bf16", "fp8", "int8", "nf4", "int4", "int3", "int2"]


class RunConfig(BaseModel):
    """One run: the model, the cluster's tiers, and how requests are computed."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: Path
    workers: int = Field(default=2, ge=1, le=256)
    hbm_ratio: float = Field(default=0.3, gt=0, le=1)
    hbm_bytes: int | None = Field(default=None, gt=0)
    host_pools: int = Field(default=1, ge=0, le=64)
    host_ratio: float = Field(default=0.5, gt=0, le=1)
    host_profile: str | None = None
    cxl_pools: int = Field(default=1, ge=0, le=64)
    cxl_ratio: float = Field(default=1.0, gt=0, le=1)
    cxl_profile: str = "cxl2x8"
    threads: int = Field(default=1, ge=1)
    policy: str = "hotset"
    reference: Literal["eager", "grouped_mm"] = "eager"
    numerics: Literal["exact", "tiled"] = "exact"
    move: Literal["auto", "weights", "tokens"] = "auto"
    transport: Literal["nixl", "auto", "tcp", "ucx", "storage"] = "nixl"
    reduced_ratio: float = Field(default=0.0, ge=0, le=1)
    floors: dict[int, Floor] = Field(default_factory=dict)
    default_floor: Floor | None = None
    sensitivity: Path | None = None
    quality_budget: float | None = Field(default=None, ge=0, allow_inf_nan=False)
    wire: Literal["auto", "bf16"] = "auto"
    device: str = "cpu"
    dashboard_port: int | None = Field(default=None, ge=1, le=65535)
    run_dir: Path | None = None
    mode: Literal["active", "advisory"] = "active"
    record: bool = False
    plan_s: float = Field(default=PLAN_NS / 1e9, ge=0)
    payback_s: float = Field(default=PAYBACK_NS / 1e9, gt=0)

    @property
    def exact(self) -> bool:
        """Whether the tokens must be those of the unmodified model."""
        if self.sensitivity is not None:
            return self.quality_budget == 0
        floors = (self.default_floor, *self.floors.values())
        return not self.reduced_ratio or all(floor in {None, "bf16"} for floor in floors)

    @classmethod
    def build(cls, **values: object) -> RunConfig:
        """Check values. Raises ConfigError with one line for the first that is wrong."""
        try:
            config = cls(**values)  # type: ignore[arg-type] # pydantic checks them
        except ValidationError as error:
            first = error.errors()[0]
            place = ".".join(str(part) for part in first["loc"])
            raise ConfigError(
                f"{place}: {first['msg'].lower()}", remedy=f"got {first.get('input')!r}"
            ) from None
        if config.policy not in LIVE_POLICIES:
            raise ConfigError(
                f"policy {config.policy!r} is unknown or for replays only",
                remedy=f"choose one of {', '.join(LIVE_POLICIES)}",
            )
        for profile in (config.cxl_profile, config.host_profile):
            if profile is not None and profile not in PROFILES:
                raise ConfigError(
                    f"profile {profile!r} is unknown",
                    remedy=f"choose one of {', '.join(PROFILES)}",
                )
        if config.quality_budget and config.sensitivity is None:
            raise ConfigError(
                f"a quality budget of {config.quality_budget} nats needs measured sensitivity",
                remedy="give --sensitivity FILE, made by `hotset calibrate`",
            )
        return config


class Sizes(BaseModel):
    """Bytes of each store of a run, and of one slot."""

    model_config = ConfigDict(frozen=True)

    slot_bytes: int
    hbm_bytes: int
    host_bytes: int
    cxl_bytes: int


def sizes(config: RunConfig, catalog: Catalog, *, reduced_nbytes: int) -> Sizes:
    """Bytes for each store. Raises ConfigError when a worker could not run one layer.

    A worker must hold the experts of one token in one layer at once: `top_k` slots. Where formats
    are planned it gives up two more: one to decode into, one for the live check.
    """
    slot = slot_stride(catalog.block_nbytes, reduced_nbytes)
    blocks = len(catalog.blocks)
    if config.hbm_bytes is not None:
        slots = config.hbm_bytes // slot
    else:
        slots = math.floor(blocks * config.hbm_ratio)
    least = catalog.top_k + (0 if config.sensitivity is None else 2)
    if slots < least:
        raise ConfigError(
            f"the worker's budget holds {slots} experts, one layer of one token needs {least}",
            remedy=f"use --hbm-ratio {math.ceil(least / blocks * 1000) / 1000} or more"
            if config.hbm_bytes is None
            else f"use --hbm-bytes {least * slot} or more",
        )
    return Sizes(
        slot_bytes=slot,
        hbm_bytes=slots * slot,
        host_bytes=max(1, math.ceil(blocks * config.host_ratio / max(1, config.host_pools))) * slot,
        cxl_bytes=max(1, math.ceil(blocks * config.cxl_ratio / max(1, config.cxl_pools))) * slot,
    )


def new_run_dir(config: RunConfig, run: str) -> Path:
    """Make the run's directory: the one asked for, else one under $HOTSET_RUNS or here."""
    base = Path(os.environ.get("HOTSET_RUNS", "hotset-runs"))
    path = config.run_dir or base / run
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"cannot make the run's directory {path} ({error.strerror})",
            remedy="choose another with --run-dir",
        ) from None
    return path.resolve()
