"""The libraries that `hotset bench formats` measures beside our codecs, each for its own formats.

Decides only how a library is called: weights in, its own object out, and back. An absent library is
left out with the reason. Must not know timing or our codecs.
"""

from __future__ import annotations

import importlib
import warnings
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Callable


@dataclass(frozen=True, slots=True, kw_only=True)
class Peer:
    """One library's way to one format. `decode` gives a matrix of the shape it was given."""

    format: str
    by: str
    encode: Callable[[torch.Tensor], Any]
    decode: Callable[[Any], torch.Tensor]
    nbytes: Callable[[Any], int]


@dataclass(frozen=True, slots=True, kw_only=True)
class LeftOut:
    """A contender that was not measured."""

    by: str
    reason: str


def find_peers(probe: list[torch.Tensor]) -> tuple[list[Peer], list[LeftOut]]:
    """All libraries that are installed and take `probe`, and why the others are left out."""
    peers: list[Peer] = [
        Peer(format="fp8", by="torch cast", encode=_cast, decode=_uncast, nbytes=_sum_nbytes)
    ]
    left_out: list[LeftOut] = []
    for name, make in (("torchao", _torchao), ("bitsandbytes", _bitsandbytes), ("blosc2", _blosc2)):
        try:
            found = make(_quietly(name))
        except ImportError as error:
            left_out.append(LeftOut(by=name, reason=f"{error}; pip install 'hotset[bench]'"))
            continue
        for peer in found:
            try:
                for matrix in probe:
                    peer.decode(peer.encode(matrix))
            except Exception as error:  # noqa: BLE001 - a library's failure is a finding here
                reason = f"{peer.format}: {type(error).__name__}: {error}".splitlines()[0]
                left_out.append(LeftOut(by=peer.by, reason=reason))
            else:
                peers.append(peer)
    return peers, left_out


def _quietly(name: str) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return importlib.import_module(name)


def _cast(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    scale = weight.abs().amax(dim=1, keepdim=True).clamp_min(1e-12) / 448
    return (weight / scale).clamp(-448, 448).to(torch.float8_e4m3fn), scale


def _uncast(encoded: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    return encoded[0].to(encoded[1].dtype).mul_(encoded[1])


def _sum_nbytes(encoded: tuple[torch.Tensor, ...]) -> int:
    return sum(part.nbytes for part in encoded)


# --- torchao ------------------------------------------------------------------------------------


def _torchao(_module: Any) -> list[Peer]:
    ways = _quietly("torchao.quantization")
    kinds: Any = torch  # its types do not name int4
    configs = {
        "int8": [
            ("torchao Int8Tensor", ways.Int8WeightOnlyConfig()),
            (
                "torchao Intx",
                ways.IntxWeightOnlyConfig(weight_dtype=torch.int8, granularity=ways.PerAxis(0)),
            ),
        ],
        "fp8": [("torchao Float8Tensor", ways.Float8WeightOnlyConfig())],
        "int4": [
            (
                "torchao Intx (a byte each)",
                ways.IntxWeightOnlyConfig(weight_dtype=kinds.int4, granularity=ways.PerGroup(64)),
            )
        ],
    }
    peers = [
        Peer(
            format=name, by=by, encode=partial(_ao_encode, ways, config),
            decode=_ao_decode, nbytes=_ao_nbytes,
        )
        for name, ones in configs.items()
        for by, config in ones
    ]  # fmt: skip
    nf4 = _quietly("torchao.quantization.quantize_.workflows.nf4.nf4_tensor")
    peers.append(
        Peer(
            format="nf4", by="torchao NF4Tensor", encode=partial(_nf4_encode, nf4),
            decode=lambda found: found.get_original_weight(), nbytes=_ao_nbytes,
        )
    )  # fmt: skip
    return peers


def _ao_encode(ways: Any, config: Any, weight: torch.Tensor) -> Any:
    if hasattr(config, "granularity") and isinstance(config.granularity, ways.PerGroup):
        weight = weight.reshape(-1, config.granularity.group_size)  # rows need not be whole groups
    layer = torch.nn.Linear(1, 1, bias=False)
    layer.weight = torch.nn.Parameter(weight, requires_grad=False)
    ways.quantize_(layer, config)
    return layer.weight


def _ao_decode(encoded: Any) -> torch.Tensor:
    found: torch.Tensor = encoded.dequantize()
    return found


def _nf4_encode(module: Any, weight: torch.Tensor) -> Any:
    return module.to_nf4(weight, block_size=64, scaler_block_size=64)


def _ao_nbytes(encoded: Any) -> int:
    names, _context = encoded.__tensor_flatten__()
    return sum(getattr(encoded, name).nbytes for name in names)


# --- bitsandbytes -------------------------------------------------------------------------------


def _bitsandbytes(_module: Any) -> list[Peer]:
    ways = _quietly("bitsandbytes.functional")
    return [
        Peer(
            format="nf4", by="bitsandbytes",
            encode=lambda weight: ways.quantize_4bit(weight, blocksize=64, quant_type="nf4"),
            decode=lambda found: ways.dequantize_4bit(*found),
            nbytes=lambda found: found[0].nbytes + found[1].absmax.nbytes,
        ),
        Peer(
            format="int4", by="bitsandbytes fp4",
            encode=lambda weight: ways.quantize_4bit(weight, blocksize=64, quant_type="fp4"),
            decode=lambda found: ways.dequantize_4bit(*found),
            nbytes=lambda found: found[0].nbytes + found[1].absmax.nbytes,
        ),
        Peer(
            format="int8", by="bitsandbytes vectorwise",
            encode=lambda weight: ways.int8_vectorwise_quant(weight.to(torch.float16))[:2],
            decode=lambda found: ways.int8_vectorwise_dequant(*found).to(torch.bfloat16),
            nbytes=_sum_nbytes,
        ),
        Peer(
            format="int8", by="bitsandbytes blockwise",
            encode=lambda weight: ways.quantize_blockwise(weight, blocksize=256),
            decode=lambda found: ways.dequantize_blockwise(*found),
            nbytes=lambda found: found[0].nbytes + found[1].absmax.nbytes,
        ),
    ]  # fmt: skip


# --- blosc2 -------------------------------------------------------------------------------------


def _blosc2(module: Any) -> list[Peer]:
    kinds = {
        "blosc2 shuffle+zstd": (module.Filter.SHUFFLE, module.Codec.ZSTD, 1),
        "blosc2 bitshuffle+lz4": (module.Filter.BITSHUFFLE, module.Codec.LZ4, 5),
    }
    return [
        Peer(
            format="bf16z", by=by,
            encode=partial(_blosc_encode, module, {
                "filters": [kind], "filters_meta": [0], "codec": method, "clevel": level,
                "nthreads": 1, "typesize": 2,
            }),
            decode=partial(_blosc_decode, module), nbytes=lambda found: len(found[0]),
        )
        for by, (kind, method, level) in kinds.items()
    ]  # fmt: skip


def _blosc_encode(
    module: Any, how: dict[str, object], weight: torch.Tensor
) -> tuple[bytes, torch.Tensor]:
    raw = weight.contiguous().view(torch.int16).numpy()
    return module.compress2(raw, **how), torch.empty_like(weight)


def _blosc_decode(module: Any, found: tuple[bytes, torch.Tensor]) -> torch.Tensor:
    module.decompress2(found[0], dst=found[1].view(torch.int16).numpy(), nthreads=1)
    return found[1]
