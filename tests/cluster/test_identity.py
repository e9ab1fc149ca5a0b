"""Greedy tokens of a real cluster are those of the unmodified model, bit for bit, over NIXL."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import pytest

from hotset.cluster.front import Front
from tests.cluster.world import assert_sound, deployed, prompts

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from hotset.cluster.local import LocalCluster

pytestmark = [pytest.mark.ray, pytest.mark.nixl]

TOKENS = 16


def case(model: str, ratio: float, workers: int, **more: Any) -> Any:
    """A point of the matrix; its id says all of it."""
    options = {"hbm_ratio": ratio, "workers": workers, "move": "auto", "reference": "eager"} | more
    name = f"{model}-{ratio}-{workers}w-{options['move']}-{options['reference']}"
    return pytest.param(model, options, id=name)


MATRIX = [
    *(case("demo", ratio, workers) for ratio in (0.2, 0.5, 1.0) for workers in (1, 3)),
    case("demo", 0.2, 3, reference="grouped_mm"),
    case("demo", 0.2, 3, move="weights"),
    case("demo", 0.5, 3, move="tokens"),
    case("olmoe", 0.2, 3),
    case("olmoe", 0.5, 1, reference="grouped_mm"),
    case("mixtral", 0.2, 3, move="tokens"),
    case("mixtral", 1.0, 1),
    case("qwen3_moe", 0.2, 3, reference="grouped_mm"),
    case("qwen3_moe", 0.5, 1),
    case("deepseek_v3", 0.5, 3, move="tokens"),
    case("deepseek_v3", 0.2, 1),
    case("trained", 0.2, 3),
]

# Each family at every point: 30 deployments, about ten minutes, so only on request.
FULL_MATRIX = [
    case(model, ratio, workers)
    for model in ("olmoe", "mixtral", "qwen3_moe", "deepseek_v3", "gpt_oss", "trained")
    for ratio in (0.2, 0.5, 1.0)
    for workers in (1, 3)
]
if os.environ.get("HOTSET_FULL_MATRIX"):
    seen = {point.id for point in MATRIX}
    MATRIX += [point for point in FULL_MATRIX if point.id not in seen]


@pytest.mark.parametrize(("model", "options"), MATRIX)
def test_tokens_are_those_of_the_unmodified_model(  # noqa: PLR0917 - fixtures
    cluster: LocalCluster,
    models: Callable[[str], Path],
    expected: Callable[..., list[list[int]]],
    tmp_path: Path,
    model: str,
    options: dict[str, Any],
) -> None:
    assert cluster.address
    path, asked = models(model), prompts(3)
    wanted = expected(path, asked, count=TOKENS, reference=options["reference"])
    pools = {} if model == "demo" else {"cxl_pools": 0, "host_ratio": 1.0}  # fewer processes
    with deployed(path, tmp_path, **options, **pools) as deployment:
        front = Front(deployment)
        for index, prompt in enumerate(asked):
            worker = f"worker-{index % options['workers']}"
            served = front.generate(prompt, max_new_tokens=TOKENS, worker=worker)
            assert served.tokens == wanted[index]
            assert served.workers == [worker]
            assert not served.replays
        totals = deployment.totals()
        assert_sound(deployment)
    assert totals.tokens == sum(len(tokens) for tokens in wanted)
    assert sum(totals.hits.values()) == totals.queries > 0
    if options["move"] == "tokens":
        assert totals.hits.get("peer", 0) > 0  # tokens were dispatched, and came back right
    if options["hbm_ratio"] < 1:
        assert any(moved for link, moved in totals.bytes_by_link.items() if "->worker" in link)
