"""Plans whole layers from nothing, and makes a given one legal. Compiled like the kernels.

Decides replica counts, the order of packing, and which of a few attempts is kept. Must not know
arguments as users give them (`place` checks those) or other layers.

Invariant: every expert is placed or reported as missing.
"""

# ruff: noqa: C901, FBT001, PLR0913, PLR0917 - numba has no keyword-only
# arguments, and a call that hands over a whole layer costs more than the loop around it

from __future__ import annotations

import heapq
from typing import NamedTuple

import numpy as np

from hotset.policies.jit import compiled
from hotset.policies.planner_kernels import (
    Fleet,
    Floats,
    Ints,
    Layer,
    Log,
    covered,
    replicate,
    settle,
)
from hotset.policies.planner_pairs import fold_counts
from hotset.policies.planner_scans import FORBIDDEN
from hotset.policies.planner_search import search

FINE_GOAL = 1.0003
"""Time of the slowest device at which a plan from scratch is good enough to stop."""
RETRY_ABOVE = 1.003
REPACK_ABOVE = 1.005
RETRY_PAIRS_ABOVE = 1.028
"""Over the bound times this, a plan from scratch is tried again: with other replica counts, or
packed again with those that search found.

Two slots on a device leave few ways to fill it up, so less is asked there.
"""
ROUNDS = 2
"""Times that a layer is packed from one start, each time with the counts that search found."""
WORTH_PACKING = 1e-3
"""Less improvement than this ends packing again."""
FRESH_REACH = 0.05
"""Reach of the search, see `planner_search.search`."""


class Prices(NamedTuple):
    """What a byte costs."""

    move: float  # where it comes to another device
    cross: float  # added where the node did not hold the expert either
    leave: float  # added outside the expert's home node


@compiled
def blank(load: Floats, size: Floats, slot: Ints, home: Ints, fleet: Fleet, priced: bool) -> Layer:
    """A layer's state around `slot`, which is shared and not copied."""
    devices, nodes, experts = fleet.node.shape[0], fleet.num_nodes, load.shape[0]
    return Layer(
        slot,
        load,
        size,
        home,
        np.zeros((devices, experts)) if priced else np.zeros((1, 1)),
        np.zeros(experts, dtype=np.int64),
        np.zeros(experts),
        np.zeros(experts),
        np.zeros(experts),
        np.zeros((devices, experts), dtype=np.int16),
        np.zeros((nodes, experts), dtype=np.int16),
        np.zeros(devices),
        np.zeros(devices),
    )


@compiled
def _put(layer: Layer, fleet: Fleet, at: int, expert: int) -> None:
    """Put `expert` (or -1) into a slot; loads wait for the next `settle`."""
    device, old = at // fleet.width, layer.slot[at]
    node = fleet.node[device]
    if old >= 0:
        layer.count[old] -= 1
        layer.hold[device, old] -= 1
        layer.on_node[node, old] -= 1
        layer.used[device] -= layer.size[old]
    layer.slot[at] = expert
    if expert >= 0:
        layer.count[expert] += 1
        layer.hold[device, expert] += 1
        layer.on_node[node, expert] += 1
        layer.used[device] += layer.size[expert]


@compiled
def _gap(layer: Layer, fleet: Fleet, device: int) -> int:
    """First empty slot of a device that has one."""
    at = device * fleet.width
    while layer.slot[at] >= 0:
        at += 1
    return at


@compiled
def _best_device(
    layer: Layer, fleet: Fleet, free: Ints, expert: int, finish: Floats, unit: float, home: int
) -> int:
    """The device that would finish first with one more replica of load `unit`, or -1."""
    hold, used, room, node = layer.hold, layer.used, fleet.room, fleet.node
    pace, nbytes = fleet.pace, layer.size[expert]
    best, chosen = np.inf, -1
    for device in range(free.shape[0]):
        if free[device] <= 0 or (home >= 0 and node[device] != home):
            continue
        time = finish[device] + unit * pace[device]
        if time >= best or hold[device, expert] >= fleet.twice:
            continue
        if used[device] + nbytes > room[device]:
            continue
        if fleet.spread > 1 and not covered(
            layer, fleet, expert, -1, device, layer.count[expert] + 1
        ):
            continue
        best, chosen = time, device
    return chosen


