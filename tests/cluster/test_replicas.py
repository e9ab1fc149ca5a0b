"""Plans for the workers' replicas on a real cluster: in force where they pay, refused where not."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any, Self

import msgspec
import pytest

from hotset.actors.commandlog import check_replay
from hotset.actors.control import ControlSpec, make_brain
from hotset.actors.frames import read_frames
from hotset.actors.messages import unpack_command
from hotset.cluster.front import Front
from hotset.policies.types import Copy, PlanDecision, PublishEpoch, Reason, StartTransfer
from tests.cluster.world import assert_sound, call, deployed, eventually

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from hotset.cluster.launch import Deployment
    from hotset.cluster.local import LocalCluster

pytestmark = [pytest.mark.ray, pytest.mark.nixl]

WORKERS = 3
PROMPT = [7] * 40  # one token again and again: a few experts of each layer get nearly all of it
TOKENS = 4
OPTIONS = {"workers": WORKERS, "hbm_ratio": 0.5, "move": "tokens", "plan_s": 2.0}


class Traffic:
    """The same request on every worker until it is told to stop; what each answered."""

    def __init__(self, run: Deployment) -> None:
        self._front = Front(run)
        self._stop = threading.Event()
        self.answers: list[list[int]] = []
        self.errors: list[BaseException] = []
        self._threads = [
            threading.Thread(target=self._serve, args=(name,), daemon=True) for name in run.workers
        ]

    def _serve(self, name: str) -> None:
        try:
            while not self._stop.is_set():
                served = self._front.generate(PROMPT, max_new_tokens=TOKENS, worker=name)
                self.answers.append(served.tokens)
        except BaseException as error:  # noqa: BLE001 - shown by the test's own thread
            self.errors.append(error)

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(timeout=200)
        assert not self.errors


def commands(folder: Path) -> list[Any]:
    found = []
    for frame in read_frames(folder / "commands.msgpack"):
        _, packed = msgspec.msgpack.decode(frame)
        found += [unpack_command(one) for one in packed]
    return found


def decisions(folder: Path) -> list[PlanDecision]:
    return [one for one in commands(folder) if isinstance(one, PlanDecision)]


def plan_spans(folder: Path) -> list[dict[str, Any]]:
    """Attributes of the spans that judge a plan."""
    found = []
    for path in folder.glob("trace-*.jsonl"):
        for line in path.read_bytes().splitlines():
            for group in msgspec.json.decode(line)["resourceSpans"]:
                for scope in group["scopeSpans"]:
                    for span in scope["spans"]:
                        keys = {a["key"]: a["value"] for a in span["attributes"]}
                        if "hotset.plan.balance_after_ppm" in keys:
                            assert span["name"] == "hotset.plan"
                            found.append({k: next(iter(v.values())) for k, v in keys.items()})
    return found


def test_a_plan_levels_a_skewed_load(
    cluster: LocalCluster,
    models: Callable[[str], Path],
    expected: Callable[..., list[list[int]]],
    tmp_path: Path,
) -> None:
    assert cluster.nodes
    with deployed(models("demo"), tmp_path, transport="auto", **OPTIONS) as run:
        with Traffic(run) as traffic:
            (plan, *_) = eventually(
                lambda: [d for d in decisions(tmp_path) if d.reason is Reason.REBALANCE],
                deadline_s=250, what="a plan in force",
            )  # fmt: skip
            asked = {
                (one.store, one.block)
                for one in commands(tmp_path)
                if isinstance(one, StartTransfer) and one.reason is Reason.REPLICATE
            }
            eventually(
                lambda: all(
                    store in {copy.store for copy in copies(run, block)} for store, block in asked
                ),
                deadline_s=250, what="the plan's copies are there",
            )  # fmt: skip
            judged = len(decisions(tmp_path))
            eventually(  # one look alone sees the load of few steps
                lambda: [
                    d for d in decisions(tmp_path)[judged:] if d.before_ppm > plan.before_ppm
                ],
                deadline_s=250, what="what follows is better balanced",
            )  # fmt: skip
        assert plan.after_ppm >= plan.before_ppm + 20_000
        assert {tuple(tokens) for tokens in traffic.answers} == {
            tuple(expected(models("demo"), [PROMPT], count=TOKENS)[0])
        }
        epochs = [one.epoch for one in commands(tmp_path) if isinstance(one, PublishEpoch)]
        assert plan.epoch in epochs
        assert epochs == sorted(epochs)
        assert_sound(run)
        for worker in run.workers.values():
            call(worker.ship)
    assert {span["hotset.reason"] for span in plan_spans(tmp_path)} >= {"rebalance"}
    spec = msgspec.json.decode((tmp_path / "run.json").read_bytes(), type=ControlSpec)
    replayed = check_replay(tmp_path, lambda: make_brain(spec))
    assert replayed.differs_at is None
    assert replayed.compared > 0


def copies(run: Deployment, block: Any) -> list[Any]:
    _, found = msgspec.msgpack.decode(
        call(run.controller.why, block.layer, block.index), type=tuple[list[Any], list[Copy]]
    )
    return found


def test_a_plan_that_could_not_pay_in_time_is_refused(
    cluster: LocalCluster, models: Callable[[str], Path], tmp_path: Path
) -> None:
    assert cluster.nodes
    options = {**OPTIONS, "payback_s": 0.001}
    with deployed(models("demo"), tmp_path, transport="auto", **options) as run:
        with Traffic(run):
            told = eventually(
                lambda: [d for d in decisions(tmp_path) if d.moves],
                deadline_s=250, what="a plan that is judged",
            )  # fmt: skip
        for worker in run.workers.values():
            call(worker.ship)
    assert {one.reason for one in told} == {Reason.VETO_COST}
    assert not [
        one
        for one in commands(tmp_path)
        if isinstance(one, StartTransfer) and one.reason is Reason.REPLICATE
        and one.store.startswith("worker")
    ]  # fmt: skip
    spans = [span for span in plan_spans(tmp_path) if span["hotset.reason"] == "veto_cost"]
    assert spans
    assert int(spans[0]["hotset.plan.moves"]) > 0
