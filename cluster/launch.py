"""Putting a run on a Ray cluster: controller, telemetry, pools and workers, and taking it off.

Every actor is named, in the namespace `hotset`, and says in its name which run it belongs to. Nodes
that carry hotset's custom resources get the stores they are meant for; on any other cluster Ray
spreads them. The controller is detached and restarted by Ray; so are stores, as new incarnations.
"""

from __future__ import annotations

import contextlib
import os
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import msgspec
import ray

from hotset.actors import cgroup
from hotset.actors.assembly import StoreSpec, telemetry_name
from hotset.actors.control import ControlSpec
from hotset.actors.exporters import sample_ratio, wanted
from hotset.actors.membership import NAMESPACE, controller_name
from hotset.actors.peers import actor_name
from hotset.actors.telemetry import TelemetrySpec, Totals
from hotset.actors.worker import WorkerSpec, remote_classes
from hotset.blocks.formats import codec
from hotset.cluster.config import PROFILES, RunConfig, Sizes, new_run_dir, sizes
from hotset.cluster.quality import bases_nbytes, planned_formats, read_quality
from hotset.errors import ClusterError
from hotset.policies.types import Format, Tier
from hotset.transport.token import load_token, make_token

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from hotset.actors.quality import QualitySpec
    from hotset.blocks.checkpoint import Catalog
    from hotset.transport.base import LinkProfile

START_S = 180.0
CALL_S = 20.0
MOST_RESTARTS = 5  # of a store; one that cannot even start must not try for ever
NODE_PREFIX = "hotset_node_"


def plan_nodes(config: RunConfig) -> dict[str, dict[str, float]]:
    """Nodes of an embedded cluster: one for each worker (host pools share them), one for CXL."""
    nodes: dict[str, dict[str, float]] = {f"node{i}": {"hbm": 1} for i in range(config.workers)}
    if config.cxl_pools:
        nodes["memory"] = {"cxl": float(config.cxl_pools)}
    return nodes


def _run_token() -> bytes:
    """HOTSET_TOKEN, else a token of this run's own."""
    return load_token() or make_token()


