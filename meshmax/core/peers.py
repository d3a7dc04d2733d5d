"""Who is there: a bounded table of peers, their newest statuses, and whom to dial when.

Rules. Of one peer's statuses the one with the highest sequence wins, whoever brought it. A sighting (an address that
somebody named) makes a peer worth dialling; of two peers that see each other at once the one with the smaller PeerId dials
first and the other waits a moment, so that they seldom cross. Failed dials back off, and so do connections on which no
heartbeat ever came back (another libp2p program on the LAN does not speak our protocols); a new address starts afresh. A peer
is online while it is connected, and is shown as offline for a minute after it left. Statuses of peers that are not
connected serve for their addresses only. Peers of which only others speak may be made up, by the thousand: at most
GOSSIP_DIALS of them are dialled at once, after those that we have seen ourselves, the least failed ones first. When the table
is full, the peer that was longest without a sign goes, those of hearsay first and for no other reason than a better one;
never a connected one. Not here: heartbeats and streams (services.presence), what peers are good for (core.routing).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

import msgspec

from meshmax.base.ids import PeerId
from meshmax.base.model import Signed
from meshmax.base.status import MAX_ADDRESSES, PeerStatus
from meshmax.core.backoff import Random, backoff_s

SHOWN_AFTER_LEAVING_S: Final = 60.0
FORGET_AFTER_S: Final = 600.0  # a peer with no sign of life and no sighting for that long is not worth a line
YIELD_S: Final = 1.0  # the larger PeerId waits that long for the smaller one to dial
FIRST_BACKOFF_S: Final = 1.0
MAX_BACKOFF_S: Final = 60.0
GOSSIP_DIALS: Final = 4  # at once, of peers known by hearsay; a quarter of what is dialled at once
RTT_WEIGHT: Final = 0.3  # of a new round trip in the smoothed one


class Dial(msgspec.Struct, frozen=True):
    """Connect to this peer at one of these addresses; report with on_connected or on_dial_failed."""

    peer_id: PeerId
    addresses: tuple[str, ...]


class PeerEntry(msgspec.Struct):
    """What the table knows of a peer. Times are monotonic seconds; only PeerTable writes."""

    peer_id: PeerId
    last_sign_at: float
    addresses: tuple[str, ...] = ()
    signed: Signed | None = None
    status: PeerStatus | None = None
    seen: bool = False  # a rung of ours saw it, or it was connected; else we know it by hearsay
    connected: bool = False
    left_at: float | None = None
    address: str = ""
    rtt_s: float | None = None
    failures: int = 0
    dial_at: float | None = None
    dialing: bool = False
    knows: dict[PeerId, int] = msgspec.field(default_factory=dict)  # sequences of statuses that this neighbour has


class PeerTable:
    """The table. Every method is O(table) at worst; the table holds ``limit`` peers."""

    __slots__ = ("_entries", "_limit", "_own", "_random")

    def __init__(self, own: PeerId, limit: int, random: Random) -> None:
        self._own = own
        self._limit = limit
        self._random = random
        self._entries: dict[PeerId, PeerEntry] = {}

    # --- events ------------------------------------------------------------------------------------------------------

    def on_sighting(self, peer_id: PeerId, addresses: Iterable[str], now: float, hearsay: bool = False) -> None:
        """Somebody says that the peer is at these addresses; the newest named come first, at most MAX_ADDRESSES are kept.

        ``hearsay``: another peer says so.
        """
        if peer_id == self._own or not (entry := self._entry(peer_id, now, seen=not hearsay)):
            return
        fresh = tuple(dict.fromkeys(addresses))[:MAX_ADDRESSES]
        news = not set(fresh) <= set(entry.addresses)
        entry.addresses = tuple(dict.fromkeys((*fresh, *entry.addresses)))[:MAX_ADDRESSES]
        entry.last_sign_at = now
        if entry.connected or entry.dialing or not entry.addresses:
            return
        if news or entry.dial_at is None:
            entry.failures = 0
            entry.dial_at = now + (0.0 if self._own < peer_id else YIELD_S)

    def on_connected(self, peer_id: PeerId, address: str, now: float) -> None:
        """A first connection to the peer stands, whoever dialled."""
        if entry := self._entry(peer_id, now, seen=True, connected=True):
            entry.connected, entry.dialing, entry.dial_at = True, False, None
            entry.address, entry.left_at, entry.last_sign_at = address, None, now
            entry.knows.clear()

    def on_disconnected(self, peer_id: PeerId, now: float) -> None:
        """The last connection is gone; the peer is dialled again soon, since most losses are of a network, not of a peer."""
        entry = self._entries.get(peer_id)
        if entry and entry.connected:
            entry.connected, entry.left_at, entry.rtt_s = False, now, None
            entry.failures += 1
            if entry.addresses:
                entry.dial_at = now + backoff_s(entry.failures, FIRST_BACKOFF_S, MAX_BACKOFF_S, self._random)

    def on_dial_failed(self, peer_id: PeerId, now: float) -> None:
        """No address answered as that peer."""
        if (entry := self._entries.get(peer_id)) and entry.dialing:
            entry.dialing = False
            entry.failures += 1
            entry.dial_at = now + backoff_s(entry.failures, FIRST_BACKOFF_S, MAX_BACKOFF_S, self._random)

    def on_network_change(self, now: float) -> None:
        """Our own network changed: what failed before may work now, so whoever waits is dialled at once."""
        for entry in self._entries.values():
            if self._waits(entry):
                entry.failures, entry.dial_at = 0, now

    def on_round_trip(self, peer_id: PeerId, rtt_s: float, now: float) -> None:
        """A heartbeat came back after ``rtt_s``."""
        if entry := self._entries.get(peer_id):
            entry.rtt_s = rtt_s if entry.rtt_s is None else entry.rtt_s + RTT_WEIGHT * (rtt_s - entry.rtt_s)
            entry.last_sign_at, entry.failures = now, 0

    def on_status(self, status: PeerStatus, signed: Signed, bearer: PeerId, now: float) -> bool:
        """A verified status, brought by ``bearer``; True if it was news."""
        hearsay = bearer != status.peer_id
        if status.peer_id == self._own or not (entry := self._entry(status.peer_id, now, seen=not hearsay)):
            return False
        if carrier := self._entries.get(bearer):
            carrier.knows[status.peer_id] = max(status.sequence, carrier.knows.get(status.peer_id, -1))
        if entry.status and entry.status.sequence >= status.sequence:
            return False
        entry.status, entry.signed = status, signed
        if status.addresses:
            self.on_sighting(status.peer_id, status.addresses, now, hearsay)
        return True

    def is_known(self, signed: Signed, bearer: PeerId) -> bool:
        """Whether this very status, brought by ``bearer``, is the one that we have: it needs no second check."""
        entry = self._entries.get(signed.signer)
        if entry is None or entry.status is None or entry.signed != signed:
            return False
        if carrier := self._entries.get(bearer):
            carrier.knows[signed.signer] = max(entry.status.sequence, carrier.knows.get(signed.signer, -1))
        return True

    # --- what to do --------------------------------------------------------------------------------------------------

    def tick(self, now: float) -> list[Dial]:
        """The dials that are due; each peer is dialled once at a time. Forgets whom nobody has seen for long.

        Those of hearsay come last and are few; what is left over is due as soon as one of them ends: tick then.
        """
        for entry in list(self._entries.values()):
            if not (entry.connected or entry.dialing) and now - entry.last_sign_at > FORGET_AFTER_S:
                self._forget(entry.peer_id)
        waiting = [entry for entry in self._entries.values() if self._waits(entry) and (entry.dial_at or 0.0) <= now]
        told = sorted((e for e in waiting if not e.seen), key=lambda entry: (entry.failures, entry.dial_at))
        due = [entry for entry in waiting if entry.seen] + told[: self._gossip_room()]
        for entry in due:
            entry.dialing, entry.dial_at = True, None
        return [Dial(entry.peer_id, entry.addresses) for entry in due]

    def deadline(self) -> float | None:
        """When `tick` is due next; None: when something happens."""
        room = self._gossip_room()
        waiting = (entry for entry in self._entries.values() if self._waits(entry) and (entry.seen or room))
        return min((entry.dial_at for entry in waiting if entry.dial_at is not None), default=None)

    def news_for(self, neighbour: PeerId, most: int, most_bytes: int) -> list[Signed]:
        """Statuses of others that the neighbour is not known to have, its own never; counted as known from now on."""
        carrier = self._entries.get(neighbour)
        news: list[Signed] = []
        if not carrier:
            return news
        # Those it heard of longest ago first, so that a talkative few cannot crowd the others out.
        for entry in sorted(self._entries.values(), key=lambda entry: carrier.knows.get(entry.peer_id, -1)):
            if not (entry.status and entry.signed and entry.connected) or entry.peer_id == neighbour:
                continue
            size = len(entry.signed.payload)
            if carrier.knows.get(entry.peer_id, -1) >= entry.status.sequence or size > most_bytes:
                continue
            if len(news) >= most:
                break
            carrier.knows[entry.peer_id] = entry.status.sequence
            news.append(entry.signed)
            most_bytes -= size
        return news

    # --- what is ------------------------------------------------------------------------------------------------------

    def shown(self, now: float) -> list[PeerEntry]:
        """Connected peers by round trip, then those that left within SHOWN_AFTER_LEAVING_S. Read only."""
        online = [entry for entry in self._entries.values() if entry.connected]
        left = [e for e in self._entries.values() if e.left_at is not None and now - e.left_at <= SHOWN_AFTER_LEAVING_S]
        online.sort(key=lambda entry: (entry.rtt_s is None, entry.rtt_s or 0.0, entry.peer_id))
        return online + sorted(left, key=lambda entry: entry.peer_id)

    def entry(self, peer_id: PeerId) -> PeerEntry | None:
        """One peer. Read only."""
        return self._entries.get(peer_id)

    # --- inside ---------------------------------------------------------------------------------------------------------

    def _waits(self, entry: PeerEntry) -> bool:
        return not entry.connected and not entry.dialing and entry.dial_at is not None

    def _gossip_room(self) -> int:
        dialling = sum(entry.dialing and not entry.seen for entry in self._entries.values())
        return max(GOSSIP_DIALS - dialling, 0)

    def _entry(self, peer_id: PeerId, now: float, seen: bool, connected: bool = False) -> PeerEntry | None:
        entry = self._entries.get(peer_id)
        if entry is None and (len(self._entries) < self._limit or self._evict(seen) or connected):
            entry = self._entries[peer_id] = PeerEntry(peer_id, now)
        if entry is not None:
            entry.seen = entry.seen or seen
        return entry

    def _evict(self, seen: bool) -> bool:
        """Make room for a peer; one of hearsay takes it only from its like."""
        entries = self._entries.values()
        idle = [e for e in entries if not (e.connected or e.dialing) and (seen or not e.seen)]
        if not idle:
            return False
        self._forget(min(idle, key=lambda entry: (entry.seen, entry.last_sign_at)).peer_id)
        return True

    def _forget(self, peer_id: PeerId) -> None:
        del self._entries[peer_id]
        for entry in self._entries.values():
            entry.knows.pop(peer_id, None)
