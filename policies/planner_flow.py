"""Levels the devices of one layer by moving load between replicas of the same expert. Compiled.

Decides how much of each expert's load its slots take, never where experts are. Must not know
arguments as users give them (`shares` checks those), other layers, or prices.

A limit is a time that no device may exceed; a perfectly level layer takes 1.0. Load is pushed from
devices over the limit along chains of replicas to devices under it: blocking flows over shortest
chains (Dinic 1970). When no chain leads out, the devices that were reached are a bottleneck: its
load over its speed is the next limit (Newton's method on the cut). The end is the optimum of the
linear program of LPLB, up to `TOLERANCE`.

Invariants: the flows of an expert sum to its load, none is negative, `held` agrees with `flow`.
"""

# ruff: noqa: C901, PLR0912 - loops over arrays; numba pays for every call and every object

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from hotset.policies.jit import compiled

TOLERANCE = 1e-8
"""A device may exceed the limit by this part of it."""
HAIR = 1e-3 * TOLERANCE
"""A device this close under the limit takes nothing more."""
CRUMB = 1e-13
"""Load below this part of a layer's total is not worth a path."""
UNSEEN = -1
Ints = NDArray[np.int64]
Floats = NDArray[np.float64]


class Flow(NamedTuple):
    """Who takes how much of one layer's load, and scratch space to change it."""

    slot: Ints  # [P] expert, or -1
    load: Floats  # [E], sums to 1
    speed: Floats  # [D], sums to 1
    first: Ints  # [E + 1] where an expert's slots begin in `hosts`
    hosts: Ints  # [P] slots that hold an expert, by expert
    flow: Floats  # [P] load that a slot takes
    held: Floats  # [D] load that a device takes
    stuck: Ints  # [D] 1 in the last bottleneck
    depth: Ints  # [D] chain length from a device over the limit, or UNSEEN
    layer_of: Ints  # [E] the same for experts
    next_slot: Ints  # [D] slot from which a device's search goes on
    next_host: Ints  # [E] place in `hosts` from which an expert's search goes on
    queue: Ints  # [D]
    path: Ints  # [D] slots that give, in the order of the chain


@compiled
def open_flow(slot: Ints, load: Floats, speed: Floats) -> Flow:
    """Every replica takes the same part; `load` and `speed` sum to 1."""
    experts, devices = load.shape[0], speed.shape[0]
    whole = Flow(
        slot,
        load,
        speed,
        np.zeros(experts + 1, dtype=np.int64),
        np.zeros(slot.shape[0], dtype=np.int64),
        np.zeros(slot.shape[0]),
        np.zeros(devices),
        np.zeros(devices, dtype=np.int64),
        np.zeros(devices, dtype=np.int64),
        np.zeros(experts, dtype=np.int64),
        np.zeros(devices, dtype=np.int64),
        np.zeros(experts, dtype=np.int64),
        np.zeros(devices, dtype=np.int64),
        np.zeros(devices, dtype=np.int64),
    )
    list_hosts(slot, whole.first, whole.hosts, whole.next_host)
    for expert in range(experts):
        start, end = whole.first[expert], whole.first[expert + 1]
        for index in range(start, end):
            at = whole.hosts[index]
            whole.flow[at] = load[expert] / (end - start)
    hold(whole)
    return whole


@compiled
def list_hosts(slot: Ints, first: Ints, hosts: Ints, ahead: Ints) -> None:
    """List slots by expert: those of e are `hosts[first[e] : first[e + 1]]`; `ahead` is scratch."""
    first[:] = 0
    for at in range(slot.shape[0]):
        if slot[at] >= 0:
            first[slot[at] + 1] += 1
    for expert in range(ahead.shape[0]):
        ahead[expert] = first[expert]
        first[expert + 1] += first[expert]
    for at in range(slot.shape[0]):
        expert = slot[at]
        if expert >= 0:
            hosts[ahead[expert]] = at
            ahead[expert] += 1


@compiled
def _root(label: Ints, device: int) -> int:
    while label[device] != device:
        label[device] = label[label[device]]
        device = int(label[device])
    return device


