"""Messages between the page and its server.

Text is JSON. A moment is binary, because cells are many: `u32 length | JSON | padding to 4 |
payload`, little endian. The payload is all cells (`full`, u16 each, [stores, blocks]), or what
changed since this connection's last moment (`delta`: `count` u32 places, then u16 values).

Times go as offsets from the run's start, because a browser's numbers hold 53 bits.
"""

from __future__ import annotations

from pathlib import PurePath
from typing import TYPE_CHECKING, Literal

import msgspec
import numpy as np

from hotset.dashboards.page.timeline import ASKED, FORMATS

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from hotset.dashboards.page.moment import Moment
    from hotset.dashboards.page.run import Run, Series, Why
    from hotset.dashboards.page.timeline import Cells

DELTA_UP_TO = 4
"""A delta is sent when no more than one cell in so many has changed; it costs three cells each."""


class Ask(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What the page wants: a moment (`show`) or a block's story (`why`).

    `offset_ns` is from the run's start; None follows the newest moment.
    """

    kind: Literal["show", "why"]
    offset_ns: int | None = None
    plan: int | None = None
    block: str = ""


_ask_decoder = msgspec.json.Decoder(Ask)


def decode_ask(text: str | bytes) -> Ask:
    """Read a message of the page. Raises msgspec.ValidationError or DecodeError."""
    return _ask_decoder.decode(text)


def hello(run: Run) -> str:
    """What does not change while a run is shown."""
    spec = run.spec
    return _text(
        {
            "kind": "hello",
            "run": spec.run,
            "model": PurePath(spec.model).name,
            "digest": spec.digest,
            "mode": spec.mode,
            "layers": list(spec.layers),
            "experts": spec.num_experts,
            "block_bytes": spec.nbytes,
            "formats": [form.value for form in FORMATS],
            "asked_bit": ASKED,
            "guessed": run.guessed,
            "decides": run.brain is not None,
        }
    )


def series(found: Series, *, from_ns: int) -> str:
    """Time series; edges as seconds from the run's start."""
    return _text(
        {
            "kind": "series",
            "edges_s": [(edge - from_ns) / 1e9 for edge in found.edges_ns],
            "stall": found.stall,
            "moved": found.moved,
        }
    )


def why(found: Why | None, *, block: str, from_ns: int) -> str:
    """Story of a block, or that there is no such block."""
    said = msgspec.to_builtins(found) if found else {"block": block, "summary": "no such block"}
    return _text({"kind": "why", "from_ns": from_ns, **said})


def trouble(text: str) -> str:
    """A request that could not be answered."""
    return _text({"kind": "error", "text": text})


def moment(now: Moment, cells: Cells, *, before: Cells | None) -> bytes:
    """A moment for a connection whose last cells were `before` (None: it has none)."""
    form, payload, count = _cells(cells, before)
    said = msgspec.to_builtins(now)
    header = msgspec.json.encode(
        {
            "kind": "moment",
            "cells": form,
            "count": count,
            "offset_ns": now.at_ns - now.from_ns,
            "span_ns": now.to_ns - now.from_ns,
            **said,
        }
    )
    padding = b" " * (-len(header) % 4)
    length = (len(header) + len(padding)).to_bytes(4, "little")
    return length + header + padding + payload


def _cells(cells: Cells, before: Cells | None) -> tuple[str, bytes, int]:
    flat = np.ascontiguousarray(cells, "<u2").reshape(-1)
    if before is None or before.shape != cells.shape:
        return "full", flat.tobytes(), len(flat)
    changed: NDArray[np.intp] = np.flatnonzero(flat != before.reshape(-1))
    if len(changed) * DELTA_UP_TO > len(flat):
        return "full", flat.tobytes(), len(flat)
    return "delta", changed.astype("<u4").tobytes() + flat[changed].tobytes(), len(changed)


def _text(value: object) -> str:
    return msgspec.json.encode(value).decode()