@compiled
def _squeeze(layer: Layer, fleet: Fleet, free: Ints, expert: int) -> bool:
    """Place a copy that fits no free slot by moving another expert into one; say if it went."""
    for device in range(free.shape[0]):
        if free[device] <= 0:
            continue
        for at in range(layer.slot.shape[0]):
            other, there = layer.slot[at], at // fleet.width
            if other < 0 or there == device or layer.hold[there, expert] >= fleet.twice:
                continue
            if layer.hold[device, other] >= fleet.twice:
                continue
            if layer.used[device] + layer.size[other] > fleet.room[device]:
                continue
            grown = layer.size[expert] - layer.size[other]
            if layer.used[there] + grown > fleet.room[there]:
                continue
            if not covered(layer, fleet, other, there, device, layer.count[other]):
                continue
            if not covered(layer, fleet, expert, -1, there, layer.count[expert] + 1):
                continue
            _put(layer, fleet, at, expert)
            _put(layer, fleet, _gap(layer, fleet, device), other)
            free[device] -= 1
            return True
    return False


@compiled
def _displace(layer: Layer, fleet: Fleet, expert: int, least: int) -> bool:
    """Overwrite the replica that carries least, of an expert with more than `least`."""
    best, chosen = np.inf, -1
    for at in range(layer.slot.shape[0]):
        old = layer.slot[at]
        if old < 0 or layer.count[old] <= least:
            continue
        device = at // fleet.width
        if layer.hold[device, expert] >= fleet.twice:
            continue
        if not covered(layer, fleet, expert, -1, device, layer.count[expert] + 1):
            continue
        if layer.used[device] - layer.size[old] + layer.size[expert] > fleet.room[device]:
            continue
        if not covered(layer, fleet, old, device, -1, layer.count[old] - 1):
            continue
        unit = layer.load[old] / layer.count[old]
        if unit < best:
            best, chosen = unit, at
    if chosen >= 0:
        _put(layer, fleet, chosen, expert)
    return chosen >= 0


@compiled
def _raise_counts(layer: Layer, fleet: Fleet, free: Ints) -> None:
    """Bring experts with too few replicas to `least`, as far as there is room."""
    for expert in range(layer.load.shape[0]):
        while 0 < layer.count[expert] < fleet.least:
            settle(layer, fleet)
            unit = layer.load[expert] / fleet.least
            device = _best_device(layer, fleet, free, expert, layer.time, unit, -1)
            if device >= 0:
                _put(layer, fleet, _gap(layer, fleet, device), expert)
                free[device] -= 1
            elif not _displace(layer, fleet, expert, fleet.least):
                break


@compiled
def _place(
    layer: Layer, fleet: Fleet, free: Ints, finish: Floats, expert: int, unit: float
) -> bool:
    """Place one replica on the device that would finish first, at home if that has room."""
    device, home = -1, layer.home[expert]
    if home >= 0:
        device = _best_device(layer, fleet, free, expert, finish, unit, home)
    if device < 0:
        device = _best_device(layer, fleet, free, expert, finish, unit, -1)
    if device < 0:
        return False
    _put(layer, fleet, _gap(layer, fleet, device), expert)
    free[device] -= 1
    finish[device] += unit * fleet.pace[device]
    return True


@compiled
def _place_quickly(
    layer: Layer, fleet: Fleet, free: Ints, queue: list[tuple[float, int]], expert: int,
    unit: float, copies: int,
) -> int:  # fmt: skip
    """Place replicas on the devices at the head of a heap (finish, device); return how many.

    For equal devices without homes: all replicas of an expert go to different devices.
    """
    passed = [(0.0, 0) for _ in range(0)]
    placed = 0
    while placed < copies and len(queue) > 0:
        time, device = heapq.heappop(queue)
        if free[device] <= 0:
            continue  # filled by a squeeze
        roomy = layer.used[device] + layer.size[expert] <= fleet.room[device]
        if roomy and covered(layer, fleet, expert, -1, device, layer.count[expert] + 1):
            _put(layer, fleet, _gap(layer, fleet, device), expert)
            free[device] -= 1
            placed += 1
            time += unit * fleet.pace[device]
        if free[device] > 0:
            passed.append((time, device))
    for entry in passed:
        heapq.heappush(queue, entry)
    return placed


