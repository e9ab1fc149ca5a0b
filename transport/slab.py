"""A store's memory: one region of slots, registered once, never unmapped.

Moves no bytes between processes; keeps who owns which bytes. The region is cut into super-slots
of one fixed stride. A super-slot serves one full-size copy or several equal parts for reduced ones
(two for int8, three for int4), so precision is a lever on how many copies fit; it belongs to one
class of parts while any of them is in use (as in a SLUB allocator). Free super-slots are reused
oldest first, which gives remote readers of a retired copy the longest time to finish.

    FREE -allocate-> FILLING -publish-> READY -retire-> DRAINING -last unpin-> FREE
                     FILLING -fail-> FREE
                     FILLING -abandon-> QUARANTINED -restore-> FREE

Behind the slots lie SCRATCH_CELLS headers' worth of scratch, where a reader looks at a peer's
header before its payload. A FILLING slot may carry a progress header, so that readers follow it.

Invariants: a header is valid only in READY (FILLING slots may hold what a backend writes); a
header is written last and voided first; generations only grow; used bytes never exceed the
budget; a `Slot` is good for one use of its memory, a later use has another serial, and any move
with a stale one raises InvalidTransition. One lock; no method blocks. This module must not know
peers, backends, or what the bytes mean.
"""

from __future__ import annotations

import threading
from collections import deque
from dataclasses import dataclass
from enum import IntEnum
from typing import TYPE_CHECKING, Final

from hotset.errors import ConfigError, InvalidTransition
from hotset.transport.header import HEADER_BYTES, VOID, Header, pack, pack_progress
from hotset.transport.memory import DeviceMemory, HostMemory, Memory
from hotset.transport.slots import part_bytes, slot_bytes, slot_parts, slot_stride

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch
    from _typeshed import ReadableBuffer

    from hotset.transport.base import Expect

SCRATCH_CELLS: Final = 64


class SlotState(IntEnum):
    """Who owns a slot."""

    FREE = 0
    FILLING = 1
    READY = 2
    DRAINING = 3
    QUARANTINED = 4


@dataclass(frozen=True, slots=True)
class Slot:
    """One use of a part of the slab: `offset` of its header, `nbytes` asked for its payload."""

    offset: int
    nbytes: int
    unit: int  # most parts of any class x super-slot + part
    serial: int

    @property
    def payload_offset(self) -> int:
        """Offset of the payload's first byte in the slab."""
        return self.offset + HEADER_BYTES


