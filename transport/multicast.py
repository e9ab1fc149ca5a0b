"""Who reads a hot block from whom, so that its source sends it once.

Each reader follows the slot of the one before it while that still fills (`ReadItem.follow` and
`stream`), so all of them end soon after the first. A chain is best for large blocks; below the
first reader a tree has fewer hops, and each store in it sends `fanout` times. It moves nothing; it
must not know engines.

In use: open the readers in order (each reads with `stream=True`, which makes its slot known), and
tell the next one where that slot is. A reader that loses the store before it goes on with
`fallbacks`, keeping what has come.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from hotset.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Sequence


@dataclass(frozen=True, slots=True, kw_only=True)
class Hop:
    """One reader: what it reads from, what else has the block, how many hops from the source."""

    reader: str
    source: str
    fallbacks: tuple[str, ...]
    depth: int


def plan(source: str, readers: Sequence[str], *, fanout: int = 1) -> tuple[Hop, ...]:
    """Hops in the order in which the readers are opened; the source sends the block once.

    `fanout` 1 is a chain. The time is about (block + depth x piece) / bandwidth, where a store that
    sends to several shares its bandwidth among them. Raises ConfigError for a reader that is named
    twice or is the source.
    """
    if fanout < 1:
        raise ConfigError(f"a fanout of {fanout}", remedy="give 1 for a chain, or more for a tree")
    if len({source, *readers}) != len(readers) + 1:
        raise ConfigError(
            f"{source!r} and {list(readers)} name a store twice", remedy="name each store once"
        )
    hops: list[Hop] = []
    for index, reader in enumerate(readers):
        parent = hops[(index - 1) // fanout] if index else None
        if parent is None:
            hops.append(Hop(reader=reader, source=source, fallbacks=(), depth=1))
            continue
        hops.append(
            Hop(
                reader=reader,
                source=parent.reader,
                fallbacks=(parent.source, *parent.fallbacks),
                depth=parent.depth + 1,
            )
        )
    return tuple(hops)
