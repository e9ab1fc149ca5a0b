"""A ring that is off takes no row; on again, it goes on where it was."""

from __future__ import annotations

import numpy as np

from hotset.actors.ring import SwitchedRing
from hotset.transport.records import ROW, Kind


def test_rows_are_written_only_while_it_is_on() -> None:
    ring = SwitchedRing(capacity=8)
    for row_id, on in ((1, True), (2, False), (3, False), (4, True)):
        ring.switch(on=on)
        ring.append(Kind.STEP, start_ns=1, end_ns=2, row_id=row_id)
    assert np.frombuffer(ring.drain(), ROW)["row_id"].tolist() == [1, 4]
    assert (ring.written, ring.dropped) == (2, 0)
