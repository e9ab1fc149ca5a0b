"""Twenty seconds of the soak; `python -m tests.transport.soak` runs for ten minutes."""

from __future__ import annotations

import pytest

from tests.transport.soak import soak


@pytest.mark.nixl
@pytest.mark.slow
def test_stores_that_are_stopped_and_killed_never_believe_wrong_bytes() -> None:
    result = soak(20, seed=7)
    assert result.wrong == []
    assert result.total("corrupt") == 0
    assert result.total("done") > 2000
    assert result.kills >= 1
    assert result.stops >= 3
