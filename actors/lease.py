"""A lease: the right of an actor to serve and write, so that no predecessor changes anything.

After a partition Ray may start a successor while the old process still runs. So every store holds
a lease that only something on the far side of the partition can renew: the controller with each
heartbeat, or, while the controller is away, the cluster's key-value store, which names the one
incarnation that may act under a store's name. An actor whose lease has run out stops serving; one
that finds a successor's incarnation there ends itself.
"""

from __future__ import annotations

import time
from typing import Protocol

LEASE_NS = 10_000_000_000


class Registry(Protocol):
    """Which incarnation may act under a name, kept outside of every actor."""

    def claim(self, name: str, incarnation: int) -> None:
        """Make this incarnation the one that may act. Raises ClusterError when out of reach."""

    def holder(self, name: str) -> int:
        """The incarnation that may act; 0 when none has claimed. Raises ClusterError."""


class Lease:
    """Lease of one incarnation of one store. `fenced` once a successor has claimed the name."""

    def __init__(self, *, name: str, incarnation: int, registry: Registry) -> None:
        """Claim the name; raises ClusterError when the registry is out of reach."""
        self._name = name
        self._incarnation = incarnation
        self._registry = registry
        self._until_ns = time.monotonic_ns() + LEASE_NS
        self.fenced = False
        registry.claim(name, incarnation)

    @property
    def valid(self) -> bool:
        """Whether the holder may serve and write now."""
        return not self.fenced and time.monotonic_ns() < self._until_ns

    def renew(self, *, asked_ns: int) -> None:
        """The controller answered a heartbeat that was sent at `asked_ns` (monotonic)."""
        self._until_ns = max(self._until_ns, asked_ns + LEASE_NS)

    def renew_from_registry(self) -> None:
        """No controller: ask the registry. Raises ClusterError when that is out of reach too."""
        asked_ns = time.monotonic_ns()
        holder = self._registry.holder(self._name)
        if holder > self._incarnation:
            self.fenced = True
        else:
            self.renew(asked_ns=asked_ns)
