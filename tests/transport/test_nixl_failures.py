"""Peers that die, come back or fall silent, over NIXL between processes."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING, Any

import pytest

from hotset.errors import DependencyError, PeerGoneError, TransportError
from hotset.transport.base import Status
from hotset.transport.nixl import NixlBackend
from hotset.transport.nixl_lane import merge
from hotset.transport.slab import SlotState
from tests.transport.leaks import footprint
from tests.transport.peer import PeerProcess, Store, build
from tests.transport.worlds import NBYTES, deadline, until

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.nixl
SHAPE: dict[str, Any] = {"blocks": 4, "nbytes": NBYTES, "room": 4}
TCP = {"UCX_TLS": "tcp", "UCX_NET_DEVICES": "lo"}


@pytest.fixture
def sink() -> Iterator[Store]:
    store = build(name="sink", incarnation=1, backend=NixlBackend(), **(SHAPE | {"blocks": 0}))
    yield store
    assert store.engine.close()
    store.slab.check_integrity()


def _read(sink: Store, peer: PeerProcess, *, seconds: float = 20.0) -> Any:
    slot = sink.slab.allocate(NBYTES)
    assert slot is not None
    item = peer.copies[0].item(slot)
    return sink.engine.read(peer.info.name, [item], deadline_ns=deadline(seconds))


def test_a_killed_peer_is_a_typed_failure_and_a_new_incarnation_is_readable(sink: Store) -> None:
    old = PeerProcess(name="source", incarnation=1, **SHAPE)
    sink.engine.connect(old.info)
    first = _read(sink, old).wait()
    assert first.status is Status.DONE
    old.kill()
    failed = _read(sink, old).wait()
    assert failed.status is Status.FAILED
    assert failed.items[0].error
    assert until(lambda: sink.engine.quarantined == 0)
    assert sink.slab.state(failed.items[0].dest) is SlotState.FREE
    new = PeerProcess(name="source", incarnation=2, **SHAPE)
    sink.engine.connect(new.info)
    again = _read(sink, new).wait()
    assert again.status is Status.DONE
    with pytest.raises(PeerGoneError):
        sink.engine.connect(old.info)
    # a directory that still names the former incarnation gets STALE, never the wrong bytes
    slot = sink.slab.allocate(NBYTES)
    assert slot is not None
    item = old.copies[0].item(slot)
    stale = sink.engine.read("source", [item], deadline_ns=deadline()).wait()
    assert stale.status is Status.STALE
    assert "incarnation" in stale.items[0].error
    new.close()


def test_a_peer_that_died_before_the_first_read(sink: Store) -> None:
    peer = PeerProcess(name="source", incarnation=1, **SHAPE)
    sink.engine.connect(peer.info)
    peer.kill()
    assert _read(sink, peer).wait().status is Status.FAILED


def test_reads_from_a_dead_peer_leave_no_descriptors_behind(sink: Store) -> None:
    """UCX leaks a socket for each connection that is refused, so few may be tried."""
    peer = PeerProcess(name="source", incarnation=1, **SHAPE)
    sink.engine.connect(peer.info)
    assert _read(sink, peer).wait().status is Status.DONE
    peer.kill()
    assert _read(sink, peer).wait().status is Status.FAILED
    assert until(lambda: sink.engine.quarantined == 0)
    before = footprint(os.getpid())
    for _ in range(200):
        assert _read(sink, peer).wait().status is Status.FAILED
    assert footprint(os.getpid()).since(before).fds <= 1
    with pytest.raises(PeerGoneError):  # whoever connects it again is told
        sink.engine.connect(peer.info)


def test_a_frozen_peer_times_out_and_slots_return_only_after_it_answers(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name, value in TCP.items():
        monkeypatch.setenv(name, value)
    store = build(name="tcp-sink", incarnation=1, backend=NixlBackend(), **(SHAPE | {"blocks": 0}))
    peer = PeerProcess(name="source", incarnation=1, environment=TCP, **SHAPE)
    store.engine.connect(peer.info)
    assert _read(store, peer).wait().status is Status.DONE
    peer.freeze()
    ticket = _read(store, peer, seconds=0.3)
    outcome = ticket.wait(timeout_ns=5_000_000_000)
    assert outcome.status is Status.TIMED_OUT
    assert store.slab.state(outcome.items[0].dest) is SlotState.QUARANTINED
    assert (store.engine.quarantined, store.engine.quarantined_bytes) == (1, NBYTES)
    cancelled = _read(store, peer)
    assert not until(lambda: cancelled.done, seconds=0.1)
    cancelled.cancel()
    assert cancelled.wait(timeout_ns=5_000_000_000).status is Status.CANCELLED
    assert store.engine.quarantined == 2
    peer.thaw()
    assert until(lambda: store.engine.quarantined == 0)
    store.slab.check_integrity()
    assert store.slab.state(outcome.items[0].dest) is SlotState.FREE
    assert _read(store, peer).wait().status is Status.DONE
    assert store.engine.close()
    peer.close()


def test_close_with_a_read_in_flight_says_so_and_keeps_everything_alive(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name, value in TCP.items():
        monkeypatch.setenv(name, value)
    store = build(name="tcp-sink2", incarnation=1, backend=NixlBackend(), **(SHAPE | {"blocks": 0}))
    peer = PeerProcess(name="source", incarnation=1, environment=TCP, **SHAPE)
    store.engine.connect(peer.info)
    assert _read(store, peer).wait().status is Status.DONE
    peer.freeze()
    ticket = _read(store, peer)
    assert not until(lambda: ticket.done, seconds=0.1)
    assert not store.engine.close(timeout_ns=200_000_000)
    assert ticket.wait().status is Status.CANCELLED
    with pytest.raises(TransportError):
        _read(store, peer)
    peer.thaw()
    peer.close()  # the source survives its reader's close


def test_metadata_of_another_store_is_refused(sink: Store) -> None:
    from dataclasses import replace

    peer = PeerProcess(name="source", incarnation=1, **SHAPE)
    with pytest.raises(TransportError, match="metadata"):
        sink.engine.connect(replace(peer.info, incarnation=2))
    with pytest.raises(TransportError):
        sink.engine.connect(replace(peer.info, backend_metadata=peer.info.backend_metadata[:99]))
    with pytest.raises(TransportError, match="speaks"):
        sink.engine.connect(replace(peer.info, backend="loopback"))
    sink.engine.connect(peer.info)
    assert _read(sink, peer).wait().status is Status.DONE
    peer.close()


def test_available_says_nothing_when_nixl_is_here() -> None:
    assert NixlBackend.available() == ""


def test_adjacent_spans_merge() -> None:
    from hotset.transport.base import Span

    spans = [Span(local_offset=at, remote_offset=1000 + at, nbytes=64) for at in (0, 64, 192, 256)]
    merged = merge(spans)
    assert [(span.local_offset, span.nbytes) for span in merged] == [(0, 128), (192, 128)]


def test_without_nixl_the_error_names_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    for wheel in ("nixl", "nixl_cu12", "nixl_cu13"):
        monkeypatch.setitem(sys.modules, wheel, None)
        monkeypatch.setitem(sys.modules, f"{wheel}._bindings", None)
    assert NixlBackend.available() == "pip install nixl"
    with pytest.raises(DependencyError, match="pip install nixl"):
        build(name="sink", incarnation=1, backend=NixlBackend(), **SHAPE)
