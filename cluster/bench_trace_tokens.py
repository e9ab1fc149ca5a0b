"""What tracing does to tokens a second: requests in turns on one worker of one deployment.

Each round serves the same prompt in each way, in another order: rows `on` (written to the trace
file), `off`, `sent` (on, and to a collector as well), and `frozen` (the collector hangs). After
each request the worker ships its rows, and the next one waits until they are written and sent, so
that no way pays for another's spans. A change is that of a round, so what slows the machine for
seconds slows both sides of it; over rounds stands the Hodges-Lehmann estimate (the median of the
means of all pairs, Hodges and Lehmann 1963) of the logarithms with the interval of Wilcoxon's
signed ranks: no rare slow round moves it far, and no distribution is assumed but a symmetric one.
Decides nothing else.
"""

from __future__ import annotations

import itertools
import math
import statistics
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np

from hotset.actors.telemetry import Totals
from hotset.cluster.front import Front

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from hotset.cluster.bench_trace_sink import Sink
    from hotset.cluster.launch import Deployment

WAYS = ("on", "off", "sent", "frozen")
CHANGE_BOUND = 0.03
_PROMPT = "def __init__(self, name, value, **kwargs):\n"
_LOOK_S = 0.1
_SURE = 1.959964  # standard deviations on both sides hold 95 %


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """By what share something changed, and where 95 of 100 such measurements would see it."""

    ratio: float
    low: float
    high: float

    @property
    def verdict(self) -> str:
        """Whether a loss of `CHANGE_BOUND` or more is ruled out."""
        if self.low > -CHANGE_BOUND:
            return "kept"
        return "missed" if self.high <= -CHANGE_BOUND else "open: more rounds decide"


@dataclass(frozen=True, slots=True, kw_only=True)
class Tokens:
    """One way of serving: medians over rounds, with the least and the most.

    `change` is how many tokens a second more or fewer than with tracing off; `cpu_change` the same
    of the worker's CPU time for a token. `telemetry_ms_per_token` is CPU time of the telemetry
    actor, beside the worker.
    """

    way: str
    tokens_per_s: float
    least: float
    most: float
    change: Change
    cpu_ms_per_token: float
    cpu_change: Change
    telemetry_ms_per_token: float


def change(mine: Sequence[float], others: Sequence[float]) -> Change:
    """Ratio of paired values, less one, with its 95 % interval."""
    logs = np.log(np.asarray(mine) / np.asarray(others))
    count = len(logs)
    first, second = np.triu_indices(count)
    means = np.sort((logs[first] + logs[second]) / 2)
    spread = math.sqrt(count * (count + 1) * (2 * count + 1) / 24)
    out = max(0, math.floor(len(means) / 2 - _SURE * spread))
    found = (float(np.median(means)), float(means[out]), float(means[-1 - out]))
    ratio, low, high = (math.expm1(one) for one in found)
    return Change(ratio=ratio, low=low, high=high)


@dataclass(frozen=True, slots=True)
class _Turn:
    """One request: tokens a second, and CPU seconds of the worker and of its telemetry."""

    tokens_per_s: float
    worker_s: float
    telemetry_s: float


def measure_tokens(
    deployment: Deployment, collector: Sink, *, rounds: int, tokens: int
) -> tuple[tuple[Tokens, ...], float]:
    """Serve each way in turns; also the number of spans for a token with tracing on."""
    served = _Server(deployment, tokens=tokens)
    turns: dict[str, list[_Turn]] = {way: [] for way in WAYS}
    orders = itertools.cycle(itertools.permutations(WAYS))
    served.turn()  # the first one pays for what others find
    for _, order in zip(range(rounds), orders, strict=False):
        for way in order:
            served.trace(on=way != "off", send=way in {"sent", "frozen"})
            if way == "frozen":
                collector.freeze()
            turns[way].append(served.turn(thaw=collector.thaw))
    served.trace(on=True, send=True)
    before = deployment.totals().spans
    served.turn()
    spans = deployment.totals().spans - before
    return tuple(_row(way, turns, tokens=tokens) for way in WAYS), spans / tokens


class _Server:
    """The first worker of a deployment, asked the same each time."""

    def __init__(self, deployment: Deployment, *, tokens: int) -> None:
        import psutil  # type: ignore[import-untyped] # it has no types
        import ray

        from hotset.cluster.serve import encode_prompt, load_tokenizer

        self._name = next(iter(deployment.workers))
        self._worker = deployment.workers[self._name]
        self._front = Front(deployment)
        self._prompt = encode_prompt(load_tokenizer(str(deployment.config.model)), _PROMPT)
        self._tokens = tokens
        self._process = psutil.Process(ray.get(self._worker.pid.remote()))
        self._telemetry = list(deployment.telemetry.values())
        self._collecting = [psutil.Process(ray.get(one.pid.remote())) for one in self._telemetry]

    def trace(self, *, on: bool, send: bool) -> None:
        import ray

        ray.get([one.send.remote(on=send) for one in self._telemetry])
        ray.get(self._worker.trace.remote(on=on))

    def turn(self, *, thaw: Callable[[], None] = lambda: None) -> _Turn:
        """Serve; `thaw` is called before what the request left behind is waited for."""
        import ray

        worker, telemetry = _cpu_s([self._process]), _cpu_s(self._collecting)
        served = self._front.generate(self._prompt, max_new_tokens=self._tokens, worker=self._name)
        ray.get(self._worker.ship.remote())
        worker = _cpu_s([self._process]) - worker
        thaw()
        while any(self._totals(actor).export_waiting for actor in self._telemetry):
            time.sleep(_LOOK_S)
        return _Turn(
            tokens_per_s=len(served.tokens) / (served.wall_ns / 1e9),
            worker_s=worker,
            telemetry_s=_cpu_s(self._collecting) - telemetry,
        )

    @staticmethod
    def _totals(actor: Any) -> Totals:
        import ray

        return msgspec.msgpack.decode(ray.get(actor.totals.remote()), type=Totals)


def _cpu_s(processes: Sequence[Any]) -> float:
    return sum(sum(one.cpu_times()[:2]) for one in processes)


def _row(way: str, turns: dict[str, list[_Turn]], *, tokens: int) -> Tokens:
    mine, off = turns[way], turns["off"]
    speed = [one.tokens_per_s for one in mine]
    per_token = 1e3 / tokens
    return Tokens(
        way=way,
        tokens_per_s=statistics.median(speed),
        least=min(speed),
        most=max(speed),
        change=change(speed, [one.tokens_per_s for one in off]),
        cpu_ms_per_token=per_token * statistics.median(one.worker_s for one in mine),
        cpu_change=change([one.worker_s for one in mine], [one.worker_s for one in off]),
        telemetry_ms_per_token=per_token * statistics.median(one.telemetry_s for one in mine),
    )
