"""The ucx backend alone, between real processes: ends, canaries, trust, and what waiting costs.

What it shares with the other backends is in the contract suite.
"""

from __future__ import annotations

import multiprocessing as mp
import os
import random
import secrets
import signal
import socket
import threading
import time
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np
import pytest

from hotset.errors import PeerGoneError, TransportError
from hotset.transport.base import PeerInfo, PostState, Span
from hotset.transport.slab import Slab
from hotset.transport.ucx import UcxBackend

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from multiprocessing.connection import Connection

pytestmark = pytest.mark.slow  # starts processes


MIB = 1 << 20
SOURCE_BYTES = 64 * MIB
BYTE = 0xAA
CANARY = 0x22

needs_ucx = pytest.mark.skipif(bool(UcxBackend.available()), reason=UcxBackend.available())


@pytest.fixture(autouse=True)
def _no_other_ucx() -> None:
    """Tests of NIXL in the same process leave a second UCX behind."""
    if reason := UcxBackend.available():
        pytest.skip(reason)


def until(condition: Callable[[], bool], *, seconds: float = 10.0) -> bool:
    """Whether `condition` comes true before the deadline."""
    end, tick = time.monotonic() + seconds, threading.Event()
    while not condition():
        if time.monotonic() > end:
            return False
        tick.wait(0.0005)
    return True


def _slab(name: str, nbytes: int, *, incarnation: int = 1) -> Slab:
    return Slab(
        capacity_bytes=nbytes, slot_payload_bytes=MIB // 2, name=name, incarnation=incarnation
    )


def _source(pipe: Connection, incarnation: int, port: int, token: bytes) -> None:
    slab = _slab("source", SOURCE_BYTES, incarnation=incarnation)
    slab.memory.write(0, bytes([BYTE]) * SOURCE_BYTES)
    backend = UcxBackend(port=port, token=token)
    backend.register(slab)
    pipe.send(backend.info(name="source", incarnation=incarnation))
    while True:
        order = pipe.recv()
        if order == "quit":
            backend.close()
            pipe.send("ended")
            return
        before, begin = time.process_time(), time.monotonic()
        while time.monotonic() - begin < order:
            pipe.poll(order)
        pipe.send((time.process_time() - before) / (time.monotonic() - begin))


class Source:
    """A process that serves `SOURCE_BYTES` of one value."""

    def __init__(self, *, incarnation: int = 1, port: int = 0, token: bytes = b"") -> None:
        context = mp.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(
            target=_source, args=(theirs, incarnation, port, token), daemon=True
        )
        self.process.start()
        theirs.close()
        self.info: PeerInfo = self.answer()

    def answer(self) -> Any:
        assert self.pipe.poll(30), "the source does not answer"
        return self.pipe.recv()

    def signal(self, number: int) -> None:
        assert self.process.pid is not None
        os.kill(self.process.pid, number)

    def kill(self) -> None:
        self.signal(signal.SIGKILL)
        self.process.join(10)

    def close(self) -> None:
        if self.process.is_alive():
            self.signal(signal.SIGCONT)
            self.pipe.send("quit")
            assert self.answer() == "ended"
        self.process.join(10)
        assert not self.process.is_alive()


class Sink:
    """A backend of this process, and the bytes of its slab."""

    def __init__(
        self, name: str = "sink", *, token: bytes = b"", nbytes: int = SOURCE_BYTES
    ) -> None:
        self.nbytes = nbytes
        self.slab = _slab(name, nbytes + 2 * MIB)
        self.backend = UcxBackend(token=token)
        self.backend.register(self.slab)
        self.bytes = np.frombuffer(self.slab.memory.view(0, nbytes), dtype=np.uint8)

    def post(self, spans: list[Span]) -> int:
        return self.backend.post("source", spans)

    def end(self, handle: int, *, seconds: float = 20.0) -> tuple[PostState, str]:
        pending = PostState.PENDING
        until(lambda: self.backend.poll(handle)[0] is not pending, seconds=seconds)
        end = self.backend.poll(handle)
        if end[0] is not pending:
            self.backend.release(handle)
        return end

    def beat(self) -> None:
        """Read a little beside the watched bytes; all that arrived earlier is handled by then."""
        handle = self.post([Span(local_offset=self.nbytes, remote_offset=0, nbytes=MIB)])
        assert self.end(handle) == (PostState.DONE, "")


@pytest.fixture
def sink() -> Iterator[Sink]:
    made = Sink()
    yield made
    made.backend.close()


@pytest.fixture(scope="module")
def source() -> Iterator[Source]:
    made = Source()
    yield made
    made.close()


