"""The planner's kernels: compiled and plain forms choose alike, and books agree with slots."""

from __future__ import annotations

import importlib.util
import sys
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from hard_loads import KINDS, hard_load
from hypothesis import given, settings
from hypothesis import strategies as st

from hotset.policies import jit, planner_kernels, planner_layers, planner_scans, planner_search
from hotset.policies.place import plan
from hotset.policies.planner_kernels import Fleet, Layer

if TYPE_CHECKING:
    from types import ModuleType


def layer_of(seed: int, *, devices: int, width: int, experts: int, spread: int) -> tuple[Any, Any]:
    """A packed layer under a shifted load, with prices."""
    rng = np.random.default_rng(seed)
    nodes = 2 if devices % 2 == 0 else 1
    speed = rng.choice([1.0, 2.0], devices) if seed % 3 == 0 else np.ones(devices)
    fleet = Fleet(
        node=np.arange(devices) * nodes // devices,
        pace=speed.sum() / speed,
        room=np.full(devices, np.inf),
        num_nodes=nodes,
        width=width,
        twice=-(-width // experts),
        spread=min(spread, nodes),
        least=1,
    )
    load = rng.lognormal(0, 1, experts)
    slot = np.full(devices * width, -1, dtype=np.int64)
    home = np.full(experts, -1)
    layer = planner_layers.blank(load / load.sum(), np.ones(experts), slot, home, fleet, True)
    count = np.ones(experts, dtype=np.int64)
    most = devices * fleet.twice
    planner_kernels.replicate(layer.load, devices * width - experts, most, 0.0, False, count)
    planner_layers.pack(layer, fleet, count, False)
    planner_layers.price_copies(layer, fleet, planner_layers.Prices(1.0, 0.5, 0.0))
    shifted = load * rng.lognormal(0, 0.3, experts)
    layer = layer._replace(load=shifted / shifted.sum())
    planner_kernels.settle(layer, fleet)
    return layer, fleet


shapes = st.tuples(st.integers(0, 10_000), st.integers(2, 6), st.integers(1, 5), st.integers(1, 3))


@pytest.mark.skipif(not jit.COMPILED, reason="numba is not installed")
@settings(max_examples=60)
@given(shapes, st.floats(1.0, 1.5), st.sampled_from([0.0, 3.0]))
def test_both_scans_choose_alike(
    shape: tuple[int, int, int, int], goal: float, price: float
) -> None:
    seed, devices, width, spread = shape
    experts = max(2, devices * width - seed % (devices * width))
    layer, fleet = layer_of(seed, devices=devices, width=width, experts=experts, spread=spread)
    hot = int(layer.time.argmax())
    tolls = planner_search.open_tolls(layer, fleet, price, 0.0)
    for name in ("scan_swaps", "scan_overwrites"):
        floor = 0.0
        for _ in range(2):
            given = (layer, fleet, hot, goal, price, floor, tolls)
            compiled = getattr(planner_search, name)(*given)
            plain = getattr(planner_scans, name)(*given)
            assert compiled[1:] == plain[1:]
            assert compiled[0] == pytest.approx(plain[0], rel=1e-12)
            floor = compiled[0] * 1.5  # nothing is that good
        assert compiled[1] == -1


@settings(max_examples=30)
@given(shapes)
def test_books_agree_with_slots_after_any_writes(shape: tuple[int, int, int, int]) -> None:
    seed, devices, width, spread = shape
    experts = max(2, devices * width // 2)
    layer, fleet = layer_of(seed, devices=devices, width=width, experts=experts, spread=spread)
    rng = np.random.default_rng(seed)
    for _ in range(10):
        at = int(rng.integers(layer.slot.shape[0]))
        planner_kernels.write(layer, fleet, at, int(rng.integers(-1, experts)))
    fresh: Layer = layer._replace(
        count=layer.count.copy(), hold=layer.hold.copy(), time=layer.time.copy(),
        used=layer.used.copy(), on_node=layer.on_node.copy(),
    )  # fmt: skip
    planner_kernels.settle(fresh, fleet)
    for name in ("count", "hold", "on_node"):
        assert (getattr(layer, name) == getattr(fresh, name)).all()
    assert np.allclose(layer.time, fresh.time)
    assert np.allclose(layer.used, fresh.used)


def without_numba(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """A second copy of the planner that finds no numba."""
    monkeypatch.setitem(sys.modules, "numba", None)
    order = (
        "jit", "planner_flow", "planner_kernels", "planner_search", "planner_pairs",
        "planner_layers", "shares", "affinity", "planner_keep", "planner_free", "planner_mix",
        "place",
    )  # fmt: skip
    for name in order:
        full = f"hotset.policies.{name}"
        spec = importlib.util.find_spec(full)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, full, module)
        monkeypatch.setattr(f"hotset.policies.{name}", module, raising=False)
        spec.loader.exec_module(module)
    return sys.modules["hotset.policies.place"]


def problems(rng: Any, *, layers: int, rounds: int) -> list[tuple[dict[str, Any], Any, Any]]:
    """Clusters, a load and a later one: every kind of load, of devices and of demand.

    Seven kinds and six clusters: with each round every kind meets another cluster and split.
    """
    clusters: list[dict[str, Any]] = [
        {"num_devices": 8, "num_slots": 40, "num_nodes": 2},
        {"num_devices": 16, "num_slots": 32, "num_nodes": 4, "spread_nodes": 2},
        {"num_devices": 8, "num_slots": 40, "num_nodes": 2, "groups": 4, "speed": [1, 2] * 4},
        {"num_devices": 6, "num_slots": 48, "num_nodes": 3, "capacity": [5, 5, 8, 8, 8, 6],
         "speed": [1.0, 3.0] * 3, "cross_node_price": 0.5},
        {"num_devices": 24, "num_slots": 24},
        {"num_devices": 2, "num_slots": 60},
    ]  # fmt: skip
    found = []
    for number, kind in enumerate(KINDS * rounds):
        case = clusters[number % len(clusters)] | {"split": ("even", "free")[number % 2]}
        load = hard_load(kind, rng, layers=layers, experts=24)
        then = load * rng.lognormal(0, 0.1, load.shape)
        if number % 3 == 0:
            case["target"] = 0.99
            then = hard_load("tail", rng, layers=layers, experts=24)
        found.append((case, load, then))
    windows = rng.lognormal(0, 1, (3, 2, 24))
    found.append((clusters[0] | {"risk": 0.5}, windows, windows[:2]))
    counts = rng.pareto(1.0, (1, 24, 24))
    found.append((clusters[0] | {"co_routing": counts}, windows[0], windows[1]))
    return found


@pytest.mark.skipif(not jit.COMPILED, reason="numba is not installed")
@pytest.mark.parametrize(
    ("layers", "rounds"), [(1, 1), pytest.param(2, 6, marks=pytest.mark.slow)], ids=["few", "many"]
)
def test_plans_are_the_same_without_numba(
    monkeypatch: pytest.MonkeyPatch, layers: int, rounds: int
) -> None:
    cases = problems(np.random.default_rng(3), layers=layers, rounds=rounds)
    firsts = [plan(load, **case) for case, load, _ in cases]
    seconds = [plan(then, current=p, **c) for p, (c, _, then) in zip(firsts, cases, strict=True)]
    slow = without_numba(monkeypatch)
    assert not sys.modules["hotset.policies.jit"].COMPILED
    for (case, load, then), first, second in zip(cases, firsts, seconds, strict=True):
        pairs = ((slow.plan(load, **case), first), (slow.plan(then, current=first, **case), second))
        for plain, compiled in pairs:
            assert (plain.physical_to_logical_map == compiled.physical_to_logical_map).all(), case
            assert np.allclose(plain.shares, compiled.shares, atol=1e-9), case


def test_a_kept_result_is_stale_when_something_built_into_it_changes() -> None:
    def version(*, constant: float, callee: str) -> str:
        """Lineage of one function in a world where a constant and a callee differ."""

        def inner(value: float) -> float:
            return value

        inner.__dict__["lineage"] = callee
        known = {"LIMIT": constant, "inner": type("Dispatcher", (), {"py_func": inner})}
        exec("def outer(value):\n    return inner(value) * LIMIT", known)  # noqa: S102 - own text
        return jit.lineage(known["outer"])  # type: ignore[arg-type]

    base = version(constant=1.0, callee="a")
    assert version(constant=1.0, callee="a") == base
    assert version(constant=2.0, callee="a") != base
    assert version(constant=1.0, callee="b") != base


@pytest.mark.skipif(not jit.COMPILED, reason="numba is not installed")
def test_the_stamp_reaches_numbas_cache() -> None:
    dispatcher: Any = planner_layers.fresh_layers
    assert dispatcher.py_func.lineage in dispatcher._cache._cache_file._source_stamp
