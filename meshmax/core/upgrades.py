"""Better paths to peers that we reach over a relay: for whom an attempt is due, and when the next.

Rules. The side that dialled the relayed connection begins at once, the other one after YIELD_S, unless the path is better by
then; who cannot agree on that begin both, and signalling sorts it out (core.signalling). An attempt that failed is repeated
after PAUSES_S, the last of them for ever, each with jitter; at once, with pauses afresh, when our network changes or the peer
tells other addresses, though not within AGAIN_S of the attempt before. At most AT_ONCE attempts go on, one with each peer: one
that has outlived its relayed connection is waited for. Whoever is connected over a path that is no relay's needs none. Not
here: the attempt itself (services.signalling), the relayed connection.
"""

from __future__ import annotations

from typing import Final

from meshmax.base.ids import PeerId
from meshmax.base.status import Path
from meshmax.core.backoff import Random

YIELD_S: Final = 5.0  # as long as a whole attempt of the other side takes
PAUSES_S: Final = (5.0, 15.0, 60.0, 180.0, 420.0, 900.0)  # before the second attempt, the third ...
AGAIN_S: Final = 1.0  # between two attempts at one peer, whatever happens
JITTER: Final = 0.25  # of a pause, either way, so that peers which failed together do not try together
AT_ONCE: Final = 8  # each takes a port, a few hundred packets and, for UDP, some hundred milliseconds of processor time


class _Relayed:
    __slots__ = ("again", "due_at", "failures", "tried_at", "under_way")

    def __init__(self, due_at: float) -> None:
        self.due_at, self.failures = due_at, 0
        self.tried_at = float("-inf")
        self.under_way = self.again = False  # again: something happened during the attempt


class Upgrades:
    """See the module. Times are monotonic seconds. As many entries as there are relayed connections."""

    __slots__ = ("_former", "_peers", "_random")

    def __init__(self, random: Random) -> None:
        self._random = random
        self._peers: dict[PeerId, _Relayed] = {}
        # Attempts at these are under way from when they were reached over a relay before.
        self._former: set[PeerId] = set()

    # --- events ------------------------------------------------------------------------------------------------------

    def on_path(self, peer_id: PeerId, path: Path, dialled: bool, now: float) -> None:
        """The best path to the peer is ``path`` now. ``dialled``: by us."""
        if path != "relay":
            self.on_gone(peer_id)
        elif peer_id not in self._peers:
            peer = self._peers[peer_id] = _Relayed(now if dialled else now + YIELD_S)
            if peer_id in self._former:
                self._former.discard(peer_id)
                peer.under_way = peer.again = True

    def on_gone(self, peer_id: PeerId) -> None:
        """The peer is not connected any more, or not over a relay."""
        peer = self._peers.pop(peer_id, None)
        if peer is not None and peer.under_way:
            self._former.add(peer_id)

    def on_tried(self, peer_id: PeerId, now: float) -> None:
        """The attempt that `tick` named is over. Of one that worked `on_path` hears, too."""
        self._former.discard(peer_id)
        if (peer := self._peers.get(peer_id)) is None:
            return
        again, peer.under_way, peer.again, peer.tried_at = peer.again, False, False, now
        if again:
            peer.failures, peer.due_at = 0, now + AGAIN_S
            return
        pause_s = PAUSES_S[min(peer.failures, len(PAUSES_S) - 1)]
        peer.failures += 1
        peer.due_at = now + pause_s * (1.0 + JITTER * (2.0 * self._random.random() - 1.0))

    def on_addresses(self, peer_id: PeerId, now: float) -> None:
        """The peer tells other addresses than before."""
        if (peer := self._peers.get(peer_id)) is not None:
            self._hasten(peer, now)

    def on_network_change(self, now: float) -> None:
        """Our own network is another."""
        for peer in self._peers.values():
            self._hasten(peer, now)

    def _hasten(self, peer: _Relayed, now: float) -> None:
        peer.failures, peer.again = 0, peer.under_way
        peer.due_at = max(now, peer.tried_at + AGAIN_S)

    # --- what to do --------------------------------------------------------------------------------------------------

    def tick(self, now: float) -> list[PeerId]:
        """Attempts to be begun now, the longest due first; each is under way until `on_tried`."""
        free = AT_ONCE - self._under_way
        due = sorted(
            (peer.due_at, peer_id) for peer_id, peer in self._peers.items() if not peer.under_way and peer.due_at <= now
        )
        chosen = [peer_id for _, peer_id in due[: max(free, 0)]]
        for peer_id in chosen:
            self._peers[peer_id].under_way = True
        return chosen

    def deadline(self) -> float | None:
        """When `tick` is due next; None: when something happens."""
        if self._under_way >= AT_ONCE:
            return None
        return min((peer.due_at for peer in self._peers.values() if not peer.under_way), default=None)

    @property
    def _under_way(self) -> int:
        return len(self._former) + sum(peer.under_way for peer in self._peers.values())
