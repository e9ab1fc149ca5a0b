"""A store's view of remote copies: deltas, what reads have taught, order of sources."""

from __future__ import annotations

from hotset.actors.directory import Directory
from hotset.policies.directory import CopyKey
from hotset.policies.types import STORAGE, BlockId, Copy, Format, Tier

BLOCK = BlockId(1, 2)
NBYTES = 10_000_000


def copy(
    store: str, *, generation: int = 1, incarnation: int = 1, fmt: Format = Format.BF16
) -> Copy:
    return Copy(
        block=BLOCK, format=fmt, store=store, offset=0, nbytes=NBYTES, generation=generation,
        checksum=1, incarnation=incarnation,
    )  # fmt: skip


def view(*copies: Copy) -> Directory:
    directory = Directory(owner="me")
    directory.replace(copies, epoch=3, version=7)
    return directory


def stores(directory: Directory, **more: frozenset[str]) -> list[str]:
    sources = directory.sources(BLOCK, fmt=Format.BF16, nbytes=NBYTES, **more)
    return [source.store for source in sources]


def test_own_copies_are_not_listed() -> None:
    directory = view(copy("me"), copy("a"))
    directory.change(added=[copy("me", generation=2)], removed=[], epoch=4, version=8)
    assert [one.store for one in directory.copies(BLOCK)] == ["a"]
    assert (directory.epoch, directory.version) == (4, 8)


def test_a_change_replaces_the_copy_of_the_same_store_and_format() -> None:
    directory = view(copy("a"), copy("a", fmt=Format.INT8), copy("b"))
    removed = [CopyKey(BLOCK, "b", Format.BF16)]
    directory.change(added=[copy("a", generation=5)], removed=removed, epoch=3, version=9)
    assert {(c.store, c.format, c.generation) for c in directory.copies(BLOCK)} == {
        ("a", Format.BF16, 5),
        ("a", Format.INT8, 1),
    }


def test_epochs_only_grow() -> None:
    directory = view()
    directory.replace([], epoch=1, version=1)
    assert directory.epoch == 3


def test_what_a_read_missed_is_not_tried_again_until_published_anew() -> None:
    directory = view(copy("a"), copy("b"))
    directory.forget(copy("a"))
    assert "a" not in stores(directory)
    directory.change(added=[copy("a", generation=2)], removed=[], epoch=4, version=8)
    assert "a" in stores(directory)
    directory.forget(copy("a"))  # of the older generation: says nothing of the newer
    assert "a" in stores(directory)


def test_a_dead_incarnation_takes_none_of_its_successors_copies() -> None:
    directory = view(copy("a", incarnation=4), copy("b"))
    directory.forget_store("a", incarnation=3)
    assert "a" in stores(directory)
    directory.forget_store("a", incarnation=4)
    assert stores(directory) == ["b", STORAGE]


def test_sources_are_ordered_by_what_links_have_cost() -> None:
    directory = view(copy("a"), copy("b"), copy("c", fmt=Format.INT8))
    for _ in range(20):
        directory.cost("a").observe(nbytes=NBYTES, elapsed_ns=50_000_000)
        directory.cost("b").observe(nbytes=NBYTES, elapsed_ns=2_000_000)
    assert stores(directory) == ["b", STORAGE, "a"]
    assert stores(directory, allow=frozenset({"a"})) == [STORAGE, "a"]
    directory.set_tiers({"b": Tier.HOST})
    assert directory.tier("b") is Tier.HOST
    assert directory.tier(STORAGE) is None


def test_a_dear_source_is_read_again_for_a_sixteenth_of_the_time() -> None:
    directory = view(copy("a"), copy("b"))
    for _ in range(20):
        directory.cost("a").observe(NBYTES, elapsed_ns=1_000_000)
        directory.cost("b").observe(NBYTES, elapsed_ns=4_000_000)
    first = [stores(directory)[0] for _ in range(64 * 4)]
    price = {name: directory.cost(name).estimate_ns(NBYTES) for name in ("a", "b")}
    assert 1 <= first.count("b") <= len(first) * price["a"] / price["b"] / 16 + 1
    for _ in range(4000):  # whatever made it slow is over: its price follows, and it wins
        if stores(directory)[0] == "b":
            directory.cost("b").observe(NBYTES, elapsed_ns=500_000)
    assert stores(directory)[0] == "b"


def test_prices_are_asked_for_without_trying_anything() -> None:
    directory = view(copy("a"), copy("b"))
    for _ in range(20):
        directory.cost("a").observe(NBYTES, elapsed_ns=1_000_000)
        directory.cost("b").observe(NBYTES, elapsed_ns=4_000_000)
    for _ in range(500):
        asked = directory.sources(BLOCK, fmt=Format.BF16, nbytes=NBYTES, look_again=False)
        assert asked[0].store == "a"
