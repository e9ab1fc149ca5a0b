"""A store that follows the plan for replicas, and a controller that publishes it."""

from __future__ import annotations

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from hotset.actors.controllog import ControlLog
from hotset.actors.dispatchplan import DispatchPlan
from hotset.actors.kinds import ControlKind
from hotset.actors.messages import (
    Heartbeat,
    HeartbeatReply,
    WorkerPlan,
    decode,
    encode,
    pack,
    unpack_command,
)
from hotset.policies.types import BlockId, PlanDecision, PublishEpoch, Reason, Replan, Share

HOT = BlockId(3, 7)


def plan(parts: dict[str, int], *, epoch: int = 4) -> WorkerPlan:
    return WorkerPlan(
        epoch=epoch,
        keep=(HOT, BlockId(1, 2)),
        shares=tuple(
            Share(block=HOT, store=store, permille=permille) for store, permille in parts.items()
        ),
    )


def test_before_a_plan_nobody_is_picked_and_nothing_is_kept() -> None:
    known = DispatchPlan()
    assert known.epoch == -1
    assert not known.kept
    assert known.pick(HOT, ["a", "b"], rows=3) is None


@given(
    st.dictionaries(st.sampled_from("abcd"), st.integers(0, 1000), min_size=1),
    st.lists(st.integers(1, 9), min_size=200, max_size=200),
)
def test_tokens_come_out_as_the_parts_say(parts: dict[str, int], batches: list[int]) -> None:
    known = DispatchPlan()
    known.take(plan(parts))
    sent: Counter[str] = Counter()
    for rows in batches:
        store = known.pick(HOT, sorted(parts), rows=rows)
        if store is None:
            assert not any(parts.values())
            return
        assert parts[store] > 0
        sent[store] += rows
    total = sum(parts.values())
    for store, permille in parts.items():
        assert abs(sent[store] - sum(batches) * permille / total) <= 2 * max(batches)


def test_only_those_that_hold_the_block_get_tokens_and_a_new_plan_replaces_the_old() -> None:
    known = DispatchPlan()
    known.take(plan({"a": 900, "b": 100}))
    assert known.kept == {(3, 7), (1, 2)}
    assert known.pick(HOT, ["b", "c"], rows=1) == "b", "a has lost its copy"
    assert known.pick(HOT, ["c"], rows=1) is None
    assert known.pick(BlockId(0, 0), ["a"], rows=1) is None
    known.take(plan({"c": 1000}, epoch=5))
    assert (known.epoch, known.pick(HOT, ["a", "b", "c"], rows=1)) == (5, "c")


def decision(reason: Reason, *, moves: int) -> PlanDecision:
    return PlanDecision(
        epoch=9, cause="replan 1", reason=reason, before_ppm=700_000, after_ppm=950_000,
        moves=moves, nbytes=moves * 100, saved_ns_per_step=5, move_ns=7, horizon_steps=11,
    )  # fmt: skip


def test_plans_and_their_messages_survive_the_wire() -> None:
    told = decision(Reason.VETO_COST, moves=3)
    assert unpack_command(pack(told)) == told
    reply = HeartbeatReply(
        known=True, lease_until_ns=1, controller_incarnation=1, full=False, directory_version=1,
        added=(), removed=(), membership_version=1, members=None, commands=[pack(told)],
        draining=False, plan=plan({"a": 1000}),
    )  # fmt: skip
    assert decode(encode(reply), HeartbeatReply).plan == plan({"a": 1000})
    beat = Heartbeat(
        store="a", incarnation=1, directory_version=0, membership_version=0, events=[],
        gauges={}, plan_epoch=4,
    )  # fmt: skip
    assert decode(encode(beat), Heartbeat).plan_epoch == 4


def test_refused_plans_are_counted_and_become_rows_as_well() -> None:
    log = ControlLog(first_row_id=1, nbytes={"bf16": 100})
    event = Replan(now_ns=5)
    refused = decision(Reason.VETO_COST, moves=3)
    log.handled(event, [refused], epoch=9, start_ns=1, end_ns=2)
    in_force = decision(Reason.REBALANCE, moves=2)
    epoch = PublishEpoch(epoch=9, cause="replan 1", reason=Reason.REBALANCE)
    log.handled(event, [epoch, in_force], epoch=9, start_ns=3, end_ns=4)
    assert log.plans == {"veto_cost": 1, "rebalance": 1}
    assert log.plan_moves == {"veto_cost": 3, "rebalance": 2}
    assert log.last_plan == in_force
    batch = log.take()
    rows = batch.table()
    assert rows["kind"].tolist() == [ControlKind.PLAN] * 2
    assert [batch.names[at] for at in rows["reason"]] == ["veto_cost", "rebalance"]
    assert rows["verify_ns"].tolist() == [700_000] * 2
    assert rows["activate_ns"].tolist() == [950_000] * 2
    assert rows["attempt"].tolist() == [3, 2]
