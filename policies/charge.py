"""What each predictor costs and saves; the one that costs more than it saves is switched off.

Decides which stages of `StagedPredictor` run. Must not know clocks (times are told), links or what
is resident.

The predictors are the stages by which an estimate gets sharper: `ageing` (popularity), `previous
step` (what the layer used last time), and `n ahead` (what the layer n before the visit uses). A
stage is charged the time that it takes itself, as measured. It saves what its knowledge is worth:
the recall that it adds (of the experts that a layer needs, how many more are among as many
likeliest ones), times the blocks loaded in a pass, times what a missing block makes compute wait.

Stages ahead can be switched off, the farthest first, since each builds on the one before. Ageing
and previous step carry eviction, which costs no time of its own, so they are charged but stay.

Invariants: same samples, same answers; a stage is judged on a whole window of passes only; after it
was switched off it is tried again, each time later.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

_GAIN = 0.05
_WINDOW = 48
"""Sampled passes on which a stage is judged."""
_HOLD = 512
"""Sampled passes until a stage that was switched off is tried again; doubles each time."""
_KEEP_RATIO = 1.1
"""Hysteresis: a stage must cost that much more than it saves to be switched off."""


class Charge(NamedTuple):
    """One predictor's account, of one pass."""

    name: str
    on: bool
    spent_ns: int
    saved_ns: int

    @property
    def pays(self) -> bool:
        """Whether it saves at least what it costs."""
        return self.saved_ns >= self.spent_ns


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One pass. `recalls` and `spent_ns` are by stage: ageing, previous step, farthest to nearest.

    `loads` are the blocks that were loaded in it, `missed_ns` is what each missing one costs.
    """

    recalls: Sequence[float]
    spent_ns: Sequence[int]
    loads: float
    missed_ns: int


class StageCharges:
    """Accounts of all stages, and how many stages ahead are on."""

    def __init__(self, *, depth: int, switch: bool) -> None:
        """`depth` stages ahead, all on; they stay so unless it may `switch`."""
        self.depth = depth
        self._switch = switch
        self.on = depth
        self.switched_off = 0
        self._names = ("ageing", "previous step", *(f"{n} ahead" for n in range(depth, 0, -1)))
        self._spent = [0.0] * len(self._names)
        self._saved = [0.0] * len(self._names)
        self._samples = 0
        self._wait = self._hold = _HOLD

    def observe(self, sample: Sample) -> int:
        """Take in a pass; return how many stages ahead should run from now on."""
        off = self.depth - self.on
        stages = [0, 1, *range(2 + off, len(self._names))]
        before = 0.0
        for at, (recall, spent_ns) in enumerate(zip(sample.recalls, sample.spent_ns, strict=True)):
            stage = stages[at]
            worth = max(0.0, recall - before) * sample.loads * sample.missed_ns
            gain = max(_GAIN, 1.0 / (self._samples + 1))
            self._spent[stage] += gain * (spent_ns - self._spent[stage])
            self._saved[stage] += gain * (worth - self._saved[stage])
            before = max(before, recall)
        self._samples += 1
        if not self._switch:
            return self.on
        farthest = 2 + off
        if self.on and self._samples >= _WINDOW and self._costs(farthest):
            self.on -= 1
            self.switched_off += 1
            self._samples, self._wait = 0, self._hold
        elif off:
            self._wait -= 1
            if self._wait <= 0:
                self.on += 1
                self._samples, self._hold = 0, 2 * self._hold
                self._wait = self._hold
        return self.on

    def _costs(self, stage: int) -> bool:
        return self._spent[stage] > _KEEP_RATIO * self._saved[stage]

    def accounts(self) -> tuple[Charge, ...]:
        """Return each predictor's account, of one pass; one that is off keeps its last."""
        off = self.depth - self.on
        return tuple(
            Charge(name, at < 2 or at >= 2 + off, int(spent), int(saved))
            for at, (name, spent, saved) in enumerate(
                zip(self._names, self._spent, self._saved, strict=True)
            )
        )


_PREFIX = "predictor/"
_PREFETCHING = "prefetching"


def gauges_of(charges: Sequence[Charge], *, prefetching: bool) -> dict[str, float]:
    """Return the accounts, and whether the trial lets prefetches start, as gauges of a store."""
    found: dict[str, float] = {_PREFETCHING: float(prefetching)}  # a message refuses bools
    for charge in charges:
        found[f"{_PREFIX}{charge.name}/on"] = float(charge.on)
        found[f"{_PREFIX}{charge.name}/spent_ns"] = charge.spent_ns
        found[f"{_PREFIX}{charge.name}/saved_ns"] = charge.saved_ns
    return found


def said_of(gauges: Mapping[str, float]) -> str:
    """Return the same in words; empty for a store that predicts nothing."""
    if _PREFETCHING not in gauges:
        return ""
    said = ["prefetching" if gauges[_PREFETCHING] else "prefetching OFF: steps are faster without"]
    for key in gauges:
        if not (key.startswith(_PREFIX) and key.endswith("/on")):
            continue
        name = key.removeprefix(_PREFIX).removesuffix("/on")
        spent, saved = (gauges[f"{_PREFIX}{name}/{what}_ns"] / 1e3 for what in ("spent", "saved"))
        if not (spent or saved):
            continue  # no account yet
        state = "" if gauges[key] else " OFF"
        said.append(f"{name}{state} costs {spent:.0f} us a pass, saves {saved:.0f} us")
    return "; ".join(said)
