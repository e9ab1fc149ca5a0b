"""`hotset bench brain`: time of the brain's tick and events, from 15,000 to a million blocks.

Measures the pure core in this process, with no cluster: pools and a worker that hold everything, a
load that shifts before each tick, so that each one finds something to move. CPU time stands beside
wall time, because a machine that others use stretches only the latter.
"""

from __future__ import annotations

import platform
import statistics
import time
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from hotset.dashboards.text import table
from hotset.policies.brain import ClusterBrain
from hotset.policies.config import PolicyConfig
from hotset.policies.types import (
    BlockId,
    BlockInfo,
    Copy,
    Format,
    RouterCounts,
    StoreInfo,
    StoreJoined,
    Tick,
    Tier,
)

if TYPE_CHECKING:
    from collections.abc import Callable

EXPERTS = 256
_NBYTES = 1024
_SLOT = 1152  # two halves of 512 bytes with their headers, or one full copy
_TICK_NS = 10_000_000_000
_REPORT = 8192
"""Blocks in one report of routed tokens."""
BOUNDS_NS = {15_000: 10_000_000, 1_000_000: 700_000_000}


@dataclass(frozen=True, slots=True, kw_only=True)
class BrainRow:
    """Medians over `repeat` ticks; spread is the largest by the smallest of wall times."""

    blocks: int
    tick_ns: int
    tick_cpu_ns: int
    tick_spread: float
    report_ns_per_block: int
    join_ns_per_copy: int
    moves_per_tick: int
    bound_ns: int | None


def measure(blocks: int, *, repeat: int, seed: int = 1) -> BrainRow:
    """Fill a brain with so many blocks (rounded to whole layers) and time its events."""
    layers = max(1, round(blocks / EXPERTS))
    size = layers * EXPERTS
    infos = [
        BlockInfo(block=BlockId(layer, index), nbytes=_NBYTES, reduced_nbytes=_NBYTES // 2)
        for layer in range(layers)
        for index in range(EXPERTS)
    ]
    config = PolicyConfig(min_dwell_ns=0, cool_down_ns=0, bytes_per_tick=64 * _SLOT)
    brain = ClusterBrain(infos, config=config)
    third = size // 3
    joins: list[int] = []
    for name, tier, part in (
        ("host-0", Tier.HOST, infos[:third]),
        ("cxl-0", Tier.CXL, infos[third:]),
        ("worker-0", Tier.HBM, infos[: size // 10]),
    ):
        joins.append(_join(brain, name, tier, part))
    rng = np.random.default_rng(seed)
    ticks: list[int] = []
    cpu: list[int] = []
    reports: list[int] = []
    moves = 0
    for turn in range(1, repeat + 1):
        picked = rng.choice(size, size=min(size, _REPORT), replace=False)
        tokens = rng.integers(1, 5000, size=len(picked))
        counts = tuple(
            (infos[at].block, count)
            for at, count in zip(picked.tolist(), tokens.tolist(), strict=True)
        )
        event = RouterCounts(now_ns=turn * _TICK_NS, store="worker-0", counts=counts, tokens=4096)
        reports.append(_timed(partial(brain.handle, event)) // len(counts))
        cpu_began = time.process_time_ns()
        began = time.perf_counter_ns()
        commands = brain.handle(Tick(now_ns=turn * _TICK_NS))
        ticks.append(time.perf_counter_ns() - began)
        cpu.append(time.process_time_ns() - cpu_began)
        moves += len(commands) - 1
    bound = next((ns for count, ns in BOUNDS_NS.items() if abs(size - count) <= count // 50), None)
    return BrainRow(
        blocks=size,
        tick_ns=int(statistics.median(ticks)),
        tick_cpu_ns=int(statistics.median(cpu)),
        tick_spread=round(max(ticks) / max(1, min(ticks)), 2),
        report_ns_per_block=int(statistics.median(reports)),
        join_ns_per_copy=int(statistics.median(joins)),
        moves_per_tick=moves // repeat,
        bound_ns=bound,
    )


def _join(brain: ClusterBrain, name: str, tier: Tier, part: list[BlockInfo]) -> int:
    copies = tuple(
        Copy(
            block=info.block, format=Format.BF16, store=name, offset=0, nbytes=_NBYTES,
            generation=1, checksum=1, incarnation=1,
        )
        for info in part
    )  # fmt: skip
    store = StoreInfo(
        name=name, tier=tier, node="node0", incarnation=1, capacity_bytes=len(part) * _SLOT
    )
    event = StoreJoined(now_ns=1, store=store, copies=copies)
    return _timed(partial(brain.handle, event)) // max(1, len(part))


def _timed(call: Callable[[], object]) -> int:
    began = time.perf_counter_ns()
    call()
    return time.perf_counter_ns() - began


def render(rows: list[BrainRow]) -> str:
    """A table, with the growth by block beside each size."""
    head = (
        "blocks", "tick ms", "CPU ms", "spread", "ns/block", "bound ms", "moves",
        "report ns/block", "join ns/copy",
    )  # fmt: skip
    lines = [
        (
            f"{row.blocks:,}",
            f"{row.tick_ns / 1e6:.2f}",
            f"{row.tick_cpu_ns / 1e6:.2f}",
            f"{row.tick_spread:.2f}",
            f"{row.tick_cpu_ns / row.blocks:.0f}",
            f"{row.bound_ns / 1e6:.0f}" if row.bound_ns else "-",
            str(row.moves_per_tick),
            str(row.report_ns_per_block),
            str(row.join_ns_per_copy),
        )
        for row in rows
    ]
    machine = f"{platform.processor() or platform.machine()}, Python {platform.python_version()}"
    note = f"numpy {np.__version__}; medians, spread is largest by smallest"
    return f"{machine}, {note}\n" + "\n".join(table(head, lines))
