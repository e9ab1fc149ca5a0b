"""Ray shell of the controller: named, detached, restarted by Ray, recovered from its journal."""

from __future__ import annotations

import contextlib
import os
import threading
import time
from typing import TYPE_CHECKING

import msgspec
import ray

from hotset.actors import names, watch
from hotset.actors.control import ControlCore, ControlSpec
from hotset.actors.membership import NAMESPACE
from hotset.actors.messages import Heartbeat, Join, Rows, decode, encode
from hotset.actors.metrics import make_metric
from hotset.policies.replicas import warm
from hotset.policies.types import BlockId

if TYPE_CHECKING:
    from collections.abc import Mapping

PUBLISH_S = 1.0


class Planner:
    """Makes the planner ready in the background: its kernels are compiled on first use."""

    def __init__(self) -> None:
        """Nothing happens before somebody asks."""
        self._warm: threading.Thread | None = None

    def ready(self) -> bool:
        """Whether planning is quick by now; the first call starts to make it so."""
        if self._warm is None:
            self._warm = threading.Thread(target=warm, name="planner", daemon=True)
            self._warm.start()
        return not self._warm.is_alive()


class Controller:
    """Decides where copies live. Stores call it; it calls nobody."""

    def __init__(self, spec: bytes) -> None:
        """Recover the run's state from its journal, if there is one."""
        self._core = ControlCore(msgspec.msgpack.decode(spec, type=ControlSpec))
        shown = (
            names.EPOCH_NUMBER, names.EPOCH_AGE, names.BLOCKS, names.VETOES, names.DECISIONS,
            names.IMBALANCE, names.PLANS, names.PLAN_MOVES, names.PLAN_BALANCE, names.ALERT,
            names.DRIFT,
        )  # fmt: skip
        run = self._core.spec.run
        self._metrics = {metric.name: make_metric(metric, run=run) for metric in shown}
        self._counted: dict[tuple[str, str], int] = {}
        self._telemetry: ray.actor.ActorHandle | None = None
        self._publish_at = 0.0
        self._raised: set[str] = set()
        self._planner = Planner()
        self._core.may_plan = self._planner.ready

    def __repr__(self) -> str:
        """What the Ray dashboard shows beside each log line."""
        status = self._core.status()
        stores = status["stores"]
        resident = sum(store["resident_bytes"] for store in stores)
        return f"controller[epoch {status['epoch']}, {len(stores)} stores, {resident >> 20} MiB]"

    def pid(self) -> int:
        """Process id, for tests."""
        return os.getpid()

    def join(self, message: bytes) -> bytes:
        """A store presents itself. Raises StaleEpochError to a predecessor."""
        return encode(self._core.join(decode(message, Join)))

    def heartbeat(self, message: bytes) -> bytes:
        """Events in; lease, news and commands out."""
        reply = encode(self._core.heartbeat(decode(message, Heartbeat)))
        self._publish()
        return reply

    def drain(self, name: str) -> bool:
        """Ask a store to leave; False when there is no such store."""
        return self._core.drain(name)

    def leave(self, name: str, incarnation: int) -> None:
        """A store has ended."""
        self._core.leave(name, incarnation=incarnation)

    def status(self) -> bytes:
        """MessagePack of the fields of `dashboards.status.Status`."""
        return msgspec.msgpack.encode(self._core.status())

    @ray.method(concurrency_group="ask")
    def wait_settled(self, timeout_s: float) -> bool:
        """Wait until the stores have reported on all that was asked; False at the deadline."""
        return self._core.settled.wait(timeout_s)

    def why(self, layer: int, index: int) -> bytes:
        """MessagePack of [story lines, copies] of a block."""
        return msgspec.msgpack.encode(self._core.why(BlockId(layer, index)))

    def records(self, offset: int) -> bytes:
        """MessagePack of `Records`: the journal from a byte on, for the live page."""
        return msgspec.msgpack.encode(self._core.records(offset))

    def replayed(self) -> int:
        """Events that were recovered from the journal at birth."""
        return self._core.replayed

    def clock(self) -> int:
        """Wall clock here: nodes measure theirs against it."""
        return time.time_ns()

    def close(self) -> None:
        """Write the journal out, and send the last rows."""
        self._core.close()
        sent = self._ship()
        if sent is not None:
            with contextlib.suppress(ray.exceptions.RayError):
                ray.get(sent, timeout=5)

    def _publish(self) -> None:
        """Set the gauges that only the controller knows, once a second."""
        now = time.monotonic()
        if now < self._publish_at:
            return
        self._publish_at = now + PUBLISH_S
        alerts = self._core.alerts()
        status = self._core.status(alerts)
        self._metrics[names.EPOCH_NUMBER.name].set(status["epoch"])
        self._metrics[names.EPOCH_AGE.name].set(status["epoch_age_ns"] / 1e9)
        for state, count in status["states"].items():
            self._metrics[names.BLOCKS.name].set(count, tags={"state": state})
        self._count(names.VETOES, status["vetoes"])
        self._count(names.DECISIONS, self._core.log.decisions)
        self._count(names.PLANS, self._core.log.plans)
        self._count(names.PLAN_MOVES, self._core.log.plan_moves)
        plan = self._core.log.last_plan
        if plan is not None:
            for when, ppm in (("before", plan.before_ppm), ("after", plan.after_ppm)):
                self._metrics[names.PLAN_BALANCE.name].set(ppm / 1e6, tags={"when": when})
        for kind, nats in self._core.drift().items():
            self._metrics[names.DRIFT.name].set(nats, tags={"kind": kind})
        imbalance = self._core.log.imbalance()
        if imbalance is not None:
            self._metrics[names.IMBALANCE.name].set(imbalance)
        raised = {alert.kind for alert in alerts}
        for kind in sorted(raised - self._raised):
            self._alarm(kind)
        self._raised = raised
        for kind in watch.KINDS:
            self._metrics[names.ALERT.name].set(int(kind in raised), tags={"alert": kind})
        self._ship()

    def _count(self, metric: names.Metric, totals: Mapping[str, int]) -> None:
        for reason, total in totals.items():
            fresh = total - self._counted.get((metric.name, reason), 0)
            if fresh:
                self._metrics[metric.name].inc(fresh, tags={"reason": reason})
                self._counted[metric.name, reason] = total

    def _alarm(self, kind: str) -> None:
        """Let all nodes' telemetry keep the seconds before an alert; never waits."""
        name = self._core.spec.telemetry
        with contextlib.suppress(ray.exceptions.RayError, ValueError):  # it is away: no dump
            ray.get_actor(name, namespace=NAMESPACE).alarm.remote(f"{watch.DUMP}{kind}")

    def _ship(self) -> ray.ObjectRef | None:
        """Send new rows to telemetry and never wait; what cannot be sent counts as dropped."""
        name = self._core.spec.telemetry
        batch = self._core.log.take()
        if not name or not (batch.rows or batch.dropped):
            return None
        rows = Rows(
            batch=batch, resident_bytes=0, capacity_bytes=0, quarantined_bytes=0,
            peak_rss_bytes=0, pid=os.getpid(),
        )  # fmt: skip
        try:
            if self._telemetry is None:
                self._telemetry = ray.get_actor(name, namespace=NAMESPACE)
            return self._telemetry.ingest.remote(encode(rows))
        except (ray.exceptions.RayError, ValueError):  # ValueError: no actor of this name
            self._telemetry = None
            self._core.log.put_back(batch)
            return None
