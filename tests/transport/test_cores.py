"""Where a woken thread may run."""

from __future__ import annotations

import itertools
import os
import threading

import pytest

from hotset.transport.cores import Aside, keep_to_share

CORES = os.sched_getaffinity(0)


@pytest.mark.skipif(len(CORES) < 2, reason="one core only")
def test_two_threads_part_and_rejoin() -> None:
    aside, known, done = Aside(), threading.Event(), threading.Event()
    aside.part()  # from nobody yet: nothing happens
    aside.rejoin()
    ids = []

    def work() -> None:
        aside.here()
        ids.append(threading.get_native_id())
        known.set()
        done.wait(20)

    thread = threading.Thread(target=work)
    thread.start()
    try:
        assert known.wait(20)
        for core in sorted(CORES)[:2]:
            os.sched_setaffinity(0, {core})
            os.sched_setaffinity(0, CORES)
            aside.part()
            [here] = os.sched_getaffinity(0)
            assert os.sched_getaffinity(ids[0]) == CORES - {here}
            aside.part()  # parted already
            other = threading.Thread(target=aside.rejoin)  # turns go from thread to thread
            other.start()
            other.join()
            assert os.sched_getaffinity(0) == CORES
    finally:
        os.sched_setaffinity(0, CORES)
        done.set()
        thread.join()
    os.sched_setaffinity(0, {min(CORES)})
    try:
        aside.part()  # from a thread that has ended: nothing happens
        assert os.sched_getaffinity(0) == {min(CORES)}
    finally:
        os.sched_setaffinity(0, CORES)


def test_what_may_use_one_core_only_stays_there(monkeypatch: pytest.MonkeyPatch) -> None:
    aside = Aside()
    monkeypatch.setattr(os, "sched_getaffinity", lambda _tid: {0})
    asked: list[object] = []
    monkeypatch.setattr(os, "sched_setaffinity", lambda *what: asked.append(what))
    aside.here()
    aside.part()
    aside.rejoin()
    assert not asked


@pytest.mark.parametrize("threads", [1, 2, 3, 64])
def test_threads_of_a_pool_divide_the_cores(threads: int) -> None:
    allowed = os.sched_getaffinity(0)
    shares = min(threads, len(allowed))
    found: list[set[int]] = []

    def work(number: int) -> None:
        keep_to_share(number, threads)
        found.append(os.sched_getaffinity(0))

    for number in range(threads):
        thread = threading.Thread(target=work, args=(number,))
        thread.start()
        thread.join()
    assert os.sched_getaffinity(0) == allowed, "only the thread itself is moved"
    assert set().union(*found) == allowed
    for one, other in itertools.combinations(found[:shares], 2):
        assert not one & other
    assert found[shares:] == [found[i % shares] for i in range(shares, threads)]
