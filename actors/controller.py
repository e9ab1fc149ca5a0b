"""Ray shell of the controller: named, detached, restarted by Ray, recovered from its journal."""

from __future__ import annotations

import os
import time

import msgspec
import ray

from hotset.actors import names
from hotset.actors.control import ControlCore, ControlSpec
from hotset.actors.messages import Heartbeat, Join, decode, encode
from hotset.actors.metrics import make_metric
from hotset.policies.types import BlockId

PUBLISH_S = 1.0


class Controller:
    """Decides where copies live. Stores call it; it calls nobody."""

    def __init__(self, spec: bytes) -> None:
        """Recover the run's state from its journal, if there is one."""
        self._core = ControlCore(msgspec.msgpack.decode(spec, type=ControlSpec))
        shown = (names.EPOCH_NUMBER, names.EPOCH_AGE, names.BLOCKS, names.VETOES)
        self._metrics = {metric.name: make_metric(metric) for metric in shown}
        self._vetoes: dict[str, int] = {}
        self._publish_at = 0.0

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

    def close(self) -> None:
        """Write the journal out."""
        self._core.close()

    def _publish(self) -> None:
        """Set the gauges that only the controller knows, once a second."""
        now = time.monotonic()
        if now < self._publish_at:
            return
        self._publish_at = now + PUBLISH_S
        status = self._core.status()
        self._metrics[names.EPOCH_NUMBER.name].set(status["epoch"])
        self._metrics[names.EPOCH_AGE.name].set(status["epoch_age_ns"] / 1e9)
        for state, count in status["states"].items():
            self._metrics[names.BLOCKS.name].set(count, tags={"state": state})
        for reason, count in status["vetoes"].items():
            fresh = count - self._vetoes.get(reason, 0)
            if fresh:
                self._metrics[names.VETOES.name].inc(fresh, tags={"reason": reason})
                self._vetoes[reason] = count
