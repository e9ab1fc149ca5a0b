"""Writes the golden blocks that `test_format_blocks` reads; run it when a version is added.

A file is never changed: later versions must read the blocks of earlier ones.

    .venv/bin/python tests/blocks/write_golden_blocks.py
"""

from __future__ import annotations

import base64
import json
from pathlib import Path

import torch
from format_layouts import make_layout, make_payload

from hotset.blocks.formats import CODECS
from hotset.blocks.formats_header import VERSION
from hotset.blocks.formats_lossless import LosslessCodec

FOLDER = Path(__file__).parent / "data"
LAYOUT = make_layout(hidden=11, inter=7, transposed=False, bias=True)


def text(payload: torch.Tensor) -> str:
    return base64.b64encode(payload.numpy().tobytes()).decode()


def write_dense() -> None:
    """The dense form of bf16z, which needs more weights to be smaller than they are."""
    layout = make_layout(hidden=40, inter=60)
    payload = make_payload(layout, seed=43, spread=0.2)
    dense = LosslessCodec(dense=True)
    block = torch.zeros(dense.nbytes(layout), dtype=torch.uint8)
    used = dense.encode(payload, layout, block)
    path = FOLDER / f"dense_v{VERSION}.json"
    if not path.exists():
        path.write_text(json.dumps({"payload": text(payload), "block": text(block[:used])}) + "\n")


def main() -> None:
    payload = make_payload(LAYOUT, seed=42, spread=1.0)
    payload.view(torch.bfloat16)[:4] = torch.tensor([0.0, -0.0, 1e-40, -3.0]).to(torch.bfloat16)
    codecs = {str(name): by for name, by in CODECS.items() if name != "bf16"}
    codecs["bf16z dense"] = LosslessCodec(dense=True)
    blocks = {}
    for name, by in codecs.items():
        block = torch.zeros(by.nbytes(LAYOUT), dtype=torch.uint8)
        used = by.encode(payload, LAYOUT, block)
        out = torch.zeros(LAYOUT.nbytes, dtype=torch.uint8)
        by.decode(block[:used], LAYOUT, out)
        blocks[name] = {"block": text(block[:used]), "decoded": text(out)}
    write_dense()
    path = FOLDER / f"blocks_v{VERSION}.json"
    if path.exists():
        raise SystemExit(f"{path} is there; a version's blocks never change")
    path.write_text(json.dumps({"payload": text(payload), "blocks": blocks}, indent=1) + "\n")


if __name__ == "__main__":
    main()
