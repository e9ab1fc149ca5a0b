"""Allocation: the format of each block under bytes or under a quality budget.

Decides formats from a table of damages and sizes. Must not know how damage was measured, nor where
copies are. A multiple-choice knapsack: each block takes one of its formats. Greedy over the steps
of each block's lower convex hull, the fewest nats for each byte saved first (Sinha and Zoltners
1979); its fractional form is the optimum of the LP relaxation, so the loss against the relaxation
is at most one step.

Invariants: a format that `allowed` excludes is never chosen; an expert's and a layer's damage stay
under their caps; under a budget the sum of damages never exceeds it, and a budget of 0
allows lossless formats only, whatever the table says; under bytes the sum of bytes
never exceeds them, or ValueError says that no allocation can.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from hotset.policies.guard import is_lossless

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

    Floats = NDArray[np.float64]
    Ints = NDArray[np.int64]
    Flags = NDArray[np.bool_]

LAYER_CAP_RATIO = 0.5
EXPERT_CAP_RATIO = 0.1


@dataclass(frozen=True, slots=True, kw_only=True)
class Costs:
    """What each block costs in each format; the first format is full precision.

    `formats` names [F], best quality first; `nbytes` [F] of one block; `nats` [L, E, F] damage for
    each token of text, 0 in the first format. Rows are MoE layers in ascending order.
    """

    formats: tuple[str, ...]
    nbytes: Ints
    nats: Floats

    def __post_init__(self) -> None:
        """Refuse tables that do not fit together, with the field's name."""
        if self.nats.ndim != 3 or self.nats.shape[2] != len(self.formats):
            raise ValueError(
                f"nats must be [L, E, {len(self.formats)}] for formats {self.formats}, "
                f"not {self.nats.shape}"
            )
        if self.nbytes.shape != (len(self.formats),) or (self.nbytes <= 0).any():
            raise ValueError("nbytes must hold one positive size for each format")
        if not np.isfinite(self.nats).all() or (self.nats < 0).any():
            raise ValueError("nats must be finite and not negative; calibrate again")
        if self.nats[..., 0].any():
            raise ValueError("nats of the first format must be 0; put full precision first")


@dataclass(frozen=True, slots=True, kw_only=True)
class Allocation:
    """A format for each block: `formats[codes[layer, expert]]`."""

    codes: Ints  # [L, E]
    nbytes: int
    nats: float


@dataclass(frozen=True, slots=True, kw_only=True)
class _Steps:
    """Hull steps of all blocks: block `at` goes from `before` to `after`."""

    at: Ints
    before: Ints
    after: Ints
    saved: Floats  # bytes
    nats: Floats  # damage added


def allocate(  # noqa: PLR0913 - the terms of one trade
    costs: Costs,
    *,
    bytes_at_most: float | None = None,
    nats_at_most: float | None = None,
    allowed: Any = None,
    layer_cap_nats: float = np.inf,
    expert_cap_nats: float = np.inf,
) -> Allocation:
    """Choose formats: least damage under `bytes_at_most`, or fewest bytes under `nats_at_most`.

    With both, demotion stops as soon as the bytes fit, and ValueError tells that the budget does
    not reach them. `allowed` [L, E, F] (or broadcastable) is False where a floor forbids a format;
    the first format is always allowed. Raises ValueError that names the argument.
    """
    if bytes_at_most is None and nats_at_most is None:
        raise ValueError("give bytes_at_most, nats_at_most or both")
    layers, experts, _ = costs.nats.shape
    usable = _usable(costs, allowed, expert_cap_nats)
    if nats_at_most is not None and nats_at_most <= 0:
        usable &= [is_lossless(name) for name in costs.formats]  # exact, whatever the table says
    steps = _hulls(costs, usable)
    budget = np.inf if nats_at_most is None else float(nats_at_most)
    total = float(costs.nbytes[0]) * layers * experts
    surplus = np.inf if bytes_at_most is None else total - float(bytes_at_most)
    codes = np.zeros(layers * experts, dtype=np.int64)
    spent, by_layer = 0.0, np.zeros(layers)
    taken: list[int] = []
    for one in np.lexsort((steps.at, steps.nats / steps.saved)):
        if surplus <= 0:
            break
        block, more = int(steps.at[one]), float(steps.nats[one])
        if codes[block] != steps.before[one]:
            continue  # an earlier step of this block was refused
        layer = block // experts
        if spent + more > budget or by_layer[layer] + more > layer_cap_nats:
            continue
        codes[block] = steps.after[one]
        spent, surplus = spent + more, surplus - float(steps.saved[one])
        by_layer[layer] += more
        taken.append(int(one))
    if bytes_at_most is not None:
        if surplus > 0:
            raise ValueError(
                f"bytes_at_most={bytes_at_most:.0f} cannot be reached within floors, caps and "
                f"budget: {surplus:.0f} bytes too many; give more bytes or a larger budget"
            )
        _give_back(steps, codes, taken, slack=-surplus)
    return described(costs, codes.reshape(layers, experts))


