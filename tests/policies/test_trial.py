from __future__ import annotations

import numpy as np
import pytest

from hotset.policies.trial import PrefetchTrial


def drive(trial: PrefetchTrial, *, on_ns: int, off_ns: int, steps: int) -> list[bool]:
    random = np.random.default_rng(0)
    seen = []
    for _ in range(steps):
        seen.append(trial.on)
        mean = on_ns if trial.on else off_ns
        trial.observe(int(mean * random.lognormal(0, 0.02)))
    return seen


@pytest.mark.parametrize(("on_ns", "off_ns", "better"), [(100, 80, False), (80, 100, True)])
def test_the_better_side_stays(*, on_ns: int, off_ns: int, better: bool) -> None:
    trial = PrefetchTrial(hold=64)
    seen = drive(trial, on_ns=on_ns, off_ns=off_ns, steps=16 + 64)
    assert set(seen[:16]) == {True, False}
    assert seen[16:] == [better] * 64
    assert trial.switched_off == (not better)


def test_a_change_of_the_machine_is_noticed() -> None:
    trial = PrefetchTrial(hold=32)
    drive(trial, on_ns=100, off_ns=80, steps=16 + 32)
    seen = drive(trial, on_ns=70, off_ns=100, steps=16 + 32)
    assert all(seen[16:])


def test_noise_alone_does_not_switch() -> None:
    trial = PrefetchTrial(hold=8)
    drive(trial, on_ns=100, off_ns=100, steps=24 * 20)
    assert trial.switched_off == 0
