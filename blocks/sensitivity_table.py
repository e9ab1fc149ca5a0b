"""The sensitivity file: what calibration measured, for one checkpoint and one text.

Decides how measurements are written, read and refused. Must not know how they are used. A small
JSON file with a version; numbers with four digits, since error bars are wider.

Invariants: a table is used with the checkpoint that it was measured on and with no other; damages
are finite and not negative, sizes positive, and all arrays fit together, or the file is refused.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
import numpy as np

from hotset.errors import UNREADABLE, ConfigError

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Floats = NDArray[np.float64]
    Ints = NDArray[np.int64]

VERSION = 1
_DIGITS = 4
_CALIBRATE = "hotset calibrate --model DIR --text FILE"


class GroupCheck(msgspec.Struct, frozen=True, kw_only=True):
    """True KL of one layer in one format against the sum of its first-order estimates; nats."""

    layer: int
    format: str
    estimate: float
    mean: float
    lower: float
    upper: float
    tokens: int


class MixCheck(msgspec.Struct, frozen=True, kw_only=True):
    """True KL of a whole mix that was chosen by the table, on text that the table did not see."""

    budget: float
    bits_per_weight: float
    estimate: float
    mean: float
    lower: float
    upper: float
    p99: float
    flip_ratio: float
    tokens: int


class SensitivityTable(msgspec.Struct, frozen=True, kw_only=True):
    """Damage of each block in each format, in nats for each token of text.

    `nats[l][e][f]` is that of expert e of MoE layer `layers[l]` in `formats[f]`, corrected by the
    checks; `frequency[l][e]` the share of tokens routed there that it is stated for. `optimism` is
    the true KL of whole mixes over the sum of their damages, `optimism_upper` its 95 % bound.
    `bases` names the file beside this one that `lowrank` needs; empty
    where it was not offered.
    """

    version: int
    checkpoint: str
    text: str
    tokens: int
    layers: tuple[int, ...]
    num_experts: int
    formats: tuple[str, ...]
    nbytes: tuple[int, ...]
    full_nbytes: int
    nats: list[list[list[float]]]
    frequency: list[list[float]]
    groups: tuple[GroupCheck, ...]
    mixes: tuple[MixCheck, ...]
    optimism: float
    optimism_upper: float
    bases: str = ""

    @property
    def damage(self) -> Floats:
        """`nats` as an array [L, E, F]."""
        return np.array(self.nats, dtype=np.float64)

    @property
    def use(self) -> Floats:
        """`frequency` as an array [L, E]."""
        return np.array(self.frequency, dtype=np.float64)


def write_table(table: SensitivityTable, path: str | Path) -> None:
    """Write the file. Raises ConfigError when it cannot be written."""
    try:
        Path(path).write_bytes(msgspec.json.format(msgspec.json.encode(table), indent=0) + b"\n")
    except OSError as error:
        raise ConfigError(
            f"{path} cannot be written ({error.strerror})", remedy="choose another --out"
        ) from error


def read_table(path: str | Path, *, checkpoint: str) -> SensitivityTable:
    """Read a file for the checkpoint with digest `checkpoint`.

    Raises ConfigError for a file that is absent, damaged, of another version or another checkpoint.
    """
    try:
        found = msgspec.json.decode(Path(path).read_bytes(), type=SensitivityTable)
    except OSError as error:
        raise ConfigError(
            f"{path} cannot be read ({error.strerror})", remedy=f"make it with {_CALIBRATE}"
        ) from error
    except UNREADABLE as error:
        raise ConfigError(
            f"{path} is not a sensitivity file ({error})", remedy=f"make it with {_CALIBRATE}"
        ) from error
    if found.version != VERSION:
        raise ConfigError(
            f"{path} has version {found.version}, this hotset reads {VERSION}",
            remedy=f"make it again with {_CALIBRATE}",
        )
    if found.checkpoint != checkpoint:
        raise ConfigError(
            f"{path} was measured on checkpoint {found.checkpoint}, not on {checkpoint}",
            remedy=f"make one for this checkpoint with {_CALIBRATE}",
        )
    wrong = _wrong(found)
    if wrong:
        raise ConfigError(f"{path}: {wrong}", remedy=f"make it again with {_CALIBRATE}")
    return found


def shorten(values: Floats) -> Floats:
    """Round to the digits of the file, so that a table in memory equals the one that is read."""
    short = [float(f"{value:.{_DIGITS}g}") for value in values.ravel().tolist()]
    return np.array(short, dtype=np.float64).reshape(values.shape)


def _wrong(table: SensitivityTable) -> str:
    """Name the first field that does not fit, or give nothing."""
    layers, experts, formats = len(table.layers), table.num_experts, len(table.formats)
    if len(set(table.formats)) != formats or len(set(table.layers)) != layers:
        return "formats and layers must not repeat"
    if [len(row) for row in table.frequency] != [experts] * layers:
        return f"frequency is not {layers} x {experts}"
    if len(table.nats) != layers or any(
        [len(cell) for cell in row] != [formats] * experts for row in table.nats
    ):
        return f"nats is not {layers} x {experts} x {formats}"
    if len(table.nbytes) != formats:
        return "nbytes must give a size for each format"
    if Path(table.bases).name != table.bases or ("lowrank" in table.formats) != bool(table.bases):
        return "bases must name a file beside this one exactly where lowrank was measured"
    return _wrong_value(table)


def _wrong_value(table: SensitivityTable) -> str:
    nats = (x for row in table.nats for cell in row for x in cell)
    if not all(math.isfinite(x) and x >= 0 for x in (*nats, table.optimism_upper)):
        return "nats and optimism_upper must be finite and not negative"
    if not all(math.isfinite(x) and x > 0 for row in table.frequency for x in row):
        return "frequency must be finite and positive"
    if min((*table.nbytes, table.full_nbytes)) <= 0:
        return "nbytes must be positive"
    return ""
