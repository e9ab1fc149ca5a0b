"""`hotset bench mix`: what a quality budget buys, measured on text that calibration never saw.

Calibrates (or reads a table), lets the guardrail choose a mix, and measures it: uniform formats,
ten random samples of held-out text and of text of another kind, the frontier of bytes against KL
next to popularity mixes, which layers refuse which formats, and how soon a live check notices a
table of zeros. Must not know Ray.

Text by default: the interpreter's standard library, every second module for calibration and the
others held out; its reference manual is the other kind. Nothing is downloaded.
"""

from __future__ import annotations

import itertools
import platform
import sysconfig
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from hotset.cluster.bench_mix_rivals import RIVALS, rival_codes
from hotset.cluster.calibrate import (
    budget_of,
    costs_of,
    meter_of,
    mix_within,
    run_calibrate,
    within,
)
from hotset.policies.allocate import Costs, allocate, described
from hotset.policies.drift import DriftMeter
from hotset.policies.drift_check import LiveCheck
from hotset.policies.guard import BUDGET_NATS, LOSSY
from hotset.policies.types import BlockId

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch
    from numpy.typing import NDArray

    from hotset.blocks.sensitivity import KLMeter
    from hotset.blocks.sensitivity_rank import RankCheck
    from hotset.blocks.sensitivity_stats import KLSummary
    from hotset.blocks.sensitivity_table import SensitivityTable

    Ints = NDArray[np.int64]

SAMPLES = 10
_BITS = (2.5, 2.75, 3.0, 3.5, 4.0, 5.0, 6.0)  # sizes of the frontier besides those of the formats
_BITS_QUICK = (3.0, 4.0)
_BITS_SHIFTED = (2.75, 3.0, 3.5, 4.0)
_STDLIB_MODULES = 60
_LIVE_STEPS = 200
_RANKED, _RANKED_QUICK = 64, 12  # blocks whose true KL is measured one by one
_RANKED_WINDOWS = 8
_RANKED_FIT = 32  # windows that the estimates are made from


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """KL of one mix at one size; nats a token with one-sided 95 % bounds."""

    name: str
    bits_per_weight: float
    kl_nats: float
    kl_lower_nats: float
    kl_upper_nats: float
    p99_nats: float
    flip_ratio: float
    tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class LiveFigures:
    """A table that is believed, on the real model: when the check acted, KL before and after."""

    noticed_step: int  # -1: not within the steps
    repaired_blocks: int
    kl_before_nats: float
    kl_after_nats: float


@dataclass(frozen=True, slots=True, kw_only=True)
class MixFigures:
    """All that `hotset bench mix` measures."""

    model: str
    budget_nats: float
    gamma: float
    optimism: float
    optimism_upper: float
    drift_nats: float
    drift_shifted_nats: float
    mix: Point
    formats: dict[str, int]  # blocks of the mix in each format
    samples_nats: tuple[float, ...]
    shifted_nats: tuple[float, ...]
    uniform: tuple[Point, ...]
    frontier: tuple[Point, ...]
    frontier_shifted: tuple[Point, ...]
    floors: dict[int, str]
    vetoes: dict[str, str]  # layer and format -> the bound
    live: LiveFigures  # the measured table
    live_zeros: LiveFigures  # a table of zeros
    ranks: tuple[RankCheck, ...]  # how well estimates rank single blocks, best first
    versions: dict[str, str]

    def part(self) -> dict[str, float]:
        """The part `mix` of `hotset bench formats --json`."""
        return {
            "bits_per_weight": self.mix.bits_per_weight,
            "kl_nats": self.mix.kl_nats,
            "kl_upper_nats": self.mix.kl_upper_nats,
            "budget_nats": self.budget_nats,
            "kl_worst_sample_nats": max(self.samples_nats),
            "kl_worst_shifted_sample_nats": max(self.shifted_nats, default=0.0),
        }


