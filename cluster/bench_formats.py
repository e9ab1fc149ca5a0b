"""`hotset bench formats`: size, speed and error of each format, next to libraries in one run.

Speed is measured on a block of at least 12 MB, made of the model's own trained experts one below
the other, since that is what an expert of a served model weighs; decoding one block of the model's
own size is timed too. All contenders of a format and a plain copy take turns, on one thread, with
buffers that were written before; each decodes twice right before it is timed, so that nobody finds
the caches as the one before has left them. Time is the processor time of this process: other work
on the machine counts for less, and a library that starts threads pays for them. Error is that of an
expert's output, on seeded Gaussian rows and experts spread over the model: norm of the difference
over norm of the full-precision output, the mean over experts.

Must not know how formats are made. Figures are medians with the fastest and slowest round.
"""

from __future__ import annotations

import json
import platform
import time
from dataclasses import asdict, dataclass
from functools import partial
from importlib.metadata import version
from statistics import median
from typing import TYPE_CHECKING

import torch
from torch.nn import functional

from hotset.blocks.checkpoint import BlockLayout, Catalog, Field
from hotset.blocks.experts import layout_dtype, run_expert, view_weights
from hotset.blocks.formats import CODECS
from hotset.blocks.formats_jit import COMPILED, PERMUTES
from hotset.blocks.formats_lossless import LosslessCodec
from hotset.blocks.local import BlockReader
from hotset.cluster.bench_formats_peers import LeftOut, Peer, find_peers
from hotset.errors import DependencyError, HotsetError

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from hotset.blocks.formats import Codec

_LEAST_NBYTES = 12_000_000
_ROWS = 64
_SEED = 1
_QUICK_BUDGET_NS = 30_000_000_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One contender. Speeds are GB/s of full-precision bytes; `checked` hashes the body, too."""

    format: str
    by: str
    ratio: float  # full-precision bytes over encoded bytes
    bits_per_weight: float
    encode_gb_per_s: float
    decode_gb_per_s: float
    decode_slowest_gb_per_s: float
    decode_fastest_gb_per_s: float
    decode_checked_gb_per_s: float | None
    block_decode_us: float | None  # one block of the model, checked
    output_error: float
    decode_over_best_peer: float | None
    decode_over_copy: float  # a copy of the full-precision block in the same rounds


@dataclass(frozen=True, slots=True, kw_only=True)
class Weights:
    """A full-precision payload and what it is."""

    layout: BlockLayout
    payload: torch.Tensor

    def matrices(self) -> list[torch.Tensor]:
        """The matrices as the libraries take them."""
        views = view_weights(self.payload, self.layout)
        return [views.gate_up.contiguous(), views.down.contiguous()]


class _Gate:
    """The gate of the model's family on its own, so that no model need be built."""

    def __init__(self, *, is_transposed: bool) -> None:
        self.is_transposed = is_transposed

    def _apply_gate(self, gate_up: torch.Tensor) -> torch.Tensor:
        if not self.is_transposed:
            gate, up = gate_up.chunk(2, dim=-1)
            return functional.silu(gate) * up
        gate, up = gate_up[..., ::2].clamp(max=7.0), gate_up[..., 1::2].clamp(-7.0, 7.0)
        return (up + 1) * gate * torch.sigmoid(1.702 * gate)  # gpt-oss


class _Contender:
    """A codec or a library on one set of weights: encodes and decodes again and again."""

    def __init__(self, by: Codec | Peer, weights: Weights, *, name: str) -> None:
        self.by = by
        self.name = name
        self._weights = weights
        self._matrices = weights.matrices() if isinstance(by, Peer) else []
        self._found: list[object] = []
        if not isinstance(by, Peer):
            self._block = torch.zeros(by.nbytes(weights.layout), dtype=torch.uint8)
            self._out = torch.zeros(weights.layout.nbytes, dtype=torch.uint8)

    def encode(self) -> None:
        if isinstance(self.by, Peer):
            self._found = [self.by.encode(matrix) for matrix in self._matrices]
        else:
            self.by.encode(self._weights.payload, self._weights.layout, self._block)

    def decode(self, *, verified: bool = True) -> list[torch.Tensor]:
        if isinstance(self.by, Peer):
            return [self.by.decode(one) for one in self._found]
        self.by.decode(self._block, self._weights.layout, self._out, verified=verified)
        return []

    def nbytes(self) -> int:
        if isinstance(self.by, Peer):
            return sum(self.by.nbytes(one) for one in self._found)
        return self.by.stored_nbytes(self._block, self._weights.layout)

    def output(self, rows: torch.Tensor) -> torch.Tensor:
        self.encode()
        found = self.decode()
        layout = self._weights.layout
        if isinstance(self.by, Peer):
            parts = [matrix.to(layout_dtype(layout)).flatten() for matrix in found]
            self._out = torch.cat(parts).view(torch.uint8)
        return _output(Weights(layout=layout, payload=self._out), rows)


