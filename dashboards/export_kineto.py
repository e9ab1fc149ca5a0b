"""A run as PyTorch profiler (Kineto) traces, one file a device, for Holistic Trace Analysis.

That tool tells computation from communication by a kernel's name and stream, so compute stands as
kernels on one stream (time in which the device computed and did not wait, merged) and each transfer
that touches the device as a kernel named like NCCL's on a stream of its own. HTA truncates to
microseconds; files keep three decimals. A device is a rank. Decides only how things are spelled.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from hotset.dashboards.trace import computing_time

if TYPE_CHECKING:
    from pathlib import Path

    from hotset.dashboards.trace_view import View

_COMPUTE_STREAM, _MOVE_STREAM = 7, 20


def write_kineto(view: View, folder: Path) -> list[Path]:
    """Write `rank-N.json` for each device, in the order of their names; returns the paths."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    zero_ns = int(view.table["start_ns"].min())
    for rank, device in enumerate(view.devices):
        path = folder / f"rank-{rank}.json"
        about = {
            "schemaVersion": 1,
            "distributedInfo": {
                "backend": "hotset", "rank": rank, "world_size": len(view.devices),
            },
            "deviceProperties": [],
            "hotset": {"device": device, "emulated": view.spans.emulated},
        }  # fmt: skip
        events = _events(view, device, rank=rank, zero_ns=zero_ns)
        path.write_text(json.dumps({**about, "traceEvents": events}), encoding="utf-8")
        paths.append(path)
    return paths


def _events(view: View, device: str, *, rank: int, zero_ns: int) -> list[dict[str, Any]]:
    table, mine = view.table, view.of(device)
    events: list[dict[str, Any]] = []

    def add(name: str, start_ns: int, end_ns: int, *, stream: int) -> None:
        number = len(events) + 1
        args = {"stream": stream, "device": rank, "correlation": number, "External id": number}
        events.append(
            {
                "ph": "X", "cat": "kernel", "name": name, "pid": rank, "tid": stream,
                "ts": (start_ns - zero_ns) / 1000, "dur": (end_ns - start_ns) / 1000, "args": args,
            }
        )  # fmt: skip

    for step in mine[view.step[mine]].tolist():
        start_ns, end_ns = int(table["start_ns"][step]), int(table["end_ns"][step])
        events.append(
            {
                "ph": "X", "cat": "cpu_op", "name": "hotset.compute.step", "pid": rank, "tid": 1,
                "ts": (start_ns - zero_ns) / 1000, "dur": (end_ns - start_ns) / 1000,
                "args": {"External id": len(events) + 1},
            }
        )  # fmt: skip
    computing = computing_time(view, device)
    for start_ns, end_ns in zip(computing.starts.tolist(), computing.ends.tolist(), strict=True):
        add("hotset_compute", start_ns, end_ns, stream=_COMPUTE_STREAM)
    for row in view.touching(device).tolist():
        source = view.name(int(table["source"][row])) or "unknown"
        add(
            f"ncclDevKernel_hotset_transfer_{source}",
            int(table["start_ns"][row]),
            int(table["end_ns"][row]),
            stream=_MOVE_STREAM,
        )
    return events
