"""A ring of rows that can be switched off while its owners go on appending.

For measuring what tracing costs: everything else stays as it is, in the same process and run.
Decides nothing. Invariant: while it is off, nothing is written and nothing counts as dropped.
"""

from __future__ import annotations

from hotset.transport.records import Ring


class SwitchedRing(Ring):
    """A ring that is on until it is told otherwise."""

    def switch(self, *, on: bool) -> None:
        """Append rows, or let them go; costs nothing while it is on."""
        if on:
            self.__dict__.pop("append", None)
            self.__dict__.pop("extend", None)
        else:
            self.append = _nothing  # type: ignore[method-assign,assignment] # only this ring's, and for a while
            self.extend = _nothing  # type: ignore[method-assign,assignment]


def _nothing(_what: object, **_columns: int) -> None:
    """Rows that are not written."""
