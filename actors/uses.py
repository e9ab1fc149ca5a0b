"""What became of the bytes that transfers brought: read by compute, or dropped unread.

A row for each landed block, at its first use or at its drop, whichever comes first: so `useful`
(bytes used before eviction / bytes moved) and the precision of prefetches come from measured
facts. Decides nothing; must not know policy or Ray. Called under the cache's lock.

Invariant: each landing leaves at most one row; blocks still unread at the end leave none, and
count as neither used nor wasted.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, NamedTuple

from hotset.actors.kinds import ControlKind
from hotset.policies.types import FORMAT_CODES

if TYPE_CHECKING:
    from collections.abc import Callable

    from hotset.actors.fetcher import Landing
    from hotset.policies.types import BlockId
    from hotset.transport.records import Ring


class _Fresh(NamedTuple):
    landing: Landing
    at_ns: int


class Uses:
    """Landed blocks that nothing has read yet."""

    def __init__(self, ring: Ring, *, take_id: Callable[[], int]) -> None:
        """`take_id` gives row ids that are unique in the cluster."""
        self._ring = ring
        self._take_id = take_id
        self._fresh: dict[BlockId, _Fresh] = {}

    def landed(self, landing: Landing) -> None:
        """A transfer has brought a block."""
        self._fresh[landing.block] = _Fresh(landing, time.time_ns())

    def used(self, block: BlockId) -> None:
        """Compute is about to read a block; costs one look-up when it has been read before."""
        fresh = self._fresh.pop(block, None)
        if fresh is not None:
            self._tell(fresh, used=True)

    def dropped(self, block: BlockId) -> None:
        """A block's copy is freed."""
        fresh = self._fresh.pop(block, None)
        if fresh is not None:
            self._tell(fresh, used=False)

    def _tell(self, fresh: _Fresh, *, used: bool) -> None:
        landing = fresh.landing
        self._ring.append(
            int(ControlKind.USE),
            format_code=FORMAT_CODES[landing.format],
            layer=landing.block.layer,
            index=landing.block.index,
            start_ns=fresh.at_ns,
            end_ns=time.time_ns(),
            row_id=self._take_id(),
            waits_for=landing.transfer_id,
            trace_hi=landing.trace[0],
            trace_lo=landing.trace[1],
            nbytes=landing.nbytes,
            reason=self._ring.name(landing.reason.value),
            used=int(used),
        )
