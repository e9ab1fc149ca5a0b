"""Eight requests at once on two workers: each one's tokens are those that it gets alone."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from hotset.cluster.front import Front
from tests.cluster.world import assert_sound, deployed, prompts

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from hotset.cluster.local import LocalCluster

pytestmark = [pytest.mark.ray, pytest.mark.nixl]

REQUESTS = 8
TOKENS = 24


@pytest.mark.parametrize("move", ["auto", "tokens"])
@pytest.mark.parametrize("numerics", ["exact", "tiled"])
def test_company_changes_no_token(  # noqa: PLR0917 - fixtures
    cluster: LocalCluster,
    models: Callable[[str], Path],
    expected: Callable[..., Any],
    tmp_path: Path,
    numerics: str,
    move: str,
) -> None:
    assert cluster.address
    asked = prompts(REQUESTS, seed=23)
    options = {"workers": 2, "hbm_ratio": 0.25, "numerics": numerics, "move": move}
    with deployed(models("demo"), tmp_path, **options) as deployment:
        front = Front(deployment)
        alone = [front.generate(prompt, max_new_tokens=TOKENS).tokens for prompt in asked]
        together = front.generate_many(asked, max_new_tokens=TOKENS)
        totals = deployment.totals()
        assert_sound(deployment)
    assert [served.tokens for served in together] == alone
    assert {served.workers[0] for served in together} == {"worker-0", "worker-1"}
    assert len({tuple(tokens) for tokens in alone}) > REQUESTS // 2  # else equality says little
    if numerics == "exact":
        assert alone == expected(models("demo"), asked, count=TOKENS)
    if move == "tokens":
        assert totals.hits.get("peer", 0) > 0
