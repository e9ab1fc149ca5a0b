"""The unmodified transformers model on the same prompts, in a process of its own.

A process of its own, because the reference wants the whole checkpoint in memory, the plug-in must
not be near it, and its thread count must be the workers'.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from hotset.errors import ClusterError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from hotset.cluster.config import RunConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class Reference:
    """Tokens for each prompt, and how fast they came."""

    tokens: list[list[int]]
    tokens_per_s: float


def reference_tokens(
    config: RunConfig, prompts: Sequence[Sequence[int]], *, max_new_tokens: int
) -> Reference:
    """Generate with transformers alone. Raises ClusterError with its last line if that fails."""
    job = {
        "model": str(config.model),
        "implementation": config.reference,
        "prompts": [list(prompt) for prompt in prompts],
        "max_new_tokens": max_new_tokens,
        "threads": config.threads,
    }
    env = dict(os.environ, OMP_NUM_THREADS=str(config.threads))
    done = subprocess.run(
        [sys.executable, "-m", "hotset.cluster.reference"],
        input=json.dumps(job),
        capture_output=True,
        text=True,
        env=env,
        check=False,
    )
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no output"])[-1]
        raise ClusterError(
            f"the reference model failed: {last[:200]}",
            remedy="use --no-check to run without it",
        )
    answer = json.loads(done.stdout.splitlines()[-1])
    return Reference(tokens=answer["tokens"], tokens_per_s=answer["tokens_per_s"])


def _child() -> None:
    job = json.loads(sys.stdin.read())
    import torch
    from transformers import AutoModelForCausalLM

    from hotset.blocks.generate import generate

    torch.set_num_threads(job["threads"])
    model = AutoModelForCausalLM.from_pretrained(
        job["model"], dtype="auto", experts_implementation=job["implementation"]
    ).eval()
    tokens, elapsed = [], 0.0
    for prompt in job["prompts"]:
        began = time.perf_counter()
        tokens.append(generate(model, prompt, max_new_tokens=job["max_new_tokens"]))
        elapsed += time.perf_counter() - began
    count = sum(len(one) for one in tokens)
    print(json.dumps({"tokens": tokens, "tokens_per_s": count / elapsed}))


if __name__ == "__main__":
    _child()
