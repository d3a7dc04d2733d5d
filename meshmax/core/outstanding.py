"""Our own requests at each peer, against what its newest status can already tell of them.

A status is seconds old: requests that we sent after it was issued are added to its load, and those that it counted but
that have ended since are taken off. Bounded by the requests under way and MAX_ENDED. Not here: other nodes' requests.
"""

from __future__ import annotations

from typing import Final

from meshmax.base.ids import PeerId
from meshmax.base.status import Load

MAX_ENDED: Final = 1024  # peers whose status still counts a request of ours that has ended; the oldest is forgotten


class Outstanding:
    """The requests of one node. A peer's status is known by its sequence, which grows."""

    __slots__ = ("_ended", "_sent")

    def __init__(self) -> None:
        self._sent: dict[PeerId, list[int]] = {}  # sequence of the peer's status when each request now there was sent
        self._ended: dict[PeerId, tuple[int, int]] = {}  # (sequence, how many it counts that have ended since)

    def on_sent(self, peer: PeerId, sequence: int) -> None:
        """A request goes to ``peer``, whose newest status is ``sequence``."""
        self._sent.setdefault(peer, []).append(sequence)

    def on_ended(self, peer: PeerId, sent_at: int, sequence: int) -> None:
        """A request that was sent when the status was ``sent_at`` has ended; ``sequence`` is the newest now."""
        sent = self._sent.get(peer, [])
        if sent_at in sent:
            sent.remove(sent_at)
        if not sent:
            self._sent.pop(peer, None)
        if sent_at < sequence:
            at, count = self._ended.pop(peer, (sequence, 0))
            self._ended[peer] = (sequence, count + 1 if at == sequence else 1)
            if len(self._ended) > MAX_ENDED:
                del self._ended[next(iter(self._ended))]

    def count(self, peer: PeerId) -> int:
        """Our requests at ``peer`` now."""
        return len(self._sent.get(peer, ()))

    def load(self, peer: PeerId, sequence: int, stated: Load) -> Load:
        """The load of ``peer`` as of now, from the one ``stated`` in its status ``sequence``."""
        unseen, gone = self._since(peer, sequence)
        if not (unseen or gone):
            return stated
        total = max(0, stated.running + stated.queued - gone) + unseen
        running = min(total, max(stated.capacity, 1))
        return Load(running, total - running, stated.capacity, stated.limit, stated.waits)

    def since(self, peer: PeerId, sequence: int) -> int:
        """How many more requests of ours are at ``peer`` than its status ``sequence`` could count; negative: fewer."""
        unseen, gone = self._since(peer, sequence)
        return unseen - gone

    def _since(self, peer: PeerId, sequence: int) -> tuple[int, int]:
        sent = self._sent.get(peer)
        unseen = sum(at >= sequence for at in sent) if sent else 0
        at, ended = self._ended.get(peer, (sequence, 0))
        return unseen, ended if at == sequence else 0
