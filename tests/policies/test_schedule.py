"""A link's schedule: who goes first, who is refused, who waits, and for how long."""

from __future__ import annotations

from itertools import permutations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hotset.policies.linkmodel import Landing, LinkSpec
from hotset.policies.schedule import LinkSchedule, ScheduleConfig, Service, service_of
from hotset.policies.types import Reason

SPEC = LinkSpec(bandwidth_bytes_per_s=1_000_000_000, latency_ns=0)  # a byte takes 1 ns
CONFIG = ScheduleConfig(
    chunk_bytes=10, margin=0, imminent_share=0, staging_share=0, window_ns=1 << 60
)
WHOLE = ScheduleConfig(chunk_bytes=10, margin=0)

SIZES = st.integers(1, 100)
TIMES = st.integers(0, 400)
JOBS = st.lists(st.tuples(TIMES, st.sampled_from(Service), SIZES, TIMES), max_size=12)


def run(link: LinkSchedule, jobs: list[tuple[int, Service, int, int]]) -> dict[int, int]:
    """Add each job at its time; when each one landed."""
    landed: dict[int, int] = {}

    def up_to(until_ns: int) -> None:
        while (landing := link.advance(until_ns)) is not None:
            assert landing.key not in landed
            assert landing.at_ns <= until_ns
            landed[landing.key] = landing.at_ns

    for key, (at_ns, service, nbytes, due_ns) in enumerate(sorted(jobs)):
        up_to(at_ns)
        # Imminent ones in order of arrival: then each one's delay can be told.
        due = 0 if service is Service.IMMINENT else at_ns + due_ns
        link.add(key, service, nbytes=nbytes, now_ns=at_ns, due_ns=due)
    up_to(1 << 40)
    return landed


@given(JOBS)
def test_every_transfer_lands_once_and_the_link_never_idles_with_work(
    jobs: list[tuple[int, Service, int, int]],
) -> None:
    link = LinkSchedule(SPEC, config=CONFIG)
    landed = run(link, jobs)
    assert sorted(landed) == list(range(len(jobs)))
    assert link.busy_ns == sum(nbytes for _, _, nbytes, _ in jobs)
    free_ns = 0  # the end of all work does not depend on its order
    for at_ns, _, nbytes, _ in sorted(jobs):
        free_ns = max(free_ns, at_ns) + nbytes
    assert max(landed.values(), default=0) == (free_ns if jobs else 0)
    assert len(link) == 0
    assert link.next_landing_ns() is None


@given(JOBS)
def test_lower_services_delay_an_imminent_transfer_by_one_chunk_at_most(
    jobs: list[tuple[int, Service, int, int]],
) -> None:
    jobs = sorted(jobs)
    landed = run(LinkSchedule(SPEC, config=CONFIG), jobs)
    imminent = [key for key, job in enumerate(jobs) if job[1] is Service.IMMINENT]
    lonely = run(LinkSchedule(SPEC, config=CONFIG), [jobs[key] for key in imminent])
    for place, key in enumerate(imminent):
        assert landed[key] <= lonely[place] + CONFIG.chunk_bytes


def test_an_imminent_transfer_waits_for_the_chunk_on_the_wire_alone() -> None:
    link = LinkSchedule(SPEC, config=CONFIG)
    link.add(1, Service.BACKGROUND, nbytes=1000, now_ns=0)
    assert link.advance(101) is None
    link.add(2, Service.IMMINENT, nbytes=50, now_ns=101)
    assert link.next_landing_ns() == 160
    assert link.advance(500) == Landing(2, 160)
    assert link.advance(5000) == Landing(1, 1050)


def test_earliest_deadline_first_within_a_service() -> None:
    link = LinkSchedule(SPEC, config=CONFIG)
    for key, due_ns in ((1, 900), (2, 300), (3, 600), (4, 0)):
        link.add(key, Service.STAGING, nbytes=20, now_ns=0, due_ns=due_ns)
    order = [landing.key for _ in range(4) if (landing := link.advance(10_000))]
    assert order == [2, 3, 1, 4]


@given(st.lists(st.tuples(TIMES, SIZES, TIMES, st.booleans()), min_size=1, max_size=8))
def test_admitted_transfers_land_in_time(asked: list[tuple[int, int, int, bool]]) -> None:
    """Whenever they come, and whatever background work there is."""
    link = LinkSchedule(SPEC, config=WHOLE)
    due: dict[int, int] = {}

    def up_to(until_ns: int) -> None:
        while (landing := link.advance(until_ns)) is not None:
            assert landing.at_ns <= due.pop(landing.key, 1 << 40)

    for key, (at_ns, nbytes, due_ns, background) in enumerate(sorted(asked)):
        up_to(at_ns)
        if background:
            link.add(key, Service.BACKGROUND, nbytes=nbytes, now_ns=at_ns)
            continue
        due_ns = at_ns + due_ns + 1  # noqa: PLW2901 - from now on an absolute time
        if link.can(Service.STAGING, nbytes=nbytes, now_ns=at_ns, due_ns=due_ns) is None:
            link.add(key, Service.STAGING, nbytes=nbytes, now_ns=at_ns, due_ns=due_ns)
            due[key] = due_ns
    up_to(1 << 40)
    assert not due