@dataclass(slots=True, kw_only=True)
class Deployment:
    """A run's actors. `emulated` says what is not the real device; `token` proves its stores."""

    run: str
    run_dir: Path
    config: RunConfig
    catalog: Catalog
    sizes: Sizes
    emulated: tuple[str, ...]
    quality: QualitySpec | None = None
    controller: Any = None
    workers: dict[str, Any] = field(default_factory=dict)
    pools: dict[str, Any] = field(default_factory=dict)
    telemetry: dict[str, Any] = field(default_factory=dict)
    nodes: list[str] = field(default_factory=list)
    say: Callable[[str], None] = lambda _text: None
    token: bytes = field(default_factory=_run_token, repr=False)

    # --- starting -------------------------------------------------------------------------------

    def start(self) -> None:
        """Start everything and wait until all stores have joined. Raises what a store raised."""
        classes = remote_classes()
        self.nodes = _our_nodes()
        self.controller = classes["controller"].options(
            name=controller_name(self.run), namespace=NAMESPACE, lifetime="detached",
            max_restarts=-1, max_task_retries=0, num_cpus=0, **self._place("head"),
        ).remote(msgspec.msgpack.encode(self._control_spec()))  # fmt: skip
        for node in self.nodes or ["any"]:
            self._start_telemetry(node)
        config = self.config
        for index in range(config.cxl_pools):
            self._start_pool(f"cxl-{index}", tier=Tier.CXL, node="memory")
        if self.quality is not None:  # CXL takes the full copies: host memory is for cheap ones
            for name, pool in self.pools.items():
                self._wait(pool, name)
        for index in range(config.host_pools):
            node = f"node{index % config.workers}"
            self._start_pool(f"host-{index}", tier=Tier.HOST, node=node)
        for index in range(config.workers):
            self._start_worker(f"worker-{index}", node=f"node{index}")
        self._wait_started()

    def add_worker(self, *, node: str | None = None) -> str:
        """Start one more worker and wait until it has joined; returns its name."""
        name = f"worker-{self._next_index()}"
        self._start_worker(name, node=node or "any")
        self._wait(self.workers[name], name)
        return name

    def drain_worker(self, name: str, *, timeout_s: float = 60.0) -> None:
        """Ask a worker to leave, wait until it serves nobody, end it.

        Raises ClusterError for an unknown name and when requests do not end in time.
        """
        if name not in self.workers:
            raise ClusterError(
                f"there is no worker {name!r}", remedy=f"choose one of {', '.join(self.workers)}"
            )
        worker = self.workers.pop(name)
        ray.get(self.controller.drain.remote(name), timeout=CALL_S)
        deadline = time.monotonic() + timeout_s
        while ray.get(worker.requests.remote(), timeout=CALL_S):
            if time.monotonic() > deadline:
                self.workers[name] = worker
                raise ClusterError(
                    f"{name} still serves after {timeout_s:.0f} s",
                    remedy="wait for its requests or give a longer timeout",
                )
            ray.wait([worker.draining.remote()], timeout=0.1)
        ray.get(worker.close.remote(), timeout=CALL_S)
        self._kill(worker)
        ray.get(self.controller.leave.remote(name, time.time_ns()), timeout=CALL_S)

    # --- asking ---------------------------------------------------------------------------------

    def wait_settled(self, *, timeout_s: float = 120.0) -> bool:
        """Wait until the stores have done what the controller asked so far; False: not in time."""
        waiting = self.controller.wait_settled.remote(timeout_s)
        settled: bool = ray.get(waiting, timeout=timeout_s + CALL_S)
        return settled

    def status(self) -> dict[str, Any]:
        """The controller's snapshot."""
        data = ray.get(self.controller.status.remote(), timeout=CALL_S)
        found: dict[str, Any] = msgspec.msgpack.decode(data)
        return found

    def totals(self) -> Totals:
        """Sums over all telemetry actors, after every store has shipped what it has."""
        for worker in self.workers.values():
            with contextlib.suppress(Exception):
                ray.get(worker.ship.remote(), timeout=CALL_S)
        sums = Totals()
        for actor in self.telemetry.values():
            with contextlib.suppress(Exception):
                data = ray.get(actor.totals.remote(), timeout=CALL_S)
                _add(sums, msgspec.msgpack.decode(data, type=Totals))
        return sums

    # --- ending ---------------------------------------------------------------------------------

    def stop(self) -> None:
        """End all actors: stores first, so that their last rows are written."""
        for actor in (*self.workers.values(), *self.pools.values()):
            with contextlib.suppress(Exception):
                ray.get(actor.close.remote(), timeout=CALL_S)
        if self.controller is not None:
            with contextlib.suppress(Exception):
                ray.get(self.controller.close.remote(), timeout=CALL_S)
        for actor in self.telemetry.values():
            with contextlib.suppress(Exception):
                ray.get(actor.close.remote(), timeout=CALL_S)
        actors = (*self.workers.values(), *self.pools.values(), *self.telemetry.values())
        for actor in (*actors, self.controller):
            self._kill(actor)

    def _kill(self, actor: Any) -> None:
        with contextlib.suppress(Exception):
            ray.kill(actor, no_restart=True)

    # --- inside ---------------------------------------------------------------------------------

    def _next_index(self) -> int:
        return 1 + max(int(name.rpartition("-")[2]) for name in self.workers)

    def _place(self, node: str) -> dict[str, Any]:
        if node in self.nodes:
            return {"resources": {f"{NODE_PREFIX}{node}": 0.01}}
        return {"scheduling_strategy": "SPREAD"}

    def _telemetry_for(self, node: str) -> str:
        place = node if node in self.telemetry else next(iter(self.telemetry))
        return telemetry_name(self.run, place)

    def _start_telemetry(self, node: str) -> None:
        spec = TelemetrySpec(
            run=self.run, run_dir=str(self.run_dir), node=node, emulated=self.emulated,
            controller=controller_name(self.run),
            others=tuple(telemetry_name(self.run, one) for one in self.nodes if one != node),
            settings=_settings(),
        )  # fmt: skip
        self.telemetry[node] = remote_classes()["telemetry"].options(
            name=telemetry_name(self.run, node), namespace=NAMESPACE, lifetime="detached",
            max_restarts=-1, num_cpus=0, **self._place(node),
        ).remote(msgspec.msgpack.encode(spec))  # fmt: skip

    def _store_spec(self, name: str, *, tier: Tier, node: str) -> StoreSpec:
        capacity = {
            Tier.HBM: self.sizes.hbm_bytes,
            Tier.HOST: self.sizes.host_bytes,
            Tier.CXL: self.sizes.cxl_bytes,
        }[tier]
        return StoreSpec(
            run=self.run,
            name=name,
            tier=int(tier),
            model=str(self.config.model.resolve()),
            digest=self.catalog.digest,
            capacity_bytes=capacity,
            reduced_nbytes=_reduced_nbytes(self.catalog),
            formats=planned_formats(self.quality),
            packs=self.config.wire == "auto",
            bases=self.quality.bases if self.quality else "",
            telemetry=self._telemetry_for(node),
            device=self.config.device if tier is Tier.HBM else "cpu",
            link=self._link(tier),
            transport=self.config.transport,
            token=self.token,
        )

    def _link(self, tier: Tier) -> LinkProfile | None:
        """The emulated link that readers of a store take."""
        profiles = {Tier.CXL: self.config.cxl_profile, Tier.HOST: self.config.host_profile}
        profile = profiles.get(tier)
        return PROFILES[profile] if profile else None

    def _start_pool(self, name: str, *, tier: Tier, node: str) -> None:
        kind = "cxl" if tier is Tier.CXL else "host"
        spec = self._store_spec(name, tier=tier, node=node)
        self.pools[name] = remote_classes()[kind].options(
            name=actor_name(self.run, name), namespace=NAMESPACE, lifetime="detached",
            max_restarts=MOST_RESTARTS, num_cpus=0, **self._place(node),
        ).remote(msgspec.msgpack.encode(spec))  # fmt: skip

    def _start_worker(self, name: str, *, node: str) -> None:
        config = self.config
        spec = WorkerSpec(
            store=self._store_spec(name, tier=Tier.HBM, node=node),
            threads=config.threads,
            policy=config.policy,
            reference=config.reference,
            numerics=config.numerics,
            move=config.move,
            record=config.record,
            quality=self.quality,
        )
        variables = {"OMP_NUM_THREADS": str(config.threads)}
        if os.environ.get(cgroup.ENV):
            variables[cgroup.ENV] = os.environ[cgroup.ENV]
        env = {"env_vars": variables}
        gpus = 1 if config.device.startswith("cuda") else 0
        self.workers[name] = remote_classes()["worker"].options(
            name=actor_name(self.run, name), namespace=NAMESPACE, lifetime="detached",
            max_restarts=MOST_RESTARTS, num_cpus=0, num_gpus=gpus, runtime_env=env,
            **self._place(node),
        ).remote(msgspec.msgpack.encode(spec))  # fmt: skip

    def _wait_started(self) -> None:
        everyone = {**self.telemetry, **self.pools, **self.workers}
        for name, actor in everyone.items():
            self._wait(actor, name)
            self.say(f"{name} is up")

    def _wait(self, actor: Any, name: str) -> None:
        try:
            ray.get(actor.pid.remote(), timeout=START_S)
        except ray.exceptions.RayActorError as error:
            raise _start_error(name, error) from None
        except ray.exceptions.GetTimeoutError:
            raise ClusterError(
                f"{name} did not start within {START_S:.0f} s",
                remedy="look at its log: `ray logs actor --id ...`, or at free memory",
            ) from None

    def _control_spec(self) -> ControlSpec:
        config, nodes = self.config, self.nodes or ["any"]
        return ControlSpec(
            run=self.run,
            run_dir=str(self.run_dir),
            model=str(config.model),
            digest=self.catalog.digest,
            layers=self.catalog.layers,
            num_experts=self.catalog.num_experts,
            nbytes=self.catalog.block_nbytes,
            reduced_nbytes=_reduced_nbytes(self.catalog),
            emulated=self.emulated,
            reduced_ratio=config.reduced_ratio,
            floors=dict(config.floors),
            default_floor=config.default_floor or "",
            formats=planned_formats(self.quality),
            quality=self.quality,
            mode=config.mode,
            telemetry=telemetry_name(self.run, "head" if "head" in nodes else nodes[0]),
            # Replicas level tokens that go to peers; where none do, there is nothing to plan.
            plan_ns=int(config.plan_s * 1e9) if config.move != "weights" else 0,
            payback_ns=int(config.payback_s * 1e9),
        )


