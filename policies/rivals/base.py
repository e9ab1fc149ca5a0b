"""What the rival policies share: values by block, room by layer, and a stand-in for next gates.

Decides nothing by itself. Must not know links or clocks; none of the papers steers by the link,
so `steer` does nothing. Invariant: with quotas, a layer above its share gives up a copy before
one below it does.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from hotset.policies.device import DeviceShape, DeviceTable, Resident
from hotset.policies.foresight import Path, StagedPredictor
from hotset.policies.plan import LayerPlan, UseChances, sort_needs
from hotset.policies.types import Format, Reason

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence

    from numpy.typing import NDArray

_MOST_REQUESTS = 64
_GUARD = 1e12
"""What was fetched ahead outranks all else until its layer has passed, or it came in vain."""


def slots_of(shape: DeviceShape) -> int:
    """Full copies that the device holds."""
    return shape.capacity_bytes // shape.full_nbytes


def even_quota(shape: DeviceShape) -> NDArray[np.int64]:
    """Slots by row when every layer gets the same; the first layers take what is left over."""
    rows = len(shape.layers)
    share, rest = divmod(slots_of(shape), rows)
    return np.array([share + (row < rest) for row in range(rows)], dtype=np.int64)


class Rival(DeviceTable):
    """A policy that keeps the copies of the highest value; subclasses say what that is.

    `quota` [rows] divides the slots among the layers; None: all layers compete for all slots.
    """

    def __init__(self, shape: DeviceShape, *, quota: NDArray[np.int64] | None = None) -> None:
        """Start empty."""
        super().__init__(shape)
        self.rows, self.size = len(shape.layers), shape.num_experts
        self._values = np.full(self.rows * self.size, 0.5)
        self._quota = quota
        self._count = np.zeros(self.rows, dtype=np.int64)
        self._guarded: list[list[int]] = [[] for _ in range(self.rows)]
        self._guard = np.ones(self.rows * self.size)
        self._here = 0

    # --- what subclasses decide -------------------------------------------------------------

    def _used(
        self, row: int, *, experts: Sequence[int], missing: Sequence[int], request: int
    ) -> None:
        """Change values: these experts are used at `row` now, `missing` were not here."""

    def _guess(self, row: int, *, experts: Sequence[int], request: int) -> list[tuple[int, int]]:
        """Return (row, expert) to prefetch, likeliest first; what is here already is skipped."""
        del row, experts, request
        return []

    # --- the protocol -----------------------------------------------------------------------

    def routed(
        self,
        layer: int,
        experts: Sequence[int],
        counts: Sequence[int],
        *,
        step: int,
        request: int = 0,
    ) -> LayerPlan:
        """See `ResidencyPolicy`."""
        self._step = step
        base = self._base[layer]
        row = self._here = base // self.size
        plan = sort_needs(self, base, experts=experts, counts=counts)
        self._used(row, experts=experts, missing=plan.missing, request=request)
        if self._guarded[row]:
            self._guard[self._guarded[row]] = 1.0
            self._guarded[row].clear()
            self._rerank(row)
        landed, coming = self._format, self._coming
        for ahead, expert in self._guess(row, experts=experts, request=request):
            flat = ahead * self.size + expert
            if landed[flat] is None and coming[flat] is None:
                self._guarded[ahead].append(flat)
                self._guard[flat] = _GUARD
                plan.prefetch.append((self.layers[ahead], expert))
        return plan

    def victim(
        self, want_bytes: int, *, needed: Collection[tuple[int, int]] = ()
    ) -> Resident | None:
        """See `ResidencyPolicy`."""
        if self._quota is None or needed or self.room(want_bytes):
            return super().victim(want_bytes, needed=needed)
        over = self._count - self._quota
        row = self._here
        worst = int(over.argmax())
        if over[worst] > over[row]:
            row = worst
        if not self._count[row]:
            return super().victim(want_bytes)
        first = row * self.size
        part = self._rank[first : first + self.size]
        expert = int(part.argmin())
        form = self._format[first + expert]
        if part[expert] == np.inf or form is None:
            return None
        return Resident(self.layers[row], expert, form)

    def steer(
        self,
        least_chance: float,
        *,
        most: int | None = None,
        ahead: int = 1,
        missed_ns: int | None = None,
    ) -> None:
        """The paper knows no feedback from the link."""

    def use_chances(self, layer: int, expert: int) -> UseChances:  # noqa: ARG002 - protocol
        """The papers do not weigh a fetch against what it displaces."""
        return UseChances(0.0, 0.0)

    def forget(self, request: int) -> None:
        """Nothing is kept by request."""

    def expected_use(self) -> NDArray[np.float64]:
        """Values as a stand-in, scaled to at most 1."""
        values = self._values.reshape(self.rows, self.size)
        top = float(values.max())
        scaled: NDArray[np.float64] = values / top if top > 0 else values
        return scaled

    # --- the books --------------------------------------------------------------------------

    def in_flight(
        self, layer: int, expert: int, form: Format = Format.BF16, reason: Reason = Reason.DEMAND
    ) -> None:
        """See `DeviceTable`."""
        here = self._format[self._base[layer] + expert] is not None
        super().in_flight(layer, expert, form, reason)
        self._count[self._base[layer] // self.size] += not here

    def failed(self, layer: int, expert: int, *, staged: bool = False) -> None:
        """See `DeviceTable`."""
        super().failed(layer, expert, staged=staged)
        flat = self._base[layer] + expert
        self._count[flat // self.size] -= self._format[flat] is None

    def dropped(
        self, layer: int, expert: int, *, staged: bool = False, reason: Reason = Reason.EVICT
    ) -> None:
        """See `DeviceTable`."""
        super().dropped(layer, expert, staged=staged, reason=reason)
        self._count[self._base[layer] // self.size] -= 1

    def _value(self, flat: int) -> float:
        return float(self._values[flat] * self._guard[flat])

    def _rerank(self, row: int | None = None) -> None:
        """Values of a row (None: of all) have changed."""
        here = slice(None) if row is None else slice(row * self.size, (row + 1) * self.size)
        rank = self._rank[here]
        np.multiply(self._values[here], self._held[here], out=rank)
        rank *= self._guard[here]


class NextGates:
    """Stand-in for running the next layers' routers on this layer's hidden state.

    A routing trace has no hidden states. The nearest to a next gate that can be had from routing
    alone is a linear map, learnt online, from the experts of this layer to those of the layers
    ahead: `StagedPredictor` without the request's history. Its recall on recorded traces is .6 to
    .75, that of true next gates in the papers .8 to .97.
    """

    def __init__(self, *, rows: int, num_experts: int, depth: int = 1) -> None:
        """`depth` layers ahead."""
        self._predictor = StagedPredictor(rows=rows, num_experts=num_experts, depth=depth)
        self._paths: dict[int, Path] = {}
        self.rows, self.size, self.depth = rows, num_experts, self._predictor.depth

    def see(self, row: int, *, experts: Sequence[int], request: int) -> NDArray[np.float32]:
        """Return the odds [depth, E] for the rows after `row`."""
        path = self._paths.get(request)
        if path is None:
            if len(self._paths) >= _MOST_REQUESTS:
                del self._paths[next(iter(self._paths))]
            path = self._paths[request] = self._predictor.begin()
        odds = self._predictor.visit(path, row, np.array(experts, dtype=np.intp))
        if row == self.rows - 1:
            self._predictor.finish_pass(path, learn=True)
        return odds[self.size :].reshape(self.depth, self.size)

    def forget(self, request: int) -> None:
        """A request has ended."""
        self._paths.pop(request, None)


def best(odds: NDArray[np.floating], count: int) -> list[int]:
    """Return the `count` experts of the highest odds [E], highest first."""
    found: list[int] = np.argsort(-odds, kind="stable")[:count].tolist()
    return found
