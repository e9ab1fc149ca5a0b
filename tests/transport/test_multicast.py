"""A hot block to eight processes: the source sends it once, whatever happens on the way."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from hotset.errors import ConfigError
from hotset.transport.multicast import plan
from tests.transport.bench_multicast import BLOCK, Group

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.slow  # starts processes


def test_a_chain_reads_each_from_the_one_before() -> None:
    hops = plan("s", ["a", "b", "c"])
    assert [(hop.reader, hop.source, hop.depth) for hop in hops] == [
        ("a", "s", 1), ("b", "a", 2), ("c", "b", 3),
    ]  # fmt: skip
    assert hops[2].fallbacks == ("a", "s")


@pytest.mark.parametrize("fanout", [2, 3])
def test_a_tree_loads_no_store_more_than_its_fanout(fanout: int) -> None:
    names = [f"r{i}" for i in range(50)]
    hops = plan("s", names, fanout=fanout)
    sends = {name: sum(hop.source == name for hop in hops) for name in ("s", *names)}
    assert sends["s"] == 1
    assert max(sends.values()) == fanout
    assert [hop.reader for hop in hops] == names
    assert max(hop.depth for hop in hops) <= (8 if fanout == 2 else 6)
    for hop in hops:
        opened = {"s", *names[: names.index(hop.reader)]}
        assert {hop.source, *hop.fallbacks} <= opened


def test_bad_plans_are_refused() -> None:
    with pytest.raises(ConfigError, match="twice"):
        plan("s", ["a", "a"])
    with pytest.raises(ConfigError, match="twice"):
        plan("s", ["s"])
    with pytest.raises(ConfigError, match="fanout"):
        plan("s", ["a"], fanout=0)


@pytest.fixture(
    scope="module",
    params=["shm", "tcp", pytest.param("nixl", marks=pytest.mark.nixl)],
)
def group(request: pytest.FixtureRequest) -> Iterator[Group]:
    made = Group(backend=request.param)
    yield made
    made.close()


@pytest.mark.parametrize("fanout", [1, 2])
def test_the_source_sends_a_block_to_eight_processes_once(group: Group, fanout: int) -> None:
    result = group.spread(fanout=fanout)  # checks every block's bytes
    assert len(group.readers) == 8
    assert result.sent["source"] <= 1.5 * BLOCK
    assert sum(result.sent.values()) == 8 * BLOCK
    assert max(result.sent.values()) <= fanout * BLOCK


def test_a_chain_goes_on_without_a_store_that_dies(group: Group) -> None:
    """The third of the chain dies while it fills; those after it fall back to the source."""
    victim = group.readers["reader-2"]
    infos, block = group.infos, group.block
    changes = {"follow": True, "generation": None, "incarnation": None}
    offset = victim.call(
        "pull", ([infos["source"]], block, changes | {"stream": True, "checksum": 1})
    )  # never complete: its checksum is wrong, so its slot goes back
    last = group.readers["reader-7"]
    last.call(
        "pull",
        (
            [infos["reader-2"], infos["source"]],
            block,
            changes | {"remote_offset": offset, "others": (block.replica("source"),)},
        ),
    )
    victim.kill()
    [(status, checksum, source, attempt, error)] = last.call("ended")
    assert (status, checksum, source) == ("done", block.checksum, "source"), error
    assert attempt == 1
    last.call("drop")
    del group.readers["reader-2"]
