"""In which format a worker wants each block: the plan of the run, and what was taken back since.

Decides the format to fetch: the planned one where a peer or pool has it so, else full precision
(and the worker encodes it here). A block that the controller has sent back to full precision, or
whose cheap copy it refused, is wanted in full from then on. Must not know how damage is measured.

Invariants: without a plan every block is wanted in full; nothing is fetched below its plan.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from hotset.policies.guard import QUALITY
from hotset.policies.types import LOSSLESS, BlockId, Format

if TYPE_CHECKING:
    from collections.abc import Mapping

    from hotset.actors.directory import Directory


class FormatChoice:
    """Formats wanted by one worker. Changes are single dictionary writes, so no lock is needed."""

    def __init__(self, planned: Mapping[BlockId, Format], *, directory: Directory) -> None:
        """`planned` names the blocks that are not to be held at full precision."""
        self._planned = dict(planned)
        self._directory = directory

    def target(self, block: BlockId) -> Format:
        """The format to hold the block in."""
        return self._planned.get(block, Format.BF16)

    def accepts(self, block: BlockId, form: Format) -> bool:
        """Whether tokens may be computed in this format elsewhere."""
        return QUALITY[form] >= QUALITY[self.target(block)]

    def fetched(self, block: BlockId) -> Format:
        """The format to ask for: the planned one if somebody has it."""
        target = self.target(block)
        if target in LOSSLESS:
            return Format.BF16  # compressed or not: the source that is cheaper
        has = any(copy.format is target for copy in self._directory.copies(block))
        return target if has else Format.BF16

    def keep_full(self, block: BlockId) -> None:
        """Hold the block at full precision from now on."""
        self._planned.pop(block, None)

    def distrust(self) -> None:
        """Forget the plan: every block is wanted in full until the controller says otherwise."""
        self._planned = {}

    def demote(self, block: BlockId, form: Format) -> None:
        """Hold the block in this format from now on."""
        self._planned[block] = form
