"""The live check on a real cluster: a wrong sensitivity file is noticed, a right one is left alone.

Steps of real requests are computed again at full precision in the worker; the controller freezes
demotions and sends the worst blocks back to full precision.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import msgspec
import pytest

from hotset.blocks.checkpoint import Catalog
from hotset.blocks.formats import codec
from hotset.blocks.sensitivity_table import VERSION, SensitivityTable, write_table
from hotset.cluster.front import Front
from hotset.cluster.inspect import live_status, live_story
from hotset.policies.types import BlockId, Format
from tests.cluster.conftest import DEMO
from tests.cluster.world import assert_sound, call, deployed, eventually, prompts

if TYPE_CHECKING:
    from pathlib import Path

    from hotset.cluster.launch import Deployment
    from hotset.cluster.local import LocalCluster

pytestmark = [pytest.mark.ray, pytest.mark.nixl]

STEPS = 200  # within which a table of zeros has to be noticed
TOKENS = 40
SMALL = {"workers": 1, "host_pools": 1, "cxl_pools": 0, "host_ratio": 1.0, "hbm_ratio": 0.2}


def zeros(
    path: Path,
    *,
    model: Path = DEMO,
    formats: tuple[str, ...] = ("int8", "int4", "int3", "int2"),
    bases: str = "",
) -> Path:
    """A sensitivity file that is deliberately wrong: nothing costs anything."""
    catalog = Catalog.open(model)
    layers, experts = len(catalog.layers), catalog.num_experts
    table = SensitivityTable(
        version=VERSION,
        checkpoint=catalog.digest,
        text="none",
        tokens=1,
        layers=catalog.layers,
        num_experts=experts,
        formats=formats,
        nbytes=tuple(codec(form).nbytes(catalog.layout) for form in formats),
        full_nbytes=catalog.block_nbytes,
        nats=[[[0.0] * len(formats)] * experts] * layers,
        frequency=[[catalog.top_k / experts] * experts] * layers,
        groups=(),
        mixes=(),
        optimism=1.0,
        optimism_upper=1.0,
        bases=bases,
    )
    write_table(table, path)
    return path


def lossy(deployment: Deployment) -> int:
    """Copies at the workers that are not at full precision."""
    stores = [store for store in deployment.status()["stores"] if store["tier"] == "hbm"]
    return sum(
        count
        for store in stores
        for form, count in store["blocks"].items()
        if form not in {Format.BF16, Format.BF16Z}
    )


def serve(deployment: Deployment, *, steps: int) -> int:
    """Serve requests until the live check has broken a bound; gives the steps that were served."""
    front, done = Front(deployment), 0
    for prompt in prompts(steps // TOKENS, seed=7):
        done += len(front.generate(prompt, max_new_tokens=TOKENS).tokens)
        if deployment.status()["vetoes"].get("veto_drift"):
            break
    return done


def test_a_table_of_zeros_is_noticed_repaired_and_explained(
    cluster: LocalCluster, tmp_path: Path
) -> None:
    assert cluster.address
    table = zeros(tmp_path / "zeros.json")
    with deployed(DEMO, tmp_path / "run", sensitivity=table, **SMALL) as deployment:
        eventually(lambda: lossy(deployment) > 0, what="cheap copies at the worker")
        steps = serve(deployment, steps=STEPS)
        vetoes = eventually(
            lambda: deployment.status()["vetoes"].get("veto_drift", 0), what="the live check"
        )
        assert steps <= STEPS
        assert vetoes > 0
        status = live_status(deployment.controller)
        assert "FROZEN by the live check" in status.quality
        told = [story_of(deployment, block) for block in sorted(deployment.catalog.blocks)]
        repaired = [lines for lines in told if any("veto_drift" in line for line in lines)]
        assert repaired
        assert any("nats" in line for lines in repaired for line in lines)
        eventually(lambda: lossy(deployment) == 0, what="full precision everywhere")
        Front(deployment).generate(prompts(1)[0], max_new_tokens=4)
        assert lossy(deployment) == 0, "nothing is demoted while frozen"
        assert_sound(deployment)


@pytest.mark.parametrize(
    "options",
    [{"quality_budget": 20.0}, {"default_floor": "int8"}],
    ids=["a budget that int2 keeps", "int8 inside the default budget"],
)
def test_drift_inside_the_budget_raises_nothing(
    cluster: LocalCluster, tmp_path: Path, options: dict[str, Any]
) -> None:
    assert cluster.address
    table = zeros(tmp_path / "zeros.json")
    with deployed(DEMO, tmp_path / "run", sensitivity=table, **SMALL, **options) as deployment:
        eventually(lambda: lossy(deployment) > 0, what="cheap copies at the worker")
        front = Front(deployment)
        for prompt in prompts(3, seed=7):
            front.generate(prompt, max_new_tokens=TOKENS)
        checked = eventually(lambda: live_checked(deployment), what="steps computed again")
        assert checked > 0
        assert "veto_drift" not in deployment.status()["vetoes"]
        assert lossy(deployment) > 0
        assert_sound(deployment)


def story_of(deployment: Deployment, block: BlockId) -> list[str]:
    """Lines of `hotset why`."""
    lines, _ = live_story(deployment.controller, block)
    return [f"{line.what} {line.reason}" for line in lines]


def live_checked(deployment: Deployment) -> int:
    """Tokens that the workers have computed again."""
    return sum(call(worker.live_checked) for worker in deployment.workers.values())


def test_exact_mode_computes_nothing_again(cluster: LocalCluster, tmp_path: Path) -> None:
    assert cluster.address
    table = zeros(tmp_path / "zeros.json")
    options = {**SMALL, "sensitivity": table, "quality_budget": 0.0}
    with deployed(DEMO, tmp_path / "run", **options) as deployment:
        Front(deployment).generate(prompts(1)[0], max_new_tokens=TOKENS)
        assert live_checked(deployment) == 0
        assert lossy(deployment) == 0
        assert msgspec.to_builtins(live_status(deployment.controller))["vetoes"] == {}
