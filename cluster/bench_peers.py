"""The contenders of `hotset bench serve` that are not hotset: transformers, full and mapped.

Each runs in a process of its own, with the same arithmetic, threads and prompt as hotset's worker.
`full`: everything in memory; the bound. `mmap`: the dense part in memory, experts as views of a
mapped file laid out block by block, so the kernel's reclaim decides what stays (what llama.cpp does
within transformers). Joins the memory limit after its imports, before it loads.
"""

from __future__ import annotations

import json
import mmap
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from hotset.blocks.checkpoint import Catalog
from hotset.blocks.experts import run_expert, view_weights
from hotset.blocks.generate import TokenStream, generate
from hotset.blocks.local import BlockReader
from hotset.blocks.routing import combine, experts_hit, group_rows
from hotset.policies.types import BlockId

if TYPE_CHECKING:
    from hotset.blocks.experts import ExpertsModule, ExpertWeights


class MappedRunner:
    """Experts as views of a mapped file: the memory-mapped peer."""

    def __init__(self, catalog: Catalog, path: Path) -> None:
        """Map the file that `write_mapped` wrote."""
        self._catalog = catalog
        with path.open("rb") as file:
            self._map = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ, flags=mmap.MAP_SHARED)
        whole = torch.frombuffer(memoryview(self._map), dtype=torch.uint8)
        self._views: dict[BlockId, ExpertWeights] = {}
        for index, block in enumerate(catalog.blocks):
            start = index * catalog.block_nbytes
            payload = whole[start : start + catalog.block_nbytes]
            self._views[block] = view_weights(payload, catalog.layout)

    def run(
        self,
        layer: int,
        module: ExpertsModule,
        hidden: torch.Tensor,
        top_k_index: torch.Tensor,
        top_k_weights: torch.Tensor,
    ) -> torch.Tensor:
        """As `ExpertRunner.run`."""
        outputs = {}
        for expert in experts_hit(top_k_index, num_experts=self._catalog.num_experts):
            rows = hidden[group_rows(top_k_index, expert).tokens]
            outputs[expert] = run_expert(module, rows, self._views[BlockId(layer, expert)])
        return combine(hidden, top_k_index, top_k_weights, outputs, reference="eager")


def write_mapped(catalog: Catalog, path: Path) -> None:
    """Write all blocks, one after the other, in layout order (once per checkpoint)."""
    reader = BlockReader(catalog)
    buffer = torch.empty(catalog.block_nbytes, dtype=torch.uint8)
    part = path.with_suffix(".part")
    with part.open("wb") as file:
        for block in catalog.blocks:
            reader.read(block, buffer)
            file.write(memoryview(buffer.numpy().data))
    reader.close()
    part.rename(path)


def _full(model: str) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(
        model, dtype="auto", experts_implementation="eager"
    ).eval()


def _mapped(model: str, mapped: str) -> Any:
    from hotset.blocks.hf import load_skeleton

    catalog = Catalog.open(model)
    skeleton = load_skeleton(model, catalog=catalog)
    skeleton.bind(MappedRunner(catalog, Path(mapped)))
    return skeleton.model


def _child() -> None:
    from hotset.actors import cgroup
    from hotset.blocks.hf import import_model_code

    job = json.loads(sys.stdin.read())
    import_model_code(Catalog.open(job["model"]).model_type)
    torch.set_num_threads(job["threads"])
    if job["group"]:
        cgroup.join(job["group"])
    kind = job["kind"]
    model = _full(job["model"]) if kind == "full" else _mapped(job["model"], job["mapped"])
    generate(model, job["prompt"], max_new_tokens=job["max_new_tokens"])  # warm, as hotset is
    times: list[float] = []
    stream = TokenStream(lambda _tokens: times.append(time.perf_counter()))
    tokens = generate(model, job["prompt"], max_new_tokens=job["max_new_tokens"], stream=stream)
    rate = (len(times) - 1) / (times[-1] - times[0])
    print(json.dumps({"tokens": tokens, "tokens_per_s": rate}))


if __name__ == "__main__":
    _child()
