"""Plain TCP: what it refuses, how it ends reads early, and what it survives."""

from __future__ import annotations

import os
import socket
import threading
import time
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from hotset.errors import ConfigError, PeerGoneError, TransportError
from hotset.transport import listener as listener_module
from hotset.transport import wire
from hotset.transport.base import PostState, Span, Status
from hotset.transport.handshake import Identity, greet
from hotset.transport.slab import Slab, SlotState
from hotset.transport.tcp import TcpBackend
from hotset.transport.tcp_serve import MOST_RANGES, REFUSED, REPLY, REQUEST, pack_request
from hotset.transport.wire import dial, receive_exactly
from tests.transport.peer import PeerProcess, Store, build
from tests.transport.scripted import MARK, NBYTES, Reader, ScriptedSource
from tests.transport.worlds import deadline, until

if TYPE_CHECKING:
    from collections.abc import Iterator

TOKEN = b"0123456789abcdef0123456789abcdef"


@pytest.fixture
def reader() -> Iterator[Reader]:
    made = Reader()
    yield made
    made.backend.close()
    assert until(lambda: not _threads("hotset-tcp-", "hotset-read-"))


def _threads(*prefixes: str) -> list[str]:
    return [t.name for t in threading.enumerate() if t.name.startswith(prefixes)]


def _store(incarnation: int = 1, **config: Any) -> Store:
    return build(
        name="source", incarnation=incarnation, backend=TcpBackend(**config),
        blocks=3, nbytes=NBYTES, room=0,
    )  # fmt: skip


# --- who may read ---------------------------------------------------------------------------------


@pytest.mark.parametrize("host", ["10.1.2.3", "node-1.example", "::"])
def test_off_loopback_a_token_is_required(host: str) -> None:
    with pytest.raises(ConfigError) as caught:
        TcpBackend(host=host)
    assert caught.value.remedy


def test_sockets_are_available_here() -> None:
    assert TcpBackend.available() == ""


def test_any_address_cannot_be_advertised_and_a_taken_port_is_told() -> None:
    with pytest.raises(ConfigError, match="not an address"):
        TcpBackend(host="0.0.0.0", token=TOKEN)  # noqa: S104 - refused
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        slab = Slab(capacity_bytes=1 << 20, slot_payload_bytes=1000, name="late", incarnation=1)
        with pytest.raises(ConfigError, match="cannot listen"):
            TcpBackend(port=taken.getsockname()[1]).register(slab)


@pytest.mark.parametrize(("mine", "theirs"), [(TOKEN, b""), (b"", TOKEN), (TOKEN, TOKEN[::-1])])
def test_a_wrong_absent_or_one_sided_token_connects_nobody(mine: bytes, theirs: bytes) -> None:
    source = _store(token=theirs)
    slab = Slab(capacity_bytes=1 << 20, slot_payload_bytes=1000, name="sink", incarnation=1)
    backend = TcpBackend(token=mine)
    backend.register(slab)
    with pytest.raises(TransportError, match="token"):
        backend.connect(source.engine.info())
    with pytest.raises(PeerGoneError, match="not connected"):
        backend.post("source", [])
    backend.close()
    assert source.engine.close()


def test_with_the_same_token_blocks_move() -> None:
    source = _store(token=TOKEN)
    sink = build(
        name="sink", incarnation=1, backend=TcpBackend(token=TOKEN), blocks=0, nbytes=NBYTES, room=3
    )
    sink.engine.connect(source.engine.info())
    slots = [sink.slab.allocate(NBYTES) for _ in source.copies]
    items = [copy.item(slot) for copy, slot in zip(source.copies, slots, strict=True) if slot]
    assert sink.engine.read("source", items, deadline_ns=deadline()).wait().status is Status.DONE
    assert sink.engine.close()
    assert source.engine.close()


def test_a_store_that_came_back_on_the_same_port_is_not_its_former_self(reader: Reader) -> None:
    old = _store(incarnation=1)
    info = old.engine.info()
    port = old.engine._backend._listener.address[1]  # type: ignore[union-attr]
    reader.backend.connect(info)
    assert reader.state(reader.post(0))[0] is PostState.DONE
    assert old.engine.close()
    new = _store(incarnation=2, port=port)
    state, error = reader.state(reader.post(1 << 20))
    assert state is PostState.ERROR
    assert "source:2" in error
    assert reader.holds(1 << 20, MARK)
    stranger = Reader()
    with pytest.raises(PeerGoneError, match="source:2"):
        stranger.backend.connect(info)
    stranger.backend.close()
    reader.backend.connect(new.engine.info())
    assert reader.state(reader.post(2 << 20))[0] is PostState.DONE
    with pytest.raises(PeerGoneError):
        reader.backend.connect(info)
    assert new.engine.close()


