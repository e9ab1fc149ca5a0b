"""Policies that run the next layers' gates early: Mixtral-offloading, Fate, HOBBIT, HybriMoE.

A routing trace has no hidden states, so all four use `NextGates`, a trained stand-in; their true
gates predict better (see there). None uses cheaper formats here: the comparison is at full
precision.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import TYPE_CHECKING

import numpy as np

from hotset.policies.device import Resident
from hotset.policies.rivals.base import NextGates, Rival, best, slots_of
from hotset.policies.rivals.classic import Lru
from hotset.policies.types import Reason

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence

    from hotset.policies.device import DeviceShape


class MixtralOffloading(Lru):
    """LRU by layer, and a few speculative loads (Eliseev and Mazur, arXiv:2312.17238).

    As many experts as a quarter of those just used (the paper: one or two for top 2 of 8, at
    least one) are guessed for the next layer. A guess that fails is the first to go.
    """

    def __init__(self, shape: DeviceShape) -> None:
        """Start empty."""
        super().__init__(shape)
        self._gates = NextGates(rows=self.rows, num_experts=self.size)
        self._guessed: list[list[int]] = [[] for _ in range(self.rows)]

    def _used(
        self, row: int, *, experts: Sequence[int], missing: Sequence[int], request: int
    ) -> None:
        for expert in self._guessed[row]:
            self._values[row * self.size + expert] = 1e-3
        super()._used(row, experts=experts, missing=missing, request=request)

    def _guess(self, row: int, *, experts: Sequence[int], request: int) -> list[tuple[int, int]]:
        odds = self._gates.see(row, experts=experts, request=request)
        if not self._gates.depth:
            return []
        ahead = (row + 1) % self.rows
        chosen = best(odds[0], max(1, len(experts) // 4))
        guessed = self._guessed[ahead] = [
            expert for expert in chosen if self._format[ahead * self.size + expert] is None
        ]
        for expert in guessed:
            self._values[ahead * self.size + expert] = self._now
        return [(ahead, expert) for expert in chosen]

    def forget(self, request: int) -> None:
        """See `ResidencyPolicy`."""
        self._gates.forget(request)


class Fate(Rival):
    """Cross-layer gate, adaptive replacement, the shallow end kept (Fang et al., 2502.12224).

    Fetches the next layer's `k` likeliest. The first layer, which no gate foresees, is never
    evicted where it takes at most a quarter of the slots. The rest is an ARC (Megiddo and Modha,
    FAST 2003): recent and frequent copies in two lists, whose sizes follow the hits on the names
    of what either list evicted last.
    """

    def __init__(self, shape: DeviceShape) -> None:
        """Start empty."""
        super().__init__(shape)
        self._gates = NextGates(rows=self.rows, num_experts=self.size)
        self._slots = slots_of(shape)
        self._keep_first = 4 * self.size <= self._slots
        self._recent: OrderedDict[int, None] = OrderedDict()
        self._frequent: OrderedDict[int, None] = OrderedDict()
        self._was_recent: OrderedDict[int, None] = OrderedDict()
        self._was_frequent: OrderedDict[int, None] = OrderedDict()
        self._aim = 0.0

    def _used(
        self, row: int, *, experts: Sequence[int], missing: Sequence[int], request: int
    ) -> None:
        del missing, request
        for expert in experts:
            self._touch(row * self.size + expert)

    def _touch(self, flat: int) -> None:
        gone_recent, gone_frequent = self._was_recent, self._was_frequent
        if flat in self._recent or flat in self._frequent:
            self._recent.pop(flat, None)
            self._frequent.pop(flat, None)
            self._frequent[flat] = None
        elif flat in gone_recent:
            step = max(1.0, len(gone_frequent) / len(gone_recent))
            self._aim = min(float(self._slots), self._aim + step)
            del gone_recent[flat]
            self._frequent[flat] = None
        elif flat in gone_frequent:
            step = max(1.0, len(gone_recent) / len(gone_frequent))
            self._aim = max(0.0, self._aim - step)
            del gone_frequent[flat]
            self._frequent[flat] = None
        else:
            self._recent[flat] = None

    def _guess(self, row: int, *, experts: Sequence[int], request: int) -> list[tuple[int, int]]:
        odds = self._gates.see(row, experts=experts, request=request)
        if not self._gates.depth:
            return []
        ahead = (row + 1) % self.rows
        chosen = best(odds[0], len(experts))
        for expert in chosen:
            flat = ahead * self.size + expert
            if flat not in self._frequent:
                self._recent[flat] = None
                self._recent.move_to_end(flat)
        return [(ahead, expert) for expert in chosen]

    def victim(
        self, want_bytes: int, *, needed: Collection[tuple[int, int]] = ()
    ) -> Resident | None:
        """See `ResidencyPolicy`."""
        if self.room(want_bytes):
            return None
        saved = {self._base[layer] + expert for layer, expert in needed}
        first, second = self._recent, self._frequent
        if len(first) <= self._aim:
            first, second = second, first
        for names in (first, second):
            for flat in names:
                if self._rank[flat] < np.inf and flat not in saved:
                    if self._keep_first and flat < self.size:
                        continue
                    form = self._format[flat]
                    assert form is not None  # noqa: S101 - a finite rank says so
                    row, expert = divmod(flat, self.size)
                    return Resident(self.layers[row], expert, form)
        return super().victim(want_bytes, needed=needed)

    def dropped(
        self, layer: int, expert: int, *, staged: bool = False, reason: Reason = Reason.EVICT
    ) -> None:
        """See `DeviceTable`; the name stays on a list of what was evicted."""
        super().dropped(layer, expert, staged=staged, reason=reason)
        flat = self._base[layer] + expert
        gone = self._was_recent if flat in self._recent else self._was_frequent
        self._recent.pop(flat, None)
        self._frequent.pop(flat, None)
        gone[flat] = None
        while len(gone) > self._slots:
            gone.popitem(last=False)

    def forget(self, request: int) -> None:
        """See `ResidencyPolicy`."""
        self._gates.forget(request)


class Hobbit(Rival):
    """Four priorities in one (Tang et al., arXiv:2411.01433), without the cheaper formats.

    Recency, frequency within the sequence, use in high precision (here the frequency again) and
    nearness of the layer, weighed equally; the next layer's likeliest experts are prefetched.
    """

    def __init__(self, shape: DeviceShape) -> None:
        """Start empty."""
        super().__init__(shape)
        self._gates = NextGates(rows=self.rows, num_experts=self.size)
        self._used_at = np.zeros((self.rows, self.size))
        self._uses = np.zeros((self.rows, self.size))
        distance = (np.arange(self.rows)[None, :] - np.arange(self.rows)[:, None]) % self.rows
        self._near = 1.0 - distance / self.rows
        self._now = 1
        self._request: int | None = None

    def _used(
        self, row: int, *, experts: Sequence[int], missing: Sequence[int], request: int
    ) -> None:
        del missing
        if request != self._request:
            self._request = request
            self._uses[:] = 0.0
        self._now += 1
        self._used_at[row, experts] = self._now
        self._uses[row, experts] += 1.0
        values = self._values.reshape(self.rows, self.size)
        np.multiply(self._used_at, 0.25 / self._now, out=values)
        values += self._uses * (0.5 / max(1.0, float(self._uses.max())))
        values += 0.25 * self._near[row][:, None] + 1e-6
        self._rerank()

    def _guess(self, row: int, *, experts: Sequence[int], request: int) -> list[tuple[int, int]]:
        odds = self._gates.see(row, experts=experts, request=request)
        if not self._gates.depth:
            return []
        ahead = (row + 1) % self.rows
        return [(ahead, expert) for expert in best(odds[0], len(experts))]

    def forget(self, request: int) -> None:
        """See `ResidencyPolicy`."""
        self._gates.forget(request)


class HybriMoE(Rival):
    """Minus Recent Score, and prefetches by impact (Zhong et al., DAC 2025, arXiv:2504.05897).

    The score of a block is an exponential mean of its router score where it is among the top,
    else of 0; the lowest goes. Prefetches compare the next three layers and take those of the
    highest expected gain, as many as were just used. A trace may lack router scores, so a used
    expert scores 1 / k. The paper's split of experts between CPU and GPU is another subject.
    """

    _GAIN = 0.1

    def __init__(self, shape: DeviceShape) -> None:
        """Start empty."""
        super().__init__(shape)
        self._gates = NextGates(rows=self.rows, num_experts=self.size, depth=3)
        self._values[:] = 1e-6

    def _used(
        self, row: int, *, experts: Sequence[int], missing: Sequence[int], request: int
    ) -> None:
        del missing, request
        score = self._values[row * self.size : (row + 1) * self.size]
        score *= 1.0 - self._GAIN
        score += 1e-12
        score[list(experts)] += self._GAIN / len(experts)
        self._rerank(row)

    def _guess(self, row: int, *, experts: Sequence[int], request: int) -> list[tuple[int, int]]:
        odds = self._gates.see(row, experts=experts, request=request)
        depth = self._gates.depth
        if not depth:
            return []
        gain = odds / (1.0 + odds)
        for distance in range(depth):
            ahead = (row + 1 + distance) % self.rows
            part = self._format[ahead * self.size : (ahead + 1) * self.size]
            gain[distance] *= [form is None for form in part]
        chosen = best(gain.reshape(-1), len(experts))
        return [
            ((row + 1 + place // self.size) % self.rows, place % self.size)
            for place in chosen
            if gain.reshape(-1)[place] > 0.5  # likelier needed than not
        ]

    def forget(self, request: int) -> None:
        """See `ResidencyPolicy`."""
        self._gates.forget(request)
