"""Random reads over TCP of which a third are abandoned, with canaries in what was given back."""

from __future__ import annotations

import numpy as np
import pytest

from hotset.transport.base import PostState, Span
from tests.transport.scripted import Reader

SIZE = 1 << 20
SLOTS = 14
MOST = 8


class Churn:
    """Slots of a reader that are free with a canary, or filled by a read in flight."""

    def __init__(self, seed: int) -> None:
        self.rng = np.random.default_rng(seed)
        self.source, self.sink = Reader(), Reader()
        self.truth = self.rng.integers(0, 256, self.source.slab.nbytes, dtype=np.uint8)
        self.source.slab.memory.write(0, self.truth.data)
        self.sink.backend.connect(self.source.backend.info(name="reader", incarnation=1))
        self.canaries = dict.fromkeys(range(SLOTS), 0xEE)
        self.flights: dict[int, Span] = {}
        self.ends = dict.fromkeys((PostState.DONE, PostState.ERROR), 0)

    def start(self) -> None:
        slot = int(self.rng.choice(list(self.canaries)))
        self.check(slot)
        del self.canaries[slot]
        nbytes = int(self.rng.choice([100, 70_000, SIZE]))
        remote = int(self.rng.integers(0, self.source.slab.nbytes - nbytes))
        span = Span(local_offset=slot * SIZE, remote_offset=remote, nbytes=nbytes)
        self.flights[self.sink.backend.post("reader", [span])] = span

    def abandon(self) -> None:
        self.sink.backend.abort(int(self.rng.choice(list(self.flights))))

    def collect(self, canary: int) -> None:
        """Check what has ended and give its slot to a canary at once."""
        for handle, span in list(self.flights.items()):
            state, _ = self.sink.backend.poll(handle)
            if state is PostState.PENDING:
                continue
            self.ends[state] += 1
            if state is PostState.DONE:
                got = np.frombuffer(
                    self.sink.slab.memory.read(span.local_offset, span.nbytes), np.uint8
                )
                wanted = self.truth[span.remote_offset : span.remote_offset + span.nbytes]
                assert np.array_equal(got, wanted)
            self.sink.backend.release(handle)
            del self.flights[handle]
            self.sink.slab.memory.write(span.local_offset, bytes([canary]) * SIZE)
            self.canaries[span.local_offset // SIZE] = canary

    def check(self, slot: int) -> None:
        assert self.sink.holds(slot * SIZE, self.canaries[slot], SIZE), f"slot {slot} was written"


@pytest.mark.parametrize("seed", [1, 2])
def test_random_reads_and_aborts_never_write_a_slot_that_was_given_back(seed: int) -> None:
    churn = Churn(seed)
    for turn in range(1500):
        if len(churn.flights) < MOST:
            churn.start()
        elif churn.sink.state(next(iter(churn.flights)))[0] is PostState.PENDING:
            pytest.fail("a read did not end")
        if churn.rng.random() < 0.3:
            churn.abandon()
        churn.collect(turn % 251)
    for handle in churn.flights:
        assert churn.sink.state(handle)[0] is not PostState.PENDING
    for slot in churn.canaries:
        churn.check(slot)
    assert min(churn.ends.values()) > 100
    churn.sink.backend.close()
    churn.source.backend.close()
