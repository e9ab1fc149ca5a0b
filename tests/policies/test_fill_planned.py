"""A worker that joins is filled by the plan of formats at once, within what it can use."""

from __future__ import annotations

from cluster_model import SLOT, ClusterModel, blocks_of

from hotset.policies.brain import ClusterBrain
from hotset.policies.config import PolicyConfig
from hotset.policies.guard import Guardrail
from hotset.policies.reformat import RESERVED_SLOTS
from hotset.policies.types import BlockId, Format, Reason, StartTransfer, Tier

LAYERS, EXPERTS, SLOTS = 2, 8, 7


def test_cheap_copies_are_asked_for_before_anything_was_served_and_leave_the_reserve_free() -> None:
    planned = {BlockId(0, index): Format.INT8 for index in range(EXPERTS)}
    brain = ClusterBrain(
        blocks_of(LAYERS, EXPERTS),
        config=PolicyConfig(formats=planned),
        guard=Guardrail(default_floor=Format.INT8),
    )
    model = ClusterModel(brain=brain)
    commands = model.join("w0", Tier.HBM, slots=SLOTS)
    asked = [one for one in commands if isinstance(one, StartTransfer) and one.store == "w0"]
    cheap = {one.block for one in asked if one.format is Format.INT8}
    assert cheap
    assert cheap <= set(planned)
    assert all(one.reason is Reason.DEMOTE for one in asked if one.block in cheap)
    used = sum(SLOT // 2 if one.block in cheap else SLOT for one in asked)
    room = (SLOTS - RESERVED_SLOTS) * SLOT
    assert room - SLOT < used <= room