def _whole(*, parts: int = 1) -> list[Span]:
    """Spans that are not adjacent, so that each is a message of its own."""
    nbytes = SOURCE_BYTES // parts
    return [
        Span(local_offset=i * nbytes, remote_offset=i * nbytes, nbytes=nbytes - 64)
        for i in range(parts)
    ]


def _post_and_catch(sink: Sink, source: Source, *, seed: int, number: int) -> int:
    """Post a large read and signal the source when a random part of it has landed."""
    chance = random.Random(seed)
    sink.bytes[:] = 0
    handle = sink.post(_whole(parts=chance.choice((1, 60))))
    watched = chance.randrange(2 * MIB, SOURCE_BYTES // 2)
    until(lambda: sink.bytes[watched] == BYTE or sink.backend.poll(handle)[0] is PostState.DONE)
    source.signal(number)
    return handle


# --- between processes ----------------------------------------------------------------------------


@needs_ucx
def test_many_spans_land_where_they_belong_and_nowhere_else(sink: Sink, source: Source) -> None:
    sink.backend.connect(source.info)
    sink.bytes[:] = CANARY
    chance = random.Random(7)
    spans = [
        Span(local_offset=i * 16384, remote_offset=i * 4096, nbytes=chance.randrange(1, 16000))
        for i in range(3000)
    ]
    assert sink.end(sink.post(spans)) == (PostState.DONE, "")
    wanted = np.full(SOURCE_BYTES, CANARY, dtype=np.uint8)
    for span in spans:
        wanted[span.local_offset : span.local_offset + span.nbytes] = BYTE
    assert np.array_equal(sink.bytes, wanted)


@needs_ucx
def test_waiting_costs_less_than_2_percent_of_a_core(sink: Sink, source: Source) -> None:
    sink.backend.connect(source.info)
    sink.beat()
    ours, theirs = [], []
    for _ in range(3):  # the quietest counts: processor time grows when others fill the caches
        before, begin = time.process_time(), time.monotonic()
        source.pipe.send(1.0)
        theirs.append(source.answer())
        ours.append((time.process_time() - before) / (time.monotonic() - begin))
    assert min(theirs) < 0.02
    assert min(ours) < 0.02


@needs_ucx
def test_a_range_outside_of_the_slab_is_refused_at_the_source(sink: Sink, source: Source) -> None:
    sink.backend.connect(replace(source.info, nbytes=1 << 40))  # so that this side lets it pass
    handle = sink.post([Span(local_offset=0, remote_offset=SOURCE_BYTES - 1, nbytes=2)])
    state, error = sink.end(handle)
    assert state is PostState.ERROR
    assert "outside of the slab" in error
    sink.beat()  # a new connection is made


@needs_ucx
def test_spans_that_leave_a_slab_are_refused_here(sink: Sink, source: Source) -> None:
    sink.backend.connect(source.info)
    for span in (
        Span(local_offset=0, remote_offset=SOURCE_BYTES, nbytes=1),
        Span(local_offset=SOURCE_BYTES + 2 * MIB, remote_offset=0, nbytes=1),
        Span(local_offset=0, remote_offset=-1, nbytes=1),
    ):
        with pytest.raises(TransportError):
            sink.post([span])


@needs_ucx
@pytest.mark.slow
@pytest.mark.parametrize("seed", range(4))
def test_a_killed_source_is_an_error_and_nothing_lands_later(sink: Sink, seed: int) -> None:
    source = Source()
    sink.backend.connect(source.info)
    sink.beat()
    handle = _post_and_catch(sink, source, seed=seed, number=signal.SIGKILL)
    begin = time.monotonic()
    state, error = sink.end(handle)
    assert time.monotonic() - begin < 1.0
    assert state is PostState.DONE or "source" in error
    sink.bytes[:] = CANARY
    other = Source(incarnation=2)
    sink.backend.connect(other.info)
    sink.beat()
    assert (sink.bytes == CANARY).all()
    other.close()
    source.process.join(10)


@needs_ucx
@pytest.mark.slow
def test_a_frozen_source_stays_pending_and_an_abort_is_final(sink: Sink) -> None:
    """The canaries of all rounds: UCX lets nothing land once a closed endpoint gave receives back.

    Some rounds find the read done, because all of it was in the kernel's buffers already.
    """
    source = Source()
    sink.backend.connect(source.info)
    sink.beat()
    aborted = 0
    for seed in range(12):
        handle = _post_and_catch(sink, source, seed=seed, number=signal.SIGSTOP)
        state, _ = sink.end(handle, seconds=0.2)
        if state is PostState.PENDING:
            begin = time.monotonic()
            sink.backend.abort(handle)
            state, error = sink.end(handle)
            assert state is PostState.ERROR
            assert "nobody waits" in error
            assert time.monotonic() - begin < 0.5
            aborted += 1
        sink.bytes[:] = CANARY
        source.signal(signal.SIGCONT)
        sink.beat()
        sink.beat()
        assert (sink.bytes == CANARY).all()
    assert aborted >= 4
    source.close()


@needs_ucx
def test_an_abort_waits_for_the_other_reads_of_its_connection(sink: Sink) -> None:
    source = Source()
    sink.backend.connect(source.info)
    sink.beat()
    source.signal(signal.SIGSTOP)
    first = sink.post(_whole(parts=2)[:1])
    second = sink.post(_whole(parts=2)[1:])
    sink.backend.abort(first)
    assert sink.end(second, seconds=0.2)[0] is PostState.PENDING
    source.signal(signal.SIGCONT)
    assert sink.end(second) == (PostState.DONE, "")
    assert sink.end(first)[0] is not PostState.PENDING
    sink.beat()  # over a connection of its own
    source.close()


@needs_ucx
def test_a_source_that_never_answers_ends_in_time(
    sink: Sink, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hotset.transport.ucx_read.CONNECT_NS", 300_000_000)
    source = Source()
    source.signal(signal.SIGSTOP)
    sink.backend.connect(source.info)
    handle = sink.post(_whole())
    begin = time.monotonic()
    state, error = sink.end(handle)
    assert state is PostState.ERROR
    assert "did not answer" in error
    assert time.monotonic() - begin < 2.0
    source.kill()  # frozen until then: it cannot be asked to end


@needs_ucx
def test_a_restart_at_the_same_port_is_never_taken_for_its_former_self(sink: Sink) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    former = Source(incarnation=1, port=port)
    sink.backend.connect(former.info)
    sink.beat()
    former.kill()
    newer = Source(incarnation=2, port=port)
    assert newer.info.backend_metadata == former.info.backend_metadata
    ends = [sink.end(sink.post(_whole())) for _ in range(2)]  # the first may meet the old wreck
    assert {state for state, _ in ends} == {PostState.ERROR}
    assert "source:2" in ends[1][1]
    sink.backend.connect(newer.info)
    sink.beat()
    with pytest.raises(PeerGoneError):
        sink.backend.connect(former.info)
    newer.close()


@needs_ucx
@pytest.mark.parametrize(("ours", "theirs"), [(b"", b"t"), (b"t", b""), (b"s", b"t")])
def test_without_the_same_token_nothing_is_read(ours: bytes, theirs: bytes) -> None:
    source = Source(token=theirs * 32)
    sink = Sink(token=ours * 32)
    sink.backend.connect(source.info)
    sink.bytes[:] = CANARY
    state, error = sink.end(sink.post(_whole()))
    assert state is PostState.ERROR
    assert "token" in error
    assert (sink.bytes == CANARY).all()
    friend = Sink("friend", token=theirs * 32)
    friend.backend.connect(source.info)
    friend.beat()
    for each in (sink, friend):
        each.backend.close()
    source.close()


@needs_ucx
def test_strangers_at_the_door_disturb_nobody(sink: Sink, source: Source) -> None:
    door = _door(source.info)
    sink.backend.connect(source.info)
    for size in (0, 1, 4, 100, 5000):
        with socket.create_connection(("127.0.0.1", door), timeout=5) as stranger:
            stranger.sendall(secrets.token_bytes(size))
        sink.beat()


def _door(info: PeerInfo) -> int:
    port = msgspec.msgpack.decode(info.backend_metadata)[2]
    assert isinstance(port, int)
    return port


@needs_ucx
def test_a_closed_backend_leaves_no_thread_and_no_file(source: Source) -> None:
    def once() -> None:
        sink = Sink(nbytes=MIB)
        sink.backend.connect(source.info)
        sink.beat()
        sink.backend.close()

    once()  # what UCX opens once per process stays
    files, threads = len(os.listdir("/proc/self/fd")), threading.active_count()  # noqa: PTH208 - fds
    for _ in range(10):
        once()
    assert len(os.listdir("/proc/self/fd")) <= files + 1  # noqa: PTH208 - as above; slabs stay mapped
    assert threading.active_count() == threads


@needs_ucx
def test_closing_a_source_ends_its_readers(sink: Sink) -> None:
    source = Source()
    sink.backend.connect(source.info)
    sink.beat()
    source.close()
    state, error = sink.end(sink.post(_whole()))
    assert state is PostState.ERROR
    assert "source" in error


@needs_ucx
def test_one_port_is_taken_once(source: Source) -> None:
    backend = UcxBackend(port=_door(source.info))
    with pytest.raises(TransportError, match="port"):
        backend.register(_slab("second", MIB))