def _settings() -> dict[str, str]:
    """OpenTelemetry's variables: the actors of all nodes get those of the driver."""
    return {key: value for key, value in os.environ.items() if key.startswith("OTEL_")}


def prepare(config: RunConfig, *, run: str, say: Callable[[str], None]) -> Deployment:
    """Check model and sizes; everything that can be wrong is found here, before Ray starts."""
    from hotset.blocks.checkpoint import Catalog

    settings = _settings()
    wanted(settings)
    sample_ratio(settings)
    catalog = Catalog.open(config.model)
    reduced_nbytes = _reduced_nbytes(catalog)
    size = sizes(config, catalog, reduced_nbytes=reduced_nbytes)
    kept = bases_nbytes(config, catalog)
    size = size.model_copy(update={"hbm_bytes": max(size.slot_bytes, size.hbm_bytes - kept)})
    quality = read_quality(
        config, catalog, reduced_nbytes=reduced_nbytes, capacity_bytes=size.hbm_bytes
    )
    return Deployment(
        run=run,
        run_dir=new_run_dir(config, run),
        config=config,
        catalog=catalog,
        sizes=size,
        quality=quality,
        emulated=_emulated(config),
        say=say,
    )


def _reduced_nbytes(catalog: Catalog) -> int:
    return codec(Format.INT8).nbytes(catalog.layout)


