"""`hotset bench planner`: balance, bytes moved and time, next to a greedy planner and to bounds.

Measures one process with one thread: each case is planned once to warm up, then `--repeat` times;
the median is printed with the fastest and slowest. Loads are seeded; recorded ones are read from
`HOTSET_DATA` when it is set. Must not know how plans are found.
"""

from __future__ import annotations

import json
import platform
import re
import time
from dataclasses import asdict, dataclass
from functools import partial
from importlib import import_module
from importlib.metadata import version
from importlib.util import find_spec
from itertools import pairwise
from statistics import median
from typing import TYPE_CHECKING, Any

import numpy as np

from hotset.policies import place_score as score
from hotset.policies.affinity import crossing
from hotset.policies.jit import COMPILED
from hotset.policies.place import plan
from hotset.policies.place_greedy import greedy_plan
from hotset.policies.place_types import Crossing
from hotset.policies.shares import best_shares

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

DRIFT = 0.05
SEED = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """A cluster, and how its load is made."""

    layers: int
    experts: int
    slots: int
    devices: int
    nodes: int
    load: str  # real, lognormal or zipf-EXPONENT
    floors: tuple[float, ...] = (0.975, 0.99)

    @property
    def label(self) -> str:
        """Layers x experts, slots, devices, nodes, load."""
        return f"{self.layers}x{self.experts} {self.slots}/{self.devices}/{self.nodes} {self.load}"


def _case(shape: str, load: str, *floors: float) -> Case:
    """Case from `layers x experts / slots / devices / nodes`."""
    layers, experts, slots, devices, nodes = (int(part) for part in re.split("[x/]", shape))
    return Case(
        layers=layers, experts=experts, slots=slots, devices=devices, nodes=nodes, load=load,
        floors=floors or (0.975, 0.99),
    )  # fmt: skip