class Bench:
    """One table, one meter, and the windows to measure on."""

    def __init__(
        self, meter: KLMeter, table: SensitivityTable, *, budget_nats: float, seed: int
    ) -> None:
        """`budget_nats` is the quality budget that the guardrail keeps."""
        self.meter, self.table, self.budget_nats, self.seed = meter, table, budget_nats, seed
        self.costs = costs_of(table)

    def mix_of(self, codes: Ints) -> dict[BlockId, str]:
        """Name the formats of codes [L, E]."""
        return {
            BlockId(self.table.layers[row], expert): self.costs.formats[codes[row, expert]]
            for row, expert in np.argwhere(codes > 0).tolist()
        }

    def bits(self, codes: Ints) -> float:
        """Bits of a weight on average, headers and scales included."""
        full = self.table.full_nbytes * codes.size
        return self.meter.full_bits * described(self.costs, codes).nbytes / full

    def point(self, name: str, codes: Ints, windows: torch.Tensor) -> Point:
        """Measure one mix."""
        found = self.meter.measure(self.mix_of(codes), windows).summary(seed=self.seed)
        return _point(name, found, bits=self.bits(codes))

    def uniform(self, windows: torch.Tensor) -> tuple[Point, ...]:
        """Measure every format everywhere."""
        shape = self.costs.nats.shape[:2]
        return tuple(
            self.point(form, np.full(shape, code, dtype=np.int64), windows)
            for code, form in enumerate(self.costs.formats)
            if code
        )

    def frontier(self, windows: torch.Tensor, *, bits: tuple[float, ...]) -> list[Point]:
        """Measure hotset's mix and the rivals' at each size, in bits of a weight."""
        found = []
        blocks = self.costs.nats.shape[0] * self.costs.nats.shape[1]
        for size in bits:
            room = size / self.meter.full_bits * self.table.full_nbytes * blocks
            mixes: dict[str, Ints | None] = {
                "hotset": allocate(self.costs, bytes_at_most=room).codes,
                **{
                    name: rival_codes(
                        name, self.costs, frequency=self.table.use, bytes_at_most=room,
                        seed=self.seed,
                    )
                    for name in RIVALS
                },
            }  # fmt: skip
            found += [self.point(n, c, windows) for n, c in mixes.items() if c is not None]
        return found

    def vetoes(self) -> dict[str, str]:
        """What whole layers refuse: the bound, by `LAYER:FORMAT`."""
        drift = meter_of(self.table, nats=self.budget_nats)
        asked = itertools.product(self.table.layers, self.table.formats)
        bounds = {f"{layer}:{form}": drift.check_layer(layer, form) for layer, form in asked}
        return {key: bound for key, bound in bounds.items() if bound is not None}

    def live(self, windows: torch.Tensor, *, believed: Costs) -> LiveFigures:
        """Believe a table, serve a token a step, and let the live check find out about it."""
        drift = DriftMeter(
            believed,
            layers=self.table.layers,
            frequency=self.table.use,
            budget=budget_of(self.table, nats=self.budget_nats),
        )
        mix = self.mix_of(within(believed, budget=drift.budget).codes)
        for block, form in mix.items():
            drift.set(block, form)
        pairs = self.meter.measure(mix, windows)
        check, noticed, repaired = LiveCheck(drift), -1, 0
        kl, flips = pairs.kl.ravel(), pairs.flips.ravel()
        random = np.random.default_rng(self.seed)
        for step in range(_LIVE_STEPS):
            if not check.wants(step):
                continue
            token = int(random.integers(kl.size))  # requests are at any place of their text
            check.add([float(kl[token])], [bool(flips[token])])
            if (acted := check.step(step)) is not None:
                noticed, repaired = step, len(acted.repairs)
                break
        after = self.meter.measure(self.mix_of(drift.codes), windows)
        return LiveFigures(
            noticed_step=noticed,
            repaired_blocks=repaired,
            kl_before_nats=float(kl.mean()),
            kl_after_nats=float(after.kl.mean()),
        )

    def zeros(self) -> Costs:
        """The table's costs with every damage 0."""
        return Costs(
            formats=self.costs.formats,
            nbytes=self.costs.nbytes,
            nats=np.zeros_like(self.costs.nats),
        )


def _point(name: str, found: KLSummary, *, bits: float) -> Point:
    return Point(
        name=name,
        bits_per_weight=bits,
        kl_nats=found.mean,
        kl_lower_nats=found.lower,
        kl_upper_nats=found.upper,
        p99_nats=found.p99,
        flip_ratio=found.flip_ratio,
        tokens=found.tokens,
    )


