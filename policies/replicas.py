"""Which workers keep which replicas, and how the others' tokens are split over them.

Decides a proposal from what is there; `replanning` carries it out or refuses it. Must not know
events, epochs or clocks. The search is the planner's (`place.plan`), run on the copies that workers
hold now, whoever brought them there. A plan only ever adds copies and splits tokens: what a worker
gives up to make room is its own decision, so a plan never breaks before it makes, and any part of
a proposal is as legal as the whole.

Tokens of a worker that holds the expert itself are computed there. The others' go to the holders by
shares, set so that a holder's total comes as near as can be to its part of the best split
(`shares.best_shares`). Experts that no worker holds are fetched, and computed, by whoever needs
them. A worker that is full gives up what its own requests use least for each new copy, so a larger
plan may be the worse one: several prefixes of it are judged.

Shapes: D workers, B blocks in flat order, L layers, E experts, P = D * width slots.
Invariants: at most `keep_ratio` of a worker's memory is promised; equal inputs, equal proposals.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, TypeVar

import numpy as np

from hotset.policies.place import plan
from hotset.policies.shares import best_shares

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray

    from hotset.policies.place_types import Floats, Ints
    from hotset.policies.types import BlockInfo

    Bools = NDArray[np.bool_]

_Kind = TypeVar("_Kind", bound=np.generic)

_SPARE_SLOTS = 2
"""Slots that a search may fill at each worker and layer beyond those in use."""
_NOT_HELD = 1e-3
"""Size, in mean blocks, of an expert that no worker holds: it fills a slot and costs nothing."""
_FADED = 0.05
"""Share of its layer's mean load below which a kept copy is let go."""
_PERMILLE = 1000
_PREFIX = 4
"""Each smaller plan that is judged has so many times fewer copies: shares are what takes time."""


class Grid:
    """Flat blocks as a table of layers and experts."""

    def __init__(self, blocks: Sequence[BlockInfo]) -> None:
        """Blocks in flat order, sorted by layer and index."""
        layers = sorted({info.block.layer for info in blocks})
        row = {layer: at for at, layer in enumerate(layers)}
        width = 1 + max((info.block.index for info in blocks), default=0)
        self.row = np.array([row[info.block.layer] for info in blocks], dtype=np.intp)
        self.column = np.array([info.block.index for info in blocks], dtype=np.intp)
        self.flat = np.full((len(layers), width), -1, dtype=np.int64)
        self.flat[self.row, self.column] = np.arange(len(blocks))

    def table(self, values: NDArray[_Kind]) -> NDArray[_Kind]:
        """[..., B] -> [..., L, E]; zero where there is no block."""
        found = np.zeros((*values.shape[:-1], *self.flat.shape), dtype=values.dtype)
        found[..., self.row, self.column] = values
        return found


@dataclass(frozen=True, slots=True, kw_only=True)
class Survey:
    """What a plan starts from; arrays by worker and flat block."""

    names: tuple[str, ...]  # workers that stay, in an order that keeps nodes together
    num_nodes: int
    held: Bools  # [D, B] full copies, landed
    kept: Bools  # [D, B] those promised by earlier plans
    barred: Bools  # [D, B] copies that must not come now: on their way, failed, or just gone
    origin: Ints  # [D, B] aged tokens of each worker's own requests
    shares: Mapping[int, Mapping[str, int]]  # in force, by flat block
    nbytes: Ints  # [B] of a slot
    room_bytes: Ints  # [D] that may still be promised
    free_bytes: Ints  # [D] that nothing occupies
    batch_bytes: int  # most bytes of new copies at one worker


class Promise(NamedTuple):
    """A copy that `worker` (an index into `names`) should keep, or need not keep any more."""

    worker: int
    flat: int


class Option(NamedTuple):
    """A plan: its new copies, and what follows from them.

    `held` [D, L, E] is what will be there, `load` [D, L, E] the tokens by where they are computed,
    `split` [D, L, E] the part of the tokens from elsewhere that each holder gets. `fetched_ratio`
    is the part of all tokens whose expert nobody holds.
    """

    adds: tuple[Promise, ...]
    held: Bools
    split: Floats
    load: Floats
    fetched_ratio: float


class Proposal(NamedTuple):
    """What there is to choose from. `options` begin with shares alone, which move nothing."""

    now: Option
    options: tuple[Option, ...]
    released: tuple[Promise, ...]


