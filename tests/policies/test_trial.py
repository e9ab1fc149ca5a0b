from __future__ import annotations

import numpy as np
import pytest

from hotset.policies.trial import PrefetchTrial

FIRST = 64
LONGEST = 8 * 2 * 4


def drive(
    trial: PrefetchTrial, *, on_ns: int, off_ns: int, steps: int, noise: float = 0.02, seed: int = 0
) -> list[bool]:
    random = np.random.default_rng(seed)
    seen = []
    for _ in range(steps):
        seen.append(trial.on)
        mean = on_ns if trial.on else off_ns
        trial.observe(int(mean * random.lognormal(0, noise)))
    return seen


@pytest.mark.parametrize(("on_ns", "off_ns", "better"), [(100, 80, False), (80, 100, True)])
def test_the_better_side_stays(*, on_ns: int, off_ns: int, better: bool) -> None:
    trial = PrefetchTrial(hold=64)
    seen = drive(trial, on_ns=10 * on_ns, off_ns=10 * off_ns, steps=FIRST + LONGEST + 48)
    assert all(seen[:FIRST])
    assert set(seen[FIRST : FIRST + LONGEST]) == {True, False}
    assert seen[-16:] == [better] * 16
    assert trial.switched_off == (not better)


def test_a_change_of_the_machine_is_noticed() -> None:
    trial = PrefetchTrial(hold=32)
    drive(trial, on_ns=1000, off_ns=800, steps=FIRST + LONGEST)
    assert trial.switched_off == 1
    drive(trial, on_ns=700, off_ns=1000, steps=32 + LONGEST)
    assert trial.on


@pytest.mark.parametrize("seed", range(6))
def test_noise_of_a_third_seldom_switches_and_takes_few_steps(seed: int) -> None:
    trial = PrefetchTrial(hold=64)
    seen = drive(trial, on_ns=1000, off_ns=1000, steps=64 * 60, noise=0.3, seed=seed)
    assert trial.switched_off <= 5
    assert seen.count(False) < 0.25 * len(seen)


def test_windows_of_a_drifting_request_are_judged_fairly() -> None:
    trial = PrefetchTrial(hold=64)
    for step in range(64 * 20):  # each request's steps get faster; prefetching changes nothing
        trial.observe(100_000 - 1_000 * (step % 64))
    assert trial.switched_off == 0