# --- strangers and hostile clients ----------------------------------------------------------------


def _client(source: Store) -> socket.socket:
    """A connection past the handshake, to say whatever a test likes."""
    address = source.engine._backend._listener.address  # type: ignore[union-attr]
    sock = dial(address, deadline_ns=deadline(5))
    wanted = Identity(name="source", incarnation=1)
    greet(sock, purpose="read", token=b"", wanted=wanted, deadline_ns=deadline(5))
    sock.settimeout(10)
    return sock


@pytest.mark.parametrize(
    ("offset", "nbytes"),
    [(-1, 64), (0, -1), (2**64 - 64, 128), (2**63, 2**63), (0, 2**63), (64, 2**64 - 64), (None, 1)],
)
def test_the_source_refuses_what_lies_outside_of_its_slab(offset: int | None, nbytes: int) -> None:
    source = _store()
    first = source.slab.nbytes if offset is None else offset % 2**64
    with _client(source) as sock:
        table = np.array([(0, 64), (first, nbytes % 2**64)], dtype="<u8").tobytes()
        sock.sendall(REQUEST.pack(5, 2) + table)
        number, length, status = REPLY.unpack(receive_exactly(sock, REPLY.size))
        assert (number, status) == (5, REFUSED)
        assert b"outside" in receive_exactly(sock, length)
        sock.sendall(pack_request(6, [(source.copies[0].offset, 64)]))  # the line still works
        assert REPLY.unpack(receive_exactly(sock, REPLY.size)) == (6, 64, 0)
        assert len(receive_exactly(sock, 64)) == 64
    assert source.engine.close()


def test_oversized_and_truncated_requests_cost_only_their_connection() -> None:
    source = _store()
    with _client(source) as big, _client(source) as short, _client(source) as good:
        big.sendall(REQUEST.pack(1, MOST_RANGES + 1))
        assert big.recv(1) == b""
        short.sendall(pack_request(1, [(0, 64)])[:-3])
        short.shutdown(socket.SHUT_WR)
        assert short.recv(1) == b""
        good.sendall(pack_request(1, [(0, 64), (64, 0)]))
        assert REPLY.unpack(receive_exactly(good, REPLY.size)) == (1, 64, 0)
    assert source.engine.close()