@compiled
def pack(layer: Layer, fleet: Fleet, count: Ints, firsts: bool) -> int:
    """Place `count` replicas of each expert, largest first; return experts without a copy.

    With `firsts`, one copy of each comes before all replicas, the largest in bytes first: the order
    that finds room where bytes are tight.
    """
    layer.slot[:] = -1
    settle(layer, fleet)
    devices = fleet.node.shape[0]
    finish = np.zeros(devices)
    free = np.full(devices, fleet.width)
    queue = [(0.0, device) for device in range(devices)]
    quick = (
        fleet.twice == 1
        and not firsts
        and layer.home[0] < 0
        and fleet.pace.min() == fleet.pace.max()
    )
    missing = 0
    unit = layer.load / count
    for turn in range(2 if firsts else 1):
        opening = firsts and turn == 0
        for expert in np.argsort(-layer.size if opening else -unit, kind="mergesort"):
            copies = 1 if opening else count[expert] - (1 if firsts else 0)
            if quick:
                copies -= _place_quickly(layer, fleet, free, queue, expert, unit[expert], copies)
            for _ in range(copies):
                if not quick and _place(layer, fleet, free, finish, expert, unit[expert]):
                    continue
                if not _squeeze(layer, fleet, free, expert):
                    missing += layer.count[expert] == 0
                    break  # its further replicas would fare no better
    _raise_counts(layer, fleet, free)
    fill(layer, fleet, free)
    settle(layer, fleet)
    return missing


@compiled
def fill(layer: Layer, fleet: Fleet, free: Ints) -> None:
    """Use slots that are still empty for replicas of the hottest experts that may go there."""
    for device in range(free.shape[0]):
        while free[device] > 0:
            best, chosen = -1.0, -1
            for expert in range(layer.load.shape[0]):
                copies = layer.count[expert]
                if copies < 1 or layer.hold[device, expert] >= fleet.twice:
                    continue
                if layer.used[device] + layer.size[expert] > fleet.room[device]:
                    continue
                unit = layer.load[expert] / copies
                if unit > best and covered(layer, fleet, expert, -1, device, copies + 1):
                    best, chosen = unit, expert
            if chosen < 0:
                break
            _put(layer, fleet, _gap(layer, fleet, device), chosen)
            free[device] -= 1


@compiled
def _counts(load: Floats, fleet: Fleet, home: Ints, slots: Ints, cap: float, cold: bool) -> Ints:
    """Replicas of each expert; with homes each node's slots go to its own experts."""
    count = np.ones(load.shape[0], dtype=np.int64)
    devices = fleet.node.shape[0]
    if home[0] < 0:
        left = slots.sum() - load.shape[0]
        replicate(load, left, devices * fleet.twice, cap, cold, count)
        return count
    for node in range(fleet.num_nodes):
        mine = np.flatnonzero(home == node)
        part = np.ones(mine.shape[0], dtype=np.int64)
        hosts = 0
        for device in range(devices):
            if fleet.node[device] == node:
                hosts += 1
        replicate(load[mine], slots[node] - mine.shape[0], hosts * fleet.twice, cap, cold, part)
        count[mine] = part
    return count


@compiled
def _start(layer: Layer, fleet: Fleet, slots: Ints, start: int) -> Ints:
    """Replica counts to begin with: the greedy ones, or fewer replicas of the hottest.

    Pairs of slots need replicas that complement each other, see `planner_pairs`; with more slots a
    large replica finds small company, so the hottest may fill most of a device.
    """
    count = _counts(layer.load, fleet, layer.home, slots, 0.0, False)
    devices = fleet.pace.shape[0]
    pairs = fleet.width == 2 and layer.home[0] < 0 and fleet.pace.min() == fleet.pace.max()
    if start > 0:
        cap = (0.7 if start == 1 else 0.8) / devices
        if fleet.width < 3:
            cap = 1.02 * (layer.load / count).max()
        count = _counts(layer.load, fleet, layer.home, slots, cap, fleet.width < 3 or start == 2)
    if pairs:
        fold_counts(layer.load, count, devices * fleet.twice)
    return count


