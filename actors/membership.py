"""A store's line to the controller: join, heartbeat, lease, directory, peers, commands.

One thread per store. The controller is looked up by name each time it does not answer, so a
successor is found without anyone's help; until then the lease is renewed from the cluster's
key-value store and the last directory stays in force. The token path never comes here.

Knows Ray; must not know what commands mean.
"""

from __future__ import annotations

import contextlib
import threading
import time
import traceback
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import ray
from ray.experimental import internal_kv

from hotset.actors.lease import Lease
from hotset.actors.messages import (
    Heartbeat,
    HeartbeatReply,
    Join,
    Member,
    decode,
    encode,
    pack,
    unpack_command,
)
from hotset.errors import ClusterError, StaleEpochError, TransportError

if TYPE_CHECKING:
    from collections.abc import Callable

    from hotset.actors.directory import Directory
    from hotset.actors.store import Store
    from hotset.policies.types import Command, Event
    from hotset.policies.wire import Reading
    from hotset.transport.engine import Engine

HEARTBEAT_S = 0.2
ANSWER_S = 2.0
NAMESPACE = "hotset"


class RayRegistry:
    """Incarnations in the cluster's key-value store, which a partition cuts off too."""

    def __init__(self, *, run: str) -> None:
        """Keys carry the run, so that runs on one cluster do not meet."""
        self._run = run

    def _key(self, name: str) -> bytes:
        return f"hotset:{self._run}:{name}".encode()

    def claim(self, name: str, incarnation: int) -> None:
        """Make this incarnation the holder."""
        try:
            internal_kv._internal_kv_put(self._key(name), str(incarnation).encode())  # noqa: SLF001 - Ray has no public key-value store
        except Exception as error:
            raise ClusterError("the cluster's key-value store is out of reach") from error

    def holder(self, name: str) -> int:
        """Incarnation that holds the name, 0 when none."""
        try:
            value = internal_kv._internal_kv_get(self._key(name))  # noqa: SLF001 - as above
        except Exception as error:
            raise ClusterError("the cluster's key-value store is out of reach") from error
        return int(value) if value else 0


def controller_name(run: str) -> str:
    """Name of a run's controller actor in the namespace."""
    return f"hotset-{run}-controller"


@dataclass(frozen=True, slots=True, kw_only=True)
class Callbacks:
    """What a store does with news. All run on the membership thread."""

    command: Callable[[Command], None]
    gauges: Callable[[], dict[str, float]]
    events: Callable[[], list[Event]]
    drained: Callable[[], None]
    fenced: Callable[[], None]
    beat: Callable[[], None]  # once a heartbeat: ship telemetry and the like
    readings: Callable[[], tuple[Reading, ...]]  # what packed blocks would save here
    packing: Callable[[float], None]  # what they would save the readers of this store