def test_garbage_and_silence_never_harm_the_listener(
    reader: Reader, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(listener_module, "TIMEOUT_NS", 200_000_000)
    source = _store()
    door = source.engine._backend._listener  # type: ignore[union-attr]
    silent = [socket.create_connection(door.address) for _ in range(listener_module.MOST_WAITING)]
    for text in (b"GET / HTTP/1.1\r\n\r\n", b"\x16\x03\x01\x02\x00", b"", b"\x04\0\0\0abcd"):
        with socket.create_connection(door.address) as scanner:
            scanner.sendall(text)
    assert until(lambda: door.refused >= len(silent) + 4)  # the slow ones have timed out
    assert all(sock.recv(1) == b"" for sock in silent)
    reader.backend.connect(source.engine.info())
    assert reader.state(reader.post(0))[0] is PostState.DONE
    assert door.connections == 1
    for sock in silent:
        sock.close()
    assert source.engine.close()


def test_a_lying_source_writes_nowhere_but_where_it_was_asked(reader: Reader) -> None:
    lies = {
        "asked for": lambda line, number, size: line.head(number, size + 64),
        "not asked": lambda line, number, size: line.head(number + 1, size),
        "too long": lambda line, number, _: line.head(number, 1 << 40, REFUSED),
    }
    for text, lie in lies.items():
        with ScriptedSource(nbytes=1 << 21) as source:
            reader.backend.connect(source.info)
            handle = reader.post(0)
            for _ in range(2 if text == "not asked" else 1):
                line = source.line()
                lie(line, *line.request())
                line.hang_up()
            state, error = reader.state(handle)
            assert state is PostState.ERROR
            assert text in error
            assert reader.holds(0, MARK, 1 << 21)
            reader.backend.disconnect("source")


# --- ends -----------------------------------------------------------------------------------------


def test_a_source_that_dies_midway_fails_the_read_at_once(reader: Reader) -> None:
    with ScriptedSource(nbytes=1 << 21) as source:
        reader.backend.connect(source.info)
        landing, behind = reader.post(0), reader.post(1 << 20)
        line = source.line()
        number, size = line.request()
        line.head(number, size)
        line.sock.sendall(b"a" * (size // 2))
        assert until(lambda: reader.holds(0, ord("a"), 1000))
        line.hang_up()
        began = time.monotonic()
        assert reader.state(landing)[0] is PostState.ERROR
        assert time.monotonic() - began < 1
        assert reader.backend.poll(behind)[0] is PostState.PENDING  # is asked for once more
        source.line().hang_up()
        assert reader.state(behind)[0] is PostState.ERROR


def test_a_killed_source_is_a_typed_failure_of_every_read(reader: Reader) -> None:
    peer = PeerProcess(name="source", incarnation=1, backend="tcp", blocks=2, nbytes=NBYTES, room=0)
    reader.backend.connect(peer.info)
    peer.freeze()
    handles = [reader.post(i << 20) for i in range(3)]
    assert reader.state(handles[0], seconds=0.05)[0] is PostState.PENDING
    peer.kill()
    for handle in handles:
        state, error = reader.state(handle, seconds=1)
        assert state is PostState.ERROR
        assert "source" in error or "cannot be reached" in error
        reader.backend.release(handle)
    reader.backend.disconnect("source")
    with pytest.raises(PeerGoneError, match="cannot be reached"):
        reader.backend.connect(peer.info)


def test_a_reader_that_was_hung_up_on_while_idle_connects_again(reader: Reader) -> None:
    with ScriptedSource(nbytes=1 << 21) as source:
        reader.backend.connect(source.info)
        line = source.line()
        for value in (b"a", b"b"):
            handle = reader.post(0)
            line.answer(value)
            assert reader.state(handle)[0] is PostState.DONE
            assert reader.holds(0, value[0])
            line.hang_up()
            if value == b"a":
                handle = reader.post(0)
                line = source.line()
                line.answer(b"c")
                assert reader.state(handle)[0] is PostState.DONE


# --- reads that nobody waits for ------------------------------------------------------------------


def test_an_abandoned_read_ends_and_those_behind_it_are_asked_for_again(reader: Reader) -> None:
    with ScriptedSource(nbytes=1 << 21) as source:
        reader.backend.connect(source.info)
        first, second, third = (reader.post(i << 20) for i in range(3))
        line = source.line()
        number, size = line.request()
        line.head(number, size)
        line.sock.sendall(b"a" * 1000)  # and never the rest
        assert until(lambda: reader.holds(0, ord("a"), 1000))
        reader.backend.abort(first)
        assert reader.state(first)[0] is PostState.ERROR
        line.sock.setblocking(False)
        reader.slab.memory.write(0, bytes([MARK]) * NBYTES)  # the slot is somebody else's now
        late = 0
        while late < size:
            try:
                late += line.sock.send(b"x" * size)
            except OSError:
                break
        again = source.line()
        again.answer(b"b")
        again.answer(b"c")
        assert reader.state(second)[0] is reader.state(third)[0] is PostState.DONE
        assert reader.holds(1 << 20, ord("b"))
        assert reader.holds(2 << 20, ord("c"))
        assert reader.holds(0, MARK)
        reader.backend.abort(second)  # nothing happens to what has ended
        assert reader.backend.poll(second)[0] is PostState.DONE
        for ended in (line, again):
            ended.hang_up()


@pytest.mark.parametrize("nbytes", [NBYTES, 3 << 20])
def test_the_reply_of_an_abandoned_read_is_skipped_or_hung_up_on(
    reader: Reader, nbytes: int
) -> None:
    with ScriptedSource(nbytes=1 << 23) as source:
        reader.backend.connect(source.info)
        gone, wanted = reader.post(0, nbytes), reader.post(8 << 20)
        line = source.line()
        reader.backend.abort(gone)
        assert reader.backend.poll(gone)[0] is PostState.ERROR  # at once: nothing was landing
        if nbytes == NBYTES:
            line.answer(b"a")
        else:
            line.head(*line.request())
            line.hang_up()
            line = source.line()
        line.answer(b"b")
        assert reader.state(wanted)[0] is PostState.DONE
        assert reader.holds(8 << 20, ord("b"))
        assert reader.holds(0, MARK, nbytes)
        line.hang_up()


def test_a_frozen_source_holds_up_nobody(reader: Reader) -> None:
    """The deadline ends the wait; abandoned slots come back while the source is still frozen."""
    peer = PeerProcess(name="source", incarnation=1, backend="tcp", blocks=2, nbytes=NBYTES, room=0)
    sink = build(name="sink", incarnation=1, backend=TcpBackend(), blocks=0, nbytes=NBYTES, room=2)
    sink.engine.connect(peer.info)
    peer.freeze()
    try:
        began = time.monotonic()
        reader.backend.connect(peer.info)  # the kernel answers for it, the handshake waits
        assert time.monotonic() - began < 1
        handle = reader.post(0)
        reader.backend.abort(handle)
        assert reader.backend.poll(handle)[0] is PostState.ERROR
        slot = sink.slab.allocate(NBYTES)
        assert slot is not None
        item = peer.copies[0].item(slot)
        outcome = sink.engine.read("source", [item], deadline_ns=deadline(0.2)).wait()
        assert outcome.status is Status.TIMED_OUT
        assert until(lambda: sink.engine.quarantined == 0, seconds=2)
        assert sink.slab.state(slot) is SlotState.FREE
    finally:
        peer.thaw()
    slot = sink.slab.allocate(NBYTES)
    assert slot is not None
    item = peer.copies[1].item(slot)
    assert sink.engine.read("source", [item], deadline_ns=deadline()).wait().status is Status.DONE
    assert sink.engine.close()
    peer.close()


def test_requests_that_find_no_room_are_sent_later(
    reader: Reader, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = (socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 16)
    monkeypatch.setattr(wire, "_buffers", lambda: (small,))
    peer = PeerProcess(name="source", incarnation=1, backend="tcp", blocks=1, nbytes=64, room=0)
    reader.backend.connect(peer.info)
    peer.freeze()
    empty = Span(local_offset=0, remote_offset=0, nbytes=0)
    last = Span(local_offset=0, remote_offset=peer.copies[0].offset + 64, nbytes=64)
    handles = [reader.backend.post("source", [empty] * 60_000 + [last]) for _ in range(14)]
    link = reader.backend._peers["source"].link
    assert link._tail
    peer.thaw()
    assert [reader.state(handle)[0] for handle in handles] == [PostState.DONE] * 14
    peer.close()


# --- memory, leaks --------------------------------------------------------------------------------


def test_device_memory_goes_through_the_host() -> None:
    """A torch tensor in place of the mapping, on both ends: the path that CUDA slabs take."""
    source, sink = Reader(device_memory=True), Reader(device_memory=True)
    data = np.random.default_rng(3).integers(0, 256, 5_000_003, dtype=np.uint8)
    source.slab.memory.write(1000, data.tobytes())
    info = source.backend.info(name="reader", incarnation=1)
    sink.backend.connect(info)
    span = Span(local_offset=77, remote_offset=1000, nbytes=len(data))
    handle = sink.backend.post("reader", [span])
    assert sink.state(handle)[0] is PostState.DONE
    assert bytes(sink.slab.memory.read(77, len(data))) == data.tobytes()
    assert sink.holds(77 + len(data), MARK, 1000)
    sink.backend.close()
    source.backend.close()


def test_a_thousand_connections_leak_neither_descriptors_nor_threads(reader: Reader) -> None:
    source = _store()
    info = source.engine.info()

    def held() -> tuple[int, int]:
        return len(os.listdir("/proc/self/fd")), threading.active_count()  # noqa: PTH208 - cheap

    reader.backend.connect(info)
    reader.backend.disconnect("source")
    door = source.engine._backend._listener  # type: ignore[union-attr]
    assert until(lambda: not door.connections and not _threads("hotset-tcp-"))
    before = held()
    for index in range(1000):
        reader.backend.connect(info)
        if index % 10 == 0:
            handle = reader.post(0, 1000)
            assert reader.state(handle)[0] is PostState.DONE
            reader.backend.release(handle)
        reader.backend.disconnect("source")
    assert until(lambda: held() <= before and held()[0] <= before[0]), (before, held())
    assert source.engine.close()
