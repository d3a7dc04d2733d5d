"""How each peer was reached from each network that we were in, so that the next dial begins with what works.

Rules. A network is known by a fingerprint of our interfaces' subnets and of our external addresses; until an observer has told
the latter, the subnets alone decide. One record a peer and network, MAX_NETWORKS a peer, MAX_PEERS peers; what was renewed
longest ago goes first. A record that is older than FORGET_AFTER_S is none. Not here: the file (store.paths_file), what follows
(core.dial_plan).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Final

from blake3 import blake3

from meshmax.base.ids import PeerId
from meshmax.base.status import Path
from meshmax.base.traversal import PathRecord

MAX_PEERS: Final = 1024
MAX_NETWORKS: Final = 4  # of one peer: at home, at work, on the way, and one more
FORGET_AFTER_S: Final = 30 * 86400.0
RENEW_S: Final = 3600.0  # a record that says the same as before is news after that, not sooner
MAX_AHEAD_S: Final = 86400.0  # a record further in the future was written by a wrong clock: it counts as of now
_DIGITS: Final = 16
_DIRECT: Final[tuple[Path, ...]] = ("direct", "mapped")


def fingerprint(networks: Iterable[str], external_ips: Iterable[str]) -> str:
    """Of the network that we are in: ``networks`` as CIDR. Two parts of hexadecimal digits; '-' for what is not known."""
    return ".".join(_hashed(part) for part in (networks, external_ips))


def _hashed(texts: Iterable[str]) -> str:
    joined = "\n".join(sorted(set(texts)))
    return blake3(joined.encode()).hexdigest()[:_DIGITS] if joined else "-"


class PathMemory:
    """See the module. Times are Unix seconds."""

    __slots__ = ("_peers",)

    def __init__(self, kept: Iterable[PathRecord] = (), now_s: float = 0.0) -> None:
        self._peers: dict[PeerId, dict[str, PathRecord]] = {}  # what was renewed longest ago first, on both levels
        for record in sorted(kept, key=lambda each: each.at_s):
            at_s = now_s if record.at_s > now_s + MAX_AHEAD_S else record.at_s
            if now_s - at_s <= FORGET_AFTER_S:
                self._put(PathRecord(record.peer_id, record.network, record.path, record.address, at_s))

    def on_path(self, peer_id: PeerId, network: str, path: Path, address: str, now_s: float) -> bool:
        """The peer is connected over ``path``; True if that is worth writing down. ``address``: where we dialled it directly."""
        before = self._peers.get(peer_id, {}).get(network)
        # A relay for a moment takes nothing away from an address that works.
        kept = address or (before.address if before else "")
        record = PathRecord(peer_id, network, path, kept, max(now_s, before.at_s if before else now_s))
        self._put(record)
        same = before is not None and (before.path, before.address) == (path, kept)
        return not same or before is None or now_s - before.at_s > RENEW_S

    def worked(self, peer_id: PeerId, network: str, now_s: float) -> tuple[str, ...]:
        """Addresses at which the peer was dialled directly from ``network``, newest first."""
        found = self._of(peer_id, network, now_s)
        return tuple(dict.fromkeys(record.address for record in found if record.address))

    def directless(self, peer_id: PeerId, network: str, now_s: float) -> bool:
        """Whether the peer was reached from ``network``, but never directly."""
        found = self._of(peer_id, network, now_s)
        return bool(found) and not any(record.address or record.path in _DIRECT for record in found)

    def snapshot(self) -> tuple[PathRecord, ...]:
        """All, what was renewed longest ago first, to be written down."""
        records = [record for of_peer in self._peers.values() for record in of_peer.values()]
        return tuple(sorted(records, key=lambda each: (each.at_s, each.peer_id, each.network)))

    def _of(self, peer_id: PeerId, network: str, now_s: float) -> Sequence[PathRecord]:
        inside, _, outside = network.partition(".")
        found = [
            record
            for known, record in self._peers.get(peer_id, {}).items()
            if now_s - record.at_s <= FORGET_AFTER_S
            and (known == network or (outside == "-" and known.partition(".")[0] == inside))
        ]
        return found[::-1]

    def _put(self, record: PathRecord) -> None:
        of_peer = self._peers.pop(record.peer_id, {})
        of_peer.pop(record.network, None)
        of_peer[record.network] = record
        while len(of_peer) > MAX_NETWORKS:
            del of_peer[next(iter(of_peer))]
        self._peers[record.peer_id] = of_peer
        while len(self._peers) > MAX_PEERS:
            del self._peers[next(iter(self._peers))]