@compiled
def fresh_layer(layer: Layer, fleet: Fleet, slots: Ints, price: float, log: Log) -> int:
    """Plan one layer from nothing; keep the best of a few replica counts.

    `slots[n]` are the usable slots of node n. A search changes counts; packing again with those is
    often better. Returns the number of experts that found no room.
    """
    best = layer.slot.copy()
    best_peak, best_missing = np.inf, layer.load.shape[0] + 1
    floor, enough, packed = 1.0, 1.0, np.inf
    wide = fleet.width > 2
    for start in range(4):
        if (start == 2 and not wide) or (start == 3 and best_missing == 0):
            continue
        count = _start(layer, fleet, slots, start % 3)
        if start == 0:
            floor = max(1.0, (layer.load / count).max() * fleet.pace.min())
            enough = floor * (RETRY_ABOVE if wide else RETRY_PAIRS_ABOVE)
        last = np.inf
        for again in range(ROUNDS if wide or start != 1 else 1):
            if fleet.least > 1:
                _at_least(count, fleet.least, slots.sum())
            missing = pack(layer, fleet, count, start == 3)
            if start == 0 and again == 0:
                packed = layer.time.max()
            elif wide and start < 3 and again == 0 and layer.time.max() > packed:
                break  # a bad start is not worth a search
            search(layer, fleet, FINE_GOAL, price, 0.0, wide, FRESH_REACH, log)
            peak = layer.time.max()
            if missing < best_missing or (missing == best_missing and peak < best_peak):
                best[:] = layer.slot
                best_peak, best_missing = peak, missing
            if best_peak <= floor * REPACK_ABOVE or peak > last - WORTH_PACKING:
                break
            if (layer.count == count).all():
                break  # packing again would give the same
            last = peak
            count = np.maximum(layer.count, 1)
        if best_missing == 0 and best_peak <= enough:
            break
    layer.slot[:] = best
    settle(layer, fleet)
    return int(best_missing)


@compiled
def _at_least(count: Ints, least: int, slots: int) -> None:
    """Raise every count to `least`, taking from the largest counts what the slots lack."""
    for expert in range(count.shape[0]):
        count[expert] = max(count[expert], least)
    over = count.sum() - slots
    while over > 0:
        rich = int(np.argmax(count))
        if count[rich] <= least:
            return
        count[rich] -= 1
        over -= 1


@compiled
def repair(layer: Layer, fleet: Fleet) -> int:
    """Make a given plan legal with few changes; return the experts that found no room.

    Copies that are one too many on a device or over its bytes go, missing experts come, empty slots
    are filled. The books must agree with the slots, and do so afterwards.
    """
    free = np.zeros(fleet.node.shape[0], dtype=np.int64)
    for device in range(free.shape[0]):
        for at in range(device * fleet.width, device * fleet.width + fleet.width):
            expert = layer.slot[at]
            if expert >= 0 and (
                layer.hold[device, expert] > fleet.twice or layer.used[device] > fleet.room[device]
            ):
                _put(layer, fleet, at, -1)
            if layer.slot[at] < 0:
                free[device] += 1
    missing = 0
    if layer.count.min() == 0:
        for expert in np.argsort(-layer.load, kind="mergesort"):
            if layer.count[expert] > 0:
                continue
            settle(layer, fleet)
            unit = layer.load[expert]
            device = _best_device(layer, fleet, free, expert, layer.time, unit, -1)
            if device >= 0:
                _put(layer, fleet, _gap(layer, fleet, device), expert)
                free[device] -= 1
            elif (
                not _squeeze(layer, fleet, free, expert)
                and not _displace(layer, fleet, expert, fleet.least)
                and not _displace(layer, fleet, expert, 1)
            ):
                missing += 1
    _raise_counts(layer, fleet, free)
    fill(layer, fleet, free)
    settle(layer, fleet)
    return missing


@compiled
def price_copies(layer: Layer, fleet: Fleet, prices: Prices) -> None:
    """Fill `cost`: nothing where the expert is now, bytes x price elsewhere."""
    for device in range(fleet.node.shape[0]):
        node = fleet.node[device]
        for expert in range(layer.load.shape[0]):
            price = 0.0
            if layer.hold[device, expert] == 0:
                price = prices.move
                if layer.on_node[node, expert] == 0:
                    price += prices.cross
            if layer.home[expert] >= 0 and layer.home[expert] != node:
                price += prices.leave
            layer.cost[device, expert] = price * layer.size[expert]


@compiled
def fresh_layers(
    slot: Ints, load: Floats, size: Floats, fleet: Fleet, home: Ints, slots: Ints, log: Log,
) -> Ints:  # fmt: skip
    """Plan every layer from nothing into `slot` [L, P]; return missing experts by layer.

    Where experts have homes, no search leaves them.
    """
    missing = np.zeros(slot.shape[0], dtype=np.int64)
    for index in range(slot.shape[0]):
        priced = home[index, 0] >= 0
        layer = blank(load[index], size[index], slot[index], home[index], fleet, priced)
        if priced:
            price_copies(layer, fleet, Prices(0.0, 0.0, 1.0))
        price = FORBIDDEN / size[index].mean() if priced else 0.0
        missing[index] = fresh_layer(layer, fleet, slots, price, log)
    return missing
