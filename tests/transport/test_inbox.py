"""The queue that the engine's threads wait at."""

from __future__ import annotations

import threading
import time
from queue import Empty

import pytest

from hotset.transport.inbox import Inbox

STEPS = 20_000


def test_items_come_in_order_and_then_nothing() -> None:
    inbox: Inbox[int] = Inbox()
    assert inbox.empty()
    for item in range(5):
        inbox.put(item)
    assert [inbox.get() for _ in range(5)] == list(range(5))
    with pytest.raises(Empty):
        inbox.get_nowait()


def test_a_wait_ends_when_its_time_is_up() -> None:
    inbox: Inbox[int] = Inbox()
    inbox.put(1)
    inbox.get()  # the bell was rung and nothing is there
    begin = time.monotonic_ns()
    with pytest.raises(Empty):
        inbox.get(20_000_000)
    assert time.monotonic_ns() - begin >= 20_000_000
    for wait_ns in (0, 1, 1_000):
        with pytest.raises(Empty):
            inbox.get(wait_ns)


def test_short_waits_between_puts_never_hang() -> None:
    """`queue.SimpleQueue` hangs here within some thousand steps on CPython 3.11 and 3.12."""
    inbox: Inbox[int] = Inbox()
    got: list[int] = []

    def receive() -> None:
        while len(got) < STEPS:
            try:
                got.append(inbox.get(30_000))
            except Empty:
                continue

    thread = threading.Thread(target=receive, daemon=True)
    thread.start()
    for item in range(STEPS):
        inbox.put(item)
        if item % 7 == 0:
            time.monotonic_ns()
    thread.join(60)
    assert not thread.is_alive()
    assert got == list(range(STEPS))


def test_many_senders_lose_nothing() -> None:
    inbox: Inbox[tuple[int, int]] = Inbox()

    def send(sender: int) -> None:
        for item in range(2_000):
            inbox.put((sender, item))

    threads = [threading.Thread(target=send, args=(sender,)) for sender in range(4)]
    for thread in threads:
        thread.start()
    got = [inbox.get(10_000_000_000) for _ in range(8_000)]
    for sender in range(4):
        assert [item for who, item in got if who == sender] == list(range(2_000))
    for thread in threads:
        thread.join(10)
