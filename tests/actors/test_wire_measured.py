"""Pools pack what readers find slow to read, by speed that readers measured, and unpack again."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch

from hotset.actors.packing import Packer, decode_ns
from hotset.actors.pool import PoolCore
from hotset.actors.wiremeter import WireMeter
from hotset.policies.types import STORAGE, Format, Reason, StartTransfer, Tier
from hotset.policies.wire import (
    Reading,
    expected_ns,
    packing_gain,
    shared_gain,
    should_pack,
)
from hotset.transport.base import LinkProfile
from tests.actors.node import Node, truth, until

if TYPE_CHECKING:
    from hotset.blocks.checkpoint import BlockLayout, Catalog
    from hotset.transport.loopback import LoopbackNetwork

BLOCKS = 12
SLOW = LinkProfile(bandwidth_bytes_per_s=2_000_000, latency_ns=1_000, emulated=True)


class Pair:
    """A filled pool and a reader of it."""

    def __init__(
        self,
        catalog: Catalog,
        network: LoopbackNetwork,
        *,
        link: LinkProfile | None,
        told: LinkProfile | None = None,
    ) -> None:
        """`link` is how the pool is read, `told` what the pool is told of that."""
        self.catalog = catalog
        self.pool = Node(
            "host-0", catalog=catalog, network=network, slots=BLOCKS + 2, tier=Tier.HOST, link=link
        )
        self.reader = Node("worker", catalog=catalog, network=network, slots=BLOCKS)
        self.core = PoolCore(
            store=self.pool.store, fetcher=self.pool.fetcher, directory=self.pool.directory,
            nbytes=self.pool.nbytes, packer=lambda: Packer(catalog.layout, link=told), packs=True,
        )  # fmt: skip
        self.blocks = list(catalog.blocks)[:BLOCKS]
        for block in self.blocks:
            self.core.command(
                StartTransfer(
                    epoch=1, store="host-0", block=block, format=Format.BF16, sources=(STORAGE,),
                    cause="test", reason=Reason.STAGE,
                )
            )  # fmt: skip
        self.meter = WireMeter(
            catalog=catalog, fetcher=self.reader.fetcher, directory=self.reader.directory,
            device=torch.device("cpu"),
        )  # fmt: skip
        until(lambda: not self.core.pending, what="a filled pool")
        self.reader.meet(self.pool)
        for _ in range(100):  # its storage is far away, or it would read that
            self.reader.directory.cost(STORAGE).observe(nbytes=1, elapsed_ns=10_000_000_000)

    def forms(self) -> set[Format]:
        until(lambda: not self.core.pending, what="the pool's work")
        return {copy.format for copy in self.pool.store.copies()}

    def read_all(self) -> None:
        for block in self.blocks:
            (landing,) = self.reader.bring(block)
            assert landing.source == "host-0"
            self.reader.store.drop(block, landing.format, reason=Reason.DEMOTE)

    def tell(self) -> float:
        until(lambda: bool(self.meter.readings()), what="a measured gain")
        gain = shared_gain(self.meter.readings())
        assert gain is not None
        self.core.readers_gain(gain)
        return gain

    def close(self) -> None:
        self.reader.close()
        self.pool.close()


def test_a_pool_packs_for_readers_that_measure_a_slow_link_and_unpacks_for_fast_ones(
    catalog: Catalog, network: LoopbackNetwork
) -> None:
    pair = Pair(catalog, network, link=SLOW)
    assert pair.forms() == {Format.BF16}  # nobody knows better yet
    assert pair.meter.readings() == ()
    pair.read_all()
    assert 0.1 < pair.tell() < 0.35
    assert pair.forms() == {Format.BF16Z}
    pair.reader.meet(pair.pool)
    block = pair.blocks[3]
    (landing,) = pair.reader.bring(block)
    assert landing.format is Format.BF16Z
    assert landing.slot is not None
    packed = pair.reader.slab.read_payload(landing.slot, landing.nbytes)
    assert len(packed) < 0.85 * catalog.block_nbytes
    unpacked = Packer(catalog.layout, link=None).unpack(packed, Format.BF16Z)
    assert bytes(unpacked) == truth(catalog, block)

    for _ in range(2):
        pair.read_all()
    assert pair.tell() > 0.05  # now that both were read
    assert pair.forms() == {Format.BF16Z}
    pair.core.readers_gain(0.0)  # near the line: nothing changes
    assert pair.forms() == {Format.BF16Z}
    pair.core.readers_gain(-0.2)  # other readers have come, over a faster link
    assert pair.forms() == {Format.BF16}
    for copy in pair.pool.store.copies():
        slot = pair.pool.store.pin(copy.block, copy.format)
        assert slot is not None
        assert pair.pool.payload(slot) == truth(catalog, copy.block)
        pair.pool.store.unpin(slot)
    pair.close()


def test_copies_that_are_packed_by_the_links_profile_stay_so_near_the_line(
    catalog: Catalog, network: LoopbackNetwork
) -> None:
    pair = Pair(catalog, network, link=SLOW, told=SLOW)
    assert pair.forms() == {Format.BF16Z}
    made = {copy.generation for copy in pair.pool.store.copies()}
    pair.core.readers_gain(0.0)
    assert pair.forms() == {Format.BF16Z}
    assert {copy.generation for copy in pair.pool.store.copies()} == made  # not made anew
    pair.core.readers_gain(-0.2)
    assert pair.forms() == {Format.BF16}
    pair.close()


def test_a_trial_that_misled_is_corrected_by_later_ones(
    catalog: Catalog, network: LoopbackNetwork, monkeypatch: pytest.MonkeyPatch
) -> None:
    disturbed = True

    def tried(source: torch.Tensor, layout: BlockLayout) -> int:
        return 2_000_000_000 if disturbed else decode_ns(source, layout)

    monkeypatch.setattr("hotset.actors.wiremeter._TRY_AGAIN_S", 0.0)
    monkeypatch.setattr("hotset.actors.wiremeter.decode_ns", tried)
    pair = Pair(catalog, network, link=SLOW)
    pair.read_all()
    until(lambda: pair.tell() < -0.2, what="trials without a processor to mislead")
    assert pair.forms() == {Format.BF16}
    disturbed = False
    until(lambda: pair.tell() > 0.1, what="later trials to correct that")
    assert pair.forms() == {Format.BF16Z}
    pair.close()


@pytest.mark.parametrize(
    ("full_us", "pays"), [(8_000, True), (1_000, True), (400, False), (150, False)]
)
def test_a_packed_read_is_expected_to_save_bytes_and_not_latency(
    full_us: int, *, pays: bool
) -> None:
    packed_ns = expected_ns(
        full_us * 1e3, full_nbytes=200_000, packed_nbytes=150_000, latency_ns=100_000
    )
    assert packed_ns > 0.75 * full_us * 1e3
    gain = packing_gain(full_ns=full_us * 1e3, packed_ns=packed_ns, decode_ns=90_000)
    assert should_pack(gain, packed=False) is pays


def test_readers_count_by_the_bytes_that_they_read() -> None:
    readings = [
        Reading(source="host-0", nbytes=300, gain=0.2),
        Reading(source="host-0", nbytes=100, gain=-1.0),
    ]
    assert shared_gain(readings) == pytest.approx(-0.1)
    assert shared_gain([]) is None