def balancedness(load: Floats) -> float:
    """Mean over layers of mean by largest load: [D, L, E] -> 0..1; an idle layer is balanced."""
    by_worker = load.sum(axis=2)
    top = by_worker.max(axis=0)
    mean = by_worker.mean(axis=0)
    return float(np.where(top > 0, mean / np.where(top > 0, top, 1.0), 1.0).mean())


def propose(survey: Survey, grid: Grid) -> Proposal | None:
    """Search from what is there; None when no worker holds what anybody asks for."""
    held = grid.table(survey.held)
    origin = grid.table(survey.origin).astype(np.float64)
    total = origin.sum(axis=0)
    load = np.where(held.any(axis=0), total, 0.0)
    if not load.any():
        return None
    slots = fill_slots(held, spare=_SPARE_SLOTS if survey.room_bytes.max() > 0 else 0)
    sizes = np.where(held.any(axis=0), 1.0, _NOT_HELD)
    found = plan(
        load,
        num_devices=len(survey.names),
        num_slots=slots.shape[1],
        num_nodes=survey.num_nodes,
        current=slots,
        sizes=sizes,
        split="free",
    )
    planned = holders_of(found.physical_to_logical_map, held.shape)
    released = _released(survey, grid, planned=planned, load=load)
    wanted = planned & ~held & held.any(axis=0)
    adds = _affordable(survey, grid, wanted=wanted, load=load, released=released)
    split = _split_in_force(survey, grid, held)
    now = Option((), held, split, *_served(held, origin, split))
    prefixes: list[tuple[Promise, ...]] = [()]
    most = len(adds)
    while most:
        prefixes.append(adds[:most])
        most //= _PREFIX
    options = tuple(_option(survey, grid, some, held, origin) for some in prefixes)
    return Proposal(now, options, released)


def _option(
    survey: Survey, grid: Grid, adds: tuple[Promise, ...], held: Bools, origin: Floats
) -> Option:
    there = _making_room(survey, grid, adds, held)
    for worker, flat in adds:
        there[worker, grid.row[flat], grid.column[flat]] = True
    load = np.where(there.any(axis=0), origin.sum(axis=0), 0.0)
    split = split_tokens(there, origin, load=load)
    return Option(adds, there, split, *_served(there, origin, split))


def _served(held: Bools, origin: Floats, split: Floats) -> tuple[Floats, float]:
    fetched = origin * np.logical_not(held.any(axis=0))
    return loads(held, origin, split) + fetched, float(fetched.sum() / origin.sum())


def _making_room(survey: Survey, grid: Grid, adds: tuple[Promise, ...], held: Bools) -> Bools:
    """What is left of the copies once full workers have given up what they use least themselves."""
    left = held.copy()
    free = survey.free_bytes.copy()
    for worker in sorted({worker for worker, _ in adds}):
        free[worker] -= sum(int(survey.nbytes[flat]) for at, flat in adds if at == worker)
        spare = np.flatnonzero(survey.held[worker] & ~survey.kept[worker])
        spare = spare[np.argsort(survey.origin[worker, spare], kind="stable")]
        for flat in spare.tolist():
            if free[worker] >= 0:
                break
            free[worker] += survey.nbytes[flat]
            left[worker, grid.row[flat], grid.column[flat]] = False
    return left


def warm() -> None:
    """Search once among two workers, so that the planner's kernels are compiled or loaded."""
    held = np.array([[[True, False]], [[False, True]]])
    slots = fill_slots(held, spare=_SPARE_SLOTS)
    load = np.array([[3.0, 1.0]])
    plan(load, num_devices=2, num_slots=slots.shape[1], current=slots, split="free")
    best_shares(slots, load, num_devices=2)


def fill_slots(held: Bools, *, spare: int) -> Ints:
    """Slots [L, P] of what is held [D, L, E], each expert that nobody holds in one slot of its own.

    The planner wants every expert somewhere; those have no load, so it lets them lie.
    """
    devices, layers, _ = held.shape
    count = held.sum(axis=2)  # [D, L]
    lists = [[np.flatnonzero(held[d, at]).tolist() for d in range(devices)] for at in range(layers)]
    absent = np.logical_not(held.any(axis=0))
    for at in range(layers):
        for expert in np.flatnonzero(absent[at]).tolist():
            least = int(count[:, at].argmin())
            lists[at][least].append(expert)
            count[least, at] += 1
    width = int(count.max(initial=0)) + spare
    slots = np.full((layers, devices, width), -1, dtype=np.int64)
    for at, row in enumerate(lists):
        for device, experts in enumerate(row):
            slots[at, device, : len(experts)] = experts
    return slots.reshape(layers, devices * width)