@compiled
def find_sets(label: Ints, first: Ints, hosts: Ints, width: int) -> int:
    """Label devices [D] that share an expert with the first of their set; return how many sets."""
    number = len(label)
    for device in range(number):
        label[device] = device
    for expert in range(first.shape[0] - 1):
        if first[expert + 1] - first[expert] < 2:
            continue
        one = _root(label, hosts[first[expert]] // width)
        for index in range(first[expert] + 1, first[expert + 1]):
            two = _root(label, hosts[index] // width)
            if one != two:
                label[max(one, two)] = min(one, two)
                one = min(one, two)
                number -= 1
    for device in range(label.shape[0]):
        label[device] = _root(label, device)
    return number


@compiled
def hold(whole: Flow) -> None:
    """Derive `held` from `flow`."""
    width = whole.slot.shape[0] // whole.speed.shape[0]
    whole.held[:] = 0.0
    for at in range(whole.slot.shape[0]):
        whole.held[at // width] += whole.flow[at]


@compiled
def _survey(whole: Flow, limit: float) -> tuple[int, bool]:
    """Depth of all that chains from devices over the limit reach: (devices seen, way out found).

    Ends with the depth at which the first device under the limit was found.
    """
    slot, first, hosts, flow, held = whole.slot, whole.first, whole.hosts, whole.flow, whole.held
    depth, layer_of, queue = whole.depth, whole.layer_of, whole.queue
    devices = held.shape[0]
    width = slot.shape[0] // devices
    depth[:] = UNSEEN
    layer_of[:] = UNSEEN
    tail = 0
    for device in range(devices):
        if held[device] > limit * whole.speed[device] * (1.0 + TOLERANCE):
            depth[device] = 0
            queue[tail] = device
            tail += 1
    last, head, found = devices + 1, 0, False
    while head < tail:
        device = queue[head]
        head += 1
        if depth[device] >= last:
            break
        for at in range(device * width, device * width + width):
            expert = slot[at]
            if expert < 0 or layer_of[expert] != UNSEEN or flow[at] <= CRUMB:
                continue
            layer_of[expert] = depth[device]
            for index in range(first[expert], first[expert + 1]):
                to = hosts[index] // width
                if depth[to] != UNSEEN:
                    continue
                depth[to] = depth[device] + 1
                queue[tail] = to
                tail += 1
                if held[to] < limit * whole.speed[to] * (1.0 - HAIR):
                    last, found = depth[to], True
    return tail, found


@compiled
def _drain(whole: Flow, source: int, limit: float) -> None:
    """Push what `source` holds over the limit along chains of the surveyed depth."""
    slot, first, hosts, flow, held = whole.slot, whole.first, whole.hosts, whole.flow, whole.held
    depth, layer_of, path = whole.depth, whole.layer_of, whole.path
    next_slot, next_host = whole.next_slot, whole.next_host
    width = slot.shape[0] // held.shape[0]
    device, length = source, 0
    while True:
        room = limit * whole.speed[device] - held[device]
        if length > 0 and room > limit * whole.speed[device] * HAIR:
            amount = min(room, held[source] - limit * whole.speed[source])
            for step in range(length):
                amount = min(amount, flow[path[step]])
            for step in range(length):
                giver = path[step]
                flow[giver] -= amount
                flow[hosts[next_host[slot[giver]]]] += amount
            held[source] -= amount
            held[device] += amount
            if held[source] <= limit * whole.speed[source] * (1.0 + 0.5 * TOLERANCE):
                return
            device, length = source, 0
            continue
        ahead = -1
        while next_slot[device] < width:
            at = device * width + next_slot[device]
            expert = slot[at]
            if expert >= 0 and layer_of[expert] == depth[device] and flow[at] > CRUMB:
                while next_host[expert] < first[expert + 1]:
                    to = hosts[next_host[expert]] // width
                    if depth[to] == depth[device] + 1:
                        ahead = to
                        break
                    next_host[expert] += 1
                if ahead >= 0:
                    path[length] = at
                    break
            next_slot[device] += 1
        if ahead >= 0:
            device = ahead
            length += 1
        elif length == 0:
            return
        else:  # nothing leads on from here: the way here is of no use to others either
            length -= 1
            giver = path[length]
            next_host[slot[giver]] += 1
            device = giver // width


@compiled
def _set_bound(whole: Flow, goal: float) -> float:
    """The limit that the most burdened connected set allows, if above `goal`; marks it `stuck`."""
    label, devices = whole.next_slot, whole.held.shape[0]
    find_sets(label, whole.first, whole.hosts, whole.slot.shape[0] // devices)
    load, speed = np.zeros(devices), np.zeros(devices)
    for device in range(devices):
        load[label[device]] += whole.held[device]
        speed[label[device]] += whole.speed[device]
    worst, limit = -1, goal * (1.0 + TOLERANCE)
    for device in range(devices):
        if load[device] > limit * speed[device]:
            worst, limit = device, load[device] / speed[device]
    for device in range(devices):
        whole.stuck[device] = 1 if label[device] == worst else 0
    return float(limit) if worst >= 0 else goal


@compiled
def level(whole: Flow, goal: float) -> float:
    """Push until every device keeps the least possible limit, but no lower than `goal`; return it.

    `stuck` marks the devices that keep the limit from being lower, if it is above `goal`.
    """
    limit = _set_bound(whole, goal)
    for _ in range(64 * whole.slot.shape[0]):
        seen, found = _survey(whole, limit)
        if seen == 0:
            break
        if not found:
            load = speed = 0.0
            whole.stuck[:] = 0
            for index in range(seen):
                device = whole.queue[index]
                load += whole.held[device]
                speed += whole.speed[device]
                whole.stuck[device] = 1
            limit = max(load / speed, limit * (1.0 + 0.1 * TOLERANCE))
            continue
        whole.next_slot[:] = 0
        whole.next_host[:] = whole.first[:-1]
        for index in range(seen):
            source = whole.queue[index]
            if whole.depth[source] > 0:
                break
            _drain(whole, source, limit)
    return limit


@compiled
def level_layer(slot: Ints, load: Floats, speed: Floats, shares: Floats) -> None:
    """Fill `shares` [P] of one layer; `load` and `speed` sum to 1."""
    whole = open_flow(slot, load, speed)
    level(whole, 1.0)
    first, hosts, flow = whole.first, whole.hosts, whole.flow
    for expert in range(load.shape[0]):
        start, end = first[expert], first[expert + 1]
        total = 0.0  # added up again, because pushing rounds
        for index in range(start, end):
            total += max(flow[hosts[index]], 0.0)
        for index in range(start, end):
            at = hosts[index]
            shares[at] = max(flow[at], 0.0) / total if total > 0.0 else 1.0 / (end - start)


@compiled
def level_layers(slot: Ints, load: Floats, speed: Floats, shares: Floats) -> None:
    """Fill `shares` [L, P] of every layer."""
    for index in range(slot.shape[0]):
        level_layer(slot[index], load[index], speed, shares[index])
