"""What a controller lets an observer read: its spec, and its journal from any byte on."""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec
import pytest

from hotset.actors.control import ControlCore, ControlSpec, Records, make_brain
from hotset.actors.messages import Join, pack, unpack_event
from hotset.dashboards.journal import read_frames
from hotset.policies.types import StoreInfo, Tier
from hotset.transport.base import PeerInfo

if TYPE_CHECKING:
    from pathlib import Path


def spec_for(run_dir: Path) -> ControlSpec:
    return ControlSpec(
        run="r", run_dir=str(run_dir), model="m", digest="d", layers=(0, 2), num_experts=3,
        nbytes=1000, reduced_nbytes=600,
    )  # fmt: skip


def joined(core: ControlCore, name: str) -> None:
    info = StoreInfo(name=name, tier=Tier.HBM, node="n", incarnation=7, capacity_bytes=9000)
    peer = PeerInfo(
        name=name, incarnation=7, backend="loopback", backend_metadata=b"", base_address=0, nbytes=9
    )
    core.join(Join(store=info, peer=peer, copies=()))


def test_the_spec_of_a_run_stands_beside_its_journal(tmp_path: Path) -> None:
    spec = spec_for(tmp_path)
    ControlCore(spec).close()
    assert msgspec.json.decode((tmp_path / "run.json").read_bytes(), type=ControlSpec) == spec
    assert not (tmp_path / "run.json.new").exists()


@pytest.mark.parametrize("cut", [0, 1])
def test_an_observer_reads_on_where_it_stopped(tmp_path: Path, cut: int) -> None:
    core = ControlCore(spec_for(tmp_path))
    joined(core, "worker-0")
    first = core.records(0)
    joined(core, "worker-1")
    rest = core.records(len(first.frames) - cut)
    whole = (tmp_path / "journal.msgpack").read_bytes()
    assert first.frames[: len(first.frames) - cut] + rest.frames == whole
    assert rest.offset == len(first.frames) - cut
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(rest), type=Records) == rest


def test_journal_and_spec_give_the_commands_again(tmp_path: Path) -> None:
    core = ControlCore(spec_for(tmp_path))
    joined(core, "worker-0")
    core.close()
    again = []
    for _ in range(2):
        brain = make_brain(spec_for(tmp_path))
        events = [
            unpack_event(msgspec.msgpack.decode(f))
            for f in read_frames(tmp_path / "journal.msgpack")
        ]
        again.append([pack(command) for event in events for command in brain.handle(event)])
    assert again[0] == again[1]
    assert {packed[0] for packed in again[0]} >= {"StartTransfer", "PublishEpoch"}
