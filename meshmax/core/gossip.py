"""Who tells whom what with heartbeats: notices of neighbours, wants, and bodies of statuses.

Rules. A peer speaks of itself and of its own neighbours only, so that word of a peer travels two hops and ends when the peer's
neighbours lose it; nobody passes on what it has from others, so an old status of a dead peer comes from nowhere. Each change
(a neighbour that came, went, or whose lasting facts changed) gets the next number of a log; for each neighbour only the number
up to which it was told is kept. What is told is a notice; the receiver wants the body if it keeps that peer (a slot is free,
or the peer is in its table already) and has an earlier one. Peers that the receiver is connected with tell it themselves. When
the table is full it looks at one unknown peer every PEEK_S, which takes the place of another of hearsay. Our own status goes as
a body if it is small, else as a notice like any other, since a neighbour that comes back may have it still. A neighbour
whose own status we lack is asked for it every WANT_AGAIN_S, whatever it believes that it told us. Other bodies
that were not wanted are not looked at: a signature costs a third of a millisecond, and a flood of them would cost a core.
So what a peer sends grows with its neighbours (bounded, core.neighbours) and with how often they change, not with the mesh.
Not here: whom to keep and dial (core.peers), frames and nonces (services.heartbeat).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Final, Generic, TypeVar

import msgspec

from meshmax.base.ids import PeerId
from meshmax.base.model import Signed
from meshmax.base.status import PeerStatus
from meshmax.core.clones import Clones
from meshmax.core.peer_entry import changed_of
from meshmax.core.peers import PeerTable
from meshmax.wire.status import GONE, MAX_NOTICES, MAX_STATUSES, MAX_WANTS, key_of

PUSH_BYTES: Final = 4096  # a status of a few models; larger ones are named first and fetched by who lacks them
PEEK_S: Final = 2.0  # one unknown status in that time when the table is full: half a kilobyte a second
WANT_AGAIN_S: Final = 4.0  # before the body that one neighbour did not bring is wanted of another
DOUBT_S: Final = 5.0  # a neighbour's own news is never that much later than others' word of it
MAX_LOG: Final = MAX_NOTICES  # neighbours, and those lost lately
MAX_PENDING: Final = 1024  # bodies wanted at once

V = TypeVar("V")


class NewsLog(Generic[V]):
    """The newest value of each key in the order of change, bounded: since(n) are the changes after the n-th."""

    __slots__ = ("_items", "_most", "version")

    def __init__(self, most: int) -> None:
        self._most = most
        self._items: dict[bytes, tuple[int, V]] = {}
        self.version = 0

    def put(self, key: bytes, value: V) -> None:
        """The key has this value now."""
        self._items.pop(key, None)
        self.version += 1
        self._items[key] = self.version, value
        if len(self._items) > self._most:
            del self._items[next(iter(self._items))]

    def since(self, version: int) -> list[tuple[bytes, V]]:
        """What changed after that, newest first; O(changes)."""
        found = []
        for key, (at, value) in reversed(self._items.items()):
            if at <= version:
                break
            found.append((key, value))
        return found


class Outgoing(msgspec.Struct, frozen=True):
    """What the next message to a neighbour carries."""

    statuses: tuple[Signed, ...]
    notices: list[tuple[bytes, int]]
    wants: list[bytes]


class _Neighbour(msgspec.Struct):
    told: int = 0  # up to which number of the log
    fresh: bool = True  # it was told nothing yet
    owed: dict[bytes, None] = msgspec.field(default_factory=dict)  # bodies that it wants
    wants: dict[bytes, None] = msgspec.field(default_factory=dict)  # bodies that we want of it
    awaited: dict[bytes, None] = msgspec.field(
        default_factory=dict
    )  # bodies that it was asked for and did not bring yet


class Gossip:
    """What neighbours are told and asked. Writes what it hears into ``table``."""

    __slots__ = (
        "_asked",
        "_clones",
        "_doubts",
        "_log",
        "_neighbours",
        "_own",
        "_own_key",
        "_own_signed",
        "_peek_at",
        "_table",
    )

    def __init__(self, own: PeerId, table: PeerTable, clones: Clones) -> None:
        self._own, self._own_key = own, key_of(own)
        self._table = table
        self._clones = clones
        self._log: NewsLog[int] = NewsLog(MAX_LOG)
        self._neighbours: dict[PeerId, _Neighbour] = {}
        self._asked: dict[bytes, float] = {}
        self._doubts: dict[bytes, tuple[int, float, PeerId]] = {}
        self._own_signed: Signed | None = None
        self._peek_at = float("-inf")

    # --- events ------------------------------------------------------------------------------------------------------

    def on_own(self, status: PeerStatus, signed: Signed) -> None:
        """Our own status was issued anew."""
        self._own_signed = signed
        self._log.put(self._own_key, changed_of(status))

    def on_connected(self, peer_id: PeerId) -> None:
        """It is a neighbour."""
        self._neighbours.setdefault(peer_id, _Neighbour())
        entry = self._table.entry(peer_id)
        if entry and entry.status and not entry.leaving:  # what we have of it from before or from others may still hold
            self._log.put(entry.key, changed_of(entry.status))

    def on_disconnected(self, peer_id: PeerId) -> None:
        """It is one no more."""
        if self._neighbours.pop(peer_id, None) is not None:
            entry = self._table.entry(peer_id)
            if entry is None or not entry.leaving:  # a farewell stays the last word
                self._log.put(key_of(peer_id), GONE)
            self._table.on_teller_lost(peer_id)

    def on_fresh(self, peer_id: PeerId) -> None:
        """It begins a stream: what it told is void, and what we told may be lost."""
        self._table.on_teller_lost(peer_id)
        self.start_afresh(peer_id)

    def start_afresh(self, peer_id: PeerId) -> None:
        """We begin a stream to it: tell it everything, with nonce 0."""
        if neighbour := self._neighbours.get(peer_id):
            neighbour.told, neighbour.fresh = 0, True
            neighbour.owed.clear()
            neighbour.wants.clear()

    def on_status(self, status: PeerStatus, signed: Signed, bearer: PeerId, now: float) -> bool:
        """A verified status; True if it was news."""
        if status.peer_id == self._own:
            self._clones.on_own(status, now)
            return False
        entry = self._table.entry(status.peer_id)
        before = (entry.status, entry.signed) if entry else (None, None)
        self._clones.on_status(*before, status, signed, now)
        if status.leaving and self._clones.is_copied(status.peer_id, now):
            return False  # the other one is still there
        news = self._table.on_status(status, signed, bearer, now)
        if entry := self._table.entry(status.peer_id):
            self._asked.pop(entry.key, None)
            if entry.connected:
                self._doubts.pop(entry.key, None)
            said_before = before[0] is not None and changed_of(before[0]) == changed_of(status)
            if news and (bearer == status.peer_id or status.leaving) and not said_before:
                self._log.put(entry.key, changed_of(status))
        return news

    def is_known(self, signed: Signed, bearer: PeerId) -> bool:
        """Whether this very status, brought by ``bearer``, is the one that we have: it needs no second check."""
        entry = self._table.entry(signed.signer)
        if entry is None or entry.signed != signed:
            return signed == self._own_signed
        if bearer != signed.signer:
            self._table.on_told(entry, bearer, there=True)
        return True

    def is_welcome(self, signed: Signed, bearer: PeerId) -> bool:
        """Whether this status, which is not known, is worth a check: ``bearer``'s own, ours, or one that it was asked for.

        Raises InvalidRequest if its signer is no PeerId.
        """
        if signed.signer in (bearer, self._own):
            return True
        neighbour, key = self._neighbours.get(bearer), key_of(signed.signer)
        if neighbour is None or key not in neighbour.awaited:
            return False
        del neighbour.awaited[key]
        return True

    def on_notices(self, bearer: PeerId, notices: Iterable[tuple[bytes, int]], now: float) -> bool:
        """A neighbour speaks of itself and of its neighbours; True if we want something of it now."""
        neighbour = self._neighbours.get(bearer)
        if neighbour is None:
            return False
        for key, changed in notices:
            if self._is_wanted(key, changed, bearer, now) and len(neighbour.wants) < MAX_WANTS:
                neighbour.wants[key] = None
                self._note_asked(key, now)
        return bool(neighbour.wants)

    def on_wants(self, peer_id: PeerId, wants: Sequence[bytes]) -> bool:
        """A neighbour wants bodies; True if it gets some."""
        if wants and (neighbour := self._neighbours.get(peer_id)):
            neighbour.owed |= dict.fromkeys(key for key in wants if self._body(key))
            return bool(neighbour.owed)
        return False

    # --- what to say -------------------------------------------------------------------------------------------------

    def message_for(self, peer_id: PeerId, now: float, most: int = MAX_STATUSES, most_bytes: int = 1 << 19) -> Outgoing:
        """What the neighbour is to be told and asked now; counts as told."""
        neighbour = self._neighbours.get(peer_id)
        if neighbour is None:
            return Outgoing((), [], [])
        if not neighbour.fresh:  # else it is only about to tell us
            self._ask_for_own(peer_id, neighbour, now)
        notices = self._log.since(neighbour.told)
        if neighbour.fresh:  # it knows of nobody who could be gone
            notices = [(key, changed) for key, changed in notices if changed != GONE]
        neighbour.told, neighbour.fresh = self._log.version, False
        if (own := self._own_signed) and len(own.payload) <= PUSH_BYTES:
            pushed = [notice for notice in notices if notice[0] == self._own_key]
            if pushed:
                notices.remove(pushed[0])
                neighbour.owed = {self._own_key: None, **neighbour.owed}
        statuses: list[Signed] = []
        for key in list(neighbour.owed)[:most]:
            body = self._body(key)
            if body and len(body.payload) > most_bytes and statuses:
                break
            del neighbour.owed[key]
            if body:
                most_bytes -= len(body.payload)
                statuses.append(body)
        if self._doubts:
            self._resolve_doubts(now)
        wants = list(neighbour.wants)[:MAX_WANTS]  # a message with more is none
        neighbour.awaited |= dict.fromkeys(wants)
        for key in list(neighbour.awaited)[: max(len(neighbour.awaited) - MAX_PENDING, 0)]:
            del neighbour.awaited[key]
        neighbour.wants.clear()
        return Outgoing(tuple(statuses), notices, wants)

    def is_quiet(self, peer_id: PeerId) -> bool:
        """Whether there is nothing that the next message to the neighbour would carry."""
        neighbour = self._neighbours.get(peer_id)
        return neighbour is None or (neighbour.told == self._log.version and not (neighbour.owed or neighbour.wants))

    def is_waiting(self, peer_id: PeerId) -> bool:
        """Whether there is something that a neighbour asked for, or that we want of it."""
        neighbour = self._neighbours.get(peer_id)
        return neighbour is not None and bool(neighbour.owed or neighbour.wants)

    # --- inside ------------------------------------------------------------------------------------------------------

    def _body(self, key: bytes) -> Signed | None:
        if key == self._own_key:
            return self._own_signed
        entry = self._table.by_key(key)
        return entry.signed if entry and (entry.connected or entry.leaving) else None

    def _ask_for_own(self, peer_id: PeerId, neighbour: _Neighbour, now: float) -> None:
        entry, key = self._table.entry(peer_id), key_of(peer_id)
        if (entry is None or entry.status is None) and not self._was_asked(key, now):
            neighbour.wants = {key: None, **neighbour.wants}
            self._note_asked(key, now)

    def _is_wanted(self, key: bytes, changed: int, bearer: PeerId, now: float) -> bool:
        if key == self._own_key:
            return changed != GONE and self._clones.is_foreign(changed)
        entry = self._table.by_key(key)
        if entry is None:
            return changed != GONE and self._is_curious(key, now)
        if entry.peer_id != bearer:
            self._table.on_told(entry, bearer, there=changed != GONE)
        known = changed_of(entry.status) if entry.status else GONE
        if changed <= known:
            return False
        if entry.connected and entry.peer_id != bearer:  # it tells us itself; if it does not, two of it are there
            self._doubts.setdefault(key, (changed, now, bearer))
            if len(self._doubts) > MAX_PENDING:
                del self._doubts[next(iter(self._doubts))]
            return False
        return not self._was_asked(key, now) or entry.peer_id == bearer

    def _resolve_doubts(self, now: float) -> None:
        """Of what others have of a neighbour that it still did not tell us, the body is wanted."""
        while self._doubts:
            key, (changed, at, teller) = next(iter(self._doubts.items()))
            if now - at < DOUBT_S:
                break
            del self._doubts[key]
            entry, neighbour = self._table.by_key(key), self._neighbours.get(teller)
            if entry and entry.status and changed_of(entry.status) < changed and neighbour:
                neighbour.wants[key] = None

    def _is_curious(self, key: bytes, now: float) -> bool:
        if self._was_asked(key, now):
            return False
        if not self._table.is_full():
            return True
        if now - self._peek_at < PEEK_S:
            return False
        self._peek_at = now
        return True

    def _was_asked(self, key: bytes, now: float) -> bool:
        return now - self._asked.get(key, float("-inf")) < WANT_AGAIN_S

    def _note_asked(self, key: bytes, now: float) -> None:
        self._asked.pop(key, None)
        self._asked[key] = now
        if len(self._asked) > MAX_PENDING:
            del self._asked[next(iter(self._asked))]
