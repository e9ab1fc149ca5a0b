"""Sending tokens to peer workers over Ray: the `Peers` side of the token path.

Rows travel as bytes in one MessagePack message to the peer's `compute`. Every call has a deadline;
whatever goes wrong is a TransportError, and the token path fetches the weights instead.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import ray
import torch

from hotset.actors.membership import NAMESPACE
from hotset.actors.messages import ComputeReply, ComputeRequest, ExpertRows, decode, encode
from hotset.errors import PeerGoneError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from hotset.actors.directory import Directory
    from hotset.actors.tracecontext import TraceContext


def actor_name(run: str, store: str) -> str:
    """Name of a store's actor in the namespace."""
    return f"hotset-{run}-{store}"


def rows_to_bytes(rows: torch.Tensor) -> bytes:
    """Bytes of rows [n, H], row-major, in their own type."""
    return rows.detach().contiguous().cpu().view(torch.uint8).numpy().tobytes()


def rows_from_bytes(
    data: bytes, *, count: int, dtype: torch.dtype, device: torch.device
) -> torch.Tensor:
    """Rows [count, H] from their bytes."""
    flat = torch.frombuffer(bytearray(data), dtype=torch.uint8).view(dtype)
    return flat.view(count, -1).to(device)


class RayPeers:
    """Workers of a run, by store name."""

    def __init__(
        self, *, run: str, directory: Directory, dtype: torch.dtype, device: torch.device
    ) -> None:
        """`dtype` and `device` are those of the hidden states."""
        self._run = run
        self._directory = directory
        self._dtype = dtype
        self._device = device
        self._handles: dict[str, Any] = {}

    def compute(
        self,
        store: str,
        *,
        layer: int,
        parts: Sequence[tuple[int, torch.Tensor]],
        timeout_s: float,
        asked: TraceContext,
    ) -> dict[int, torch.Tensor | None]:
        """As `Peers.compute`."""
        request = ComputeRequest(
            epoch=self._directory.epoch,
            deadline_ns=time.time_ns() + int(timeout_s * 1e9),
            traceparent=asked.header,
            layer=layer,
            parts=tuple(
                ExpertRows(expert=expert, count=rows.shape[0], data=rows_to_bytes(rows))
                for expert, rows in parts
            ),
        )
        try:
            if store not in self._handles:
                name = actor_name(self._run, store)
                self._handles[store] = ray.get_actor(name, namespace=NAMESPACE)
            answer = self._handles[store].compute.remote(encode(request))
            reply = decode(ray.get(answer, timeout=timeout_s), ComputeReply)
        except Exception as error:
            self._handles.pop(store, None)
            raise PeerGoneError(
                f"{store} did not compute for layer {layer}: {type(error).__name__}",
                remedy="the weights are fetched instead",
            ) from error
        return {
            part.expert: rows_from_bytes(
                part.data, count=part.count, dtype=self._dtype, device=self._device
            )
            if part.present
            else None
            for part in reply.parts
        }
