"""One incarnation acts under a name: a lease runs out by itself, a successor fences."""

from __future__ import annotations

import pytest

from hotset.actors import lease as lease_module
from hotset.actors.lease import LEASE_NS, Lease
from hotset.errors import ClusterError


class Names:
    """A registry in this process that can be cut off."""

    def __init__(self) -> None:
        self.holders: dict[str, int] = {}
        self.reachable = True

    def claim(self, name: str, incarnation: int) -> None:
        self._check()
        self.holders[name] = incarnation

    def holder(self, name: str) -> int:
        self._check()
        return self.holders.get(name, 0)

    def _check(self) -> None:
        if not self.reachable:
            raise ClusterError("cut off")


@pytest.fixture
def now(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A monotonic clock that stands until a test moves it."""
    clock = [1_000]
    monkeypatch.setattr(lease_module.time, "monotonic_ns", lambda: clock[0])
    return clock


def test_it_runs_out_unless_renewed(now: list[int]) -> None:
    lease = Lease(name="a", incarnation=1, registry=Names())
    now[0] += LEASE_NS - 1
    assert lease.valid
    lease.renew(asked_ns=now[0])
    now[0] += LEASE_NS - 1
    assert lease.valid
    now[0] += 1
    assert not lease.valid


def test_an_old_answer_does_not_shorten_it(now: list[int]) -> None:
    lease = Lease(name="a", incarnation=1, registry=Names())
    lease.renew(asked_ns=now[0] - LEASE_NS)
    assert lease.valid


def test_the_registry_renews_it_while_the_controller_is_away(now: list[int]) -> None:
    names = Names()
    lease = Lease(name="a", incarnation=1, registry=names)
    now[0] += LEASE_NS
    assert not lease.valid
    lease.renew_from_registry()
    assert lease.valid
    names.reachable = False
    with pytest.raises(ClusterError):
        lease.renew_from_registry()
    now[0] += LEASE_NS
    assert not lease.valid


def test_a_successor_fences_for_good(now: list[int]) -> None:
    names = Names()
    old = Lease(name="a", incarnation=1, registry=names)
    new = Lease(name="a", incarnation=2, registry=names)
    old.renew_from_registry()
    assert old.fenced
    old.renew(asked_ns=now[0])
    assert not old.valid
    new.renew_from_registry()
    assert new.valid
