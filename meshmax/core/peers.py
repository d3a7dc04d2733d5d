"""Who is there: a bounded table of peers, their newest statuses, and whom to dial when.

Rules. Of one peer's statuses the one with the highest sequence wins, whoever brought it; of one that was lost and is back,
what a restart ends (its load, what is in its memory) counts again once it speaks as the instance that it was. A sighting (an
address that somebody named) makes a peer worth dialling; of two peers that see each other at once the one with the smaller
PeerId dials first and the other waits a moment, so that they seldom cross. Enough neighbours are enough (core.neighbours):
then only who was asked for by a person, or is tried as a better one, is dialled. Failed dials back off, and so do
connections on which no heartbeat ever came back (another libp2p program on the LAN does not speak our protocols); a new
address starts afresh. Of the peers that were lost last, CANARIES are dialled every few seconds for as long as they are gone;
when one of them, or anybody lost, is met again, the network is back and all others are dialled again within SPREAD_S, each
at a moment of its own. Who says that we are not of its mesh is dialled again rarely, and kept aside (`refused`).

A peer is online while it is connected; after that it is shown as offline until GONE_AFTER_S after its last sign of life, and
not at all if it said farewell or parted. What others tell never makes a peer online: only its own connection does. Peers of which
only others speak may be made up, by the thousand: at most GOSSIP_DIALS of them are dialled at once, after those that we have seen
ourselves, the least failed ones first, and they are forgotten as soon as no neighbour vouches for them. Between the two stand
those that a list names (`named`: peers of former days, a rendezvous, the DHT): they may be gone, or made up as well. Of the
dials at once RESERVED are kept for each kind, those that answered us once being one, so that a flood of one kind holds up no
other. When the table is full, the peer longest without a sign goes, those of hearsay first and for no other reason than a
better one, then the named ones, those that answered us once last; never a connected one. So the table holds ``limit``
peers, or as many as are connected.
Not here: heartbeats and streams (services.heartbeat), who tells whom what (core.gossip), what peers are good for (core.routing).
"""

from __future__ import annotations

from collections.abc import Iterable, ValuesView
from typing import Final

from meshmax.base.ids import PeerId
from meshmax.base.model import Signed
from meshmax.base.status import MAX_ADDRESSES, Path, PeerStatus, Vitals, cold, vitals_of, with_vitals
from meshmax.core.backoff import Random, backoff_s
from meshmax.core.neighbours import MAX_NEIGHBOURS, NEIGHBOURS, TRIALS, candidate, surplus
from meshmax.core.peer_entry import MAX_WHY, Dial, PeerEntry, Refusal, changed_of
from meshmax.wire.status import key_of

GONE_AFTER_S: Final = (
    12.0  # after the last sign of life; with a heartbeat every 2 s a dead peer is in no list after 15 s
)
LOST_S: Final = 3600.0  # what a peer had that was lost is still told for so long: people come back to a pull that waits
FORGET_AFTER_S: Final = 600.0  # a peer with no sign of life and no sighting for that long is not worth a line
FORGET_PROVEN_S: Final = 86400.0  # the same of one that was a neighbour, which may come back after a day, or refused us
UNVOUCHED_S: Final = 5.0  # the same of one of whom only others spoke, and nobody does any more
FORGET_LEFT_S: Final = 120.0  # after a farewell; as long as anybody may still bring an earlier status
YIELD_S: Final = 1.0  # the larger PeerId waits that long for the smaller one to dial
FIRST_BACKOFF_S: Final = 1.0
MAX_BACKOFF_S: Final = 60.0
CANARIES: Final = (
    8  # lost peers that are dialled at a quick pace: enough to notice that a network is back, cheap for ever
)
CANARY_BACKOFF_S: Final = 4.0  # with a dial's own 5 s under the 10 in which a partition heals
SPREAD_S: Final = (
    1.5  # over which all lost peers are dialled when the network is back: a thousand peers do the same then
)
AGAIN_S: Final = 3.0  # the network comes back at most that often
REFUSED_S: Final = 300.0  # before who refused us is dialled again at the same address
PARTED_S: Final = 120.0  # before who has too many neighbours is dialled again
DIALS_AT_ONCE: Final = 22  # 16 of one kind, and what is reserved for the three others
GOSSIP_DIALS: Final = 4  # at once, of peers known by hearsay
RESERVED: Final = 2  # dials kept free for each other kind: one that leads nowhere takes five seconds
MAX_TELLERS: Final = 3  # remembered of one peer; when these lose it, the others tell of it again if they still have it
RTT_WEIGHT: Final = 0.3  # of a new round trip in the smoothed one
_HEARSAY: Final = 3  # the last of the kinds of `_kind`
_KINDS: Final = _HEARSAY + 1

