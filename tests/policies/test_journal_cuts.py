"""A journal that is cut at any byte gives the brain's state after the last whole event."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import msgspec
from cluster_model import ClusterModel, blocks_of

from hotset.actors.frames import encode_frame, read_frames
from hotset.actors.messages import pack, unpack_event
from hotset.policies.brain import ClusterBrain
from hotset.policies.config import PolicyConfig
from hotset.policies.types import (
    BlockId,
    Concurrency,
    LayerTimes,
    RouterCounts,
    StoreDraining,
    Tick,
    Tier,
)

if TYPE_CHECKING:
    from pathlib import Path

LAYERS, EXPERTS = 2, 4
CONFIG = PolicyConfig(
    tick_ns=1, min_dwell_ns=0, popularity_half_life_tokens=32, hbm_reduced_ratio=0.5
)


def state_of(brain: ClusterBrain) -> tuple[Any, ...]:
    stories = tuple(repr(brain.story(info.block)) for info in brain.blocks)
    return repr(brain.directory()), brain.epoch, brain.version, brain.settled(), stories


class Walk(ClusterModel):
    """Remembers the state after each event."""

    def send(self, event: Any) -> Any:
        commands = super().send(event)
        self.states = [*getattr(self, "states", []), state_of(self.brain)]
        return commands


def walk() -> Walk:
    """Joins, traffic, telemetry, moves, a drain and a loss."""
    model = Walk(brain=ClusterBrain(blocks_of(LAYERS, EXPERTS), config=CONFIG))
    for name, tier, slots in (("w0", Tier.HBM, 3), ("h0", Tier.HOST, 5), ("c0", Tier.CXL, 8)):
        model.join(name, tier, slots=slots)
        model.settle()
    for turn in range(4):
        model.now_ns += 10
        now_ns, hot = model.now_ns, BlockId(1, turn)
        counts = ((hot, 90), (BlockId(0, turn), 40), (BlockId(0, 0), 3))
        model.send(RouterCounts(now_ns=now_ns, store="w0", counts=counts, tokens=32))
        model.send(Concurrency(now_ns=now_ns, store="w0", requests=1, steps=32, tokens=32))
        times = tuple((layer, 400_000) for layer in range(LAYERS))
        model.send(LayerTimes(now_ns=now_ns, store="w0", steps=32, times=times))
        model.send(Tick(now_ns=now_ns))
        model.settle()
    model.send(StoreDraining(now_ns=model.now_ns + 1, store="h0"))
    model.settle()
    model.lose("c0")
    model.settle()
    return model


def test_a_journal_cut_at_any_byte_replays_to_the_state_of_its_whole_events(
    tmp_path: Path,
) -> None:
    model = walk()
    frames = [encode_frame(msgspec.msgpack.encode(pack(event))) for event in model.log]
    whole, path = b"".join(frames), tmp_path / "journal"
    path.write_bytes(whole)
    decoded = [unpack_event(msgspec.msgpack.decode(frame)) for frame in read_frames(path)]
    brain = ClusterBrain(blocks_of(LAYERS, EXPERTS), config=CONFIG)
    at = 0
    for number, frame in enumerate(frames):
        # `number` events are whole until the last byte of the next one is there.
        for cut in range(at, at + len(frame)):
            path.write_bytes(whole[:cut])
            assert len(list(read_frames(path))) == number, cut
        at += len(frame)
        # What is not in `state_of` shows in the commands that follow.
        assert repr(brain.handle(decoded[number])) == repr(model.answers[number])
        assert state_of(brain) == model.states[number]
        brain.validate()
    assert len(frames) > 30
    assert sum(len(answer) for answer in model.answers) > 20
