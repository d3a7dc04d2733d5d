"""Peers that we were connected with, to be dialled after a restart: which are kept, which are named.

Rules. A peer is kept with the addresses at which a dial of ours reached it first, then those that it tells of itself, and with
the mesh in which we met; it is named in that mesh alone. Forgotten is who was not seen for FORGET_AFTER_S, and beyond LIMIT
who was seen longest ago. Last seen is renewed while the peer is connected. A clock that runs back makes nobody older.
Not here: the file (store.peers_file), when it is written (services.cached_peers).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Final

from meshmax.base.discovery import KnownPeer
from meshmax.base.ids import PeerId

LIMIT: Final = 256  # peers, of all meshes; as many as a table of peers holds
MAX_KNOWN_ADDRESSES: Final = 8  # of a peer; those that worked come first
FORGET_AFTER_S: Final = 30 * 86400.0  # a machine that was away for longer has other neighbours, or tells them of itself
MAX_AHEAD_S: Final = 86400.0  # last seen further in the future than this was written by a wrong clock: it counts as now


class KnownPeers:
    """See the module. Times are Unix seconds."""

    __slots__ = ("_peers",)

    def __init__(self, kept: Iterable[KnownPeer] = (), now_s: float = 0.0) -> None:
        self._peers: dict[tuple[str, PeerId], KnownPeer] = {}
        for peer in kept:
            seen_s = now_s if peer.last_seen_s > now_s + MAX_AHEAD_S else peer.last_seen_s
            self._put(peer.mesh, peer.peer_id, peer.addresses, seen_s)
        self._forget(now_s)

    def on_seen(self, mesh: str, peer_id: PeerId, worked: str, told: Sequence[str], now_s: float) -> bool:
        """The peer is connected; True if there is something new to write down.

        ``worked``: the multiaddr at which we reached it, '' if it came to us; ``told``: those that it tells of itself.
        """
        before = self._peers.get((mesh, peer_id))
        known = before.addresses if before else ()
        fresh = (worked, *told) if worked else tuple(told)
        # Old addresses stay behind the fresh ones: a peer that moves between two networks is found in both.
        addresses = tuple(dict.fromkeys((*fresh, *known)))[:MAX_KNOWN_ADDRESSES]
        if not addresses:
            return False
        self._put(mesh, peer_id, addresses, max(now_s, before.last_seen_s if before else now_s))
        self._forget(now_s)
        return before is None or before.addresses != addresses

    def to_dial(self, mesh: str) -> tuple[KnownPeer, ...]:
        """Whom to look for in this mesh, the one seen last first."""
        found = [peer for (of_mesh, _), peer in self._peers.items() if of_mesh == mesh]
        return tuple(sorted(found, key=lambda peer: -peer.last_seen_s))

    def snapshot(self) -> tuple[KnownPeer, ...]:
        """Everybody, to be written down."""
        return tuple(sorted(self._peers.values(), key=lambda peer: -peer.last_seen_s))

    def _put(self, mesh: str, peer_id: PeerId, addresses: Sequence[str], seen_s: float) -> None:
        self._peers[mesh, peer_id] = KnownPeer(peer_id, tuple(addresses)[:MAX_KNOWN_ADDRESSES], seen_s, mesh)

    def _forget(self, now_s: float) -> None:
        for key, peer in list(self._peers.items()):
            if now_s - peer.last_seen_s > FORGET_AFTER_S:
                del self._peers[key]
        if len(self._peers) > LIMIT:
            oldest = sorted(self._peers, key=lambda key: self._peers[key].last_seen_s)
            for key in oldest[: len(self._peers) - LIMIT]:
                del self._peers[key]