__all__ = ["Dial", "PeerEntry", "PeerTable", "Refusal"]


class PeerTable:
    """The table. Every method is O(table) at worst; the table holds ``limit`` peers."""

    __slots__ = ("_back_at", "_by_key", "_entries", "_limit", "_own", "_random")

    def __init__(self, own: PeerId, limit: int, random: Random) -> None:
        self._own = own
        self._limit = limit
        self._random = random
        self._entries: dict[PeerId, PeerEntry] = {}
        self._by_key: dict[bytes, PeerEntry] = {}
        self._back_at = float("-inf")

    # --- events ------------------------------------------------------------------------------------------------------

    def on_sighting(
        self,
        peer_id: PeerId,
        addresses: Iterable[str],
        now: float,
        hearsay: bool = False,
        asked: bool = False,
        named: bool = False,
    ) -> None:
        """Somebody says that the peer is at these addresses; the newest named come first, at most MAX_ADDRESSES are kept.

        ``hearsay``: another peer says so. ``asked``: a person gave the address. ``named``: a list of peers does, which is not
        its own word of this moment; unlike hearsay it counts also for one that said farewell, and may be back.
        """
        if peer_id == self._own or not (entry := self._entry(peer_id, now, not (hearsay or named), named)):
            return
        fresh = tuple(dict.fromkeys(addresses))[:MAX_ADDRESSES]
        news = not set(fresh) <= set(entry.addresses)
        # What the peer itself signed is not pushed out by what anybody may say of it.
        signed = entry.status.addresses if entry.status else ()
        said = (*fresh[: MAX_ADDRESSES // 2], *signed, *fresh, *entry.addresses)
        entry.addresses = tuple(dict.fromkeys(said))[:MAX_ADDRESSES]
        entry.asked = entry.asked or asked
        if entry.leaving and hearsay:
            return
        entry.last_sign_at = now
        entry.news = entry.dialing and (news or entry.news)
        if entry.connected or not entry.addresses:
            return
        seen_again = (
            entry.proven and not hearsay and not (entry.refusal or entry.parted)
        )  # a rung of ours sees one of us
        if entry.dialing:
            entry.again = entry.again or seen_again
        elif news or entry.dial_at is None:
            entry.failures, entry.refusal, entry.parted = 0, None, False
            dial_at = now + (0.0 if self._own < peer_id else YIELD_S)
            entry.dial_at = dial_at if entry.dial_at is None else min(entry.dial_at, dial_at)
        elif seen_again:
            self._hasten(entry, now)

    def on_connected(
        self, peer_id: PeerId, address: str, now: float, chosen: bool = False, path: Path = "direct"
    ) -> None:
        """A first connection to the peer stands. ``chosen``: we dialled."""
        if entry := self._entry(peer_id, now, seen=True, connected=True):
            lost = entry.proven and not entry.connected and entry.failures > 0
            if not entry.connected:
                if entry.alive_at is not None:
                    _chill(entry)
                entry.connected_at, entry.leaving, entry.chosen = now, False, chosen
            entry.connected, entry.dialing, entry.dial_at, entry.trial = True, False, None, False
            entry.address, entry.path, entry.dialled = address, path, chosen
            entry.last_sign_at = entry.alive_at = now
            entry.refusal, entry.parted = None, False
            entry.why, entry.tried = "", ()
            if lost:
                self.on_network_back(now)

    def on_moved(self, peer_id: PeerId, address: str, path: Path, dialled: bool) -> None:
        """New streams to the peer go over another connection: what was measured before says nothing of it."""
        entry = self._entries.get(peer_id)
        if entry and entry.connected:
            entry.address, entry.path, entry.dialled, entry.rtt_s = address, path, dialled, None

    def on_disconnected(self, peer_id: PeerId, now: float) -> None:
        """The last connection is gone; the peer is dialled again soon, since most losses are of a network, not of a peer."""
        entry = self._entries.get(peer_id)
        if entry and entry.connected:
            entry.connected, entry.rtt_s = False, None
            if entry.leaving:
                entry.dial_at = None
            elif entry.parted:
                entry.dial_at = now + PARTED_S * (1.0 + self._random.random())
            else:
                self._back_off(entry, now)

    def on_dial_failed(
        self, peer_id: PeerId, now: float, why: str = "", attempts: Iterable[tuple[str, str, str]] = ()
    ) -> None:
        """No address answered as that peer: ``why``, and of each attempt the address, the stage and the cause."""
        if (entry := self._entries.get(peer_id)) and entry.dialing:
            entry.dialing = entry.trial = False
            tried = [(address[:MAX_WHY], cause[:MAX_WHY]) for address, _, cause in attempts]
            entry.why, entry.tried = why[:MAX_WHY], tuple(tried[:MAX_ADDRESSES])
            self._back_off(entry, now)
            if entry.news:
                entry.failures, entry.dial_at = 0, now
            elif entry.again:
                self._hasten(entry, now)

    def on_refused(self, peer_id: PeerId, address: str, reason: str, now: float) -> None:
        """It answered that we are not of its mesh: it is tried again after minutes, or at a new address."""
        if (entry := self._entries.get(peer_id)) and not entry.connected:
            entry.dialing = entry.trial = False
            entry.failures += 1
            entry.refusal = Refusal(peer_id, address, reason, now)
            entry.dial_at = now + REFUSED_S * (1.0 + 0.2 * self._random.random())
            if entry.news:  # it was said where it was before
                entry.failures, entry.refusal, entry.dial_at, entry.news = 0, None, now, False

    def on_parting(self, peer_id: PeerId) -> None:
        """It has too many neighbours, or we have; the connection ends next, and neither is dead."""
        if entry := self._entries.get(peer_id):
            entry.parted = True

    def on_round_trip(self, peer_id: PeerId, rtt_s: float, now: float) -> None:
        """A heartbeat came back after ``rtt_s``."""
        if entry := self._entries.get(peer_id):
            entry.rtt_s = rtt_s if entry.rtt_s is None else entry.rtt_s + RTT_WEIGHT * (rtt_s - entry.rtt_s)
            entry.last_sign_at = entry.alive_at = now
            entry.failures, entry.proven = 0, True

    def on_used(self, peer_id: PeerId, now: float) -> None:
        """There are streams beside the heartbeat."""
        if entry := self._entries.get(peer_id):
            entry.used_at = now

    def on_status(self, status: PeerStatus, signed: Signed, bearer: PeerId, now: float) -> bool:
        """A verified status, brought by ``bearer``; True if it was news."""
        hearsay = bearer != status.peer_id
        if status.peer_id == self._own or not (entry := self._entry(status.peer_id, now, seen=not hearsay)):
            return False
        if hearsay:
            self._add_teller(entry, bearer)
        before = entry.warm or entry.status
        if before and changed_of(before) >= changed_of(status):
            return False
        doubted = entry.warm is not None and hearsay and entry.warm.instance == status.instance
        later = before is not None and before.sequence > status.sequence and before.instance == status.instance
        entry.status, entry.warm = with_vitals(status, vitals_of(before)) if before and later else status, None
        if doubted:
            _chill(entry)
        if status.leaving and before and not before.leaving:
            entry.had = before.models
        entry.signed, entry.leaving = signed, status.leaving
        if status.leaving:
            entry.last_sign_at, entry.dial_at, entry.tellers = now, None, ()
        elif status.addresses:
            self.on_sighting(status.peer_id, status.addresses, now, hearsay)
        return True

    def on_vitals(self, peer_id: PeerId, vitals: Vitals) -> bool:
        """A neighbour's word of itself; True if it was news."""
        entry = self._entries.get(peer_id)
        if not entry or not entry.status or entry.leaving:
            return False
        newer = entry.status.sequence < vitals.sequence
        if entry.status.instance != vitals.instance:
            return newer and _chill(entry)  # it was started again, and its new status follows
        known, entry.warm = entry.warm, None
        if not (newer or known):
            return False
        entry.status = known or entry.status
        if newer:
            entry.status = with_vitals(entry.status, vitals)
        return True

    def on_told(self, entry: PeerEntry, teller: PeerId, there: bool) -> None:
        """A neighbour says that the peer is its neighbour, or no more. Who nobody vouches for is forgotten."""
        if there:
            if not entry.leaving:
                self._add_teller(entry, teller)
        elif teller in entry.tellers:
            entry.tellers = tuple(each for each in entry.tellers if each != teller)
            if not (entry.tellers or entry.seen or entry.named or entry.connected or entry.dialing):
                self._forget(entry)

    def on_teller_lost(self, teller: PeerId) -> None:
        """A neighbour is one no more, or begins afresh: what it told is void."""
        for entry in [entry for entry in self._entries.values() if teller in entry.tellers]:
            self.on_told(entry, teller, there=False)

    def on_network_back(self, now: float) -> None:
        """Dial all again that we lost, soon and not all at once: somebody lost was met again, or our interfaces changed."""
        if now - self._back_at >= AGAIN_S:
            self._back_at = now
            for entry in self._entries.values():
                if entry.proven and not (entry.connected or entry.refusal or entry.parted or entry.leaving):
                    entry.again = entry.dialing
                    if entry.dial_at is not None:
                        self._hasten(entry, now)

    def on_network_change(self, now: float) -> None:
        """Our own network changed: what failed before may work now, so whoever waits, or is dialled, is dialled soon."""
        for entry in self._entries.values():
            if entry.dialing:
                entry.news = True
            elif self._waits(entry) and not entry.parted:
                entry.failures, entry.refusal = 0, None
                entry.dial_at = now + SPREAD_S * self._random.random()

    def clear(self) -> None:
        """We are of another mesh now: nothing of what was known counts."""
        self._entries.clear()
        self._by_key.clear()

    # --- what to do --------------------------------------------------------------------------------------------------

    def tick(self, now: float) -> list[Dial]:
        """The dials that are due; each peer is dialled once at a time. Forgets whom nobody has seen for long.

        Those of hearsay come last and are few; what is left over is due as soon as one of them ends: tick then.
        """
        for entry in [entry for entry in self._entries.values() if self._is_stale(entry, now)]:
            self._forget(entry)
        due = []
        rooms = _Rooms(self._entries.values())
        waiting = [entry for entry in self._entries.values() if self._waits(entry) and (entry.dial_at or 0.0) <= now]
        for entry in sorted(waiting, key=_preference) if len(waiting) > 1 else waiting:
            if not rooms.has_room(entry):
                continue
            entry.dialing, entry.news, entry.again, entry.dial_at = True, False, False, None
            rooms.take(entry)
            due.append(Dial(entry.peer_id, entry.addresses))
        return due

    def deadline(self) -> float | None:
        """When `tick` is due next; None: when something happens."""
        rooms = _Rooms(self._entries.values())
        waiting = (entry for entry in self._entries.values() if self._waits(entry) and rooms.has_room(entry))
        return min((entry.dial_at for entry in waiting if entry.dial_at is not None), default=None)

    def review(self, now: float) -> list[PeerId]:
        """Whom to let go; and picks whom to try instead, which `tick` then dials. Due every REVIEW_S of the service."""
        connected = [entry for entry in self._entries.values() if entry.connected]
        if NEIGHBOURS <= len(connected) < NEIGHBOURS + TRIALS:
            tried = candidate(self._entries.values(), connected, now, self._random)
            if tried is not None:
                tried.trial, tried.dial_at = True, now
        gone = surplus(connected, self._limit, now)
        for peer_id in gone:
            self.on_parting(peer_id)
        return gone

    # --- what is ------------------------------------------------------------------------------------------------------

    def shown(self, now: float) -> list[PeerEntry]:
        """Connected peers by round trip, then those that were lost within GONE_AFTER_S of their last sign. Read only."""
        online = [entry for entry in self._entries.values() if entry.connected and not entry.leaving]
        online.sort(key=lambda entry: (entry.rtt_s is None, entry.rtt_s or 0.0, entry.peer_id))
        return online + sorted((e for e in self._entries.values() if _is_missed(e, now)), key=lambda e: e.peer_id)

    def lost(self, now: float) -> list[PeerEntry]:
        """Those that are gone and were seen within LOST_S, or that said farewell. Read only."""
        return [entry for entry in self._entries.values() if _is_lost(entry, now)]

    def entry(self, peer_id: PeerId) -> PeerEntry | None:
        """One peer. Read only."""
        return self._entries.get(peer_id)

    def by_key(self, key: bytes) -> PeerEntry | None:
        """The peer that a notice names so. Read only."""
        return self._by_key.get(key)

    def entries(self) -> ValuesView[PeerEntry]:
        """All. Read only."""
        return self._entries.values()

    def is_full(self) -> bool:
        """Whether a further peer takes another's place."""
        return len(self._entries) >= self._limit

    def refused(self) -> tuple[Refusal, ...]:
        """Who takes us for none of its mesh."""
        return tuple(entry.refusal for entry in self._entries.values() if entry.refusal)

    # --- inside ---------------------------------------------------------------------------------------------------------

    def _back_off(self, entry: PeerEntry, now: float) -> None:
        entry.failures += 1
        most = CANARY_BACKOFF_S if self._is_canary(entry) else MAX_BACKOFF_S
        if entry.addresses:
            entry.dial_at = now + backoff_s(entry.failures, FIRST_BACKOFF_S, most, self._random)

    def _is_canary(self, entry: PeerEntry) -> bool:
        if not entry.proven or entry.alive_at is None:
            return False
        lost = (e for e in self._entries.values() if e.proven and not (e.connected or e.leaving or e is entry))
        return sum((e.alive_at or 0.0) > entry.alive_at for e in lost) < CANARIES

    def _hasten(self, entry: PeerEntry, now: float) -> None:
        if entry.dial_at is None or entry.dial_at > now + SPREAD_S:
            entry.dial_at = now + SPREAD_S * self._random.random()

    def _waits(self, entry: PeerEntry) -> bool:
        return entry.dial_at is not None and not entry.connected and not entry.dialing

    def _is_stale(self, entry: PeerEntry, now: float) -> bool:
        if entry.connected or entry.dialing:
            return False
        if entry.leaving:
            most_s = FORGET_LEFT_S
        elif entry.proven or entry.refusal:
            most_s = FORGET_PROVEN_S
        else:
            most_s = FORGET_AFTER_S if entry.seen or entry.named or entry.tellers else UNVOUCHED_S
        return now - entry.last_sign_at > most_s

    def _add_teller(self, entry: PeerEntry, teller: PeerId) -> None:
        if teller not in entry.tellers and len(entry.tellers) < MAX_TELLERS:
            entry.tellers = (*entry.tellers, teller)

    def _entry(
        self, peer_id: PeerId, now: float, seen: bool, named: bool = False, connected: bool = False
    ) -> PeerEntry | None:
        entry = self._entries.get(peer_id)
        if entry is None and (len(self._entries) < self._limit or self._evict(seen, named) or connected):
            entry = PeerEntry(peer_id, now, key_of(peer_id), self._random.random())
            self._entries[peer_id] = self._by_key[entry.key] = entry
        if entry is not None:
            entry.seen, entry.named = entry.seen or seen, entry.named or named
        return entry

    def _evict(self, seen: bool, named: bool) -> bool:
        """Make room for a peer; one of hearsay takes it only from its like, a named one from these and its like."""
        free = (entry for entry in self._entries.values() if not (entry.connected or entry.dialing))
        idle = [e for e in free if seen or (not e.seen and (named or not e.named))]
        if not idle:
            return False
        self._forget(min(idle, key=lambda entry: (entry.proven, entry.seen, entry.named, entry.last_sign_at)))
        return True

    def _forget(self, entry: PeerEntry) -> None:
        del self._entries[entry.peer_id]
        if self._by_key.get(entry.key) is entry:
            del self._by_key[entry.key]


class _Rooms:
    """How many more dials there may be: at once, of each kind, and until there are NEIGHBOURS."""

    __slots__ = ("_by_kind", "_free", "_neighbours")

    def __init__(self, entries: Iterable[PeerEntry]) -> None:
        self._free, self._neighbours, self._by_kind = DIALS_AT_ONCE, NEIGHBOURS, [0] * _KINDS
        for entry in entries:
            if entry.dialing:
                self.take(entry)
            elif entry.connected:
                self._neighbours -= 1

    def take(self, entry: PeerEntry) -> None:
        """It is dialled."""
        self._free, self._neighbours = self._free - 1, self._neighbours - 1
        self._by_kind[_kind(entry)] += 1

    def has_room(self, entry: PeerEntry) -> bool:
        """Whether it may be dialled now."""
        kind = _kind(entry)
        if self._free <= 0 or (kind == _HEARSAY and self._by_kind[kind] >= GOSSIP_DIALS):
            return False
        if not entry.asked and self._by_kind[kind] >= RESERVED:
            kept = sum(max(RESERVED - count, 0) for other, count in enumerate(self._by_kind) if other != kind)
            if self._free <= kept:
                return False
        beyond = MAX_NEIGHBOURS - NEIGHBOURS if entry.asked else TRIALS if entry.trial else 0
        return self._neighbours + beyond > 0


def _chill(entry: PeerEntry) -> bool:
    """Whether it is the same that it was is not known: what a restart ends does not count. True if that is news."""
    if entry.status is None or entry.warm is not None:
        return False
    entry.warm, entry.status = entry.status, cold(entry.status)
    return True


def _kind(entry: PeerEntry) -> int:
    """Who answered us once, was seen, is named, or known by hearsay."""
    return 0 if entry.proven else 1 if entry.seen else 2 if entry.named else _HEARSAY


def _preference(entry: PeerEntry) -> tuple[bool, bool, bool, int, float]:
    return (not entry.asked, not entry.seen, not entry.named, entry.failures, entry.dial_at or 0.0)


def _is_missed(entry: PeerEntry, now: float) -> bool:
    if entry.connected or entry.leaving or entry.parted or entry.alive_at is None:
        return False
    return now - entry.alive_at <= GONE_AFTER_S


def _is_lost(entry: PeerEntry, now: float) -> bool:
    gone = not entry.connected or entry.leaving
    return gone and not entry.parted and entry.alive_at is not None and now - entry.alive_at <= LOST_S