def _emulated(config: RunConfig) -> tuple[str, ...]:
    said = []
    if config.device == "cpu":
        said.append("hbm: a byte budget in host memory, no GPU")
    links = {
        "host": config.host_profile if config.host_pools else None,
        "cxl": config.cxl_profile if config.cxl_pools else None,
    }
    for tier, profile in links.items():
        if profile:
            link = PROFILES[profile]
            said.append(
                f"{tier}: host memory of another process, paced to "
                f"{link.bandwidth_bytes_per_s / 1e9:g} GB/s and {link.latency_ns} ns"
            )
    return tuple(said)


def _our_nodes() -> list[str]:
    """Names of nodes that carry hotset's resources, head first."""
    found = [
        key.removeprefix(NODE_PREFIX)
        for key in ray.cluster_resources()
        if key.startswith(NODE_PREFIX)
    ]
    return sorted(found, key=lambda name: (name != "head", name))


def _start_error(name: str, error: Exception) -> Exception:
    from hotset.errors import HotsetError

    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, HotsetError):
            return cause
        inner = getattr(cause, "cause", None)
        cause = inner if isinstance(inner, BaseException) else cause.__cause__
    text = str(error)
    lines = [line for line in text.splitlines() if "hotset" in line and "Error" in line]
    what = (lines or text.splitlines() or [""])[-1].strip()
    return ClusterError(f"{name} did not start: {what[:300]}", remedy="look at its Ray log")


def _add(into: Totals, more: Totals) -> None:
    for mine, theirs in ((into.bytes_by_link, more.bytes_by_link), (into.hits, more.hits)):
        for key, value in theirs.items():
            mine[key] = mine.get(key, 0) + value
    into.peak_rss_bytes.update(more.peak_rss_bytes)
    into.queries += more.queries
    into.tokens += more.tokens
    into.stall_ns += more.stall_ns
    into.spans += more.spans
    into.dropped += more.dropped
