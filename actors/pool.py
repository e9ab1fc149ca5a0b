"""A memory pool: carries out the controller's transfers and drops, and is read by its peers.

Its copies are what the controller asked for and nothing else; only their form may be a cheaper one
to read, compressed without loss. Reads of it are one-sided, so a pool does nothing while it serves.
A lossy copy comes from a store that has it, else it is made here from a full one that lies in the
pool's one bench slot meanwhile. Transfers go by service, then by deadline; one whose window has
passed is refused. Must not know policy or Ray.

Invariants: every command ends once (landed, or failed with a reason); the bench holds one block.
"""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

from hotset.actors.fetcher import Landing, Want
from hotset.errors import HotsetError
from hotset.policies.schedule import service_of
from hotset.policies.types import (
    LOSSLESS,
    BlockId,
    CancelTransfer,
    Command,
    DropCopy,
    Format,
    Reason,
    StartTransfer,
    stand_ins,
)
from hotset.policies.wire import should_pack

if TYPE_CHECKING:
    from collections.abc import Callable

    from hotset.actors.directory import Directory
    from hotset.actors.fetcher import Fetcher
    from hotset.actors.packing import Packer
    from hotset.actors.store import Store
    from hotset.transport.slab import Slot

MOST_IN_FLIGHT = 8
_NEVER = 1 << 62


