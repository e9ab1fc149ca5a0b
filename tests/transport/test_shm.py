"""Mapped peers: who may be taken for whom, what outlives a process, who is read which way."""

from __future__ import annotations

import mmap
import os
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import pytest

from hotset.errors import PeerGoneError, TransportError
from hotset.transport.base import Span, Status
from hotset.transport.memory import HostMemory
from hotset.transport.node import NodeBackend
from hotset.transport.shm import ShmBackend
from tests.transport.peer import PeerProcess, Store, build
from tests.transport.worlds import NBYTES, deadline

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from hotset.transport.base import Outcome, PeerInfo

SHAPE: dict[str, Any] = {"blocks": 4, "nbytes": NBYTES, "room": 4}
BOOT, NAMESPACES, PID, STARTED, FD, DEVICE, INODE, SIZE = range(8)


@pytest.fixture
def sink() -> Iterator[Store]:
    store = build(name="sink", incarnation=1, backend=ShmBackend(), **(SHAPE | {"blocks": 0}))
    yield store
    assert store.engine.close()
    store.slab.check_integrity()


@pytest.fixture(scope="module")
def source() -> Iterator[PeerProcess]:
    peer = PeerProcess(name="shm-source", incarnation=3, backend="shm", **SHAPE)
    yield peer
    peer.close()


def _read(store: Store, peer: PeerProcess) -> Outcome:
    slot = store.slab.allocate(NBYTES)
    assert slot is not None
    item = peer.copies[0].item(slot)
    ticket = store.engine.read(peer.info.name, [item], deadline_ns=deadline())
    outcome = ticket.wait()
    if outcome.status is Status.DONE:
        store.slab.unpin(slot)
        store.slab.retire(slot)
    return outcome


def _maps_of(name: str) -> int:
    return Path("/proc/self/maps").read_text(encoding="utf-8").count(f"memfd:hotset-{name}")


def _changed(info: PeerInfo, column: int, change: Callable[[Any], Any]) -> PeerInfo:
    place = msgspec.msgpack.decode(info.backend_metadata)
    place[column] = change(place[column])
    return replace(info, backend_metadata=msgspec.msgpack.encode(place))


def test_a_dead_peers_copies_stay_readable_until_a_new_incarnation_replaces_it(sink: Store) -> None:
    old = PeerProcess(name="reborn", incarnation=1, backend="shm", **SHAPE)
    sink.engine.connect(old.info)
    assert _read(sink, old).status is Status.DONE
    old.kill()
    assert _read(sink, old).status is Status.DONE
    new = PeerProcess(name="reborn", incarnation=2, backend="shm", **SHAPE)
    sink.engine.connect(new.info)
    assert _maps_of("reborn") == 1
    assert _read(sink, new).status is Status.DONE
    assert _read(sink, old).status is Status.STALE  # a directory that names the former one
    with pytest.raises(PeerGoneError):
        sink.engine.connect(old.info)
    sink.engine.disconnect("reborn")
    assert _maps_of("reborn") == 0
    with pytest.raises(PeerGoneError):
        sink.engine.connect(old.info)
    new.close()


@pytest.mark.parametrize(
    ("column", "change"),
    [
        pytest.param(STARTED, lambda ticks: ticks - 1, id="recycled-pid"),
        pytest.param(INODE, lambda inode: inode + 1, id="another-memory"),
        pytest.param(FD, lambda _: 999_999, id="closed"),
        pytest.param(PID, lambda _: 2**22 + 1, id="no-such-process"),
        pytest.param(FD, lambda _: 0, id="another-file"),
    ],
)
def test_what_is_not_the_described_memory_is_never_mapped(
    sink: Store, source: PeerProcess, column: int, change: Callable[[Any], Any]
) -> None:
    with pytest.raises(PeerGoneError):
        sink.engine.connect(_changed(source.info, column, change))
    assert _maps_of("shm-source") == 0