@given(st.lists(st.tuples(st.integers(1, 30), st.integers(1, 120)), min_size=1, max_size=5))
def test_what_is_refused_could_not_have_been_in_time(asked: list[tuple[int, int]]) -> None:
    """With the whole link to book, the test is exact: no order would have served."""
    exact = ScheduleConfig(chunk_bytes=1, margin=0, imminent_share=0, staging_share=0)
    link = LinkSchedule(SPEC, config=exact)
    taken: list[tuple[int, int]] = []
    for key, (nbytes, due_ns) in enumerate(asked):
        refused = link.can(Service.STAGING, nbytes=nbytes, now_ns=0, due_ns=due_ns)
        if refused is None:
            link.add(key, Service.STAGING, nbytes=nbytes, now_ns=0, due_ns=due_ns)
            taken.append((nbytes, due_ns))
            continue
        assert refused.reason is Reason.VETO_LATE
        assert not any(_in_time(order) for order in permutations([*taken, (nbytes, due_ns)]))


def _in_time(order: tuple[tuple[int, int], ...]) -> bool:
    at_ns = 0
    for nbytes, due_ns in order:
        at_ns += nbytes
        if at_ns > due_ns:
            return False
    return True


def test_staging_may_not_book_what_is_kept_for_imminent_work() -> None:
    config = ScheduleConfig(chunk_bytes=10, margin=0, imminent_share=250, staging_share=250)
    link = LinkSchedule(SPEC, config=config)
    assert link.can(Service.STAGING, nbytes=750, now_ns=0, due_ns=1000) is None
    refused = link.can(Service.STAGING, nbytes=751, now_ns=0, due_ns=1000)
    assert refused is not None
    assert "750 ns may be booked" in refused.bound
    assert link.can(Service.BACKGROUND, nbytes=500, now_ns=0, due_ns=1000) is None
    assert link.can(Service.BACKGROUND, nbytes=501, now_ns=0, due_ns=1000) is not None
    assert link.can(Service.IMMINENT, nbytes=10**9, now_ns=0, due_ns=1) is None


def test_a_newcomer_may_not_make_another_one_late() -> None:
    link = LinkSchedule(SPEC, config=CONFIG)
    link.add(1, Service.STAGING, nbytes=80, now_ns=0, due_ns=100)
    assert link.can(Service.STAGING, nbytes=21, now_ns=0, due_ns=40) is not None
    assert link.can(Service.STAGING, nbytes=20, now_ns=0, due_ns=40) is None


def test_nothing_displaces_what_is_needed_sooner() -> None:
    link = LinkSchedule(SPEC, config=CONFIG)
    asked = {"nbytes": 10, "now_ns": 0, "due_ns": 500}
    refused = link.can(Service.STAGING, **asked, victim_due_ns=400)
    assert refused is not None
    assert refused.reason is Reason.VETO_SOONER
    assert link.can(Service.STAGING, **asked, victim_due_ns=501) is None


def test_background_pauses_under_pressure_and_comes_back() -> None:
    config = ScheduleConfig(chunk_bytes=10, window_ns=100, pause_at=700, resume_at=300)
    link = LinkSchedule(SPEC, config=config)
    link.add(0, Service.BACKGROUND, nbytes=500, now_ns=0)
    key = 1
    for at_ns in range(0, 1000, 100):
        while link.advance(at_ns) is not None:
            pass
        link.add(key, Service.IMMINENT, nbytes=90, now_ns=at_ns)
        key += 1
    while link.advance(1000) is not None:
        pass
    assert link.paused
    assert 0 in link
    carried = link.busy_ns - link.demand_ns
    while link.advance(1090) is not None:
        pass
    assert link.busy_ns - link.demand_ns == carried, "it stands still while paused"
    landing = link.advance(10_000)
    assert landing is not None
    assert landing.key == 0
    assert not link.paused


def test_hysteresis_keeps_the_pause_between_the_bounds() -> None:
    link = LinkSchedule(SPEC)
    for busy, paused in ((600, False), (701, True), (600, True), (500, False), (600, False)):
        link.pressure(busy)
        assert link.paused is paused


def test_a_cancelled_transfer_never_lands() -> None:
    link = LinkSchedule(SPEC, config=CONFIG)
    link.add(1, Service.STAGING, nbytes=100, now_ns=0)
    assert link.advance(15) is None
    assert link.cancel(1)
    assert not link.cancel(1)
    link.add(2, Service.STAGING, nbytes=5, now_ns=15)
    assert link.advance(1000) == Landing(2, 25), "the chunk on the wire ends first"


def test_a_hastened_transfer_keeps_what_was_carried() -> None:
    link = LinkSchedule(SPEC, config=CONFIG)
    link.add(1, Service.STAGING, nbytes=40, now_ns=0, due_ns=50)
    link.add(2, Service.BACKGROUND, nbytes=100, now_ns=0)
    assert link.advance(60) == Landing(1, 40)
    assert link.advance(60) is None
    link.add(3, Service.STAGING, nbytes=100, now_ns=60, due_ns=100)
    link.hasten(2)
    assert link.advance(1000) == Landing(2, 140)


def test_windows_leave_room_for_transfer_decode_and_margin() -> None:
    link = LinkSchedule(LinkSpec(bandwidth_bytes_per_s=10**9, latency_ns=50))
    window = link.window(100, due_ns=1000, decode_ns=200)
    assert window.end_ns == 1000
    assert window.start_ns == 1000 - 150 - 15 - 200


@pytest.mark.parametrize(
    ("reason", "service"),
    [
        (Reason.DEMAND, Service.IMMINENT),
        (Reason.PREFETCH, Service.STAGING),
        (Reason.DRAIN, Service.STAGING),
        (Reason.REBALANCE, Service.BACKGROUND),
        (Reason.SPILL, Service.BACKGROUND),
        (Reason.REPLICATE, Service.BACKGROUND),
        (Reason.STAGE, Service.BACKGROUND),
    ],
)
def test_services_follow_reasons(reason: Reason, service: Service) -> None:
    assert service_of(reason) is service
