"""Caches that predict nothing, and the bounds: what every comparison starts from.

`lru`, `lfu` and `lfu-aged` divide the slots evenly among the layers, as every published MoE cache
does: in a pool, a plain LRU scans through all layers and keeps nothing as soon as one pass needs
more experts than there are slots. `lru-pool` is that pool. `belady` and `static` know the future.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from hotset.policies.rivals.base import Rival, even_quota

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from numpy.typing import NDArray

    from hotset.policies.device import DeviceShape

_AGED_HALF_LIFE = 8.0
"""Passes after which a use counts half in `lfu-aged`."""
_RESCALE_AT = 1e200


@dataclass(frozen=True, slots=True, kw_only=True)
class Future:
    """What an offline policy may know of the requests to come.

    `uses` [L, E] counts the visits that need each block. `next_visit[i]` belongs to the i-th call
    of `routed`: for each expert of that call the number of the call that needs the block again.
    """

    uses: NDArray[np.int64]
    next_visit: Sequence[NDArray[np.int64]]


class Lru(Rival):
    """Evicts what was used longest ago (Mattson et al., 1970)."""

    def __init__(self, shape: DeviceShape, *, pool: bool = False) -> None:
        """`pool`: all layers compete for all slots."""
        super().__init__(shape, quota=None if pool else even_quota(shape))
        self._now = 1.0

    def _used(
        self, row: int, *, experts: Sequence[int], missing: Sequence[int], request: int
    ) -> None:
        del request
        base = row * self.size
        absent = set(missing)
        for expert in [*(e for e in experts if e not in absent), *missing]:
            self._now += 1.0
            self._values[base + expert] = self._now
        self._rerank(row)


class LoadOnDemand(Rival):
    """Keeps what was loaded until its slot is wanted: first in, first out, over all layers."""

    def __init__(self, shape: DeviceShape) -> None:
        """Start empty."""
        super().__init__(shape)
        self._now = 1.0

    def _used(
        self, row: int, *, experts: Sequence[int], missing: Sequence[int], request: int
    ) -> None:
        del experts, request
        for expert in missing:
            self._now += 1.0
            self._values[row * self.size + expert] = self._now


class Lfu(Rival):
    """Evicts what was used least often; with `half_life` passes, uses age."""

    def __init__(self, shape: DeviceShape, *, half_life: float | None = None) -> None:
        """`half_life` None: a use counts for ever."""
        super().__init__(shape, quota=even_quota(shape))
        self._weight = 1.0
        self._growth = 1.0 if half_life is None else 2.0 ** (1.0 / (half_life * self.rows))

    def _used(
        self, row: int, *, experts: Sequence[int], missing: Sequence[int], request: int
    ) -> None:
        del missing, request
        base = row * self.size
        self._weight *= self._growth
        for expert in experts:
            self._values[base + expert] += self._weight
        self._rerank(row)
        if self._weight > _RESCALE_AT:
            self._values = np.maximum(self._values / self._weight, 1e-100)
            self._weight = 1.0
            self._rerank()


def aged_lfu(shape: DeviceShape) -> Lfu:
    """LFU with dynamic ageing (Robinson and Devarakonda, 1990, in the exponential form)."""
    return Lfu(shape, half_life=_AGED_HALF_LIFE)


class Static(Rival):
    """A hot list by layer, from the use counts of the very requests that are replayed.

    What is not on the list is streamed through. Knowing the counts beforehand flatters it.
    """

    def __init__(self, shape: DeviceShape, *, future: Future) -> None:
        """`future.uses` ranks the blocks."""
        super().__init__(shape, quota=even_quota(shape))
        self._values = future.uses.reshape(-1) + 1.0


class Belady(Rival):
    """Evicts what is needed last (Belady, 1966): no prefetch-free policy has fewer misses."""

    def __init__(self, shape: DeviceShape, *, future: Future) -> None:
        """Calls of `routed` must come in the order of `future.next_visit`."""
        super().__init__(shape)
        self._next: Iterator[NDArray[np.int64]] = iter(future.next_visit)

    def _used(
        self, row: int, *, experts: Sequence[int], missing: Sequence[int], request: int
    ) -> None:
        del missing, request
        places = np.array(experts, dtype=np.intp) + row * self.size
        self._values[places] = 1.0 / (2.0 + next(self._next))
        self._rerank(row)