def holders_of(slots: Ints, shape: Sequence[int]) -> Bools:
    """Which device has which expert: [L, P] -> [D, L, E]."""
    devices = shape[0]
    found = np.zeros(shape, dtype=np.bool_)
    width = slots.shape[1] // devices
    layer, slot = np.nonzero(slots >= 0)
    found[slot // width, layer, slots[layer, slot]] = True
    return found


def split_tokens(held: Bools, origin: Floats, *, load: Floats) -> Floats:
    """Return the part of the tokens from elsewhere for each holder, [D, L, E].

    Level loads want a holder to compute its best share of all tokens; its own count towards it.
    """
    devices = held.shape[0]
    slots = fill_slots(held, spare=0)
    parts = best_shares(slots, load, num_devices=devices)
    best = np.zeros(held.shape)
    width = slots.shape[1] // devices
    layer, slot = np.nonzero(slots >= 0)
    np.add.at(best, (slot // width, layer, slots[layer, slot]), parts[layer, slot])
    want = np.maximum(best * load - origin, 0.0) * held
    return _normal(want, held)


def loads(held: Bools, origin: Floats, split: Floats) -> Floats:
    """Tokens by where they are computed, [D, L, E]: at home where held, else by `split`."""
    here = origin * held
    away = origin.sum(axis=0) * held.any(axis=0) - here.sum(axis=0)
    found: Floats = here + split * away
    return found


def shares_of(split: Floats, held: Bools, grid: Grid) -> dict[int, dict[int, int]]:
    """Thousandths by flat block and worker, of blocks that several hold."""
    found: dict[int, dict[int, int]] = {}
    several = held.sum(axis=0) > 1
    for row, column in np.argwhere(several).tolist():
        flat = int(grid.flat[row, column])
        parts = np.rint(split[:, row, column] * _PERMILLE).astype(np.int64)
        where = np.flatnonzero(held[:, row, column])
        found[flat] = {int(worker): int(parts[worker]) for worker in where}
    return found


def _split_in_force(survey: Survey, grid: Grid, held: Bools) -> Floats:
    """The split that workers follow now: the last plan's where it speaks of a holder, else even."""
    want = np.zeros(held.shape)
    index = {name: at for at, name in enumerate(survey.names)}
    for flat, parts in survey.shares.items():
        for name, permille in parts.items():
            if name in index:
                want[index[name], grid.row[flat], grid.column[flat]] = permille
    return _normal(want * held, held)


def _normal(want: Floats, held: Bools) -> Floats:
    """Scale to sum to 1 over the holders; even where nobody is wanted."""
    total = want.sum(axis=0)
    count = held.sum(axis=0)
    even = held / np.maximum(count, 1)
    parts: Floats = np.where(total > 0, want / np.where(total > 0, total, 1.0), even)
    return parts


def _affordable(
    survey: Survey, grid: Grid, *, wanted: Bools, load: Floats, released: Sequence[Promise]
) -> tuple[Promise, ...]:
    """New copies within each worker's room and batch, the most used first."""
    room = survey.room_bytes.copy()
    for worker, flat in released:
        room[worker] += survey.nbytes[flat]
    ask = [
        (-float(load[row, column]), int(grid.flat[row, column]), worker)
        for worker, row, column in np.argwhere(wanted).tolist()
        if load[row, column] > 0
    ]
    left = np.minimum(room, survey.batch_bytes)
    first = np.ones(len(left), dtype=np.bool_)  # one copy may always fly
    adds: list[Promise] = []
    for _, flat, worker in sorted(ask):
        nbytes = int(survey.nbytes[flat])
        fits = nbytes <= left[worker] or (first[worker] and nbytes <= room[worker])
        if not fits or survey.barred[worker, flat]:
            continue
        first[worker] = False
        left[worker] -= nbytes
        adds.append(Promise(worker, flat))
    return tuple(adds)


def _released(survey: Survey, grid: Grid, *, planned: Bools, load: Floats) -> tuple[Promise, ...]:
    """Kept copies that the search gave up, that are gone, or whose block nobody asks for now."""
    mean = load.mean(axis=1)
    found = []
    for worker, flat in np.argwhere(survey.kept).tolist():
        row, column = int(grid.row[flat]), int(grid.column[flat])
        faded = load[row, column] < _FADED * mean[row]
        if faded or not survey.held[worker, flat] or not planned[worker, row, column]:
            found.append(Promise(worker, flat))
    return tuple(found)
