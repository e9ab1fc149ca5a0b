"""One store put together: memory, engine, directory, fetcher, membership, telemetry.

The same parts serve a GPU worker and a pool; they differ in what they do with commands and in who
decides what to keep. Must not know policy.
"""

from __future__ import annotations

import contextlib
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import ray

from hotset.actors.batches import RowBatch
from hotset.actors.directory import Directory
from hotset.actors.fetcher import Fetcher
from hotset.actors.membership import NAMESPACE, Callbacks, Membership
from hotset.actors.messages import Rows, encode
from hotset.actors.ring import SwitchedRing
from hotset.actors.store import Store
from hotset.blocks.checkpoint import Catalog
from hotset.blocks.lowrank import install, read_bases
from hotset.policies.types import Format, StoreInfo, Tier
from hotset.transport.base import LinkProfile  # noqa: TC001 - msgspec reads annotations
from hotset.transport.engine import Engine
from hotset.transport.slab import Slab
from hotset.transport.storage import StorageReader

if TYPE_CHECKING:
    from collections.abc import Callable

    from hotset.policies.types import Command
    from hotset.policies.wire import Reading

MOST_QUARANTINED = 64  # abandoned transfers of one store; over it the process restarts


class StoreSpec(msgspec.Struct, frozen=True, kw_only=True):
    """What a store is told at birth.

    `link` is the emulated link that peers read it over. `token` is the run's: stores without it are
    not read, and cannot read over plain TCP or UCX. `formats`: payload bytes of the lossy formats
    that the run may use beside int8. `packs`: a pool holds blocks compressed without loss where
    that makes reading them faster, and a worker tells what it would save.
    """

    run: str
    name: str
    tier: int
    model: str
    digest: str
    capacity_bytes: int
    reduced_nbytes: int
    telemetry: str
    device: str = "cpu"
    link: LinkProfile | None = None
    transport: str = "nixl"
    token: bytes = b""
    formats: dict[str, int] = msgspec.field(default_factory=dict)
    packs: bool = False
    bases: str = ""  # file of the bases that `lowrank` needs

    def reduced_sizes(self) -> tuple[int, ...]:
        """Payload sizes below the full one, a class of slots for each."""
        return tuple(sorted({self.reduced_nbytes, *self.formats.values()}, reverse=True))

    def payload_nbytes(self, full: int) -> dict[Format, int]:
        """Payload of a block by format; a compressed one takes a full slot."""
        lossy = {Format(name): nbytes for name, nbytes in self.formats.items()}
        return {
            Format.BF16: full,
            Format.BF16Z: full,
            Format.INT8: self.reduced_nbytes,
            **lossy,
        }


def peak_rss_bytes() -> int:
    """Largest resident set of this process so far (`VmHWM`)."""
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return 0


def telemetry_name(run: str, node: str) -> str:
    """Name of a node's telemetry actor."""
    return f"hotset-{run}-telemetry-{node}"


@dataclass(slots=True)
class Counters:
    """Counted by the owner of the store, shipped with the rows as growth since the last batch."""

    hits: dict[str, int]
    queries: int = 0
    tokens: int = 0
    stall_ns: int = 0


