"""What a prefetch must promise, from measured layers: nothing assumed, nothing negative."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hotset.policies.choose import prefetch_bar
from hotset.policies.linkload import NEVER, LinkLoad


def fed(*, start_ns: int, stall_ns: int, layers: int = 2000, seed: int = 1) -> LinkLoad:
    random = np.random.default_rng(seed)
    load = LinkLoad()
    for _ in range(layers):
        fetches = int(random.integers(0, 3))
        started = fetches + int(random.integers(0, 2))
        waited = stall_ns * fetches
        compute = 1_000_000 + start_ns * started + int(random.normal(0, 100_000))
        load.observe(layer_ns=compute + waited, stall_ns=waited, fetches=fetches, started=started)
    return load


@pytest.mark.parametrize("start_ns", [0, 50_000, 400_000])
def test_the_price_of_a_fetch_is_found_under_noise(start_ns: int) -> None:
    load = fed(start_ns=start_ns, stall_ns=300_000)
    assert load.start_ns == pytest.approx(start_ns, abs=30_000)
    assert load.missed_ns == pytest.approx(300_000, rel=0.01)


def test_a_fetch_that_costs_compute_must_promise_more() -> None:
    free = fed(start_ns=0, stall_ns=300_000).bar(fetch_ns=300_000)
    dear = fed(start_ns=400_000, stall_ns=300_000).bar(fetch_ns=300_000)
    assert free < dear
    assert dear > 400_000 / (400_000 + 300_000) - 0.05


def test_nothing_is_known_before_the_first_layers() -> None:
    load = LinkLoad()
    assert load.bar(fetch_ns=1000) == 0.0
    assert (load.start_ns, load.missed_ns) == (0, None)


def test_an_interrupted_layer_counts_as_a_long_one() -> None:
    load = fed(start_ns=0, stall_ns=0)
    load.observe(layer_ns=100_000_000_000, stall_ns=0, fetches=0, started=0)
    assert load.layer_ns < 2_000_000


def test_a_lost_trial_forbids_prefetching() -> None:
    load = fed(start_ns=0, stall_ns=100_000)
    while load.trial.switched_off == 0:
        load.step(step_ns=2000 if load.trial.on else 1000, tokens=1)
    assert load.bar(fetch_ns=1000) == NEVER


TIMES = st.integers(0, 10**9)


@given(times=st.tuples(TIMES, TIMES, TIMES, TIMES), busy=st.floats(0, 1), missed=st.none() | TIMES)
def test_the_bar_is_a_chance_and_grows_with_the_cost(
    times: tuple[int, int, int, int], busy: float, missed: int | None
) -> None:
    fetch_ns, ahead_ns, start_ns, more_ns = times

    def bar(start_ns: int) -> float:
        return prefetch_bar(
            fetch_ns=fetch_ns, ahead_ns=ahead_ns, busy_ratio=busy, start_ns=start_ns,
            missed_ns=missed,
        )  # fmt: skip

    assert 0.0 <= bar(start_ns) <= bar(start_ns + more_ns) + 1e-9 <= 1.0 + 1e-9