def _cases(*, quick: bool) -> list[Case]:
    loads = ("real", "lognormal") if quick else ("real", "lognormal", "zipf-1.0", "zipf-1.2")
    found = [_case("58x256/288/32/4", load) for load in loads]
    if quick:
        return found
    found += [_case("58x256/320/320/40", "real"), _case("58x256/640/320/40", "real")]
    for shape in ("94x128/160/32/4", "60x384/448/64/8"):
        found += [_case(shape, load) for load in ("lognormal", "zipf-1.2")]
    for devices in (100, 300, 1000):  # the cost curve
        found.append(_case(f"60x256/{4 * devices}/{devices}/{devices // 10}", "lognormal", 0.975))
    return found


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One measured plan. `ms` is the median of `rounds`."""

    case: str
    what: str
    balancedness: float
    moved_ratio: float | None
    ms: float | None
    fastest_ms: float | None
    slowest_ms: float | None
    crossing_ratio: float | None = None


def make_load(case: Case, data: Path | None) -> Any:
    """Load [L, E] of a case, or None when recorded data is needed and absent."""
    rng = np.random.default_rng(SEED)
    shape = (case.layers, case.experts)
    if case.load == "lognormal":
        return rng.lognormal(0, 1, shape)
    if case.load.startswith("zipf-"):
        weights = np.arange(1, case.experts + 1.0) ** -float(case.load.removeprefix("zipf-"))
        return np.stack([rng.permutation(weights) for _ in range(case.layers)])
    path = None if data is None else data / "loads" / "deepseek_v3_0324.npz"
    if path is None or not path.exists():
        return None
    with np.load(path) as found:
        return found["activations"].astype(float)


def _timed(what: Callable[[], Any], *, repeat: int) -> tuple[Any, list[float]]:
    result = what()  # compiles, loads the cache, fills the processor's caches
    rounds = []
    for _ in range(repeat):
        start = time.perf_counter_ns()
        result = what()
        rounds.append((time.perf_counter_ns() - start) / 1e6)
    return result, rounds


def measure(case: Case, load: Any, *, repeat: int) -> list[Row]:
    """All rows of a case: bounds, the greedy planner, hotset from nothing and after a drift."""
    size: dict[str, Any] = {
        "num_devices": case.devices,
        "num_slots": case.slots,
        "num_nodes": case.nodes,
    }
    speed = np.ones(case.devices)
    rows: list[Row] = []

    def add(
        what: str, balance: float, moved: float | None = None, rounds: list[float] | None = None
    ) -> None:
        ms = rounds or []
        rows.append(
            Row(case=case.label, what=what, balancedness=float(balance), moved_ratio=moved,
                ms=median(ms) if ms else None, fastest_ms=min(ms, default=None),
                slowest_ms=max(ms, default=None))
        )  # fmt: skip

    def judged(slots: Any, under: Any, shares: Any = None) -> float:
        count = score.replica_counts(slots, experts=case.experts)
        part = score.even_shares(slots, count) if shares is None else shares
        return float(score.balancedness(slots, part, under, speed=speed).mean())

    hottest = score.bound_hottest(load, num_slots=case.slots, num_devices=case.devices)
    add("bound: hottest expert / replicas", hottest.mean())
    groups = 8 if case.experts % 8 == 0 and 8 % case.nodes == 0 else case.nodes
    if case.experts % groups == 0 and case.nodes > 1:
        hard = score.bound_hierarchical(load, groups=groups, num_nodes=case.nodes)
        add(f"bound: {groups} groups kept on their nodes", hard.mean())
        slots, rounds = _timed(
            lambda: greedy_plan(
                load, num_slots=case.slots, num_devices=case.devices, num_nodes=case.nodes,
                groups=groups,
            ),
            repeat=repeat,
        )  # fmt: skip
        drifted = load * np.random.default_rng(SEED + 1).lognormal(0, DRIFT, load.shape)
        again = greedy_plan(
            drifted, num_slots=case.slots, num_devices=case.devices, num_nodes=case.nodes,
            groups=groups,
        )  # fmt: skip
        node = np.arange(case.devices) * case.nodes // case.devices
        table, _ = score.move_table(again, slots, num_devices=case.devices, node=node)
        add("greedy, hierarchical", judged(slots, load), None, rounds)
        add("greedy, planned again after drift", judged(again, drifted), len(table) / slots.size)
    first, rounds = _timed(lambda: plan(load, **size), repeat=repeat)
    add("hotset, from nothing", first.balancedness, None, rounds)
    drifted = load * np.random.default_rng(SEED + 1).lognormal(0, DRIFT, load.shape)
    kept = first.physical_to_logical_map
    add("  after drift, nothing done", judged(kept, drifted), 0.0)
    shares, rounds = _timed(
        lambda: best_shares(kept, drifted, num_devices=case.devices), repeat=repeat
    )
    add("  after drift, shares only", judged(kept, drifted, shares), 0.0, rounds)
    found, rounds = _timed(lambda: plan(drifted, current=first, **size), repeat=repeat)
    add("  after drift, defaults", found.balancedness, found.moved_ratio, rounds)
    for target in case.floors:
        found, rounds = _timed(
            partial(plan, drifted, current=first, target=target, **size), repeat=repeat
        )
        name = f"  after drift, target {target:g}"
        add(name, found.balancedness, found.moved_ratio, rounds)
    if case.slots > case.experts:
        for wanted in (None, 0.995) if case.devices < 100 else (None,):
            found, rounds = _timed(
                partial(plan, drifted, current=first, split="free", target=wanted, **size),
                repeat=repeat,
            )
            name = "defaults" if wanted is None else f"target {wanted:g}"
            add(f"  after drift, free, {name}", found.balancedness, found.moved_ratio, rounds)
    return rows


def stream_rows(data: Path | None) -> list[Row]:
    """A recorded token stream: planned on what was seen, judged on the next 512 tokens."""
    path = None if data is None else data / "router" / "deepseek_v2_lite_esft.npz"
    if path is None or not path.exists():
        return []
    rows = []
    with np.load(path) as found:
        for name in ("intent", "law"):
            tokens = found[f"{name}_topk"]
            windows = [
                np.stack([
                    np.bincount(tokens[at : at + 512, layer].ravel(), minlength=64)
                    for layer in range(tokens.shape[1])
                ]).astype(float)
                for at in range(0, len(tokens) - 511, 512)
            ]  # fmt: skip
            rows += _follow(f"stream {name}", windows)
    return rows


def _follow(case: str, windows: list[Any]) -> list[Row]:
    size: dict[str, Any] = {"num_devices": 8, "num_slots": 72}
    speed = np.ones(8)
    current = plan(windows[0], **size)
    seen = windows[0]
    even, free, moved, greedy, again = [], [], [], [], []
    old = greedy_plan(windows[0], num_slots=72, num_devices=8)
    for now, following in pairwise(windows):
        seen = 0.75 * seen + 0.25 * now
        current = plan(seen, current=current, byte_budget=0.05 * current.shares.size, **size)
        slots = current.physical_to_logical_map
        moved.append(current.moved_ratio)
        even.append(score.balancedness(slots, current.shares, following, speed=speed).mean())
        shares = best_shares(slots, following, num_devices=8)
        free.append(score.balancedness(slots, shares, following, speed=speed).mean())
        new = greedy_plan(now, num_slots=72, num_devices=8)
        table, _ = score.move_table(new, old, num_devices=8, node=np.zeros(8, dtype=np.int64))
        count = score.replica_counts(new, experts=64)
        part = score.even_shares(new, count)
        greedy.append(score.balancedness(new, part, following, speed=speed).mean())
        again.append(len(table) / new.size)
        old = new

    def row(what: str, balance: list[float], ratio: list[float]) -> Row:
        return Row(
            case=case, what=what, balancedness=float(np.mean(balance)),
            moved_ratio=float(np.mean(ratio)), ms=None, fastest_ms=None, slowest_ms=None,
        )  # fmt: skip

    return [
        row("greedy, judged on the next window", greedy, again),
        row("hotset, judged on the next window", even, moved),
        row("hotset, shares of each batch", free, moved),
    ]


def affinity_rows(data: Path | None) -> list[Row]:
    """Tokens between nodes, planned on the first half of a recorded stream, judged on the second.

    The rival brings experts to nodes layer by layer, each by the best assignment there is, as
    MoETuner's integer programs do; it has no replicas and balances the number of experts alone.
    """
    path = None if data is None else data / "router" / "deepseek_v2_lite_esft.npz"
    if path is None or not path.exists():
        return []
    rows = []
    size: dict[str, Any] = {"num_devices": 8, "num_slots": 72, "num_nodes": 4}
    with np.load(path) as found:
        for name in ("intent", "law"):
            tokens = found[f"{name}_topk"].astype(np.int64)
            seen, judged = np.array_split(tokens, 2)
            load, counts = _usage(seen)
            later_load, later = _usage(judged)
            plans = {
                "planned for balance": plan(load, **size),
                "with co_routing": plan(load, co_routing=counts, **size),
            }
            for what, placed in plans.items():
                slots = placed.physical_to_logical_map
                balance = score.balancedness(slots, placed.shares, later_load, speed=np.ones(8))
                rows.append(_crossing_row(name, what, balance.mean(), crossing(placed, later)))
            if find_spec("scipy") is None:
                continue  # solves the rival's assignments
            rival = _assigned(counts, experts=64, nodes=4)
            stay = sum(
                float(step[first[:, None] == second[None, :]].sum())
                for step, (first, second) in zip(later, pairwise(rival), strict=True)
            )
            by_node = np.stack([
                [row[home == node].sum() for node in range(4)]
                for row, home in zip(later_load, rival, strict=True)
            ])  # fmt: skip
            balance = by_node.mean(axis=1) / by_node.max(axis=1)
            part = Crossing(tokens=0.0, ratio=1.0 - stay / later.sum(), saved_tokens=0.0)
            rows.append(_crossing_row(name, "assignment (nodes)", balance.mean(), part))
    return rows


def _crossing_row(name: str, what: str, balance: Any, found: Crossing) -> Row:
    return Row(
        case=f"affinity {name}", what=what, balancedness=float(balance), moved_ratio=None, ms=None,
        fastest_ms=None, slowest_ms=None, crossing_ratio=found.ratio,
    )  # fmt: skip


def _usage(tokens: Any) -> tuple[Any, Any]:
    """Uses [L, 64] and uses of a pair of experts in a layer and the next [L - 1, 64, 64]."""
    layers = tokens.shape[1]
    load = np.stack([np.bincount(tokens[:, one].ravel(), minlength=64) for one in range(layers)])
    counts = np.zeros((layers - 1, 64, 64))
    for layer in range(layers - 1):
        pairs = tokens[:, layer, :, None] * 64 + tokens[:, layer + 1, None, :]
        counts[layer] = np.bincount(pairs.ravel(), minlength=64 * 64).reshape(64, 64)
    return load.astype(float), counts


def _assigned(counts: Any, *, experts: int, nodes: int) -> list[Any]:
    """Node of each expert by layer: the assignment that keeps most tokens on their node."""
    solve = import_module("scipy.optimize").linear_sum_assignment
    homes = [np.arange(experts) * nodes // experts]
    places = np.repeat(np.arange(nodes), experts // nodes)
    for step in counts:
        wish = np.stack([step[homes[-1] == node].sum(axis=0) for node in range(nodes)], axis=1)
        expert, place = solve(-wish[:, places])
        homes.append(places[place[np.argsort(expert)]])
    return homes


def render(rows: list[Row]) -> str:
    """Return the rows as text, a block for each case."""
    lines = []
    last = None
    for row in rows:
        if row.case != last:
            lines.append(row.case)
            last = row.case
        moved = "" if row.moved_ratio is None else f"{row.moved_ratio:7.2%} moved"
        took = (
            ""
            if row.ms is None
            else f"{row.ms:9.1f} ms ({row.fastest_ms:.1f}-{row.slowest_ms:.1f})"
        )
        if row.crossing_ratio is not None:
            took = f"{row.crossing_ratio:9.2%} of tokens change node"
        lines.append(f"  {row.what:<36} {row.balancedness:.4f} {moved:>14} {took}".rstrip())
    return "\n".join(lines)


def run_bench(*, quick: bool, repeat: int, data: Path | None, as_json: bool) -> None:
    """Measure all cases and print them, as text or as one JSON list."""

    def say(text: str) -> None:
        if not as_json:
            print(text, flush=True)

    planner = f"numba {version('numba')}" if COMPILED else "no numba"
    say(
        f"{platform.machine()}, Python {platform.python_version()}, NumPy {np.__version__},"
        f" {planner}; one thread, median of {repeat}"
    )
    rows: list[Row] = []
    for case in _cases(quick=quick):
        load = make_load(case, data)
        if load is None:
            say(f"{case.label}\n  left out: recorded load not found; set HOTSET_DATA")
            continue
        found = measure(case, load, repeat=repeat)
        say(render(found))
        rows += found
    if not quick:
        found = stream_rows(data) + affinity_rows(data)
        say(render(found) if found else "streams\n  left out: set HOTSET_DATA")
        rows += found
    if as_json:
        print(json.dumps([asdict(row) for row in rows]))