@pytest.mark.parametrize(
    ("column", "change"),
    [
        pytest.param(BOOT, lambda _: "another", id="host"),
        pytest.param(NAMESPACES, lambda spaces: [spaces[0], "net:[1]"], id="network-namespace"),
        pytest.param(NAMESPACES, lambda spaces: ["pid:[1]", spaces[1]], id="pid-namespace"),
        pytest.param(SIZE, lambda nbytes: nbytes + 4096, id="size"),
    ],
)
def test_a_peer_that_cannot_be_mapped_is_a_typed_error(
    sink: Store, source: PeerProcess, column: int, change: Callable[[Any], Any]
) -> None:
    with pytest.raises(TransportError):
        sink.engine.connect(_changed(source.info, column, change))


def test_spans_outside_either_slab_are_refused(source: PeerProcess) -> None:
    store = build(name="bare", incarnation=1, backend=None, **(SHAPE | {"blocks": 0}))
    backend = ShmBackend()
    backend.register(store.slab)
    backend.connect(source.info)
    for local, remote, nbytes in (
        (store.slab.nbytes - 63, 0, 64),
        (0, source.info.nbytes - 63, 64),
        (-64, 0, 64),
        (0, -64, 64),
    ):
        with pytest.raises(TransportError, match="leaves its slab"):
            backend.post(
                "shm-source", [Span(local_offset=local, remote_offset=remote, nbytes=nbytes)]
            )
    backend.close()
    assert store.engine.close()


def test_a_slab_is_sealed_so_that_peers_can_neither_write_nor_fault() -> None:
    memory = HostMemory(1, name="sealed")
    with pytest.raises(PermissionError):
        mmap.mmap(memory.fd, memory.nbytes, flags=mmap.MAP_SHARED)
    with pytest.raises(PermissionError):
        os.truncate(memory.fd, 4096)
    memory.write(0, b"mine")
    assert bytes(memory.read(0, 4)) == b"mine"


@pytest.mark.nixl
def test_a_node_maps_its_own_peers_and_reads_others_over_nixl(
    caplog: pytest.LogCaptureFixture,
) -> None:
    backend = NodeBackend()
    store = build(name="sink", incarnation=1, backend=backend, **(SHAPE | {"blocks": 0}))
    near = PeerProcess(name="near", incarnation=1, backend="node", **SHAPE)
    nixl, shm = msgspec.msgpack.decode(near.info.backend_metadata)
    place = msgspec.msgpack.decode(shm)

    def told(column: int, value: Any) -> PeerInfo:
        changed = [value if i == column else kept for i, kept in enumerate(place)]
        metadata = msgspec.msgpack.encode([nixl, msgspec.msgpack.encode(changed)])
        return replace(near.info, backend_metadata=metadata)

    store.engine.connect(near.info)
    assert backend.way("near") == "shm"
    assert _read(store, near).status is Status.DONE
    store.engine.connect(told(BOOT, "another host"))
    assert (backend.way("near"), backend.refusals, caplog.text) == ("nixl", {}, "")
    assert _maps_of("near") == 0
    assert _read(store, near).status is Status.DONE
    store.engine.connect(near.info)
    assert backend.way("near") == "shm"
    for _ in range(2):  # a mapping is refused: the reason is kept, and told once
        store.engine.connect(told(NAMESPACES, ["pid:[1]", place[NAMESPACES][1]]))
        assert backend.way("near") == "nixl"
        assert "namespace" in backend.refusals["near"]
        assert _read(store, near).status is Status.DONE
    assert caplog.text.count("over NIXL") == 1
    plain = PeerProcess(name="plain", incarnation=1, backend="nixl", **SHAPE)
    store.engine.connect(plain.info)
    assert backend.way("plain") == "nixl"
    assert _read(store, plain).status is Status.DONE
    store.engine.disconnect("near")
    assert (backend.way("near"), _read(store, near).status) == ("", Status.FAILED)
    assert store.engine.close()
    for peer in (near, plain):
        peer.close()
