"""The books of one device: which block is in which state, what it weighs, who has pinned it.

Decides nothing; `residency` does. Must not know addresses, links or clocks. Not thread-safe: the
worker calls it under its own lock.

Invariants (checked by `validate`): used bytes = landed + in flight and never exceed the
capacity; a pinned block is landed; an evictable rank is finite exactly for landed, unpinned
copies.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from hotset.errors import ConfigError, InvalidTransition
from hotset.policies.states import ARROWS, StateEvent, advance, landed_event, state_of
from hotset.policies.story import BlockStory, StoryLine
from hotset.policies.types import BlockId, Format, Reason, State

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping

    from numpy.typing import NDArray

_HERE = frozenset({State.FULL, State.REDUCED, State.COMPRESSED})
_AWAY = frozenset(State) - _HERE - {State.IN_FLIGHT}
_WHOLE = frozenset({Format.BF16, Format.BF16Z})
_KEPT = {State.REDUCED: StateEvent.KEPT_REDUCED, State.COMPRESSED: StateEvent.KEPT_COMPRESSED}


_REMADE = {
    State.FULL: StateEvent.PROMOTED,
    State.REDUCED: StateEvent.DEMOTED,
    State.COMPRESSED: StateEvent.PACKED,
}


class Resident(NamedTuple):
    """A copy on this device."""

    layer: int
    expert: int
    format: Format


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceShape:
    """What a device can hold. Bytes are those of slots, header included.

    `layers` are the numbers of the MoE layers, ascending; gaps are fine. `nbytes` names formats
    whose slots are neither full nor `reduced_nbytes` large.
    """

    layers: tuple[int, ...]
    num_experts: int
    full_nbytes: int
    reduced_nbytes: int
    capacity_bytes: int
    nbytes: Mapping[Format, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Refuse a budget that holds nothing."""
        if self.capacity_bytes < self.full_nbytes:
            raise ConfigError(
                f"{self.capacity_bytes} bytes hold no expert of {self.full_nbytes} bytes",
                remedy="raise the ratio of fast memory or use fewer workers",
            )


