from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from hotset.blocks.checkpoint import Catalog
from hotset.blocks.families import make_random_checkpoint
from hotset.transport.loopback import LoopbackNetwork

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture(scope="session")
def olmoe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_random_checkpoint("olmoe", tmp_path_factory.mktemp("olmoe"), seed=9)


@pytest.fixture(scope="session")
def catalog(olmoe: Path) -> Catalog:
    return Catalog.open(olmoe)


@pytest.fixture
def network() -> LoopbackNetwork:
    return LoopbackNetwork()
