"""What a living process holds, seen from outside: memory, threads, descriptors, mappings.

Read from /proc, so the process that is watched need not cooperate and may even be stopped.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

_STATUS = {"RssAnon": "anon_kib", "RssShmem": "shmem_kib", "Threads": "threads"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Footprint:
    """`anon_kib` is the heap, `shmem_kib` slabs (own and mapped); `maps` counts mappings."""

    anon_kib: int
    shmem_kib: int
    threads: int
    fds: int
    maps: int

    def since(self, before: Footprint) -> Footprint:
        """What was added."""
        return Footprint(
            anon_kib=self.anon_kib - before.anon_kib,
            shmem_kib=self.shmem_kib - before.shmem_kib,
            threads=self.threads - before.threads,
            fds=self.fds - before.fds,
            maps=self.maps - before.maps,
        )

    def __str__(self) -> str:
        return (
            f"{self.anon_kib:+d} KiB heap, {self.shmem_kib:+d} KiB slabs, "
            f"{self.threads:+d} threads, {self.fds:+d} fds, {self.maps:+d} maps"
        )


def footprint(pid: int) -> Footprint:
    """Count what process `pid` holds now. Raises OSError when it has ended."""
    proc = Path(f"/proc/{pid}")
    found: dict[str, int] = {}
    for line in (proc / "status").read_text(encoding="utf-8").splitlines():
        name, _, value = line.partition(":")
        if name in _STATUS:
            found[_STATUS[name]] = int(value.split()[0])
    with (proc / "maps").open(encoding="utf-8", errors="replace") as lines:
        maps = sum(1 for _ in lines)
    return Footprint(fds=len(os.listdir(proc / "fd")), maps=maps, **found)  # noqa: PTH208 - names do


def descriptors(pid: int) -> dict[str, str]:
    """What each descriptor of `pid` is, to name a leak."""
    folder = Path(f"/proc/{pid}/fd")
    found = {}
    for entry in folder.iterdir():
        try:
            found[entry.name] = str(entry.readlink())
        except OSError:  # closed meanwhile
            continue
    return found


def leaked(growth: Footprint, *, rounds: int, slabs_kib: int = 16_384) -> str:
    """'' or what grew more than `rounds` rounds may make it grow.

    Threads, descriptors and mappings must not grow with the rounds: a leak of one every tenth
    round is found after 40 rounds. Heaps breathe, so memory has 24 MiB of room and then 4 KiB a
    round; a slab that is still mapped is found at once, because peers' slabs are larger than
    `slabs_kib`.
    """
    room = 4 + rounds // 10
    wrong = []
    if growth.threads > min(room, 4):
        wrong.append("threads")
    if growth.fds > min(room, 8):
        wrong.append("fds")
    if growth.maps > 64 + rounds // 10:
        wrong.append("maps")
    if growth.anon_kib > 24_576 + 4 * rounds:
        wrong.append("heap")
    if growth.shmem_kib > slabs_kib:
        wrong.append("slabs")
    return f"{', '.join(wrong)} after {rounds} rounds: {growth}" if wrong else ""
