"""Stores of one process that read each other over a loopback network and a real checkpoint."""

from __future__ import annotations

import contextlib
import threading
from typing import TYPE_CHECKING, Any

import torch

from hotset.actors.directory import Directory
from hotset.actors.fetcher import Fetcher, Landing, Want
from hotset.actors.store import Store
from hotset.blocks.checkpoint import Catalog
from hotset.blocks.formats import codec
from hotset.blocks.local import BlockReader
from hotset.policies.types import BlockId, Format, Reason, StoreInfo, Tier
from hotset.transport.engine import Engine
from hotset.transport.loopback import LoopbackBackend, LoopbackNetwork
from hotset.transport.records import Ring
from hotset.transport.slab import Slab, Slot
from hotset.transport.slots import slot_stride
from hotset.transport.storage import StorageReader

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from hotset.transport.base import LinkProfile

DEADLINE_S = 20.0


def until(condition: Callable[[], bool], *, what: str) -> None:
    """Wait for it, at most DEADLINE_S."""
    pace = threading.Event()
    for _ in range(int(DEADLINE_S / 0.005)):
        if condition():
            return
        pace.wait(0.005)
    raise AssertionError(f"{what} did not come true")


class Node:
    """One store with room for `slots` full blocks: slab, engine, directory, fetcher."""

    def __init__(
        self,
        name: str,
        *,
        catalog: Catalog,
        network: LoopbackNetwork,
        slots: int,
        tier: Tier = Tier.HBM,
        incarnation: int = 1,
        formats: tuple[Format, ...] = (Format.INT8,),
        link: LinkProfile | None = None,
    ) -> None:
        self.catalog = catalog
        self.reduced_nbytes = codec(Format.INT8).nbytes(catalog.layout)
        lossy = {form: codec(form).nbytes(catalog.layout) for form in formats}
        self.stride = slot_stride(catalog.block_nbytes, self.reduced_nbytes)
        self.slab = Slab(
            capacity_bytes=slots * self.stride,
            slot_payload_bytes=catalog.block_nbytes,
            reduced_payload_bytes=tuple(lossy.values()),
            name=name,
            incarnation=incarnation,
        )
        self.engine = Engine(
            slab=self.slab, backend=LoopbackBackend(network), ring=Ring(), name=name,
            incarnation=incarnation, storage=StorageReader(), describe=Catalog.describe, link=link,
        )  # fmt: skip
        self.engine.start()
        info = StoreInfo(
            name=name, tier=tier, node="here", incarnation=incarnation,
            capacity_bytes=self.slab.capacity_bytes,
        )  # fmt: skip
        self.store = Store(info=info, catalog=catalog, slab=self.slab)
        self.directory = Directory(owner=name)
        self.fetcher = Fetcher(
            catalog=catalog, slab=self.slab, engine=self.engine, directory=self.directory
        )
        full = catalog.block_nbytes
        self.nbytes = {Format.BF16: full, Format.BF16Z: full, **lossy}

    def want(self, block: BlockId, ended: Endings, fmt: Format = Format.BF16, **more: Any) -> Want:
        slot = self.slab.allocate(self.nbytes[fmt])
        assert slot is not None
        return Want(
            block=block, format=fmt, slot=slot, nbytes=self.nbytes[fmt], on_end=ended.put,
            reason=Reason.DEMAND, **more,
        )  # fmt: skip

    def bring(self, *blocks: BlockId) -> list[Landing]:
        """Fetch blocks together and list what landed, unpinned."""
        ended = Endings()
        self.fetcher.start([self.want(block, ended) for block in blocks])
        landings = ended.wait(len(blocks))
        for landing in landings:
            if landing.slot is not None:
                self.store.adopt(landing)
                self.store.unpin(landing.slot)
        return landings

    def meet(self, *others: Node) -> None:
        """Connect to others and take their copies into the directory."""
        for other in others:
            self.engine.connect(other.engine.info())
        self.directory.set_tiers({other.store.info.name: other.store.info.tier for other in others})
        copies = [copy for other in others for copy in other.store.copies()]
        self.directory.replace(copies, epoch=1, version=1)

    def payload(self, slot: Slot) -> bytes:
        return bytes(self.slab.payload(slot, self.catalog.block_nbytes))

    def close(self) -> None:
        assert self.engine.close()
        self.slab.check_integrity()


class Endings:
    """Landings as they come, from any thread."""

    def __init__(self) -> None:
        self._found: list[Landing] = []
        self._changed = threading.Condition()

    def put(self, landing: Landing) -> None:
        with self._changed:
            self._found.append(landing)
            self._changed.notify_all()

    def wait(self, count: int) -> list[Landing]:
        with self._changed:
            assert self._changed.wait_for(lambda: len(self._found) >= count, timeout=DEADLINE_S)
            assert len(self._found) == count
            return list(self._found)


def truth(catalog: Catalog, block: BlockId) -> bytes:
    """The block's bytes as they are in the checkpoint's files."""
    out = torch.empty(catalog.block_nbytes, dtype=torch.uint8)
    reader = BlockReader(catalog)
    reader.read(block, out)
    reader.close()
    return out.numpy().tobytes()


@contextlib.contextmanager
def closing(*nodes: Node) -> Iterator[None]:
    """Close nodes at the end, and check their books."""
    try:
        yield
    finally:
        close_all(nodes)


def close_all(nodes: Iterable[Node]) -> None:
    for node in nodes:
        node.close()