def described(costs: Costs, codes: Ints) -> Allocation:
    """Bytes and damage of given codes [L, E]."""
    chosen = np.take_along_axis(costs.nats, codes[..., None], axis=2)
    return Allocation(codes=codes, nbytes=int(costs.nbytes[codes].sum()), nats=float(chosen.sum()))


def caps(budget_nats: float, *, gamma: float) -> tuple[float, float]:  # layer, expert
    """Most damage of one layer and of one expert, in the table's nats, under a budget."""
    share = budget_nats / gamma
    return share * LAYER_CAP_RATIO, share * EXPERT_CAP_RATIO


def relaxed_nats(costs: Costs, *, bytes_at_most: float, allowed: Any = None) -> float:
    """Least damage of the LP relaxation under bytes: a lower bound for any allocation.

    The greedy order with the last step taken in part. ValueError when the bytes cannot be reached.
    """
    steps = _hulls(costs, _usable(costs, allowed, np.inf))
    layers, experts, _ = costs.nats.shape
    surplus = float(costs.nbytes[0]) * layers * experts - float(bytes_at_most)
    nats = 0.0
    for one in np.argsort(steps.nats / steps.saved, kind="stable"):
        if surplus <= 0:
            return nats
        part = min(1.0, surplus / float(steps.saved[one]))
        nats += part * float(steps.nats[one])
        surplus -= part * float(steps.saved[one])
    if surplus > 1e-6:
        raise ValueError(f"bytes_at_most={bytes_at_most:.0f} is below the cheapest formats")
    return nats


def _usable(costs: Costs, allowed: Any, expert_cap: float) -> Flags:
    """Formats that each block may take, [L * E, F]."""
    flags = np.ones(costs.nats.shape, dtype=np.bool_)
    if allowed is not None:
        flags &= np.asarray(allowed, dtype=np.bool_)
    flags &= costs.nats <= expert_cap
    flags[..., 0] = True
    return flags.reshape(-1, len(costs.formats))


def _hulls(costs: Costs, usable: Flags) -> _Steps:
    """Steps along each block's lower convex hull of damage over bytes saved."""
    nats = costs.nats.reshape(usable.shape)
    saved = (costs.nbytes[0] - costs.nbytes).astype(np.float64)
    rows: list[tuple[int, int, int]] = []
    for block in range(usable.shape[0]):
        rows += ((block, a, b) for a, b in _hull(nats[block], saved, usable[block]))
    at, before, after = (np.array([row[part] for row in rows], dtype=np.int64) for part in range(3))
    return _Steps(
        at=at,
        before=before,
        after=after,
        saved=saved[after] - saved[before],
        nats=nats[at, after] - nats[at, before],
    )


def _hull(nats: Floats, saved: Floats, usable: Flags) -> Iterator[tuple[int, int]]:
    """Edges of one block's hull, from full precision to fewer bytes (monotone chain)."""
    chain = [0]
    for code in (int(c) for c in np.lexsort((nats, saved)) if usable[c]):
        if saved[code] <= saved[chain[-1]]:
            continue  # as small as the last one and no better
        while len(chain) > 1 and _slope(nats, saved, chain[-2], chain[-1]) >= _slope(
            nats, saved, chain[-1], code
        ):
            chain.pop()
        chain.append(code)
    yield from itertools.pairwise(chain)


def _slope(nats: Floats, saved: Floats, left: int, right: int) -> float:
    return float(nats[right] - nats[left]) / float(saved[right] - saved[left])


def _give_back(steps: _Steps, codes: Ints, taken: list[int], *, slack: float) -> None:
    """Undo the steps that hurt most as far as the bytes left over allow it."""
    for one in sorted(taken, key=lambda step: (-steps.nats[step], step)):
        block, gain = int(steps.at[one]), float(steps.saved[one])
        if gain <= slack and codes[block] == steps.after[one]:
            codes[block] = steps.before[one]
            slack -= gain
