"""Rules for all tests."""

from __future__ import annotations

import sys

import pytest
from hypothesis import HealthCheck, settings

# Others share the machine: how long an example takes says nothing of the code.
settings.register_profile(
    "hotset", settings.default, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("hotset")


def pytest_runtest_setup(item: pytest.Item) -> None:
    """NIXL brings a UCX of its own, which does not live beside that of ucxx: `make test` separates
    them; a plain `pytest` runs those that come first.
    """
    wants_nixl = item.get_closest_marker("nixl") or item.get_closest_marker("ray")
    if wants_nixl and "ucxx" in sys.modules:
        pytest.skip("ucxx is loaded in this process: run `pytest -m nixl` or `-m ray` alone")