def _output(weights: Weights, rows: torch.Tensor) -> torch.Tensor:
    """Run the expert in float32, so that only the weights' error shows."""
    views = view_weights(weights.payload, weights.layout)
    wide = type(views)(gate_up=views.gate_up.float(), down=views.down.float())
    return run_expert(_Gate(is_transposed=weights.layout.transposed), rows, wide)


def experts_of(catalog: Catalog, *, count: int) -> list[Weights]:
    """Read `count` experts spread evenly over the model, without their biases."""
    blocks = sorted(catalog.blocks)
    count = min(count, len(blocks))
    reader = BlockReader(catalog)
    found = []
    layout = stacked_layout(catalog.layout, times=1)
    for place in range(count):
        payload = torch.empty(catalog.layout.nbytes, dtype=torch.uint8)
        reader.read(blocks[place * len(blocks) // count], payload)
        views = view_weights(payload, catalog.layout)
        parts = [views.gate_up.flatten(), views.down.flatten()]
        found.append(Weights(layout=layout, payload=torch.cat(parts).view(torch.uint8)))
    reader.close()
    return found


def stacked_layout(layout: BlockLayout, *, times: int) -> BlockLayout:
    """Layout of `times` experts as one: their output channels side by side."""
    fields, offset = [], 0
    dim = 1 if layout.transposed else 0
    for field in (layout.field("gate_up"), layout.field("down")):
        assert field is not None  # noqa: S101 - every layout has both
        shape = list(field.shape)
        shape[dim] *= times
        nbytes = field.nbytes * times
        fields.append(Field(role=field.role, offset=offset, nbytes=nbytes, shape=tuple(shape)))
        offset += nbytes
    return BlockLayout(
        fields=tuple(fields), dtype=layout.dtype, transposed=layout.transposed, nbytes=offset
    )


def stack(experts: list[Weights], *, least_nbytes: int) -> Weights:
    """Put experts below each other until the block is large, again from the first if need be."""
    times = -(-least_nbytes // experts[0].layout.nbytes)
    views = [view_weights(e.payload, e.layout) for e in experts]
    chosen = [views[place % len(views)] for place in range(times)]
    layout = stacked_layout(experts[0].layout, times=times)
    dim = 1 if layout.transposed else 0
    parts = (
        torch.cat([view.gate_up for view in chosen], dim=dim).flatten(),
        torch.cat([view.down for view in chosen], dim=dim).flatten(),
    )
    return Weights(layout=layout, payload=torch.cat(parts).view(torch.uint8))


def _seconds(what: Callable[[], object]) -> float:
    start = time.process_time_ns()
    what()
    return (time.process_time_ns() - start) / 1e9


def measure(  # noqa: PLR0913 - what is measured, and how long
    name: str,
    contenders: list[tuple[str, Codec | Peer]],
    *,
    block: Weights,
    experts: list[Weights],
    repeat: int,
    rows: torch.Tensor,
) -> list[Row]:
    """Measure all contenders of one format in turns."""
    runs = [_Contender(by, block, name=label) for label, by in contenders]
    for run in runs:
        run.encode()
        run.decode()  # compiles, fills caches
    encode: dict[str, list[float]] = {run.name: [] for run in runs}
    decode: dict[str, list[float]] = {run.name: [] for run in runs}
    checked: dict[str, list[float]] = {run.name: [] for run in runs}
    copied: list[float] = []
    spare = block.payload.clone()
    for _ in range(repeat):
        for run in runs:
            decode[run.name].append(_steady_seconds(run.decode))
            if not isinstance(run.by, Peer):
                checked[run.name].append(_steady_seconds(partial(run.decode, verified=False)))
        copied.append(_steady_seconds(partial(spare.copy_, block.payload)))
        for run in runs:
            encode[run.name].append(_seconds(run.encode))
    full = block.layout.nbytes
    weights = full // layout_dtype(block.layout).itemsize
    speed = {run.name: full / median(decode[run.name]) / 1e9 for run in runs}
    best = max((speed[r.name] for r in runs if isinstance(r.by, Peer)), default=None)
    found = []
    for run in runs:
        ours = not isinstance(run.by, Peer)
        found.append(
            Row(
                format=name, by=run.name, ratio=full / run.nbytes(),
                bits_per_weight=8 * run.nbytes() / weights,
                encode_gb_per_s=full / median(encode[run.name]) / 1e9,
                decode_gb_per_s=speed[run.name],
                decode_slowest_gb_per_s=full / max(decode[run.name]) / 1e9,
                decode_fastest_gb_per_s=full / min(decode[run.name]) / 1e9,
                decode_checked_gb_per_s=full / median(checked[run.name]) / 1e9 if ours else None,
                block_decode_us=_one_block(run.by, experts[0], repeat=repeat) if ours else None,
                output_error=_error(run.by, experts, rows),
                decode_over_best_peer=speed[run.name] / best if ours and best else None,
                decode_over_copy=median(copied) / median(decode[run.name]),
            )
        )  # fmt: skip
    return found


def _one_block(by: Codec | Peer, expert: Weights, *, repeat: int) -> float:
    run = _Contender(by, expert, name="")
    run.encode()
    run.decode()
    rounds = [_seconds(lambda: run.decode(verified=False)) for _ in range(10 * repeat)]
    return median(rounds) * 1e6


def _steady_seconds(decode: Callable[..., object]) -> float:
    for _ in range(2):
        decode()
    return _seconds(decode)


def _error(by: Codec | Peer, experts: list[Weights], rows: torch.Tensor) -> float:
    errors = []
    for expert in experts:
        full = _output(expert, rows)
        away = _Contender(by, expert, name="").output(rows) - full
        errors.append(float(away.norm() / full.norm()))
    return sum(errors) / len(errors)


def measure_all(
    catalog: Catalog, *, quick: bool, repeat: int, say: Callable[[str], None]
) -> tuple[list[Row], list[LeftOut]]:
    """Rows of all formats, printed as they come; and who was left out."""
    many = experts_of(catalog, count=len(catalog.blocks))
    block = stack(many, least_nbytes=_LEAST_NBYTES)
    experts = experts_of(catalog, count=6 if quick else 24)
    width = experts[0].layout.fields[0].shape[0 if catalog.layout.transposed else 1]
    rows = torch.randn(_ROWS, width, generator=torch.Generator().manual_seed(_SEED))
    peers, left_out = find_peers(experts[0].matrices())
    found: list[Row] = []
    for name, ours in CODECS.items():
        contenders: list[tuple[str, Codec | Peer]] = [("hotset", ours)]
        if name == "bf16z":
            contenders += _dense(block, left_out)
        contenders += [(peer.by, peer) for peer in peers if peer.format == name]
        part = measure(
            str(name), contenders, block=block, experts=experts, repeat=repeat, rows=rows
        )
        for row in part:
            say(line(row))
        found += part
    return found, left_out


def _dense(block: Weights, left_out: list[LeftOut]) -> list[tuple[str, Codec | Peer]]:
    dense = LosslessCodec(dense=True)
    try:
        dense.encode(block.payload, block.layout, torch.empty(dense.nbytes(block.layout)).byte())
    except DependencyError as error:
        left_out.append(LeftOut(by="hotset, dense", reason=str(error)))
        return []
    return [("hotset, dense", dense)]


def line(row: Row) -> str:
    """One row as text."""
    checked = "" if row.decode_checked_gb_per_s is None else f"{row.decode_checked_gb_per_s:6.2f}"
    peer = "" if row.decode_over_best_peer is None else f"{row.decode_over_best_peer:5.1f}x"
    own = "" if row.block_decode_us is None else f"{row.block_decode_us:8.0f}"
    spread = f"({row.decode_slowest_gb_per_s:.1f}-{row.decode_fastest_gb_per_s:.1f})"
    return (
        f"{row.format:<6} {row.by:<27} {row.ratio:6.3f}x {row.bits_per_weight:6.2f}"
        f" {row.encode_gb_per_s:7.2f} {row.decode_gb_per_s:7.2f} {spread:<12} {checked:>6}"
        f" {own:>8} {row.output_error:8.4f} {row.decode_over_copy:5.2f}x {peer:>6}"
    ).rstrip()


HEAD = (
    "format by                          smaller   bits  encode  decode (range)      checked"
    " block us    error  / copy / peer"
)


def machine() -> dict[str, object]:
    """What a reader needs to place the figures."""
    return {
        "processor": platform.processor() or platform.machine(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numba": version("numba") if COMPILED else None,
        "avx512_permute": PERMUTES,
        "threads": torch.get_num_threads(),
    }


def measure_mix(model: Path, *, quick: bool, say: Callable[[str], None]) -> dict[str, float] | None:
    """Let the guardrail choose formats for the model and measure that; None when it cannot."""
    from hotset.cluster.bench_mix import run_bench as run_mix

    try:
        if quick:
            return run_mix(model, quick=True, time_ns=_QUICK_BUDGET_NS, say=say).part()
        return run_mix(model, say=say).part()
    except HotsetError as error:
        say(f"mix left out: {error}")
        return None


def run_bench(*, model: Path, quick: bool, repeat: int, with_mix: bool, as_json: bool) -> None:
    """Measure and print, as text or as one JSON object."""

    def say(text: str) -> None:
        if not as_json:
            print(text, flush=True)

    torch.set_num_threads(1)
    catalog = Catalog.open(model)
    say(f"{', '.join(f'{key} {value}' for key, value in machine().items())}")
    say(
        f"{model.name}: block of {catalog.block_nbytes} bytes; GB/s of full-precision bytes, median"
    )
    say(HEAD)
    rows, left_out = measure_all(catalog, quick=quick, repeat=repeat, say=say)
    for one in left_out:
        say(f"left out: {one.by}: {one.reason}")
    mix = measure_mix(model, quick=quick, say=say) if with_mix else None
    if mix is not None:
        say("mix " + ", ".join(f"{key} {value:.5g}" for key, value in mix.items()))
    if as_json:
        print(
            json.dumps({
                "model": str(model), "block_nbytes": catalog.block_nbytes, "repeat": repeat,
                "machine": machine(), "formats": [asdict(row) for row in rows],
                "left_out": [asdict(one) for one in left_out], "mix": mix,
            })
        )  # fmt: skip
