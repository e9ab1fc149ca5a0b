"""A run at one moment, as the page and `hotset top` show it.

Puts together what journal, traces and the controller's status say; decides nothing, and must not
know how it is drawn. Everything is a frozen value that turns into JSON, except the cells.

Invariant: `states` counts every block once, by its best state in the cluster.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from hotset.dashboards.page.load import COPIES, Load, load_at
from hotset.dashboards.page.progress import Ages, alarms
from hotset.dashboards.page.timeline import ASKED, FORMATS, NOWHERE, REASONS, What
from hotset.policies.types import Format, Tier

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from hotset.dashboards.page.spans import Traces
    from hotset.dashboards.page.timeline import Cells, Plan, Timeline
    from hotset.dashboards.status import Status

MOST_ROWS = 100
"""Rows of each list in a moment."""
FULL = 1 << FORMATS.index(Format.BF16)
LOSSLESS = 1 << FORMATS.index(Format.BF16Z)
DECISIONS = (
    What.ASKED, What.DROP_ASKED, What.CANCEL_ASKED, What.CHANGE_ASKED, What.VETOED, What.JOINED,
    What.LOST, What.DRAINING,
)  # fmt: skip
_SAID = {
    What.LANDED: "landed",
    What.DROPPED: "dropped",
    What.FAILED: "did not come",
    What.ASKED: "fetch asked for",
    What.DROP_ASKED: "drop asked for",
    What.CANCEL_ASKED: "cancel asked for",
    What.CHANGE_ASKED: "new format asked for",
    What.VETOED: "vetoed",
    What.JOINED: "joined",
    What.LOST: "lost",
    What.DRAINING: "draining",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class StoreView:
    """One store: `state` is absent, ready, draining or lost; `blocks` counts copies by format."""

    name: str
    tier: str
    node: str
    state: str
    capacity_bytes: int
    resident_bytes: int
    blocks: dict[str, int]
    asked: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Flight:
    """A transfer: `moving` with a start, or `asked` for by the controller and not begun or told."""

    state: str
    store: str
    source: str
    block: str
    format: str
    reason: str
    age_ns: int
    nbytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Happening:
    """One line of what happened. `note` is its source, cause or bound."""

    at_ns: int
    what: str
    store: str
    block: str
    format: str
    reason: str
    note: str


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanView:
    """One published epoch and what it asked for."""

    at_ns: int
    epoch: int
    reason: str
    cause: str
    fetches: int
    drops: int
    vetoes: int
    nbytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Moment:
    """The run at `at_ns`. Times are wall clock in ns; `live` says that it is now."""

    at_ns: int
    from_ns: int
    to_ns: int
    live: bool
    epoch: int
    epoch_age_ns: int
    stores: tuple[StoreView, ...]
    states: dict[str, int]
    flights: tuple[Flight, ...]
    flights_total: int
    decisions: tuple[Happening, ...]
    arrivals: tuple[Happening, ...]
    plans: tuple[PlanView, ...]
    load: Load
    alarms: tuple[str, ...]
    tokens: int
    requests: int
    stall_ns: int
    dropped: int
    emulated: tuple[str, ...]


def moment_at(  # noqa: PLR0913 - the sources of one moment, by keyword
    timeline: Timeline,
    traces: Traces,
    *,
    at_ns: int,
    now_ns: int,
    live: bool,
    status: Status | None = None,
    plan_epoch: int | None = None,
) -> tuple[Moment, Cells]:
    """The run at a moment, and its cells [stores, blocks].

    `now_ns` is what ages are measured against. `status` adds what only a live controller knows.
    The load compares with the plan of `plan_epoch`, else with the last one before the moment.
    """
    cells = timeline.cells_at(at_ns)
    present = timeline.present_at(at_ns)
    place = timeline.place_at(at_ns)
    seen = [plan for plan in timeline.plans if plan.at_ns <= at_ns]
    chosen = next((plan for plan in seen if plan.epoch == plan_epoch), seen[-1] if seen else None)
    flying = traces.flying(at_ns)
    moving = [_moving(traces, row, now_ns=now_ns) for row in flying.tolist()]
    asked = _asked(timeline, cells, place=place, now_ns=now_ns)
    begun = {(one.store, one.block) for one in moving}
    flights = moving + [one for one in asked if (one.store, one.block) not in begun]
    tokens = sum(report.passed for report in timeline.counts if report.at_ns <= at_ns)
    last = int(np.searchsorted(np.array(timeline.beats, np.int64), at_ns, side="right")) - 1
    requests = status.requests_in_flight if status and live else timeline.requests_at(at_ns)
    ages = Ages(
        controller_ns=now_ns - timeline.beats[last] if last >= 0 else None,
        oldest_transfer_ns=max((one.age_ns for one in flights), default=None),
        last_token_ns=_last_token_age(timeline, now_ns=now_ns),
        requests=requests,
    )
    table = timeline.changes.table[:place]
    return Moment(
        at_ns=at_ns,
        from_ns=timeline.from_ns,
        to_ns=max(timeline.to_ns, traces.to_ns),
        live=live,
        epoch=seen[-1].epoch if seen else 0,
        epoch_age_ns=now_ns - seen[-1].at_ns if seen else 0,
        stores=_stores(timeline, cells, present),
        states=best_states(timeline, cells),
        flights=tuple(flights[:MOST_ROWS]),
        flights_total=len(flights),
        decisions=_happenings(timeline, table, DECISIONS),
        arrivals=_happenings(timeline, table, (What.LANDED, What.DROPPED, What.FAILED)),
        plans=tuple(_plan(timeline, plan) for plan in reversed(seen[-MOST_ROWS:])),
        load=load_at(timeline, cells, at_ns=at_ns, states=present, plan=chosen),
        alarms=(*(status.alerts if status and live else ()), *alarms(ages)),
        tokens=max(tokens, status.tokens if status and live else 0),
        requests=requests,
        stall_ns=max(traces.stall_ns(until_ns=at_ns), status.stall_ns if status and live else 0),
        dropped=traces.dropped,
        emulated=tuple(traces.emulated),
    ), cells


def best_states(timeline: Timeline, cells: Cells) -> dict[str, int]:
    """Blocks by their best state in the cluster, S1 to S7; the sum is the number of blocks."""
    near = np.array([store.tier is Tier.HBM for store in timeline.stores], bool)
    hbm = np.bitwise_or.reduce(cells[near], axis=0, initial=0)
    far = np.bitwise_or.reduce(cells[~near], axis=0, initial=0)
    conditions = [
        hbm & FULL > 0,
        hbm & (COPIES ^ FULL ^ LOSSLESS) > 0,
        hbm & LOSSLESS > 0,
        hbm & ASKED > 0,
        far & COPIES > 0,
    ]
    best = np.select(conditions, [1, 2, 3, 6, 4], default=5)
    counted = np.bincount(best, minlength=8)
    return {f"S{number}": int(counted[number]) for number in range(1, 8)}


def happening(timeline: Timeline, record: Sequence[int]) -> Happening:
    """One change in words."""
    at_ns, store, flat, what, code, reason, note = record
    return Happening(
        at_ns=at_ns,
        what=_SAID[What(what)],
        store=timeline.stores[store].name,
        block="" if flat == NOWHERE else str(timeline.block(flat)),
        format=FORMATS[code - 1].value if code else "",
        reason=REASONS[reason].value,
        note=timeline.notes[note],
    )


def _happenings(
    timeline: Timeline, table: NDArray[Any], kinds: Sequence[What]
) -> tuple[Happening, ...]:
    """The last ones of these kinds, newest first."""
    wanted = table[np.isin(table["what"], [int(kind) for kind in kinds])][-MOST_ROWS:]
    return tuple(happening(timeline, record) for record in reversed(wanted.tolist()))


def _stores(timeline: Timeline, cells: Cells, present: Sequence[str]) -> tuple[StoreView, ...]:
    views = []
    for number, store in enumerate(timeline.stores):
        mine = cells[number]
        counts = {
            form.value: int(np.count_nonzero(mine & (1 << place)))
            for place, form in enumerate(FORMATS)
        }
        resident = sum(
            count * timeline.sizes.get(code, 0) for code, count in enumerate(counts.values(), 1)
        )
        views.append(
            StoreView(
                name=store.name,
                tier=store.tier.name.lower(),
                node=store.node,
                state=present[number],
                capacity_bytes=store.capacity_bytes,
                resident_bytes=resident,
                blocks={form: count for form, count in counts.items() if count},
                asked=int(np.count_nonzero(mine & ASKED)),
            )
        )
    return tuple(views)


def _moving(traces: Traces, row: Sequence[int], *, now_ns: int) -> Flight:
    start_ns, _, store, source, form, reason, _, layer, index, nbytes = row
    return Flight(
        state="moving",
        store=traces.texts[store],
        source=traces.texts[source],
        block=f"{layer}.{index}",
        format=traces.texts[form],
        reason=traces.texts[reason],
        age_ns=now_ns - start_ns,
        nbytes=nbytes,
    )


def _asked(timeline: Timeline, cells: Cells, *, place: int, now_ns: int) -> list[Flight]:
    """Transfers that were asked for and have not been reported on, oldest first."""
    places = np.flatnonzero((cells & ASKED).reshape(-1)).tolist()
    pending = {divmod(place, timeline.blocks) for place in places}
    table = timeline.changes.table[:place]
    found: dict[tuple[int, int], Flight] = {}
    for record in reversed(table[table["what"] == What.ASKED].tolist()):
        if not pending:
            break
        at_ns, store, flat, _, code, reason, note = record
        if (store, flat) not in pending:
            continue
        pending.discard((store, flat))
        found[store, flat] = Flight(
            state="asked",
            store=timeline.stores[store].name,
            source=timeline.notes[note].rpartition("; from ")[2].partition(",")[0],
            block=str(timeline.block(flat)),
            format=FORMATS[code - 1].value,
            reason=REASONS[reason].value,
            age_ns=now_ns - at_ns,
            nbytes=timeline.sizes.get(code, 0),
        )
    return list(reversed(found.values()))


def _plan(timeline: Timeline, plan: Plan) -> PlanView:
    table = timeline.changes.table[plan.first : plan.last]
    asked = table[table["what"] == What.ASKED]
    return PlanView(
        at_ns=plan.at_ns,
        epoch=plan.epoch,
        reason=plan.reason,
        cause=plan.cause,
        fetches=len(asked),
        drops=int((table["what"] == What.DROP_ASKED).sum()),
        vetoes=int((table["what"] == What.VETOED).sum()),
        nbytes=sum(timeline.sizes.get(code, 0) for code in asked["form"].tolist()),
    )


def _last_token_age(timeline: Timeline, *, now_ns: int) -> int | None:
    last = next((report for report in reversed(timeline.counts) if report.at_ns <= now_ns), None)
    return None if last is None else now_ns - last.at_ns
