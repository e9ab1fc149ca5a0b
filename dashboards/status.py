"""A snapshot of the cluster as text or JSON: `hotset status` and `hotset why BLOCK`.

Shows what the controller said; must not ask it, and must not know Ray. Invariant shown to the
reader: the sum of the blocks' states is the number of blocks, or the table says that it is not.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import msgspec

from hotset.dashboards import text as plain

if TYPE_CHECKING:
    from collections.abc import Sequence

    from hotset.policies.types import BlockId, Copy


@dataclass(frozen=True, slots=True, kw_only=True)
class StoreStatus:
    """One store. `tier` is a name (hbm, host, cxl); `blocks` counts copies by format.

    `state` is `ready`, `draining` or `lost`. `in_flight` counts transfers towards it.
    """

    name: str
    tier: str
    node: str
    incarnation: int
    capacity_bytes: int
    resident_bytes: int
    blocks: dict[str, int]
    state: str = "ready"
    in_flight: int = 0
    quarantined_bytes: int = 0
    emulated: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Status:
    """The cluster at one moment.

    `states` counts blocks by their best state in the cluster (`S1` to `S7`), so that its sum is
    `blocks`. `vetoes` counts by reason. `alerts` are sentences for the operator. `quality` says how
    drift stands against its budget; empty where nothing may be lost. `predictors` are sentences:
    whether each worker prefetches, and what each of its predictors costs and saves.
    """

    run: str
    model: str
    digest: str
    blocks: int
    states: dict[str, int]
    stores: tuple[StoreStatus, ...]
    epoch: int
    epoch_age_ns: int
    requests_in_flight: int
    tokens: int
    stall_ns: int = 0
    vetoes: dict[str, int] = field(default_factory=dict)
    alerts: tuple[str, ...] = ()
    emulated: tuple[str, ...] = ()
    dropped: int = 0
    mode: str = "active"
    quality: str = ""
    predictors: tuple[str, ...] = ()

    def to_json(self) -> str:
        """One line of JSON with the fields as keys."""
        return msgspec.json.encode(self).decode()


_STATE_WORDS = {
    "S1": "full precision",
    "S2": "reduced",
    "S3": "compressed",
    "S4": "staged",
    "S5": "in storage",
    "S6": "in flight",
    "S7": "recomputable",
}


_NODE_DIGITS = 8  # of an id of 56; enough to tell nodes apart
_INCARNATION_DIGITS = 6  # of a birth time in ns; enough to see that a store was reborn


def render(status: Status, *, width: int = 80) -> str:
    """Plain-text tables, no colour, at most `width` columns where names allow."""
    lines: list[str] = []
    for label, value in _facts(status):
        lines += plain.field(label, value, width=width)
    rows = [_store(one) for one in status.stores]
    if rows:
        head = ("store", "tier", "node", "inc", "resident", "of", "full", "blocks")
        lines += ["", *plain.table(head, rows, left=3)]
    else:
        lines += ["", "no store has joined"]
    by_store = [f"{one.name}: {one.emulated}" for one in status.stores if one.emulated]
    for flag in (*by_store, *status.emulated):
        lines += plain.field("EMULATED", flag, width=width)
    for said in status.predictors:
        lines += plain.field("predictors", said, width=width)
    for alert in status.alerts:
        lines += plain.field("ALERT", alert, width=width)
    return "\n".join(lines) + "\n"


def _facts(status: Status) -> list[tuple[str, str]]:
    counted = sum(status.states.values())
    states = ", ".join(
        f"{count:,} {_STATE_WORDS.get(state, state)} ({state})"
        for state, count in sorted(status.states.items())
        if count
    )
    agree = "" if counted == status.blocks else f"states add up to {counted:,}"
    vetoes = ", ".join(f"{count:,} {reason}" for reason, count in sorted(status.vetoes.items()))
    facts = [
        ("run", f"{status.run} ({status.mode})"),
        ("model", " ".join(filter(None, (status.model, status.digest and f"[{status.digest}]")))),
        ("epoch", f"{status.epoch:,}, {plain.human_ns(status.epoch_age_ns)} old"),
        ("blocks", f"{status.blocks:,}: {states or 'none'}"),
        ("MISMATCH", agree),
        ("requests", f"{status.requests_in_flight:,} in flight, {status.tokens:,} tokens served"),
        ("stall", plain.human_ns(status.stall_ns)),
        ("vetoes", vetoes or "none"),
        ("quality", status.quality),
        ("telemetry", f"{status.dropped:,} rows dropped"),
    ]
    return [(label, value) for label, value in facts if value]


def _store(one: StoreStatus) -> tuple[str, ...]:
    formats = ", ".join(f"{count:,} {form}" for form, count in sorted(one.blocks.items()) if count)
    extra = [formats or "none"]
    if one.in_flight:
        extra.append(f"{one.in_flight:,} coming")
    if one.quarantined_bytes:
        extra.append(f"{plain.human_bytes(one.quarantined_bytes)} quarantined")
    if one.state != "ready":
        extra.append(one.state.upper())
    return (
        one.name,
        one.tier,
        one.node[:_NODE_DIGITS],
        str(one.incarnation)[-_INCARNATION_DIGITS:],
        plain.human_bytes(one.resident_bytes),
        plain.human_bytes(one.capacity_bytes),
        plain.human_ratio(one.resident_bytes / one.capacity_bytes if one.capacity_bytes else None),
        "; ".join(extra),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class StoryLine:
    """One thing that happened to a block. `cause` names the event that led here."""

    at_ns: int
    store: str
    what: str
    reason: str
    cause: str = ""
    epoch: int = 0


def render_why(
    block: BlockId, *, story: Sequence[StoryLine], copies: Sequence[Copy], width: int = 80
) -> str:
    """Where the block is and how it came there, oldest first."""
    lines = [f"block {block}: expert {block.index} of layer {block.layer}", ""]
    if copies:
        rows = [
            (copy.store, copy.format.value, plain.human_bytes(copy.nbytes), str(copy.generation),
             str(copy.incarnation), f"{copy.checksum:016x}")
            for copy in copies
        ]  # fmt: skip
        head = ("copy in", "format", "size", "generation", "inc", "checksum")
        lines += plain.table(head, rows, left=2)
    else:
        lines.append("no copy in any store: it is in storage only")
    lines.append("")
    if not story:
        lines.append("nothing has happened to it yet")
    last_ns = story[-1].at_ns if story else 0
    for line in story:
        age = f"-{plain.human_ns(last_ns - line.at_ns)}" if line.at_ns < last_ns else "last"
        cause = f", because of {line.cause}" if line.cause else ""
        said = f"{line.store}: {line.what} ({line.reason}{cause}; epoch {line.epoch})"
        lines += plain.field(f"{age:>12}", said, width=width, label_width=14)
    return "\n".join(lines) + "\n"


def why_json(block: BlockId, *, story: Sequence[StoryLine], copies: Sequence[Copy]) -> str:
    """One line of JSON with `block`, `copies` and `story`; ids of blocks are `layer.expert`."""
    shown = {
        "block": str(block),
        "copies": [{**msgspec.to_builtins(copy), "block": str(copy.block)} for copy in copies],
        "story": [msgspec.to_builtins(line) for line in story],
    }
    return msgspec.json.encode(shown).decode()
