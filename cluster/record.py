"""`hotset record`: serve prompts from a live cluster and keep which experts every token used.

Puts a run and its recording together; the file is what `hotset replay` and `hotset analyze-routing`
read. Decides nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from hotset.errors import ClusterError, ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from hotset.actors.observe import Recording
    from hotset.cluster.config import RunConfig
    from hotset.cluster.launch import Deployment

CALL_S = 60.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Routing:
    """`experts` [tokens, L, k] of all requests, one after the other; `seq` [tokens] names them."""

    experts: NDArray[np.uint16]
    seq: NDArray[np.int64]
    cut: bool


def collect(deployment: Deployment) -> Routing:
    """Ask every worker for its recording. Raises ClusterError when nothing was recorded."""
    import msgspec
    import ray

    from hotset.actors.observe import Recording

    asked = [worker.recording.remote() for _, worker in sorted(deployment.workers.items())]
    found = [
        msgspec.msgpack.decode(data, type=Recording) for data in ray.get(asked, timeout=CALL_S)
    ]
    return join_recordings(found)


def join_recordings(recordings: Sequence[Recording]) -> Routing:
    """Put requests behind each other. Raises ClusterError when there is no token."""
    parts: list[NDArray[np.uint16]] = []
    for recording in recordings:
        for request in recording.requests:
            layers = [
                np.frombuffer(layer, dtype="<u2").reshape(-1, request.top_k)
                for layer in request.layers
            ]
            if len(layers[0]):
                parts.append(np.stack(layers, axis=1))
    if not parts:
        raise ClusterError("no routing was recorded", remedy="let the run generate some tokens")
    lengths = [len(part) for part in parts]
    return Routing(
        experts=np.concatenate(parts),
        seq=np.repeat(np.arange(len(parts)), lengths),
        cut=any(recording.cut for recording in recordings),
    )


def run_record(  # noqa: PLR0913 - one argument for each option of the command
    config: RunConfig,
    *,
    prompts: tuple[str, ...],
    max_new_tokens: int,
    out: Path,
    address: str | None,
    say: Callable[[str], None],
) -> dict[str, Any]:
    """Serve the prompts one after the other and write their routing; what was written."""
    from hotset.cluster.front import Front
    from hotset.cluster.launch import plan_nodes, prepare
    from hotset.cluster.local import quiet_environment
    from hotset.cluster.serve import encode_prompt, load_tokenizer, new_run_id, on_cluster
    from hotset.dashboards.routertrace import write_trace

    if out.suffix != ".npz" or not out.resolve().parent.is_dir():
        raise ConfigError(f"cannot write {out}", remedy="name a .npz file in a folder that exists")
    quiet_environment()
    deployment = prepare(config, run=new_run_id(), say=say)
    tokenizer = load_tokenizer(str(config.model))
    ids = [encode_prompt(tokenizer, text) for text in prompts]
    with on_cluster(address, plan_nodes(config), say=say):
        try:
            deployment.start()
            deployment.wait_settled()
            front = Front(deployment)
            for prompt in ids:
                front.generate(prompt, max_new_tokens=max_new_tokens)
            routing = collect(deployment)
        finally:
            deployment.stop()
    num_experts = deployment.catalog.num_experts
    write_trace(out, experts=routing.experts, seq=routing.seq, num_experts=num_experts)
    if routing.cut:
        say("the recording is full: later tokens are left out")
    tokens, layers, top_k = routing.experts.shape
    return {
        "file": str(out), "tokens": tokens, "layers": layers, "top_k": top_k,
        "num_experts": num_experts, "sequences": len(np.unique(routing.seq)),
    }  # fmt: skip
