"""A small run on disk: a journal, a spec and a trace, made by hand and from a seed."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

import msgspec

from hotset.actors.control import ControlSpec
from hotset.actors.frames import encode_frame
from hotset.actors.messages import pack
from hotset.policies.types import (
    BlockId,
    Copy,
    CopyDropped,
    CopyLanded,
    Event,
    Format,
    Reason,
    RouterCounts,
    StoreInfo,
    StoreJoined,
    Tick,
    Tier,
)

if TYPE_CHECKING:
    from pathlib import Path

SECOND_NS = 1_000_000_000
START_NS = 1_700_000_000 * SECOND_NS
NBYTES = 4096


def spec_of(run_dir: Path, *, layers: int = 4, experts: int = 8) -> ControlSpec:
    """A model of `layers` x `experts`, dense first layer left out."""
    return ControlSpec(
        run=run_dir.name, run_dir=str(run_dir), model="tiny", digest="d0",
        layers=tuple(range(1, layers + 1)), num_experts=experts, nbytes=NBYTES,
        reduced_nbytes=NBYTES // 2,
    )  # fmt: skip


def joined(name: str, tier: Tier, *, at_ns: int, slots: int = 64) -> StoreJoined:
    """A store that joins empty."""
    info = StoreInfo(
        name=name, tier=tier, node="node", incarnation=1, capacity_bytes=slots * (NBYTES + 200)
    )
    return StoreJoined(now_ns=at_ns, store=info)


def landed(
    store: str,
    block: BlockId,
    *,
    at_ns: int,
    form: Format = Format.BF16,
    reason: Reason = Reason.DEMAND,
    source: str = "storage",
    generation: int = 1,
) -> CopyLanded:
    """A copy that landed."""
    copy = Copy(
        block=block, format=form, store=store, offset=0,
        nbytes=NBYTES if form is Format.BF16 else NBYTES // 2,
        generation=generation, checksum=1, incarnation=1,
    )  # fmt: skip
    return CopyLanded(now_ns=at_ns, copy=copy, reason=reason, source=source)


def dropped(store: str, block: BlockId, *, at_ns: int, form: Format = Format.BF16) -> CopyDropped:
    """A copy that was dropped."""
    return CopyDropped(now_ns=at_ns, store=store, block=block, format=form, reason=Reason.EVICT)


def small_run() -> list[Event]:
    """Ten seconds: three stores, a move of block 2.3 from worker-0 to worker-1 at 6 s, tokens."""
    events: list[Event] = [
        joined("cxl-0", Tier.CXL, at_ns=START_NS),
        joined("worker-0", Tier.HBM, at_ns=START_NS + SECOND_NS, slots=8),
        joined("worker-1", Tier.HBM, at_ns=START_NS + SECOND_NS, slots=8),
    ]
    drawn = random.Random(7)
    at_ns = START_NS + SECOND_NS
    for layer in range(1, 5):
        for index in range(8):
            at_ns += 10_000_000
            block = BlockId(layer, index)
            events.append(landed("cxl-0", block, at_ns=at_ns, reason=Reason.WARM))
            if drawn.random() < 0.3 and block != BlockId(2, 3):
                form = drawn.choice([Format.BF16, Format.INT8, Format.BF16Z])
                events.append(landed("worker-0", block, at_ns=at_ns, form=form, source="cxl-0"))
    events += [landed("worker-0", BlockId(2, 3), at_ns=START_NS + 3 * SECOND_NS, source="cxl-0")]
    counts = tuple((BlockId(2, index), 1 + index) for index in range(8))
    for second in range(4, 10):
        now_ns = START_NS + second * SECOND_NS
        events.append(Tick(now_ns=now_ns))
        events.append(RouterCounts(now_ns=now_ns, store="worker-0", counts=counts, tokens=9))
        if second == 6:
            moved = landed("worker-1", BlockId(2, 3), at_ns=now_ns, source="worker-0")
            events += [moved, dropped("worker-0", BlockId(2, 3), at_ns=now_ns)]
    return events


def write_journal(run_dir: Path, events: list[Event]) -> Path:
    """The journal of events."""
    run_dir.mkdir(parents=True, exist_ok=True)
    path = run_dir / "journal.msgpack"
    path.write_bytes(b"".join(encode_frame(msgspec.msgpack.encode(pack(e))) for e in events))
    return path


def write_run(run_dir: Path, events: list[Event] | None = None, *, ended: bool = True) -> Path:
    """A whole folder; `ended` marks it as over."""
    write_journal(run_dir, small_run() if events is None else events)
    (run_dir / "run.json").write_bytes(msgspec.json.encode(spec_of(run_dir)))
    if ended:
        (run_dir / "trace.jsonl").touch()
    return run_dir


def trace_line(store: str, tier: str, spans: list[dict[str, object]], *, lost: int = 0) -> bytes:
    """A line of a trace file: OTLP JSON as a collector would accept it."""
    emulated = {"arrayValue": {"values": [{"stringValue": "hbm: a byte budget"}]}}
    resource = [
        {"key": "hotset.store", "value": {"stringValue": store}},
        {"key": "hotset.tier", "value": {"stringValue": tier}},
        {"key": "hotset.emulated", "value": emulated},
    ]
    scope: dict[str, object] = {"name": "hotset"}
    if lost:
        said = {"key": "hotset.telemetry.dropped", "value": {"intValue": str(lost)}}
        scope["attributes"] = [said]
    found = {"resource": {"attributes": resource}, "scopeSpans": [{"scope": scope, "spans": spans}]}
    return msgspec.json.encode({"resourceSpans": [found]}) + b"\n"


def span(name: str, start_ns: int, end_ns: int, **said: str | int) -> dict[str, object]:
    """A span; `linked` adds a link, other names are attributes of hotset."""
    linked = said.pop("linked", 0)
    attributes = [
        {
            "key": f"hotset.{key}",
            "value": {"intValue": str(value)} if isinstance(value, int) else {"stringValue": value},
        }
        for key, value in said.items()
    ]
    made: dict[str, object] = {
        "name": name,
        "spanId": "01",
        "startTimeUnixNano": str(start_ns),
        "endTimeUnixNano": str(end_ns),
        "attributes": attributes,
    }
    if linked:
        made["links"] = [{"spanId": "02"}]
    return made