class PoolCore:
    """Queue of transfers towards one pool, a few at a time."""

    def __init__(  # noqa: PLR0913 - the parts of one pool, by keyword
        self,
        *,
        store: Store,
        fetcher: Fetcher,
        directory: Directory,
        nbytes: dict[Format, int],
        packer: Callable[[], Packer] | None = None,
        packs: bool = False,
        by_profile: bool = True,
    ) -> None:
        """`nbytes` is the payload size of a block in each format that this pool may hold.

        `packer` makes the encoder when the first block is to be encoded; `packs` asks for
        lossless packing where it pays, by `by_profile` until readers have measured. A pool that may
        encode keeps a slot free for it.
        """
        self._store = store
        self._fetcher = fetcher
        self._directory = directory
        self._nbytes = nbytes
        self._make_packer = packer
        self._packer: Packer | None = None
        self._packs = packs
        self._by_profile = by_profile
        self._wanted: bool | None = None  # packed copies, as readers have measured
        self._queue: list[StartTransfer] = []
        self._flying: set[tuple[BlockId, Format]] = set()
        self._encoding = 0
        self._bench: Slot | None = None
        self._lock = threading.Lock()
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="encode")
        if any(form not in LOSSLESS and form is not Format.INT8 for form in nbytes):
            self._bench = store.slab.allocate(nbytes[Format.BF16])
        self._bench_busy = False

    @property
    def pending(self) -> int:
        """Transfers asked for that have not ended."""
        return len(self._queue) + len(self._flying) + self._encoding

    def command(self, command: Command) -> None:
        """Carry out a command of the controller."""
        match command:
            case StartTransfer():
                with self._lock:
                    self._queue.append(command)
                    self._queue.sort(key=_urgency)  # stable: equals in order of arrival
                self._pump()
            case CancelTransfer():
                self._cancel(command)
            case DropCopy():
                self._drop(command)
            case _:
                pass  # epochs and vetoes concern the directory and the story, not a pool

    def readers_gain(self, gain: float) -> None:
        """Readers have measured what packing saves (`policies.wire`): hold copies accordingly."""
        if not self._packs:
            return
        packed = self._wanted
        if packed is None:  # by the link's profile, if at all
            packed = any(copy.format is Format.BF16Z for copy in self._store.copies())
        wanted = should_pack(gain, packed=packed)
        if wanted is self._wanted:
            return
        self._wanted = wanted
        form = Format.BF16 if wanted else Format.BF16Z
        held = [copy for copy in self._store.copies() if copy.format is form]
        with self._lock:
            self._encoding += len(held)
        for copy in held:
            self._thread.submit(self._pack, copy.block, form, copy.nbytes)

    def _drop(self, command: DropCopy) -> None:
        """Drop a copy; a full one may meanwhile be a compressed one."""
        for form in stand_ins(command.format):
            self._store.drop(command.block, form, reason=command.reason)

    def _cancel(self, command: CancelTransfer) -> None:
        """Answer for a transfer that has not begun; one that has answers when it has landed."""
        key = (command.block, command.format)
        with self._lock:
            if key in self._flying:
                return
            self._queue = [one for one in self._queue if (one.block, one.format) != key]
            if self._holds(*key):
                return
        self._store.report_failure(command.block, command.format, reason=Reason.CANCELLED)

    def _holds(self, block: BlockId, form: Format) -> bool:
        return any(self._store.holds(block, one) for one in stand_ins(form))

    def _pump(self) -> None:
        wants: list[Want] = []
        refused: list[tuple[StartTransfer, Reason]] = []
        with self._lock:
            waiting: list[StartTransfer] = []
            while self._queue and len(self._flying) < MOST_IN_FLIGHT:
                command = self._queue.pop(0)
                key = (command.block, command.format)
                if key in self._flying or self._store.tell_again(*key, reason=command.reason):
                    continue
                if 0 < command.due_ns < time.time_ns():
                    refused.append((command, Reason.VETO_LATE))
                    continue
                if self._must_encode(command):
                    if self._bench_busy:
                        waiting.append(command)
                        continue
                    want = self._to_bench(command)
                else:
                    want = self._to_slot(command)
                if want is None:
                    refused.append((command, Reason.VETO_MEMORY))
                    continue
                self._flying.add(key)
                wants.append(want)
            self._queue = waiting + self._queue
        for command, reason in refused:
            self._store.report_failure(command.block, command.format, reason=reason)
        if wants:
            self._fetcher.start(wants)

    def _must_encode(self, command: StartTransfer) -> bool:
        """Whether no source has the lossy copy that is asked for."""
        if command.format in LOSSLESS:
            return False
        copies = self._directory.copies(command.block)
        return not any(copy.format is command.format for copy in copies)

    def _to_slot(self, command: StartTransfer) -> Want | None:
        nbytes = self._nbytes[command.format]
        slot = self._store.slab.allocate(nbytes)
        if slot is None:
            return None
        return Want(
            block=command.block,
            format=command.format,
            slot=slot,
            nbytes=nbytes,
            on_end=self._landed,
            reason=command.reason,
            allow=frozenset(command.sources),
        )

    def _to_bench(self, command: StartTransfer) -> Want | None:
        nbytes = self._nbytes[Format.BF16]
        slot = self._bench or self._store.slab.allocate(nbytes)
        if slot is None or self._make_packer is None:
            return None
        self._bench, self._bench_busy = None, True
        return Want(
            block=command.block,
            format=Format.BF16,
            slot=slot,
            nbytes=nbytes,
            on_end=lambda landing: self._on_bench(landing, command),
            reason=command.reason,
            allow=frozenset(command.sources),
        )

    # --- engine's thread ------------------------------------------------------------------------

    def _landed(self, landing: Landing) -> None:
        with self._lock:
            self._flying.discard((landing.block, landing.format))
            if landing.format in LOSSLESS:
                self._flying -= {(landing.block, form) for form in LOSSLESS}
        if landing.slot is None:
            reason = Reason.VETO_MEMORY if landing.no_slot else Reason.LOST
            self._store.report_failure(landing.block, landing.format, reason=reason)
        else:
            self._store.adopt(landing)
            self._store.unpin(landing.slot)
            packs = self._by_profile if self._wanted is None else self._wanted
            if self._packs and packs and landing.format is Format.BF16:
                with self._lock:
                    self._encoding += 1
                self._thread.submit(self._pack, landing.block, landing.format, landing.nbytes)
        self._pump()

    def _on_bench(self, landing: Landing, command: StartTransfer) -> None:
        if landing.slot is None:
            self._leave_bench(None)
            self._ended(command, Reason.VETO_MEMORY if landing.no_slot else Reason.LOST)
        else:
            self._thread.submit(self._encode, landing, command)

    # --- the encoder's thread -------------------------------------------------------------------

    def _encode(self, landing: Landing, command: StartTransfer) -> None:
        """Make the lossy copy from the full one on the bench."""
        assert landing.slot is not None  # noqa: S101 - a failed fetch does not come here
        failure: Reason | None = None
        try:
            full = self._full(landing.slot, landing.format, nbytes=landing.nbytes)
            payload = self._coder().encode(full, command.format)
            slot = self._store.slab.allocate(len(payload))
            if slot is None:
                failure = Reason.VETO_MEMORY
            else:
                self._store.fill(
                    slot, payload, block=command.block, fmt=command.format, reason=command.reason
                )
        except HotsetError:
            failure = Reason.LOST  # weights that no format takes
        self._leave_bench(landing.slot)
        self._ended(command, failure)

    def _pack(self, block: BlockId, form: Format, nbytes: int) -> None:
        """Hold a lossless copy in the other lossless form, if reading it is then faster."""
        slot = self._store.pin(block, form)
        if slot is not None:
            self._swap(block, slot, form, nbytes=nbytes)
        with self._lock:
            self._encoding -= 1

    def _swap(self, block: BlockId, slot: Slot, form: Format, *, nbytes: int) -> None:
        slab = self._store.slab
        into = Format.BF16 if form is Format.BF16Z else Format.BF16Z
        try:
            source = slab.read_payload(slot, nbytes)
            if into is Format.BF16Z:
                payload = self._coder().pack(source, wanted=self._wanted)
            else:
                payload = self._coder().unpack(source, form)
        except HotsetError:
            payload = None
        slab.unpin(slot)
        if payload is None or not self._store.drop(block, form, reason=Reason.DEMOTE):
            return
        place = slab.allocate(len(payload))
        if place is not None:  # else a transfer was faster, and the controller asks again
            self._store.fill(place, payload, block=block, fmt=into)

    def _full(self, slot: Slot, form: Format, *, nbytes: int) -> memoryview:
        payload = self._store.slab.read_payload(slot, nbytes)
        return payload if form is Format.BF16 else self._coder().unpack(payload, form)

    def _coder(self) -> Packer:
        if self._packer is None:
            assert self._make_packer is not None  # noqa: S101 - nothing is encoded without one
            self._packer = self._make_packer()
        return self._packer

    def _leave_bench(self, used: Slot | None) -> None:
        slab = self._store.slab
        with self._lock:
            if used is not None:
                slab.retire(used)
                slab.unpin(used)
            self._bench = slab.allocate(self._nbytes[Format.BF16])
            self._bench_busy = False

    def _ended(self, command: StartTransfer, failure: Reason | None) -> None:
        with self._lock:
            self._flying.discard((command.block, command.format))
        if failure is not None:
            self._store.report_failure(command.block, command.format, reason=failure)
        self._pump()


def _urgency(command: StartTransfer) -> tuple[int, int]:
    return service_of(command.reason), command.due_ns or _NEVER
