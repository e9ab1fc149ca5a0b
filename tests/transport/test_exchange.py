"""Stores that meet without a controller, and copies that are offered instead of written."""

from __future__ import annotations

import multiprocessing as mp
import os
import signal
import socket
import threading
import time
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import pytest

from hotset.errors import ConfigError, PeerGoneError, TransferTimeout, TransportError
from hotset.transport.base import Status
from hotset.transport.exchange import MOST_BYTES, Exchange, fetch_info, offer
from hotset.transport.handshake import Identity, greet
from hotset.transport.header import checksum
from hotset.transport.loopback import LoopbackBackend, LoopbackNetwork
from hotset.transport.offers import Offers, push
from hotset.transport.slab import SlotState
from hotset.transport.tcp import TcpBackend
from hotset.transport.token import check
from hotset.transport.wire import dial, send_frame
from tests.transport.peer import Source, Store, build
from tests.transport.worlds import deadline, until

if TYPE_CHECKING:
    from collections.abc import Iterator
    from multiprocessing.connection import Connection

    from hotset.transport.base import Expect, ItemResult

TOKEN = b"0123456789abcdef0123456789abcdef"
SECOND = 1_000_000_000
NBYTES = 200_000
WAIT_S = 30.0


@dataclass(slots=True)
class Site:
    """A source with two copies and an exchange, in this process, over loopback."""

    network: LoopbackNetwork
    store: Store
    exchange: Exchange


@pytest.fixture
def site() -> Iterator[Site]:
    network = LoopbackNetwork()
    store = build(
        name="source", incarnation=3, backend=LoopbackBackend(network), blocks=2, nbytes=NBYTES,
        room=0,
    )  # fmt: skip
    exchange = Exchange(store.engine.info, token=TOKEN, on_offer=lambda message: message[::-1])
    yield Site(network, store, exchange)
    assert exchange.close()
    assert store.engine.close()
    assert not [t for t in threading.enumerate() if t.name.startswith("hotset-exchange")]


# --- descriptions ---------------------------------------------------------------------------------


def test_a_description_comes_signed_and_whole(site: Site) -> None:
    info = fetch_info(site.exchange.address, token=TOKEN)
    check(info, TOKEN)
    assert replace(info, proof=b"") == site.store.engine.info()
    assert fetch_info(site.exchange.address, token=TOKEN, known=info) == info


@pytest.mark.parametrize("token", [b"", TOKEN[::-1]])
def test_strangers_learn_and_offer_nothing(site: Site, token: bytes) -> None:
    with pytest.raises(TransportError, match="token"):
        fetch_info(site.exchange.address, token=token)
    with pytest.raises(TransportError, match="token"):
        offer(site.exchange.address, b"x", token=token, timeout_ns=5 * SECOND)


def test_an_older_incarnation_than_the_known_one_is_refused(site: Site) -> None:
    known = replace(site.store.engine.info(), incarnation=4)
    with pytest.raises(PeerGoneError, match="replaced by 4"):
        fetch_info(site.exchange.address, token=TOKEN, known=known)
    other = replace(site.store.engine.info(), name="other")
    with pytest.raises(PeerGoneError, match="other"):
        fetch_info(site.exchange.address, token=TOKEN, known=other)


