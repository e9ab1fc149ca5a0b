"""Policies that predict from recorded routing: MoE-Infinity, EdgeMoE, ExpertFlow.

These need no hidden states, so what they predict from is what their papers use, except for
ExpertFlow's trained transformer (see there).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from hotset.policies.foresight import Path, StagedPredictor
from hotset.policies.predictor import TransitionPredictor, Visit
from hotset.policies.rivals.base import Rival, best

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from hotset.policies.device import DeviceShape

_TINY = 1e-6


class MoEInfinity(Rival):
    """Activation matrices of requests (Xue et al., arXiv:2401.14361).

    A request's matrix counts its uses of each block. The matrix among up to 100 earlier requests'
    that is nearest by cosine says what comes: prefetches take the next two layers' likeliest by
    ratio x nearness, and a copy's value is its own request's ratio, smaller in later layers. The
    nearest matrix is looked up once a pass; when the collection is full, the matrix most like the
    newcomer gives way (the paper clusters instead).
    """

    _MOST = 100
    _LONGEST = 128
    """Passes after which a request's matrix is closed: a batch looks like one endless request."""

    def __init__(self, shape: DeviceShape) -> None:
        """Start without any request known."""
        super().__init__(shape)
        self._known = np.zeros((self._MOST, self.rows * self.size), dtype=np.float32)
        self._count_known = 0
        self._now = np.zeros((self.rows, self.size), dtype=np.float32)
        self._next: NDArray[np.float32] | None = None
        self._request: int | None = None
        self._passes = 0
        self._early = 1.0 - np.arange(self.rows) / self.rows

    def _used(
        self, row: int, *, experts: Sequence[int], missing: Sequence[int], request: int
    ) -> None:
        del missing
        self._passes += row == 0
        if request != self._request or self._passes > self._LONGEST:
            self._remember()
            self._request = request
            self._passes = 0
        self._now[row, experts] += 1.0
        if row == 0:
            self._match()
        part = self._values[row * self.size : (row + 1) * self.size]
        np.multiply(
            self._now[row] / self._now[row].sum() + _TINY, self._early[row] + _TINY, out=part
        )
        self._rerank(row)

    def _unit(self) -> NDArray[np.float32]:
        sums = np.maximum(self._now.sum(axis=1, keepdims=True), 1.0)
        flat = (self._now / sums).reshape(-1)
        unit: NDArray[np.float32] = flat / max(float(np.linalg.norm(flat)), _TINY)
        return unit

    def _match(self) -> None:
        if self._count_known:
            like = self._known[: self._count_known] @ self._unit()
            self._next = self._known[int(like.argmax())].reshape(self.rows, self.size)

    def _remember(self) -> None:
        if not self._now.any():
            return
        unit = self._unit()
        if self._count_known < self._MOST:
            place = self._count_known
            self._count_known += 1
        else:
            place = int((self._known @ unit).argmax())
        self._known[place] = unit
        self._now[:] = 0.0

    def _guess(self, row: int, *, experts: Sequence[int], request: int) -> list[tuple[int, int]]:
        del request
        if self._next is None:
            return []
        found: list[tuple[int, int]] = []
        for distance in range(1, min(3, self.rows)):
            ahead = (row + distance) % self.rows
            chosen = best(self._next[ahead], len(experts))
            found += [(ahead, expert) for expert in chosen if self._next[ahead, expert] > 0.0]
        return found


class EdgeMoE(Rival):
    """Statistics of transitions (Yi et al., arXiv:2308.14352), without its bit widths.

    The next layer's `k` likeliest experts given this layer's are preloaded; a copy's value is its
    frequency, less for layers that were just passed and so come last. The paper profiles offline;
    here the statistics grow with the requests.
    """

    def __init__(self, shape: DeviceShape) -> None:
        """Start without statistics."""
        super().__init__(shape)
        self._transitions = TransitionPredictor(rows=self.rows, num_experts=self.size)
        self._path: list[Visit] = []
        self._uses = np.full((self.rows, self.size), _TINY)
        distance = (np.arange(self.rows)[None, :] - np.arange(self.rows)[:, None]) % self.rows
        self._near = 1.0 - distance / self.rows

    def _used(
        self, row: int, *, experts: Sequence[int], missing: Sequence[int], request: int
    ) -> None:
        del missing, request
        self._uses[row, experts] += 1.0
        values = self._values.reshape(self.rows, self.size)
        np.multiply(self._uses, self._near[row][:, None], out=values)
        self._rerank()

    def _guess(self, row: int, *, experts: Sequence[int], request: int) -> list[tuple[int, int]]:
        del request
        now = np.array(experts, dtype=np.intp)
        path = self._path
        if path and (path[-1].row + 1) % self.rows != row:
            path.clear()
        path.append(Visit(row, now))
        if len(path) > self.rows:
            self._transitions.observe(path)
            del path[:-1]
        guess = self._transitions.predict(row, distance=1, experts=now)
        ahead = (row + 1) % self.rows
        return [(ahead, expert) for expert in best(guess, len(experts)) if guess[expert] > 0.0]


class ExpertFlow(Rival):
    """Predicts a token's whole path at once (He et al., arXiv:2410.17954).

    What is predicted is kept and loaded ahead, what is not goes first, and the router's true
    choice corrects both. The paper's predictor is a transformer over token ids, which a routing
    trace lacks; the stand-in predicts each layer from popularity and from the same request's last
    token, learnt online.
    """

    def __init__(self, shape: DeviceShape) -> None:
        """Start ignorant."""
        super().__init__(shape)
        self._predictor = StagedPredictor(rows=self.rows, num_experts=self.size, depth=0)
        self._paths: dict[int, Path] = {}

    def _used(
        self, row: int, *, experts: Sequence[int], missing: Sequence[int], request: int
    ) -> None:
        del missing
        path = self._paths.get(request)
        if path is None:
            path = self._paths[request] = self._predictor.begin()
        odds = self._predictor.visit(path, row, np.array(experts, dtype=np.intp))
        if row == self.rows - 1:
            self._predictor.finish_pass(path, learn=True)
        self._values[row * self.size : (row + 1) * self.size] = odds
        self._rerank(row)

    def _guess(self, row: int, *, experts: Sequence[int], request: int) -> list[tuple[int, int]]:
        ahead = (row + 1) % self.rows
        logits = self._paths[request].logits[ahead * self.size : (ahead + 1) * self.size]
        return [(ahead, expert) for expert in best(logits, len(experts))]

    def forget(self, request: int) -> None:
        """See `ResidencyPolicy`."""
        self._paths.pop(request, None)
