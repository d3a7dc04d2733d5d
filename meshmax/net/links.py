"""Which of several connections of one peer is used: that with the best path and, of these, the newest.

Rules: a direct path before one through a port mapping, these before punched ones, TCP before UDP, a relay last. Of the same path
the newest counts, since an older one may belong to a machine that lost power. What changes is told as one word: a peer's first
link connects it, its last one disconnects it, another best one moves it. Shared by the real swarm and the one in memory. Not
here: streams (they stay on the link on which they began), how the others end (net.draining), who is a member (net.admission).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Final, Generic, Literal, TypeVar

from meshmax.base.ids import PeerId
from meshmax.base.status import Path
from meshmax.ports import ConnectionView

Change = Literal["connected", "moved", "disconnected"]

_ORDER: Final[tuple[Path, ...]] = ("relay", "punched-udp", "punched-tcp", "mapped", "direct", "self")
_WORTH: Final[Mapping[Path, int]] = {path: worth for worth, path in enumerate(_ORDER)}

L = TypeVar("L")


def is_worse(path: Path, than: Path) -> bool:
    """Whether ``than`` is the better path. Both ends of a connection know the same path, so they agree."""
    return _WORTH[path] < _WORTH[than]


class LinkTable(Generic[L]):
    """The links of members. ``view_of`` says what a link is; it does not change."""

    def __init__(self, view_of: Callable[[L], ConnectionView]) -> None:
        self._view_of = view_of
        self._links: dict[PeerId, list[L]] = {}  # the best last, of the same path the newest last

    def __contains__(self, peer_id: PeerId) -> bool:
        return peer_id in self._links

    def __len__(self) -> int:
        return len(self._links)

    def add(self, link: L) -> Change | None:
        """A link is a member's; what that changes for its peer."""
        view = self._view_of(link)
        links = self._links.setdefault(view.peer_id, [])
        better = sum(is_worse(view.path, than=self._view_of(other).path) for other in links)
        links.insert(len(links) - better, link)
        if len(links) == 1:
            return "connected"
        return None if better else "moved"

    def remove(self, link: L) -> Change | None:
        """A link has ended, or was never a member's; what that changes for its peer."""
        peer_id = self._view_of(link).peer_id
        links = self._links.get(peer_id, [])
        if link not in links:
            return None
        was_best = links[-1] is link
        links.remove(link)
        if not links:
            del self._links[peer_id]
            return "disconnected"
        return "moved" if was_best else None

    def best(self, peer_id: PeerId) -> L | None:
        """The link that the peer's new streams go over."""
        links = self._links.get(peer_id)
        return links[-1] if links else None

    def of(self, peer_id: PeerId) -> tuple[L, ...]:
        """The peer's links, the best one last."""
        return tuple(self._links.get(peer_id, ()))

    def is_spare(self, link: L) -> bool:
        """Whether the peer has a better one."""
        links = self._links.get(self._view_of(link).peer_id, [])
        return link in links and links[-1] is not link

    def up_to(self, last: ConnectionView) -> list[L]:
        """The link of that view and older ones over the same kind of path; none if it is gone.

        They are likely to have failed with it; another kind of path may go on where one fails.
        """
        views = [self._view_of(link) for link in self._links.get(last.peer_id, ())]
        if last not in views:
            return []
        links = self._links[last.peer_id][: views.index(last) + 1]
        return [link for link in links if self._view_of(link).path == last.path]

    def views(self) -> dict[PeerId, ConnectionView]:
        """The best connection of each peer."""
        return {peer_id: self._view_of(links[-1]) for peer_id, links in self._links.items()}
