"""A store's memory: aligned, huge where the kernel grants it, mapped as long as a view lives."""

from __future__ import annotations

import gc
import os
import weakref
from pathlib import Path

import numpy as np
import pytest

from hotset.errors import ConfigError
from hotset.transport.mapping import HUGE_PAGE_BYTES, Mapping, pool_holds
from hotset.transport.memory import HostMemory

MIB = 1 << 20


def _resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1]) * 4096


def _descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def _is_mapped(address: int) -> bool:
    lines = Path("/proc/self/maps").read_text(encoding="ascii", errors="replace").splitlines()
    ends = (line.split(maxsplit=1)[0].split("-") for line in lines)
    return any(int(begin, 16) <= address < int(end, 16) for begin, end in ends)


def _grants_huge_pages() -> bool:
    """Whether this kernel gives a fresh memfd a huge page when asked the way HostMemory asks."""
    fd = os.memfd_create("probe")
    os.ftruncate(fd, HUGE_PAGE_BYTES)
    mapping = Mapping(fd, HUGE_PAGE_BYTES, writable=True)
    mapping.fault_huge(fd)
    granted = mapping.huge_bytes() > 0
    mapping.close()
    os.close(fd)
    return granted


@pytest.mark.parametrize("nbytes", [1, HUGE_PAGE_BYTES, 5 * MIB, 64 * MIB])
def test_the_address_is_aligned_and_the_size_rounded_up(nbytes: int) -> None:
    memory = HostMemory(nbytes, name="aligned")
    assert memory.address % HUGE_PAGE_BYTES == 0
    assert memory.nbytes == -(-nbytes // HUGE_PAGE_BYTES) * HUGE_PAGE_BYTES
    assert not np.frombuffer(memory.view(0, memory.nbytes), dtype=np.uint8).any()


def test_all_pages_are_there_from_the_start_and_no_more() -> None:
    before = _resident_bytes()
    memory = HostMemory(64 * MIB, name="resident")
    grown = _resident_bytes() - before
    if not pool_holds(0) or memory.page_kind != "huge" or grown > 0:  # the pool is not in RSS
        assert 64 * MIB <= grown < 66 * MIB
    stat = os.fstat(memory.fd)
    assert stat.st_size == 64 * MIB
    assert stat.st_blocks * 512 == 64 * MIB


def test_pages_are_huge_where_the_kernel_grants_them() -> None:
    memory = HostMemory(32 * MIB, name="huge")
    granted = _grants_huge_pages()
    assert memory.page_kind in ({"huge", "mixed"} if granted else {"normal", "huge"})


def test_a_peer_maps_huge_pages_too() -> None:
    memory = HostMemory(16 * MIB, name="shared")
    memory.write(3 * MIB, b"seen")
    peer = Mapping(memory.fd, memory.nbytes, writable=False)
    view = peer.view()
    assert bytes(view[3 * MIB : 3 * MIB + 4]) == b"seen"
    assert sum(view[:: 1 << 12]) == ord("s")  # touches every page
    if memory.page_kind == "huge":
        assert peer.huge_bytes() == memory.nbytes


def test_huge_pages_can_be_declined(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOTSET_HUGEPAGES", "0")
    memory = HostMemory(4 * MIB, name="normal")
    assert memory.page_kind == "normal"
    assert memory.address % HUGE_PAGE_BYTES == 0
    memory.write(4 * MIB - 3, b"end")
    assert bytes(memory.read(4 * MIB - 3, 3)) == b"end"


def test_views_keep_the_memory_mapped() -> None:
    memory = HostMemory(2 * MIB, name="views")
    memory.write(0, b"alive")
    address, fd = memory.address, memory.fd
    view, tensor = memory.view(0, 5), memory.torch_view(0, 5)
    array = np.frombuffer(memory.view(0, 5), dtype=np.uint8)
    gone = weakref.ref(memory)
    del memory
    gc.collect()
    assert gone() is None
    for last in (bytes(view), bytes(tensor.tolist()), array.tobytes()):
        assert last == b"alive"
    del view, tensor
    gc.collect()
    assert _is_mapped(address)
    assert array.tobytes() == b"alive"
    del array
    gc.collect()
    assert not _is_mapped(address)
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(fd)


def test_nothing_leaks() -> None:
    HostMemory(2 * MIB, name="first")
    gc.collect()
    descriptors, resident = _descriptors(), _resident_bytes()
    for round_ in range(50):
        memory = HostMemory(2 * MIB, name="again")
        peer = Mapping(memory.fd, memory.nbytes, writable=False)
        assert peer.view()[round_] == 0
        peer.close()
        peer.close()
        del memory, peer
    gc.collect()
    assert _descriptors() == descriptors
    assert _resident_bytes() - resident < 4 * MIB


def test_more_than_the_machine_has_is_refused() -> None:
    descriptors = _descriptors()
    with pytest.raises(ConfigError, match="cannot reserve"):
        HostMemory(1 << 60, name="boundless")
    assert _descriptors() == descriptors


@pytest.mark.skipif(not pool_holds(4 * MIB), reason="the kernel's pool of 2 MiB pages is empty")
def test_the_pool_is_used_when_it_has_enough() -> None:
    memory = HostMemory(4 * MIB, name="pool")
    assert memory.page_kind == "huge"
    memory.write(4 * MIB - 3, b"end")
    assert bytes(memory.read(4 * MIB - 3, 3)) == b"end"
