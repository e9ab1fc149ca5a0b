from __future__ import annotations

import threading
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from hotset.errors import ConfigError, InvalidTransition
from hotset.transport.base import Expect
from hotset.transport.header import HEADER_BYTES, Header, checksum, matches
from hotset.transport.memory import DeviceMemory, HostMemory
from hotset.transport.slab import Slab, Slot, SlotState
from hotset.transport.slots import slot_stride

U64 = st.integers(0, 2**64 - 1)
HEADERS = st.builds(
    Header,
    key=st.binary(min_size=16, max_size=16),
    format_code=st.integers(0, 2**16 - 1),
    nbytes=st.integers(0, 2**32 - 1),
    generation=U64,
    checksum=U64,
    incarnation=U64,
    epoch=st.integers(0, 2**32 - 1),
    flags=st.integers(0, 255),
)
KEY = bytes(range(16))


@given(header=HEADERS, offset=st.integers(0, 100))
def test_a_header_survives_packing(header: Header, offset: int) -> None:
    buffer = bytearray(200)
    header.pack_into(buffer, offset)
    assert Header.unpack(buffer, offset) == header
    assert len(header.pack()) == HEADER_BYTES


@given(header=HEADERS, bit=st.integers(0, HEADER_BYTES * 8 - 1))
def test_any_flipped_bit_makes_a_header_void(header: Header, bit: int) -> None:
    data = bytearray(header.pack())
    data[bit // 8] ^= 1 << (bit % 8)
    assert Header.unpack(data) is None


def test_void_and_short_buffers_unpack_to_none() -> None:
    assert Header.unpack(bytes(64)) is None
    assert Header.unpack(b"HOTS") is None


def test_the_layout_is_little_endian_and_fixed() -> None:
    data = Header(
        key=KEY, format_code=0x0102, nbytes=5, generation=7, checksum=9, incarnation=11, epoch=13
    ).pack()
    assert data[:8] == bytes([0x48, 0x4F, 0x54, 0x53, 2, 0, 2, 1])
    assert data[8:24] == KEY
    assert data[24:56] == b"".join(
        value.to_bytes(size, "little") for value, size in ((5, 4), (13, 4), (7, 8), (9, 8), (11, 8))
    )


@pytest.mark.parametrize("field", ["key", "format", "nbytes", "generation", "checksum", "inc"])
def test_matches_names_what_differs(field: str) -> None:
    header = Header(key=KEY, format_code=1, nbytes=2, generation=3, checksum=4, incarnation=5)
    same = Expect(key=KEY, format_code=1, nbytes=2, generation=3, checksum=4, incarnation=5)
    assert matches(header, same) == ""
    changes = {
        "key": {"key": bytes(16)}, "format": {"format_code": 9}, "nbytes": {"nbytes": 9},
        "generation": {"generation": 9}, "checksum": {"checksum": 9}, "inc": {"incarnation": 9},
    }  # fmt: skip
    assert matches(header, replace(same, **changes[field])).startswith(field)


def test_a_key_of_another_length_is_refused() -> None:
    with pytest.raises(ValueError, match="16 bytes"):
        Header(
            key=b"short", format_code=1, nbytes=2, generation=3, checksum=4, incarnation=5
        ).pack()


Reduced = int | tuple[int, ...] | None


def _slab(slots: int = 4, *, full: int = 1000, reduced: Reduced = 500) -> Slab:
    sizes = reduced if isinstance(reduced, tuple) else (reduced,)
    return Slab(
        capacity_bytes=slots * slot_stride(full, *sizes),
        slot_payload_bytes=full,
        reduced_payload_bytes=reduced,
        name="test",
        incarnation=3,
    )


def _publish(slab: Slab, slot: Slot, *, pins: int = 0) -> int:
    return slab.publish(
        slot, key=KEY, format_code=1, nbytes=slot.nbytes,
        checksum=checksum(slab.payload(slot)), pins=pins,
    )  # fmt: skip


def test_a_budget_below_one_slot_names_the_remedy() -> None:
    with pytest.raises(ConfigError, match="at least 1088"):
        Slab(capacity_bytes=1000, slot_payload_bytes=1000, name="s", incarnation=1)


def test_a_payload_above_the_slot_size_is_refused() -> None:
    with pytest.raises(ConfigError, match="exceeds"):
        _slab().allocate(1001)


def test_the_budget_is_rounded_down_to_whole_slots() -> None:
    slab = Slab(capacity_bytes=3 * 1088 + 1087, slot_payload_bytes=1000, name="s", incarnation=1)
    assert (slab.capacity_bytes, slab.free_slots(1000)) == (3 * 1088, 3)
    assert slab.nbytes % (2 << 20) == 0


def test_two_reduced_copies_share_a_super_slot_and_give_it_back_whole() -> None:
    slab = _slab(1)
    a, b = slab.allocate(500), slab.allocate(400)
    assert a is not None
    assert b is not None
    assert b.offset - a.offset == slab.stride_bytes // 2
    assert slab.allocate(10) is None
    slab.fail(a)
    assert slab.free_slots(1000) == 0
    assert slab.free_slots(500) == 1
    assert slab.allocate(1000) is None
    slab.fail(b)
    assert slab.free_slots(1000) == 1
    assert slab.allocate(1000) is not None
    slab.check_integrity()


def test_stride_fits_uneven_reduced_copies() -> None:
    assert slot_stride(1000, 700) >= 2 * (64 + 700)
    slab = _slab(2, reduced=700)
    slots = [slab.allocate(700) for _ in range(4)]
    for seed, slot in enumerate(slots):
        assert slot is not None
        slab.write_payload(slot, bytes([seed]) * 700)
    assert [bytes(slab.payload(s)) for s in slots if s] == [bytes([i]) * 700 for i in range(4)]


def test_smaller_formats_share_a_super_slot_among_more_copies() -> None:
    slab = _slab(2, reduced=(500, 240, 100))
    thirds = [slab.allocate(240) for _ in range(3)]
    assert len({slot.offset // slab.stride_bytes for slot in thirds if slot}) == 1
    assert slab.free_slots(100) == slab.stride_bytes // (64 + 128)
    assert slab.free_slots(1000) == 1  # the rest of the first super-slot is for thirds only
    assert slab.used_bytes <= slab.stride_bytes
    for slot in thirds:
        assert slot is not None
        slab.fail(slot)
    assert slab.free_slots(1000) == 2
    slab.check_integrity()


def test_a_pinned_slot_drains_until_the_last_reader_goes() -> None:
    slab = _slab()
    slot = slab.allocate(1000)
    assert slot is not None
    generation = _publish(slab, slot, pins=1)
    header = slab.header(slot)
    assert header is not None
    assert (header.generation, header.incarnation) == (generation, 3)
    slab.pin(slot)
    assert not slab.retire(slot)
    assert slab.header(slot) is None
    assert not slab.try_pin(slot)
    slab.unpin(slot)
    assert slab.state(slot) is SlotState.DRAINING
    slab.unpin(slot)
    assert slab.state(slot) is SlotState.FREE
    slab.check_integrity()


def test_a_handle_of_a_former_use_can_do_nothing() -> None:
    slab = _slab(1)
    old = slab.allocate(1000)
    assert old is not None
    slab.fail(old)
    new = slab.allocate(1000)
    assert new is not None
    assert new.offset == old.offset
    _publish(slab, new)
    for move in (slab.fail, slab.retire, slab.pin, slab.unpin, slab.abandon, slab.restore):
        with pytest.raises(InvalidTransition):
            move(old)
    assert not slab.try_pin(old)
    assert slab.state(old) is SlotState.FREE


def test_what_landed_in_a_failed_slot_is_never_believed() -> None:
    slab = _slab()
    for end in ("fail", "restore"):
        slot = slab.allocate(1000)
        assert slot is not None
        foreign = Header(key=KEY, format_code=1, nbytes=2, generation=3, checksum=4, incarnation=5)
        if end == "restore":
            slab.abandon(slot)
        slab.memory.write(slot.offset, foreign.pack())
        getattr(slab, end)(slot)
        assert slab.header(slot) is None


@pytest.mark.parametrize("seed", [1, 2])
def test_many_threads_never_share_a_slot(seed: int) -> None:
    slab = _slab(8)
    wrong: list[str] = []

    def work(worker: int) -> None:
        rng = np.random.default_rng([seed, worker])
        for turn in range(200):
            slot = slab.allocate(int(rng.choice([400, 1000])))
            if slot is None:
                continue
            mark = bytes([worker, turn]) * (slot.nbytes // 2)
            slab.write_payload(slot, mark)
            _publish(slab, slot)
            if bytes(slab.payload(slot)) != mark:
                wrong.append(f"{worker} {turn}")
            slab.retire(slot)

    threads = [threading.Thread(target=work, args=(worker,)) for worker in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert wrong == []
    assert slab.used_bytes == 0
    slab.check_integrity()


class SlabMachine(RuleBasedStateMachine):
    """Any legal sequence keeps the slab whole; any illegal move raises."""

    def __init__(self) -> None:
        super().__init__()
        self.slab = _slab(3, reduced=(500, 240, 100))
        self.slots: dict[Slot, SlotState] = {}
        self.pins: dict[Slot, int] = {}
        self.generation = 0

    def _pick(self, data: st.DataObject) -> Slot:
        return data.draw(st.sampled_from(sorted(self.slots, key=lambda s: (s.unit, s.serial))))

    @rule(nbytes=st.sampled_from([1, 100, 240, 500, 501, 1000]))
    def allocate(self, nbytes: int) -> None:
        room = self.slab.free_slots(nbytes)
        slot = self.slab.allocate(nbytes)
        assert (slot is not None) == (room > 0)
        if slot is not None:
            taken = [s for s, state in self.slots.items() if state is not SlotState.FREE]
            ends = [(s.offset, s.payload_offset + s.nbytes) for s in taken]
            assert all(slot.payload_offset + nbytes <= a or slot.offset >= b for a, b in ends)
            self.slots[slot], self.pins[slot] = SlotState.FILLING, 0

    @precondition(lambda self: self.slots)
    @rule(data=st.data(), move=st.sampled_from(
        ["publish", "fail", "abandon", "restore", "retire", "pin", "unpin"]))  # fmt: skip
    def move(self, data: st.DataObject, move: str) -> None:
        slot = self._pick(data)
        state, pins = self.slots[slot], self.pins[slot]
        legal = {
            "publish": state is SlotState.FILLING,
            "fail": state is SlotState.FILLING,
            "abandon": state is SlotState.FILLING,
            "restore": state is SlotState.QUARANTINED,
            "retire": state is SlotState.READY,
            "pin": state is SlotState.READY,
            "unpin": pins > 0,
        }[move]
        act = _publish if move == "publish" else lambda slab, s: getattr(slab, move)(s)
        if not legal:
            with pytest.raises(InvalidTransition):
                act(self.slab, slot)
            return
        result = act(self.slab, slot)
        self._follow(slot, move, result)

    def _follow(self, slot: Slot, move: str, result: object) -> None:
        if move == "publish":
            assert isinstance(result, int)
            assert result > self.generation
            self.generation = result
            self.slots[slot] = SlotState.READY
        elif move == "abandon":
            self.slots[slot] = SlotState.QUARANTINED
        elif move in {"fail", "restore"}:
            self.slots[slot] = SlotState.FREE
        elif move == "retire":
            self.slots[slot] = SlotState.DRAINING if self.pins[slot] else SlotState.FREE
        else:
            self.pins[slot] += 1 if move == "pin" else -1
            if self.pins[slot] == 0 and self.slots[slot] is SlotState.DRAINING:
                self.slots[slot] = SlotState.FREE

    @invariant()
    def whole(self) -> None:
        self.slab.check_integrity()
        for slot, state in self.slots.items():
            assert self.slab.state(slot) is state
            assert self.slab.pins(slot) == self.pins[slot]


TestSlabMachine = SlabMachine.TestCase
TestSlabMachine.settings = settings(max_examples=40, stateful_step_count=40)


def test_host_and_device_memory_behave_alike() -> None:
    for memory in (
        HostMemory(4096, name="m"), DeviceMemory(4096, device="cpu", name="m"),
    ):  # fmt: skip
        memory.write(100, b"abc")
        assert bytes(memory.read(99, 5)) == b"\0abc\0"
        assert memory.torch_view(100, 3).tolist() == list(b"abc")
        memory.torch_view(100, 1)[0] = 0x7A
        assert bytes(memory.read(100, 1)) == b"z"
        assert memory.address > 0
        assert memory.nbytes == 2 << 20


def test_device_memory_has_no_host_view_and_absent_devices_are_told() -> None:
    with pytest.raises(ConfigError):
        DeviceMemory(4096, device="cpu", name="m").view(0, 1)
    with pytest.raises(ConfigError, match="device that exists"):
        DeviceMemory(4096, device="cuda:0", name="m")


def test_torch_view_shares_the_slots_bytes() -> None:
    slab = _slab()
    slot = slab.allocate(1000)
    assert slot is not None
    view = slab.torch_view(slot, 10)
    slab.write_payload(slot, b"0123456789")
    assert bytes(view.tolist()) == b"0123456789"
