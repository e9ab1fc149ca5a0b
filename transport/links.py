"""The links of one engine: which sources there are, at what pace, and whose turn it is.

Pure bookkeeping of the engine's owner thread; it must not know backends. Invariant: a link that is
neither connected nor in use is forgotten.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from hotset.transport.link import Link
from hotset.transport.pacepage import PacePage
from hotset.transport.pacing import Pacer

if TYPE_CHECKING:
    from hotset.transport.base import PeerInfo

STORAGE: Final = "storage"
"""Name of the source of file reads in outcomes and rows."""


class Links:
    """Links by the name of their source."""

    def __init__(self, *, own_pacer: Pacer | None, time_scale: float) -> None:
        """`own_pacer` emulates this store's own end of every link."""
        self._own_pacers = () if own_pacer is None else (own_pacer,)
        self._time_scale = time_scale
        self._links: dict[str, Link] = {}
        self._turns = 0
        self.free_ns = 0
        """When an emulated link lets the next post go; 0 when none is waited for."""

    def add_files(self, pacer: Pacer | None) -> None:
        """There is a reader of files, at the pace of `pacer`."""
        pacers = () if pacer is None else (pacer,)
        self._links[STORAGE] = Link(STORAGE, pacers=(*pacers, *self._own_pacers), is_files=True)

    def get(self, name: str) -> Link:
        """The link to a source; that of a stranger is not connected."""
        link = self._links.get(name)
        if link is None:
            link = self._links[name] = Link(name)
        return link

    def find(self, name: str) -> Link | None:
        """The link to a source that is known."""
        return self._links.get(name)

    def connect(self, peer: PeerInfo) -> Link:
        """A peer is readable now, at the pace of its profile when that is emulated."""
        link = self.get(peer.name)
        if link.peer == peer:
            return link
        link.peer = peer
        if peer.link is None or not peer.link.emulated:
            link.set_pace(self._own_pacers, profile_rate=0)
            return link
        page = PacePage.open(peer.pace, peer.name)
        pacer = Pacer(peer.link, time_scale=self._time_scale, page=page)
        rate = int(peer.link.bandwidth_bytes_per_s / self._time_scale)
        link.set_pace((pacer, *self._own_pacers), profile_rate=rate)
        return link

    def disconnect(self, name: str) -> None:
        """A peer is not readable any more."""
        link = self._links.get(name)
        if link is not None:
            link.peer = None
            self.forget_if_idle(link)

    def forget_if_idle(self, link: Link) -> None:
        """Drop a link that is not connected and that nobody uses."""
        if link.peer is None and link.idle and not link.is_files:
            self._links.pop(link.name, None)

    def has_queued(self) -> bool:
        """Whether anything waits to be posted."""
        for link in self._links.values():  # noqa: SIM110 - each turn asks; a generator costs more
            if link.head() is not None:
                return True
        return False

    def next(self, now_ns: int) -> Link | None:
        """The link with the most urgent slot of those that may post now.

        So a demand read waits for at most one piece of a prefetch that came before it.
        """
        best: Link | None = None
        best_order: tuple[int, ...] = ()
        self.free_ns = 0
        for link in self._links.values():
            head = link.head()
            if head is None or not link.has_room(head[0]):
                continue
            if link.pacers and (wait := link.wait_ns(now_ns, imminent=head[0] == 0)):
                self.free_ns = min(self.free_ns or now_ns + wait, now_ns + wait)
                continue
            order = (*head[:4], link.last_post)  # stripes take turns
            if best is None or order < best_order:
                best, best_order = link, order
        if best is not None:
            self._turns += 1
            best.last_post = self._turns
        return best