class Membership:
    """Keeps one store in the cluster."""

    def __init__(
        self, *, run: str, store: Store, engine: Engine, directory: Directory, callbacks: Callbacks
    ) -> None:
        """Claims the store's name; `start` joins."""
        self._run = run
        self._store = store
        self._engine = engine
        self._directory = directory
        self._callbacks = callbacks
        self.lease = Lease(
            name=store.info.name,
            incarnation=store.info.incarnation,
            registry=RayRegistry(run=run),
        )
        self._handle: Any = None
        self._joined = False
        self._last_error = ""
        self._membership_version = -1
        self._commands_seen = 0
        self._peers: dict[str, int] = {}
        self._draining_told = False
        self._stop = threading.Event()
        self._ready = threading.Event()
        self._thread = threading.Thread(target=self._loop, name="membership", daemon=True)

    def start(self, *, timeout_s: float = 30.0) -> None:
        """Join and wait until the first directory is here. Raises ClusterError."""
        self._thread.start()
        if not self._ready.wait(timeout_s):
            raise ClusterError(
                f"{self._store.info.name} could not join within {timeout_s:.0f} s "
                f"({self._last_error.splitlines()[-1] if self._last_error else 'no answer'})",
                remedy="look at the controller's log with `ray logs actor`",
            )

    def stop(self) -> None:
        """Say what is left to say and stop beating; the controller will count the store as lost."""
        self._stop.set()
        self._thread.join(timeout=5)
        if not self._joined or self._thread.is_alive() or self.lease.fenced:
            return
        events = self._store.take_events() + self._callbacks.events()
        if events:
            with contextlib.suppress(ray.exceptions.RayError, ValueError, OSError, StaleEpochError):
                self._call("heartbeat", self._heartbeat(events))

    def _loop(self) -> None:
        while not self._stop.is_set():
            began = time.monotonic()
            try:
                self._beat()
                self._callbacks.beat()
            except StaleEpochError:
                self._callbacks.fenced()
                return
            except BaseException:
                # A bug of ours: a store that no longer beats must not look alive.
                traceback.print_exc()
                self._callbacks.fenced()
                raise
            if self.lease.fenced:
                self._callbacks.fenced()
                return
            self._stop.wait(max(0.0, HEARTBEAT_S - (time.monotonic() - began)))

    def _beat(self) -> None:
        asked_ns = time.monotonic_ns()
        events: list[Event] = []
        try:
            if self._joined:
                events = self._store.take_events() + self._callbacks.events()
                reply = self._call("heartbeat", self._heartbeat(events))
            else:
                self._store.take_events()  # the inventory says the same
                reply = self._call("join", self._join())
        except StaleEpochError:
            raise
        except (ray.exceptions.RayError, ValueError, OSError) as error:  # the controller is away
            self._last_error = f"{type(error).__name__}: {error}".strip()
            self._no_answer(events)
            return
        if not reply.known:
            self._joined = False
            return
        self._joined = True
        self.lease.renew(asked_ns=asked_ns)
        self._take(reply)
        self._ready.set()

    def _no_answer(self, events: list[Event]) -> None:
        self._store.put_back(events)
        self._handle = None
        try:
            self.lease.renew_from_registry()
        except ClusterError:
            return  # cut off: the lease runs out by itself

    def _call(self, method: str, message: Join | Heartbeat) -> HeartbeatReply:
        if self._handle is None:
            self._handle = ray.get_actor(controller_name(self._run), namespace=NAMESPACE)
        reference = getattr(self._handle, method).remote(encode(message))
        try:
            data = ray.get(reference, timeout=ANSWER_S)
        except ray.exceptions.RayTaskError as error:
            if isinstance(error.cause, StaleEpochError):
                raise error.cause from error
            raise
        return decode(data, HeartbeatReply)

    def _join(self) -> Join:
        return Join(
            epoch=self._directory.epoch,
            store=self._store.info,
            peer=self._engine.info(),
            copies=self._store.copies(),
        )

    def _heartbeat(self, events: list[Event]) -> Heartbeat:
        return Heartbeat(
            epoch=self._directory.epoch,
            store=self._store.info.name,
            incarnation=self._store.info.incarnation,
            directory_version=self._directory.version,
            membership_version=self._membership_version,
            events=[pack(event) for event in events],
            gauges=self._callbacks.gauges(),
            commands_seen=self._commands_seen,
            plan_epoch=self._directory.plan.epoch,
            readings=self._callbacks.readings(),
        )

    def _take(self, reply: HeartbeatReply) -> None:
        if reply.members is not None:
            self._meet(reply.members)
            self._membership_version = reply.membership_version
        epoch, version = reply.epoch, reply.directory_version
        if reply.full:
            self._directory.replace(reply.added, epoch=epoch, version=version)
        else:
            self._directory.change(
                added=reply.added, removed=reply.removed, epoch=epoch, version=version
            )
        if reply.plan is not None:
            self._directory.plan.take(reply.plan)
        for packed in reply.commands:
            command = unpack_command(packed)
            if getattr(command, "epoch", epoch) <= epoch:
                self._callbacks.command(command)
        self._commands_seen = reply.command_seq
        if reply.packing_gain is not None:
            self._callbacks.packing(reply.packing_gain)
        if reply.draining and not self._draining_told:
            self._draining_told = True
            self._callbacks.drained()

    def _meet(self, members: tuple[Member, ...]) -> None:
        mine = self._store.info.name
        self._directory.set_tiers({m.store.name: m.store.tier for m in members})
        present = {m.peer.name: m.peer for m in members if m.peer.name != mine}
        for name in [name for name in self._peers if name not in present]:
            self._directory.forget_store(name, incarnation=self._peers.pop(name))
            self._engine.disconnect(name)
        for name, peer in present.items():
            if self._peers.get(name) != peer.incarnation:
                try:
                    self._engine.connect(peer)
                except TransportError:
                    continue  # tried again with the next change of membership; storage serves
                self._peers[name] = peer.incarnation
