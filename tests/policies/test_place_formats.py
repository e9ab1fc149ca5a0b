"""Formats are chosen inside the floors and the bytes, and only when they buy balance."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from hotset.policies.guard import Guardrail
from hotset.policies.place import plan
from hotset.policies.place_formats import plan_formats
from hotset.policies.types import Format

FORMATS = {"bf16": 2.0, "fp8": 1.0}


def skewed(seed: int, layers: int = 2, experts: int = 24) -> Any:
    return np.random.default_rng(seed).lognormal(0, 1.2, (layers, experts))


def used_bytes(found: Any) -> Any:
    slots = found.placement.physical_to_logical_map
    sizes = np.take_along_axis(found.placement.sizes, np.maximum(slots, 0), axis=1)
    by_device = np.where(slots >= 0, sizes, 0).reshape(len(slots), found.placement.num_devices, -1)
    return by_device.sum(axis=2)


def test_half_the_size_gives_twice_the_copies_and_better_balance() -> None:
    load = skewed(0)
    size = {"num_devices": 32, "num_slots": 32}
    exact = plan(load, **size)
    found = plan_formats(load, formats=FORMATS, **size)
    found.placement.check_integrity()
    assert (used_bytes(found) <= 2.0).all()
    assert found.placement.balancedness > exact.balancedness + 0.1
    assert 0 < found.demoted_ratio <= 1
    assert plan(load, formats=FORMATS, **size).balancedness == found.placement.balancedness


def test_formats_stay_when_balance_is_there() -> None:
    found = plan_formats(skewed(1), formats=FORMATS, num_devices=4, num_slots=40)
    assert found.demoted_ratio == 0


@pytest.mark.parametrize(
    "floors",
    ["bf16", {}, {0: "bf16", 1: "bf16"}, Guardrail()],
    ids=["name", "absent", "map", "guardrail"],
)
def test_floors_are_never_undercut(floors: Any) -> None:
    found = plan_formats(skewed(2), formats=FORMATS, floors=floors, num_devices=32, num_slots=32)
    assert found.demoted_ratio == 0
    assert (used_bytes(found) <= 2.0).all()


def test_each_layer_has_its_own_floor() -> None:
    guard = Guardrail(floor={1: Format.INT8})
    found = plan_formats(
        skewed(3), formats=FORMATS, floors=guard, num_devices=32, num_slots=32, target=1.0
    )
    assert (found.codes[0] == 0).all()
    assert (found.codes[1] == 1).any()


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"formats": {}}, "formats"),
        ({"formats": {"bf16": -1}}, "formats"),
        ({"floors": "fp99"}, "floors"),
        ({"device_bytes": 0.5}, "capacity"),
        ({"sensitivity": [[1.0]]}, "sensitivity"),
    ],
)
def test_what_cannot_be_chosen_is_refused_by_name(change: dict[str, Any], named: str) -> None:
    arguments: dict[str, Any] = {"formats": FORMATS, "num_devices": 32, "num_slots": 32} | change
    with pytest.raises(ValueError, match=named):
        plan_formats(skewed(4), **arguments)