def test_nobody_and_silence_are_typed_and_bounded() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = silent.getsockname()
        began = time.monotonic()
        with pytest.raises(TransferTimeout):
            fetch_info(address, token=TOKEN, timeout_ns=SECOND // 10)
        assert time.monotonic() - began < 2
    with pytest.raises(PeerGoneError):
        fetch_info(address, token=TOKEN)


def test_off_loopback_an_exchange_needs_a_token(site: Site) -> None:
    with pytest.raises(ConfigError):
        Exchange(site.store.engine.info, host="192.0.2.1")


# --- offers as bytes ------------------------------------------------------------------------------


def test_an_offer_is_answered(site: Site) -> None:
    answer = offer(site.exchange.address, b"abc", token=TOKEN, timeout_ns=5 * SECOND)
    assert answer == b"cba"
    with pytest.raises(PeerGoneError):
        offer(
            site.exchange.address, b"abc", token=TOKEN, timeout_ns=5 * SECOND,
            wanted=Identity(name="source", incarnation=2),
        )  # fmt: skip
    with pytest.raises(TransportError, match="at most"):
        offer(site.exchange.address, bytes(MOST_BYTES), token=TOKEN, timeout_ns=5 * SECOND)


def test_a_handler_that_fails_or_hangs_harms_only_its_offer(site: Site) -> None:
    release = threading.Event()

    def handler(message: bytes) -> bytes:
        if message == b"fail":
            raise RuntimeError
        if message == b"refuse":
            raise ConfigError("no room", remedy="offer less")
        release.wait(WAIT_S)
        return b""

    exchange = Exchange(site.store.engine.info, on_offer=handler)
    deaf = Exchange(site.store.engine.info)
    try:
        with pytest.raises(TransportError, match="handler of the offer failed"):
            offer(exchange.address, b"fail", timeout_ns=5 * SECOND)
        with pytest.raises(TransportError, match="no room: offer less"):
            offer(exchange.address, b"refuse", timeout_ns=5 * SECOND)
        with pytest.raises(TransferTimeout):
            offer(exchange.address, b"hang", timeout_ns=SECOND // 10)
        assert fetch_info(exchange.address).name == "source"
        with pytest.raises(TransportError, match="takes no offers"):
            offer(deaf.address, b"x", timeout_ns=5 * SECOND)
    finally:
        release.set()
        assert exchange.close()
        assert deaf.close()


def test_damaged_frames_end_their_connection_only(site: Site) -> None:
    def client() -> socket.socket:
        sock = dial(site.exchange.address, deadline_ns=deadline(5))
        greet(sock, purpose="exchange", token=TOKEN, wanted=Identity(), deadline_ns=deadline(5))
        sock.settimeout(5)
        return sock

    with client() as oversized, client() as truncated, client() as nonsense:
        oversized.sendall((MOST_BYTES + 1).to_bytes(4, "little"))
        assert oversized.recv(1) == b""
        truncated.sendall(b"\x40\0\0\0abc")
        truncated.shutdown(socket.SHUT_WR)
        assert truncated.recv(1) == b""
        send_frame(nonsense, b"\x93\x01\x02\x03", deadline_ns=deadline(5))
        assert b"no sense" in nonsense.recv(4096)
    assert fetch_info(site.exchange.address, token=TOKEN).incarnation == 3


# --- copies ---------------------------------------------------------------------------------------


@dataclass(slots=True)
class Taker:
    """A destination on the network of a site."""

    store: Store
    exchange: Exchange
    kept: list[tuple[Expect, ItemResult]]


@pytest.fixture
def taker(site: Site) -> Iterator[Taker]:
    store = build(
        name="taker", incarnation=1, backend=LoopbackBackend(site.network), blocks=0, nbytes=NBYTES,
        room=1,
    )  # fmt: skip
    kept: list[tuple[Expect, ItemResult]] = []
    offers = Offers(
        slab=store.slab, engine=store.engine, token=TOKEN,
        landed=lambda expect, result: kept.append((expect, result)),
    )  # fmt: skip
    exchange = Exchange(store.engine.info, token=TOKEN, on_offer=offers.handle)
    yield Taker(store, exchange, kept)
    assert exchange.close()
    assert store.engine.close()
    store.slab.check_integrity()


def _push(site: Site, taker: Taker, copy: Source, **changes: Any) -> Any:
    item = copy.item(site.store.slots[0])
    arguments: dict[str, Any] = {
        "remote_offset": item.remote_offset,
        "expect": item.expect,
        "to": taker.exchange.address,
        "deadline_ns": deadline(10),
        "token": TOKEN,
    }
    info = changes.pop("info", site.store.engine.info())
    return push(info, **(arguments | changes))


def test_an_offered_copy_is_pulled_verified_and_handed_over(site: Site, taker: Taker) -> None:
    copy = site.store.copies[0]
    pushed = _push(site, taker, copy)
    assert pushed.status is Status.DONE, pushed.error
    ((expect, result),) = taker.kept
    assert (expect.key, result.generation) == (copy.key, pushed.generation)
    slab = taker.store.slab
    assert slab.pins(result.dest) == 1
    assert checksum(slab.payload(result.dest)) == copy.checksum == pushed.checksum
    full = _push(site, taker, site.store.copies[1])
    assert full.status is Status.FAILED
    assert "full" in full.error


def test_what_cannot_be_pulled_is_refused_and_frees_the_slot(site: Site, taker: Taker) -> None:
    copy = site.store.copies[0]
    expect = copy.item(site.store.slots[0]).expect
    info = site.store.engine.info()
    cases: list[tuple[dict[str, Any], Status, str]] = [
        ({"expect": replace(expect, generation=999)}, Status.STALE, "another copy"),
        ({"expect": replace(expect, nbytes=1 << 30)}, Status.FAILED, "exceeds"),
        ({"expect": replace(expect, nbytes=-1)}, Status.FAILED, "negative"),
        ({"expect": replace(expect, key=b"short")}, Status.STALE, ""),
        ({"remote_offset": -64}, Status.FAILED, "outside"),
        ({"remote_offset": 1 << 40}, Status.FAILED, "outside"),
        ({"info": replace(info, backend_metadata=b"x")}, Status.FAILED, "damaged"),
        ({"wanted": Identity(name="taker", incarnation=9)}, Status.FAILED, "taker:1"),
        ({"token": b""}, Status.FAILED, "token"),
        ({"deadline_ns": deadline(-1)}, Status.TIMED_OUT, "deadline"),
        ({"to": ("127.0.0.1", 1)}, Status.FAILED, "cannot be reached"),
    ]
    for changes, status, text in cases:
        pushed = _push(site, taker, copy, **changes)
        assert (pushed.status, text in pushed.error) == (status, True), (changes, pushed)
        assert taker.store.slab.used_bytes == 0
    assert _push(site, taker, copy).status is Status.DONE
    landed = taker.kept[0][1].dest
    taker.store.slab.unpin(landed)
    taker.store.slab.retire(landed)
    older = replace(info, incarnation=2, backend_metadata=b"source:2")
    assert "replaced" in _push(site, taker, copy, info=older).error
    assert len(taker.kept) == 1


def test_a_handler_of_landed_copies_that_fails_leaves_no_pin(site: Site, taker: Taker) -> None:
    def fail(_: Expect, __: ItemResult) -> None:
        raise RuntimeError

    offers = Offers(slab=taker.store.slab, engine=taker.store.engine, landed=fail)
    exchange = Exchange(taker.store.engine.info, token=TOKEN, on_offer=offers.handle)
    pushed = _push(site, taker, site.store.copies[0], to=exchange.address)
    assert pushed.status is Status.FAILED
    taker.store.slab.check_integrity()
    assert not any(taker.store.slab._pins)
    assert exchange.close()


# --- between processes ----------------------------------------------------------------------------


def _destination(pipe: Connection) -> None:
    store = build(
        name="taker", incarnation=1, backend=TcpBackend(token=TOKEN), blocks=0, nbytes=NBYTES,
        room=2,
    )  # fmt: skip
    offers = Offers(slab=store.slab, engine=store.engine, token=TOKEN)
    exchange = Exchange(store.engine.info, token=TOKEN, on_offer=offers.handle)
    pipe.send(exchange.address)
    pipe.recv()
    store.slab.check_integrity()
    used = store.slab.used_bytes
    pipe.send((exchange.close(), store.engine.close(), used))


@dataclass(slots=True)
class Far:
    """A destination in a process of its own."""

    process: Any
    pipe: Connection
    address: tuple[str, int]

    def signal(self, number: int) -> None:
        os.kill(self.process.pid, number)


@pytest.fixture
def far() -> Iterator[Far]:
    context = mp.get_context("spawn")
    pipe, theirs = context.Pipe()
    process = context.Process(target=_destination, args=(theirs,), daemon=True)
    process.start()
    theirs.close()
    assert pipe.poll(WAIT_S)
    yield Far(process, pipe, pipe.recv())
    if process.is_alive():
        process.kill()
    process.join(WAIT_S)
    assert not process.is_alive()


def _offer_to(far: Far, source: Store, index: int, *, seconds: float) -> Any:
    item = source.copies[index].item(source.slots[index])
    return push(
        source.engine.info(), remote_offset=item.remote_offset, expect=item.expect,
        to=far.address, deadline_ns=deadline(seconds), token=TOKEN,
    )  # fmt: skip


def test_offers_between_processes_end_whatever_the_destination_does(far: Far) -> None:
    source = build(
        name="source", incarnation=1, backend=TcpBackend(token=TOKEN), blocks=2, nbytes=NBYTES,
        room=0,
    )  # fmt: skip
    assert _offer_to(far, source, 0, seconds=20).status is Status.DONE
    far.signal(signal.SIGSTOP)
    began = time.monotonic()
    assert _offer_to(far, source, 1, seconds=0.3).status is Status.TIMED_OUT
    assert time.monotonic() - began < 1.3
    assert source.slab.state(source.slots[1]) is SlotState.READY  # nothing of ours was taken
    far.signal(signal.SIGCONT)
    assert _offer_to(far, source, 1, seconds=20).status is Status.DONE
    far.signal(signal.SIGSTOP)
    ends: list[Any] = []
    waiting = threading.Thread(target=lambda: ends.append(_offer_to(far, source, 0, seconds=20)))
    waiting.start()
    far.signal(signal.SIGKILL)
    waiting.join(5)
    assert ends[0].status is Status.FAILED
    assert _offer_to(far, source, 0, seconds=5).status is Status.FAILED
    assert source.engine.close()
    source.slab.check_integrity()


def test_a_source_that_dies_after_its_offer_costs_the_destination_nothing(far: Far) -> None:
    """The pull fails or times out on its own, the slot comes back, the next offer is taken."""
    dead = build(
        name="dead", incarnation=1, backend=TcpBackend(token=TOKEN), blocks=1, nbytes=NBYTES, room=0
    )
    info = dead.engine.info()
    item = dead.copies[0].item(dead.slots[0])
    assert dead.engine.close()  # its port is closed: as a killed process
    pushed = push(
        info, remote_offset=item.remote_offset, expect=item.expect, to=far.address,
        deadline_ns=deadline(5), token=TOKEN,
    )  # fmt: skip
    assert pushed.status is Status.FAILED
    assert "cannot be reached" in pushed.error
    source = build(
        name="source", incarnation=1, backend=TcpBackend(token=TOKEN), blocks=2, nbytes=NBYTES,
        room=0,
    )  # fmt: skip
    assert _offer_to(far, source, 0, seconds=20).status is Status.DONE
    assert _offer_to(far, source, 1, seconds=20).status is Status.DONE
    far.pipe.send("end")
    assert far.pipe.poll(WAIT_S)
    closed, ended, used = far.pipe.recv()
    assert (closed, ended) == (True, True)
    assert used == 2 * source.slab.stride_bytes
    assert until(lambda: not source.engine.in_flight)
    assert source.engine.close()