class Assembly:
    """The parts of one store."""

    def __init__(self, spec: StoreSpec) -> None:
        """Open the catalog, reserve the memory, start the engine. Joins nobody yet."""
        self.spec = spec
        self.catalog = Catalog.open(spec.model)
        if spec.bases:
            install(read_bases(spec.bases, checkpoint=spec.digest))
        self.incarnation = time.time_ns()
        self.node = ray.get_runtime_context().get_node_id()
        self.slab = Slab(
            capacity_bytes=spec.capacity_bytes,
            slot_payload_bytes=self.catalog.block_nbytes,
            reduced_payload_bytes=spec.reduced_sizes(),
            device=spec.device,
            name=spec.name,
            incarnation=self.incarnation,
        )
        self.ring = SwitchedRing()
        self.engine = Engine(
            slab=self.slab,
            backend=_backend(spec),
            ring=self.ring,
            name=spec.name,
            incarnation=self.incarnation,
            storage=StorageReader(),
            describe=Catalog.describe,
            link=spec.link,
            max_quarantined=MOST_QUARANTINED,
            token=spec.token,
        )
        self.engine.start()
        self.directory = Directory(owner=spec.name)
        self.store = Store(
            info=StoreInfo(
                name=spec.name,
                tier=Tier(spec.tier),
                node=self.node,
                incarnation=self.incarnation,
                capacity_bytes=self.slab.capacity_bytes,
            ),
            catalog=self.catalog,
            slab=self.slab,
        )
        self.fetcher = Fetcher(
            catalog=self.catalog, slab=self.slab, engine=self.engine, directory=self.directory
        )
        self.counters = Counters(hits={})
        self._shipped = Counters(hits={})
        self._shipped_drops = 0
        self._telemetry: Any = None
        self.membership: Membership | None = None
        self._busy: Callable[[], bool] = lambda: False

    def join(  # noqa: PLR0913 - what a store does with news, by keyword
        self,
        *,
        command: Callable[[Command], None],
        gauges: Callable[[], dict[str, float]],
        drained: Callable[[], None],
        events: Callable[[], list[Any]] = list,
        readings: Callable[[], tuple[Reading, ...]] = tuple,
        packing: Callable[[float], None] = lambda _gain: None,
    ) -> None:
        """Join the cluster; returns once the first directory is here."""
        self._busy = lambda: gauges().get("requests", 0) > 0
        self.membership = Membership(
            run=self.spec.run,
            store=self.store,
            engine=self.engine,
            directory=self.directory,
            callbacks=Callbacks(
                command=command,
                gauges=lambda: self._gauges() | gauges(),
                events=events,
                drained=drained,
                fenced=_end_process,
                beat=self._beat,
                readings=readings,
                packing=packing,
            ),
        )
        self.membership.start()

    @property
    def may_serve(self) -> bool:
        """Whether this incarnation holds its lease."""
        return self.membership is not None and self.membership.lease.valid

    def _beat(self) -> None:
        if reason := self._beyond_mending():
            print(f"{self.spec.name}: {reason}, restarting", file=sys.stderr, flush=True)
            _end_process()
        self.ship()

    def _beyond_mending(self) -> str:
        """Why only a new process can go on; ''."""
        if self.engine.quarantined >= MOST_QUARANTINED:  # abandoned transfers hold the slots
            return "quarantine is full"
        fault = self.engine.fault
        return "" if self._busy() else fault  # requests that run here read what they need

    def ship(self) -> None:
        """Send new rows and counters to the node's telemetry actor; never waits."""
        message = encode(self._rows())
        with contextlib.suppress(Exception):  # telemetry may be gone; the ring counts the loss
            if self._telemetry is None:
                name = self.spec.telemetry
                self._telemetry = ray.get_actor(name, namespace=NAMESPACE)
            self._telemetry.ingest.remote(message)
            return
        self._telemetry = None

    def flush(self) -> None:
        """Send what is left and wait until it is written (end of a run)."""
        message = encode(self._rows())
        with contextlib.suppress(Exception):
            telemetry = ray.get_actor(self.spec.telemetry, namespace=NAMESPACE)
            ray.get(telemetry.ingest.remote(message), timeout=5)

    def _rows(self) -> Rows:
        rows = self.ring.drain()
        now, before = self.counters, self._shipped
        hits = {tier: count - before.hits.get(tier, 0) for tier, count in now.hits.items()}
        drops, self._shipped_drops = self.ring.dropped - self._shipped_drops, self.ring.dropped
        batch = RowBatch(
            store=self.spec.name,
            tier=Tier(self.spec.tier),
            rows=rows,
            names=tuple(self.ring.names()),
            tiers=self.directory.tiers(),
            dropped=drops,
            hits_by_tier=hits,
            queries=now.queries - before.queries,
            tokens=now.tokens - before.tokens,
            link_bytes_per_s=self.spec.link.bandwidth_bytes_per_s if self.spec.link else 0,
            oldest_transfer_ns=self.fetcher.oldest_ns,
        )
        self._shipped = Counters(
            hits=dict(now.hits), queries=now.queries, tokens=now.tokens, stall_ns=now.stall_ns
        )
        return Rows(
            epoch=self.directory.epoch,
            batch=batch,
            resident_bytes=self.slab.used_bytes,
            capacity_bytes=self.slab.capacity_bytes,
            quarantined_bytes=self.engine.quarantined_bytes,
            peak_rss_bytes=peak_rss_bytes(),
            pid=os.getpid(),
        )

    def _gauges(self) -> dict[str, float]:
        return {
            "resident_bytes": self.slab.used_bytes,
            "quarantined_bytes": self.engine.quarantined_bytes,
            "in_flight": self.engine.in_flight,
            "oldest_transfer_ns": self.fetcher.oldest_ns,
            "rss_bytes": peak_rss_bytes(),
        }


def _backend(spec: StoreSpec) -> Any:
    if spec.transport == "storage":
        return None
    if spec.transport == "auto":
        from hotset.transport.node import NodeBackend

        return NodeBackend()
    if spec.transport == "tcp":
        from hotset.transport.tcp import TcpBackend

        return TcpBackend(host=_address(), token=spec.token)
    if spec.transport == "ucx":
        from hotset.transport.ucx import UcxBackend

        return UcxBackend(host=_address(), token=spec.token)
    from hotset.transport.nixl import NixlBackend

    return NixlBackend()


def _address() -> str:
    """This node's address, as the other nodes know it."""
    return str(ray.util.get_node_ip_address())


def _end_process() -> None:
    # A successor acts under this store's name; anything done from here on would be wrong.
    os._exit(3)