class DeviceTable:
    """States, bytes and pins of every block at one device.

    `row * num_experts + expert` is a block's flat index, `row` the position of its layer in
    `layers`. `rank[flat]` is the value of keeping the copy: the victim has the lowest. It is
    `_value(flat)`, which is positive, times `held[flat]`: 1 for an evictable full copy, more for
    a reduced one (value by byte), infinite where there is nothing to evict.
    """

    _rank_dtype: type[np.floating[Any]] = np.float64

    def __init__(self, shape: DeviceShape, *, staged: bool = False) -> None:
        """`staged`: every block starts in S4 (a host or CXL copy exists) instead of S5."""
        self.shape = shape
        self.capacity_bytes = shape.capacity_bytes
        self.used_bytes = 0
        layers, num_experts = shape.layers, shape.num_experts
        self.full_nbytes = shape.full_nbytes
        self.reduced_nbytes = shape.reduced_nbytes
        self._sizes = {
            form: shape.nbytes.get(form)
            or (shape.full_nbytes if form in _WHOLE else shape.reduced_nbytes)
            for form in Format
        }
        self._by_byte = {form: shape.full_nbytes / size for form, size in self._sizes.items()}
        self.layers = layers
        self.num_experts = num_experts
        size = len(layers) * num_experts
        self._base = {layer: row * num_experts for row, layer in enumerate(layers)}
        self._state = [State.STAGED if staged else State.STORED] * size
        self._format: list[Format | None] = [None] * size
        self._coming: list[Format | None] = [None] * size
        self._pins = [0] * size
        self._rank = np.full(size, np.inf, dtype=self._rank_dtype)
        self._held = np.full(size, np.inf, dtype=self._rank_dtype)
        self._story: list[BlockStory | None] = [None] * size
        self._step = 0

    def nbytes(self, form: Format) -> int:
        """Bytes of a slot that holds this format."""
        return self._sizes[form]

    def room(self, want_bytes: int) -> bool:
        """Is there room without an eviction."""
        return self.used_bytes + want_bytes <= self.capacity_bytes

    def state(self, layer: int, expert: int) -> State:
        """State of the block here."""
        return self._state[self._base[layer] + expert]

    def format(self, layer: int, expert: int) -> Format | None:
        """Format of the landed copy, None when there is none."""
        return self._format[self._base[layer] + expert]

    def story(self, layer: int, expert: int) -> tuple[StoryLine, ...]:
        """What happened to the block here, oldest first."""
        story = self._story[self._base[layer] + expert]
        return story.lines() if story is not None else ()

    def residents(self) -> tuple[Resident, ...]:
        """All landed copies, in the order of layers and experts."""
        return tuple(
            Resident(self.layers[flat // self.num_experts], flat % self.num_experts, form)
            for flat, form in enumerate(self._format)
            if form is not None
        )

    # --- changes ---------------------------------------------------------------------------

    def in_flight(
        self, layer: int, expert: int, form: Format = Format.BF16, reason: Reason = Reason.DEMAND
    ) -> None:
        """Claim the bytes of a fetch that starts now. Raises InvalidTransition without room."""
        flat = self._base[layer] + expert
        want = self.nbytes(form)
        if self.used_bytes + want > self.capacity_bytes:
            raise InvalidTransition(
                f"block {layer}.{expert} needs {want} bytes, {self.used_bytes} of "
                f"{self.capacity_bytes} are used",
                remedy="drop the victim first",
            )
        self._move(flat, StateEvent.FETCH_STARTED, reason)
        self._coming[flat] = form
        self.used_bytes += want
        self._rank[flat] = self._held[flat] = np.inf

    def landed(self, layer: int, expert: int, form: Format | None = None) -> None:
        """Note that the fetch ended with a verified copy; a copy that it replaces is released.

        `form`: the copy came in another format than was asked for, in a slot of the same size.
        """
        flat = self._base[layer] + expert
        asked = self._coming[flat] or Format.BF16
        form = form or asked
        self.used_bytes += self.nbytes(form) - self.nbytes(asked)
        self._move(flat, landed_event(form), None)
        old = self._format[flat]
        if old is not None:
            self.used_bytes -= self.nbytes(old)
        self._format[flat] = form
        self._coming[flat] = None
        self._refresh(flat)

    def failed(self, layer: int, expert: int, *, staged: bool = False) -> None:
        """Note that the fetch ended without a copy, and give its bytes back.

        Call it when the slot is free again: while a timed-out read may still write, the slot is
        in quarantine and its bytes stay claimed. `staged`: host, CXL or a peer has a copy.
        """
        flat = self._base[layer] + expert
        old = self._format[flat]
        if old is not None:
            event = _KEPT[state_of(old)]
        else:
            event = StateEvent.FAILED_TO_HOST if staged else StateEvent.FAILED_TO_STORAGE
        self._move(flat, event, None)
        self.used_bytes -= self.nbytes(self._coming[flat] or Format.BF16)
        self._coming[flat] = None
        self._refresh(flat)

    def dropped(
        self, layer: int, expert: int, *, staged: bool = False, reason: Reason = Reason.EVICT
    ) -> None:
        """Note that the copy was freed. Raises InvalidTransition while it is pinned."""
        flat = self._base[layer] + expert
        if self._pins[flat]:
            raise InvalidTransition(
                f"block {layer}.{expert} is pinned by {self._pins[flat]} readers",
                remedy="unpin before dropping",
            )
        event = StateEvent.DROPPED_TO_HOST if staged else StateEvent.DROPPED_TO_STORAGE
        self._move(flat, event, reason)
        self.used_bytes -= self.nbytes(self._format[flat] or Format.BF16)
        self._format[flat] = None
        self._rank[flat] = self._held[flat] = np.inf

    def demoted(self, layer: int, expert: int, form: Format = Format.INT8) -> None:
        """Note that the copy here was made into another format in place, in whichever direction.

        What it frees is room at once; what it needs the caller has made room for.
        """
        flat = self._base[layer] + expert
        before, after = self._state[flat], state_of(form)
        if before is not after:
            promote = Reason.PROMOTE if after is State.FULL else Reason.DEMOTE
            self._move(flat, _REMADE[after], promote)
        self.used_bytes += self.nbytes(form) - self.nbytes(self._format[flat] or Format.BF16)
        self._format[flat] = form
        self._refresh(flat)

    def staged(self, layer: int, expert: int, *, yes: bool) -> None:
        """Note that host, CXL or a peer now has a copy, or no longer has one."""
        flat = self._base[layer] + expert
        event = StateEvent.STAGED if yes else StateEvent.UNSTAGED
        if event in ARROWS[self._state[flat]]:
            self._move(flat, event, None)

    def pin(self, layer: int, expert: int) -> None:
        """Keep a landed copy until the matching `unpin`."""
        flat = self._base[layer] + expert
        if self._format[flat] is None:
            raise InvalidTransition(
                f"block {layer}.{expert} is not here, it cannot be pinned",
                remedy="wait until it has landed",
            )
        self._pins[flat] += 1
        self._rank[flat] = self._held[flat] = np.inf

    def unpin(self, layer: int, expert: int) -> None:
        """Give back one pin."""
        flat = self._base[layer] + expert
        if not self._pins[flat]:
            raise InvalidTransition(
                f"block {layer}.{expert} is not pinned", remedy="pair every unpin with a pin"
            )
        self._pins[flat] -= 1
        if not self._pins[flat]:
            self._refresh(flat)

    # --- for policies ----------------------------------------------------------------------

    def victim(
        self, want_bytes: int, *, needed: Collection[tuple[int, int]] = ()
    ) -> Resident | None:
        """Return the least valuable landed, unpinned copy outside `needed`, or None.

        None also when `want_bytes` fit without an eviction. One victim may not make enough room
        (a reduced copy is smaller): drop it and ask again.
        """
        if self.used_bytes + want_bytes <= self.capacity_bytes:
            return None
        rank = self._rank
        if not needed:
            flat = int(rank.argmin())
        else:
            keep = [self._base[layer] + expert for layer, expert in needed]
            saved = rank[keep]
            rank[keep] = np.inf
            flat = int(rank.argmin())
            rank[keep] = saved
            if flat in keep:
                return None
        form = self._format[flat]
        if rank[flat] == np.inf or form is None:
            return None
        row, expert = divmod(flat, self.num_experts)
        return Resident(self.layers[row], expert, form)

    def _value(self, flat: int) -> float:
        """Value of keeping this block's copy; policies say what it is."""
        return 1.0 + flat

    def _refresh(self, flat: int) -> None:
        """Set the rank after the block has landed or was unpinned."""
        form = self._format[flat]
        if form is None or self._pins[flat] or self._coming[flat] is not None:
            self._rank[flat] = self._held[flat] = np.inf
            return
        held = self._held[flat] = self._by_byte[form]
        self._rank[flat] = self._value(flat) * held

    def _move(self, flat: int, event: StateEvent, reason: Reason | None) -> None:
        story = self._story[flat]
        if story is None:
            story = self._story[flat] = BlockStory()
        after = ARROWS[self._state[flat]].get(event)
        if after is None:
            row, expert = divmod(flat, self.num_experts)
            advance(self._state[flat], event, block=BlockId(self.layers[row], expert), story=story)
            return
        self._state[flat] = after
        story.add(self._step, state=after, event=event.value, reason=reason)

    def ranks(self) -> NDArray[np.float64]:
        """Value of keeping each copy, [L, E]; infinite where there is nothing to evict."""
        return self._rank.reshape(len(self.layers), self.num_experts).astype(np.float64)

    def validate(self) -> None:
        """Assert the invariants of this module."""
        landed = sum(self.nbytes(form) for form in self._format if form is not None)
        coming = sum(self.nbytes(form) for form in self._coming if form is not None)
        assert self.used_bytes == landed + coming, (self.used_bytes, landed, coming)  # noqa: S101 - our own bugs
        assert self.used_bytes <= self.capacity_bytes  # noqa: S101 - our own bugs
        finite = np.isfinite(self._rank).tolist()
        rows = zip(self._state, self._format, self._coming, self._pins, finite, strict=True)
        for flat, (state, form, coming_form, pins, ranked) in enumerate(rows):
            if form is None and coming_form is None and state in _AWAY and not (pins or ranked):
                continue
            assert (state is State.IN_FLIGHT) == (coming_form is not None), flat  # noqa: S101 - our own bugs
            if coming_form is None:
                assert (state in _HERE) == (form is not None), flat  # noqa: S101 - our own bugs
            assert form is not None or not pins, flat  # noqa: S101 - our own bugs
            evictable = form is not None and not pins and coming_form is None
            assert ranked == evictable, flat  # noqa: S101 - our own bugs