def run_bench(  # noqa: PLR0913 - one option each
    model: Path,
    *,
    text: tuple[Path, ...] = (),
    held_out: tuple[Path, ...] = (),
    shifted: tuple[Path, ...] = (),
    table_path: Path | None = None,
    formats: tuple[str, ...] = LOSSY,
    budget_nats: float = BUDGET_NATS,
    time_ns: int = 180_000_000_000,
    quick: bool = False,
    seed: int = 0,
    threads: int = 1,
    say: Callable[[str], None] = lambda _text: None,
) -> MixFigures:
    """Measure. Raises ConfigError and CheckpointError."""
    import torch

    from hotset.blocks.calibrate_text import read_text
    from hotset.blocks.sensitivity import KLMeter
    from hotset.blocks.sensitivity_rank import check_ranks
    from hotset.blocks.sensitivity_table import read_table

    torch.set_num_threads(threads)
    files = library_files()
    if table_path is None:
        table = run_calibrate(
            model, text=text or files[::2], formats=formats,
            budget_nats=budget_nats, time_ns=time_ns, seed=seed, threads=threads, say=say,
        )  # fmt: skip
    meter = KLMeter(model)
    if table_path is not None:
        table = read_table(table_path, checkpoint=meter.catalog.digest)
    bench = Bench(meter, table, budget_nats=budget_nats, seed=seed)
    own = read_text(model, held_out or files[1::2], seed=seed).whole
    other = read_text(model, shifted or (manual_file(),), seed=seed).whole
    sample = 4 if quick else 16
    allowed = mix_within(table, nats=budget_nats)
    mix = bench.mix_of(allowed.codes)
    say("random samples of held-out and shifted text")
    inside = _samples(meter, mix, own, windows=sample, seed=seed)
    outside = _samples(meter, mix, other, windows=sample, seed=seed + 1)
    windows = own[: 8 if quick else 32]
    say("uniform formats")
    uniform = bench.uniform(windows)
    sizes = _BITS_QUICK if quick else (*_BITS, *(point.bits_per_weight for point in uniform))
    say("frontier")
    frontier = bench.frontier(windows, bits=tuple(sorted(set(sizes))))
    elsewhere = bench.frontier(other[: len(windows)], bits=_BITS_QUICK if quick else _BITS_SHIFTED)
    drift = meter_of(table, nats=budget_nats)
    for block, form in mix.items():
        drift.set(block, form)
    drift_nats = drift.nats
    drift.observe(meter.routing(other[: len(windows)]), tokens=other[: len(windows)].numel())
    say("true KL of single blocks")
    ranks = check_ranks(
        meter, table, windows[:_RANKED_WINDOWS],
        fit=read_text(model, text or files[::2], seed=seed).fit[:_RANKED_FIT],
        form="int4" if "int4" in table.formats else table.formats[-1],
        blocks=_RANKED_QUICK if quick else _RANKED, seed=seed,
    )  # fmt: skip
    names, counts = np.unique(allowed.codes, return_counts=True)
    say("live check")
    found = MixFigures(
        model=model.name,
        budget_nats=budget_nats,
        gamma=drift.gamma,
        optimism=table.optimism,
        optimism_upper=table.optimism_upper,
        drift_nats=drift_nats,
        drift_shifted_nats=drift.nats,
        mix=bench.point("hotset", allowed.codes, windows),
        formats={
            bench.costs.formats[code]: int(count)
            for code, count in zip(names.tolist(), counts.tolist(), strict=True)
        },
        samples_nats=inside,
        shifted_nats=outside,
        uniform=uniform,
        frontier=tuple(frontier),
        frontier_shifted=tuple(elsewhere),
        floors={
            layer: str(form) for layer, form in meter_of(table, nats=budget_nats).floors().items()
        },
        vetoes=bench.vetoes(),
        live=bench.live(windows, believed=bench.costs),
        live_zeros=bench.live(windows, believed=bench.zeros()),
        ranks=ranks,
        versions={
            "python": platform.python_version(),
            "torch": str(torch.__version__),
            "processor": platform.processor() or platform.machine(),
        },
    )
    meter.close()
    return found


def _samples(
    meter: KLMeter, mix: dict[BlockId, str], text: torch.Tensor, *, windows: int, seed: int
) -> tuple[float, ...]:
    """Mean KL of `SAMPLES` random samples; windows repeat only in text too short for all."""
    import torch

    random = torch.Generator().manual_seed(seed)
    order = torch.randperm(text.shape[0], generator=random)
    while order.numel() < SAMPLES * windows:
        order = torch.cat([order, torch.randperm(text.shape[0], generator=random)])
    return tuple(
        float(meter.measure(mix, text[order[at * windows : (at + 1) * windows]]).kl.mean())
        for at in range(SAMPLES)
    )


def library_files() -> tuple[Path, ...]:
    """Modules of the standard library, spread over the alphabet."""
    root = Path(sysconfig.get_path("stdlib"))
    found = [path for path in sorted(root.glob("*.py")) if path.stat().st_size > 8_000]
    step = max(1, len(found) // _STDLIB_MODULES)
    return tuple(found[::step])


def manual_file() -> Path:
    """The language's reference manual, as `help()` shows it: prose."""
    return Path(sysconfig.get_path("stdlib")) / "pydoc_data" / "topics.py"