class Slab:
    """The slots of one store. Sizes in bytes; thread-safe."""

    def __init__(  # noqa: PLR0913 - a store's memory has these parameters, all by keyword
        self,
        *,
        capacity_bytes: int,
        slot_payload_bytes: int,
        device: str = "cpu",
        name: str,
        incarnation: int,
        reduced_payload_bytes: int | tuple[int, ...] | None = None,
    ) -> None:
        """Reserve the memory. Raises ConfigError when the budget holds not even one slot.

        `reduced_payload_bytes`: payload sizes below the full one, a class of parts for each.
        """
        self.name = name
        self.incarnation = incarnation
        self.device = device
        self.slot_payload_bytes = slot_payload_bytes
        reduced = reduced_payload_bytes or ()
        self.reduced_payload_bytes = (reduced,) if isinstance(reduced, int) else reduced
        self.stride_bytes = slot_stride(slot_payload_bytes, *self.reduced_payload_bytes)
        stride = self.stride_bytes
        self._classes = sorted(
            {1} | {slot_parts(size, stride=stride) for size in self.reduced_payload_bytes},
            reverse=True,
        )
        self._most = max(2, self._classes[0])
        self._size = {parts: part_bytes(parts, stride=stride) for parts in self._classes}
        self._size[1] = stride
        self.super_slots = capacity_bytes // self.stride_bytes
        if self.super_slots < 1:
            raise ConfigError(
                f"store {name!r}: a budget of {capacity_bytes} bytes holds no slot of "
                f"{self.stride_bytes} bytes",
                remedy=f"give it at least {self.stride_bytes} bytes",
            )
        self.capacity_bytes = self.super_slots * self.stride_bytes
        self.memory: Memory = (
            HostMemory(self.capacity_bytes + SCRATCH_CELLS * HEADER_BYTES, name=name)
            if device == "cpu"
            else DeviceMemory(
                self.capacity_bytes + SCRATCH_CELLS * HEADER_BYTES, device=device, name=name
            )
        )
        self._lock = threading.Lock()
        units = self._most * self.super_slots
        self._state = [SlotState.FREE] * units
        self._pins = [0] * units
        self._serial = [0] * units
        self._generation = 0
        self._parts = [0] * self.super_slots  # 0 free, 1 one full copy, n reduced copies
        self._free: deque[int] = deque(range(self.super_slots))  # super-slots of no class
        self._free_parts: dict[int, deque[int]] = {  # free units beside a used one, by class
            parts: deque() for parts in self._classes
        }
        self._used_bytes = 0

    # --- facts ----------------------------------------------------------------------------------

    @property
    def base_address(self) -> int:
        """Address of the slab's first byte in this process."""
        return self.memory.address

    @property
    def nbytes(self) -> int:
        """Length of the registered region (budget and scratch, rounded up to 2 MiB)."""
        return self.memory.nbytes

    @property
    def used_bytes(self) -> int:
        """Bytes of all slots that are not FREE, headers and rounding included."""
        return self._used_bytes

    def free_slots(self, nbytes: int) -> int:
        """How many payloads of `nbytes` could be allocated now."""
        with self._lock:
            parts = self._class(nbytes)
            return parts * len(self._free) + len(self._free_parts[parts])

    def state(self, slot: Slot) -> SlotState:
        """State of this use of the slot; FREE when the use has ended."""
        with self._lock:
            current = self._serial[slot.unit] == slot.serial
            return self._state[slot.unit] if current else SlotState.FREE

    def pins(self, slot: Slot) -> int:
        """How many readers hold this use of the slot."""
        with self._lock:
            return self._pins[slot.unit] if self._serial[slot.unit] == slot.serial else 0

    # --- moves ----------------------------------------------------------------------------------

    def allocate(self, nbytes: int) -> Slot | None:
        """Take a slot for a payload of `nbytes`: FREE -> FILLING; None when the slab is full.

        Raises ConfigError when no slot of this slab can ever hold that many bytes.
        """
        parts = self._class(nbytes)
        if nbytes > self.slot_payload_bytes:
            raise ConfigError(
                f"store {self.name!r}: a payload of {nbytes} bytes exceeds its slots of "
                f"{self.slot_payload_bytes} bytes",
                remedy="build the slab with the size of the largest block",
            )
        with self._lock:
            unit = self._take(parts)
            if unit is None:
                return None
            self._state[unit] = SlotState.FILLING
            self._serial[unit] += 1
            self._used_bytes += self._unit_bytes(unit)
            return Slot(self._offset(unit), nbytes, unit, self._serial[unit])

    def publish(  # noqa: PLR0913 - the columns of a header
        self,
        slot: Slot,
        *,
        key: bytes,
        format_code: int,
        nbytes: int,
        checksum: int,
        epoch: int = 0,
        pins: int = 0,
    ) -> int:
        """Make a filled slot readable: FILLING -> READY, header last. Returns its generation.

        `pins` are held from the start, so that nobody evicts the copy between landing and use.
        """
        if nbytes > slot.nbytes:
            raise ValueError(f"{nbytes} bytes in a slot of {slot.nbytes}")
        with self._lock:
            return self._publish(slot, key, format_code, nbytes, checksum, epoch, pins)

    def publish_landed(self, landed: Sequence[tuple[Slot, Expect, int, int]]) -> list[int]:
        """Publish slots as `publish` does, each pinned once: slot, content, checksum, epoch."""
        with self._lock:
            return [
                self._publish(
                    slot, expect.key, expect.format_code, expect.nbytes, checksum, epoch, pins=1
                )
                for slot, expect, checksum, epoch in landed
            ]

    def try_pin(self, slot: Slot) -> bool:
        """Hold a READY slot against reuse; False when it is gone, so look the block up again."""
        with self._lock:
            if (
                self._serial[slot.unit] != slot.serial
                or self._state[slot.unit] is not SlotState.READY
            ):
                return False
            self._pins[slot.unit] += 1
            return True

    def pin(self, slot: Slot) -> None:
        """Hold a READY slot against reuse. Raises InvalidTransition when it is gone."""
        with self._lock:
            self._require(slot, SlotState.READY, "pin")
            self._pins[slot.unit] += 1

    def unpin(self, slot: Slot) -> None:
        """Let go of a pin; the last one frees a DRAINING slot."""
        with self._lock:
            unit = slot.unit
            held = self._serial[unit] == slot.serial and self._pins[unit] > 0
            if not held:
                raise self._illegal(slot, "unpin")
            self._pins[unit] -= 1
            if self._pins[unit] == 0 and self._state[unit] is SlotState.DRAINING:
                self._release(unit)

    def retire(self, slot: Slot) -> bool:
        """Void the header: READY -> DRAINING, and FREE at once when nobody holds it (True)."""
        with self._lock:
            self._require(slot, SlotState.READY, "retire")
            self.memory.write(slot.offset, VOID)
            self._state[slot.unit] = SlotState.DRAINING
            if self._pins[slot.unit]:
                return False
            self._release(slot.unit)
            return True

    def show_progress(self, slot: Slot, expect: Expect, *, arrived: int) -> None:
        """Tell readers that follow a FILLING slot how many payload bytes have come, in order."""
        with self._lock:
            self._require(slot, SlotState.FILLING, "show the progress of")
            header = pack_progress(expect, arrived=arrived, incarnation=self.incarnation)
            self.memory.write(slot.offset, header)

    def fail(self, slot: Slot) -> None:
        """Give back a slot that nothing writes to any more: FILLING -> FREE."""
        self._give_back(slot, SlotState.FILLING, "fail")

    def try_fail(self, slot: Slot) -> bool:
        """Give back a slot as `fail` does; False when it is not FILLING any more."""
        with self._lock:
            unit = slot.unit
            if self._serial[unit] != slot.serial or self._state[unit] is not SlotState.FILLING:
                return False
            self.memory.write(slot.offset, VOID)
            self._release(unit)
            return True

    def abandon(self, slot: Slot) -> None:
        """Give up a slot that a backend may still write to: FILLING -> QUARANTINED."""
        with self._lock:
            self._require(slot, SlotState.FILLING, "abandon")
            self._state[slot.unit] = SlotState.QUARANTINED

    def restore(self, slot: Slot) -> None:
        """Take back a quarantined slot whose transfer has ended: QUARANTINED -> FREE.

        Only the engine may say so, after the backend reported done or error.
        """
        self._give_back(slot, SlotState.QUARANTINED, "restore")

    # --- bytes ----------------------------------------------------------------------------------

    def payload(self, slot: Slot, nbytes: int | None = None) -> memoryview:
        """Writable view of the payload on the host. Raises ConfigError for device memory."""
        return self.memory.view(slot.payload_offset, self._length(slot, nbytes))

    def read_payload(self, slot: Slot, nbytes: int | None = None) -> memoryview:
        """Payload for reading from any device: a view on the host, else a copy."""
        return self.memory.read(slot.payload_offset, self._length(slot, nbytes))

    def write_payload(self, slot: Slot, data: ReadableBuffer, *, offset: int = 0) -> None:
        """Copy `data` into the payload at `offset`, on any device."""
        self._length(slot, offset + memoryview(data).nbytes)
        self.memory.write(slot.payload_offset + offset, data)

    def torch_view(self, slot: Slot, nbytes: int | None = None) -> torch.Tensor:
        """torch.uint8 [nbytes] view of the payload, zero-copy, on the slab's device."""
        return self.memory.torch_view(slot.payload_offset, self._length(slot, nbytes))

    def scratch_offset(self, cell: int) -> int:
        """Offset of one of the SCRATCH_CELLS headers behind the slots."""
        return self.capacity_bytes + cell * HEADER_BYTES

    def header(self, slot: Slot) -> Header | None:
        """Read the slot's header; None while it is void."""
        return Header.unpack(self.memory.read(slot.offset, HEADER_BYTES))

    # --- inside, with the lock held ---------------------------------------------------------------

    def _publish(  # noqa: PLR0913, PLR0917 - the columns of a header, by place: the hot path
        self,
        slot: Slot,
        key: bytes,
        format_code: int,
        nbytes: int,
        checksum: int,
        epoch: int,
        pins: int,
    ) -> int:
        self._require(slot, SlotState.FILLING, "publish")
        self._generation += 1
        header = pack(
            key=key,
            format_code=format_code,
            nbytes=nbytes,
            generation=self._generation,
            checksum=checksum,
            incarnation=self.incarnation,
            epoch=epoch,
        )
        self.memory.write(slot.offset, header)
        self._state[slot.unit] = SlotState.READY
        self._pins[slot.unit] = pins
        return self._generation

    def _class(self, nbytes: int) -> int:
        """The most parts of a super-slot that each hold a payload of `nbytes`."""
        need = slot_bytes(nbytes)
        return next((parts for parts in self._classes if need <= self._size[parts]), 1)

    def _length(self, slot: Slot, nbytes: int | None) -> int:
        if nbytes is None:
            return slot.nbytes
        if not 0 <= nbytes <= slot.nbytes:
            raise ValueError(f"{nbytes} bytes of a slot of {slot.nbytes}")
        return nbytes

    def _offset(self, unit: int) -> int:
        index, part = divmod(unit, self._most)
        return index * self.stride_bytes + part * self._size[self._parts[index] or 1]

    def _unit_bytes(self, unit: int) -> int:
        return self._size[self._parts[unit // self._most]]

    def _take(self, parts: int) -> int | None:
        beside = self._free_parts[parts]
        if beside:
            return beside.popleft()
        if not self._free:
            return None
        index = self._free.popleft()
        self._parts[index] = parts
        first = self._most * index
        beside.extend(range(first + 1, first + parts))
        return first

    def _release(self, unit: int) -> None:
        self._used_bytes -= self._unit_bytes(unit)
        self._state[unit] = SlotState.FREE
        self._pins[unit] = 0
        index = unit // self._most
        units = self._units(index)
        beside = self._free_parts[len(units)]
        if any(self._state[other] is not SlotState.FREE for other in units):
            beside.append(unit)
            return
        for other in units:
            if other != unit:
                beside.remove(other)
        self._parts[index] = 0
        self._free.append(index)

    def _units(self, index: int) -> range:
        """Units of a super-slot in its class."""
        return range(self._most * index, self._most * index + self._parts[index])

    def _give_back(self, slot: Slot, state: SlotState, move: str) -> None:
        with self._lock:
            self._require(slot, state, move)
            self.memory.write(slot.offset, VOID)  # a foreign header may have landed
            self._release(slot.unit)

    def _require(self, slot: Slot, state: SlotState, move: str) -> None:
        if self._serial[slot.unit] != slot.serial or self._state[slot.unit] is not state:
            raise self._illegal(slot, move)

    def _illegal(self, slot: Slot, move: str) -> InvalidTransition:
        now = (
            self._state[slot.unit].name
            if self._serial[slot.unit] == slot.serial
            else "used by another copy"
        )
        return InvalidTransition(
            f"store {self.name!r}: cannot {move} the slot at {slot.offset}, it is {now}",
            remedy="this is a bug in hotset; please report it with the journal",
        )

    def check_integrity(self) -> None:
        """Raise AssertionError that says what is wrong; for tests and debugging."""
        with self._lock:
            wrong = [text for text, bad in self._findings() if bad]
        if wrong:
            raise AssertionError(f"slab {self.name!r}: " + "; ".join(wrong))

    def _findings(self) -> list[tuple[str, bool]]:
        states, free = self._state, list(self._free)
        busy = [u for u, state in enumerate(states) if state is not SlotState.FREE]
        used = sum(self._unit_bytes(u) for u in busy)
        live = {u // self._most for u in busy}
        parts = sorted(u for units in self._free_parts.values() for u in units)
        beside = {u for index in live for u in self._units(index)} - set(busy)
        return [
            (f"used {self._used_bytes} bytes, counted {used}", used != self._used_bytes),
            (f"used {used} bytes of {self.capacity_bytes}", used > self.capacity_bytes),
            ("a super-slot is free twice", len(free) != len(set(free))),
            (
                "free and used super-slots are not all",
                live | set(free) != set(range(self.super_slots)),
            ),
            ("a super-slot is free and used", bool(live & set(free))),
            ("a free super-slot has a class", any(self._parts[i] for i in free)),
            ("a used super-slot has no class", any(not self._parts[i] for i in live)),
            (
                "a part outside its super-slot's class is used",
                any(u not in self._units(u // self._most) for u in busy),
            ),
            ("the free parts are not those beside reduced copies", parts != sorted(beside)),
            (
                "a pin is held on a slot that is neither READY nor DRAINING",
                any(
                    pins and states[u] not in {SlotState.READY, SlotState.DRAINING}
                    for u, pins in enumerate(self._pins)
                ),
            ),
            (
                "a DRAINING slot has no pin",
                any(states[u] is SlotState.DRAINING and not self._pins[u] for u in busy),
            ),
            (
                "a READY slot has no valid header",
                any(states[u] is SlotState.READY and self._header_at(u) is None for u in busy),
            ),
            (
                "a FREE or DRAINING slot has a valid header",
                any(
                    self._header_at(u) is not None
                    for u in range(len(states))
                    if states[u] is SlotState.DRAINING
                    or (states[u] is SlotState.FREE and u not in self._shadowed())
                ),
            ),
        ]

    def _shadowed(self) -> set[int]:
        """Units that are no part of their super-slot's class: their bytes belong to others."""
        return {
            self._most * index + part
            for index, parts in enumerate(self._parts)
            for part in range(max(1, parts), self._most)
        }

    def _header_at(self, unit: int) -> Header | None:
        return Header.unpack(self.memory.read(self._offset(unit), HEADER_BYTES))
