"""What a worker asks of a residency policy, and what it gets back.

Decides nothing: the protocol between the token path (or a replay) and whatever decides. Must not
know how a policy decides.

The protocol for each layer of a step: `routed` -> pin what is resident -> for each missing expert
`victim` / `dropped` until there is `room`, then `in_flight`, fetch, `landed` (or `failed`), `pin`
-> compute -> `unpin`; prefetches likewise, without pins. `victim` may return None although there
is no room: everything it would give up is pinned or on its way, so ask again after an `unpin`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple, Protocol

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence

    import numpy as np
    from numpy.typing import NDArray

    from hotset.policies.device import DeviceTable, Resident
    from hotset.policies.story import StoryLine
    from hotset.policies.types import Format, Reason, State


class LayerPlan(NamedTuple):
    """What to do for one layer of one step."""

    resident: list[int]  # experts with a landed copy
    arriving: list[int]  # experts already on their way: wait for them
    missing: list[int]  # experts to fetch (or to dispatch to), most tokens first
    prefetch: list[tuple[int, int]]  # (layer, expert) to start now, likeliest first


class UseChances(NamedTuple):
    """Chances of use in a pass: of a block that is not here, and of what would make room for it."""

    reuse: float
    victim: float


class ResidencyPolicy(Protocol):
    """What the worker asks of a residency policy."""

    capacity_bytes: int
    used_bytes: int

    def routed(
        self,
        layer: int,
        experts: Sequence[int],
        counts: Sequence[int],
        *,
        step: int,
        request: int = 0,
    ) -> LayerPlan:
        """`experts` (distinct) of `layer` are needed now by `counts[i]` tokens each."""
        ...

    def victim(
        self, want_bytes: int, *, needed: Collection[tuple[int, int]] = ()
    ) -> Resident | None:
        """Return the copy to drop so that `want_bytes` may fit; None: nothing to drop."""
        ...

    def steer(
        self,
        least_chance: float,
        *,
        most: int | None = None,
        ahead: int = 1,
        missed_ns: int | None = None,
    ) -> None:
        """Say what the link bears from now on.

        A prefetch must have at least `least_chance` of use, 0..1. `most` fetches fit on the link
        before the next layer comes (None: nobody has measured it), and a fetch takes so long that
        it should start `ahead` layers early. `missed_ns` is what a missing block makes compute
        wait.
        """
        ...

    def room(self, want_bytes: int) -> bool:
        """Whether the bytes fit without an eviction."""
        ...

    def pin(self, layer: int, expert: int) -> None:
        """Keep a landed copy until the matching `unpin`."""
        ...

    def unpin(self, layer: int, expert: int) -> None:
        """Give back one pin."""
        ...

    def in_flight(self, layer: int, expert: int, form: Format = ..., reason: Reason = ...) -> None:
        """Claim the bytes of a fetch that starts now."""
        ...

    def landed(self, layer: int, expert: int, form: Format | None = None) -> None:
        """The fetch ended with a verified copy; `form`: in another format than was asked for."""
        ...

    def failed(self, layer: int, expert: int, *, staged: bool = False) -> None:
        """The fetch ended without a copy and its slot is free again."""
        ...

    def dropped(
        self, layer: int, expert: int, *, staged: bool = False, reason: Reason = ...
    ) -> None:
        """The copy was freed."""
        ...

    def demoted(self, layer: int, expert: int, form: Format = ...) -> None:
        """The copy was made into another format in place."""
        ...

    def staged(self, layer: int, expert: int, *, yes: bool) -> None:
        """Another store now has a copy, or no longer has one."""
        ...

    def state(self, layer: int, expert: int) -> State:
        """State of the block at this device."""
        ...

    def format(self, layer: int, expert: int) -> Format | None:
        """Format of the landed copy."""
        ...

    def story(self, layer: int, expert: int) -> tuple[StoryLine, ...]:
        """What happened to the block here, oldest first."""
        ...

    def residents(self) -> tuple[Resident, ...]:
        """All landed copies."""
        ...

    def nbytes(self, form: Format) -> int:
        """Bytes of a slot of this format."""
        ...

    def forget(self, request: int) -> None:
        """A request has ended."""
        ...

    def expected_use(self) -> NDArray[np.float64]:
        """Return the expected uses in the next pass over the model, [L, E]."""
        ...

    def use_chances(self, layer: int, expert: int) -> UseChances:
        """Say what fetching this block would gain and displace; zeros: the policy does not know."""
        ...

    def validate(self) -> None:
        """Assert the invariants."""
        ...


def sort_needs(
    table: DeviceTable, base: int, *, experts: Sequence[int], counts: Sequence[int]
) -> LayerPlan:
    """Split the needed experts by what is here; those to fetch come by tokens, most first."""
    landed, coming = table._format, table._coming  # noqa: SLF001 - same books, hot path
    resident: list[int] = []
    arriving: list[int] = []
    missing: list[int] = []
    for expert in experts:
        flat = base + expert
        if landed[flat] is not None:
            resident.append(expert)
        elif coming[flat] is not None:
            arriving.append(expert)
        else:
            missing.append(expert)
    if len(missing) > 1 and counts.count(counts[0]) < len(counts):
        tokens = dict(zip(experts, counts, strict=True))
        missing.sort(key=lambda expert: -tokens[expert])
    return LayerPlan(resident, arriving, missing, [])
