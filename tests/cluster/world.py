"""A deployment to test against, and waiting for what must come true."""

from __future__ import annotations

import contextlib
import threading
import time
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import ray

from hotset.cluster.config import RunConfig
from hotset.cluster.launch import prepare
from hotset.cluster.serve import new_run_id

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from hotset.cluster.launch import Deployment

CALL_S = 30.0
T = TypeVar("T")


def eventually(ask: Callable[[], T], *, deadline_s: float = 30.0, what: str = "") -> T:
    """What `ask` gives as soon as it is true; an error of Ray counts as not yet."""
    end = time.monotonic() + deadline_s
    pace = threading.Event()
    last: object = None
    while time.monotonic() < end:
        try:
            last = answer = ask()
        except ray.exceptions.RayError as error:
            last = error
        else:
            if answer:
                return answer
        pace.wait(0.05)
    raise AssertionError(f"{what or ask} did not come true in {deadline_s} s: {last!r}")


def call(method: Any, *args: Any) -> Any:
    """Result of an actor's method."""
    return ray.get(method.remote(*args), timeout=CALL_S)


@contextlib.contextmanager
def deployed(model: Path, run_dir: Path, **options: Any) -> Iterator[Deployment]:
    """A run whose pools are filled; stopped at the end."""
    config = RunConfig.build(model=model, run_dir=run_dir, **options)
    deployment = prepare(config, run=new_run_id(), say=lambda _text: None)
    try:
        deployment.start()
        assert deployment.wait_settled(timeout_s=60)
        yield deployment
    finally:
        deployment.stop()


def prompts(count: int, *, seed: int = 5, vocab: int = 250) -> list[list[int]]:
    """Prompts of 5 to 20 random ids."""
    random = np.random.default_rng(seed)
    return [random.integers(1, vocab, size=random.integers(5, 21)).tolist() for _ in range(count)]


def assert_sound(deployment: Deployment) -> None:
    """Invariants at the end of a test: books of every store, sums of the status."""
    for actor in (*deployment.workers.values(), *deployment.pools.values()):
        assert call(actor.check_integrity)
    status = deployment.status()
    assert sum(status["states"].values()) == status["blocks"] == len(deployment.catalog.blocks)
    for store in status["stores"]:
        assert store["resident_bytes"] <= store["capacity_bytes"]
        assert not store["quarantined_bytes"]
