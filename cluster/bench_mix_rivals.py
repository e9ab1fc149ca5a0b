"""Mixes of formats that others would choose at the same bytes: by popularity, or at random.

Knows blocks' sizes and how often they are used, never their measured damage. What published systems
do, reduced to the choice of formats and on hotset's own codecs, so that only the choice differs:

    edgemoe    hotter experts in more bits of int2, int4, int8, bf16 (Yi et al., EdgeMoE, 2023)
    hobbit     hot experts in a high precision, all others in a low one: bf16 over int4, and below
               int4's size int8 over int2 (Tang et al., HOBBIT, 2024)
    random     as `edgemoe`, with experts in random order

Invariant: a mix never takes more bytes than it is given.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from hotset.policies.allocate import Costs

    Floats = NDArray[np.float64]
    Ints = NDArray[np.int64]

RIVALS = ("edgemoe", "hobbit", "random")
_EDGEMOE = ("int2", "int4", "int8", "bf16")
_HOBBIT = (("int4", "bf16"), ("int2", "int8"))


def rival_codes(
    name: str, costs: Costs, *, frequency: Floats, bytes_at_most: float, seed: int = 0
) -> Ints | None:
    """Codes [L, E] of a rival's mix, or None where it has no formats for so few bytes."""
    order = np.argsort(-frequency, axis=None, kind="stable")
    if name == "random":
        order = np.random.default_rng(seed).permutation(frequency.size)
    if name == "hobbit":
        pairs = [_codes_of(costs, pair) for pair in _HOBBIT]
    else:
        ladder = _codes_of(costs, _EDGEMOE)
        pairs = [ladder[at : at + 2] for at in range(len(ladder) - 2, -1, -1)]
    mean = bytes_at_most / frequency.size
    for low, high in (pair for pair in pairs if len(pair) == 2):
        if costs.nbytes[low] <= mean:
            gap = float(costs.nbytes[high] - costs.nbytes[low])
            spare = bytes_at_most - float(costs.nbytes[low]) * frequency.size
            hot = min(frequency.size, int(spare // gap))
            codes = np.full(frequency.size, low, dtype=np.int64)
            codes[order[:hot]] = high
            return codes.reshape(frequency.shape)
    return None


def _codes_of(costs: Costs, names: Sequence[str]) -> list[int]:
    return [costs.formats.index(name) for name in names if name in costs.formats]
