"""Two peers with one identity, as when a home was copied: how each of them, and others, find out.

Each start draws an instance, and sequences grow over restarts. A restart: one instance speaks, then another, and the first
never again. Copies: both go on. So
- somebody else's identity is copied if two of its instances spoke over sequences that overlap;
- our own is, if a status bears our signature, an instance that is not ours, and a sequence above our first: what we issued
  before we were started anew is below that (core.sequence);
- and it probably is, if somebody announces our PeerId at addresses that were never ours, twice AGAIN_S apart.
Whoever proves it shows both statuses to whoever speaks in that name, at most every TELL_S a stream, so that both learn of it;
nobody is cut off and nothing is fought over. What is not seen again is taken back after KEPT_S.
Not here: who tells (services.heartbeat).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final, TypeVar

import msgspec

from meshmax.base.ids import PeerId
from meshmax.base.model import Signed
from meshmax.base.status import PeerStatus, Vitals
from meshmax.core.peer_entry import changed_of

AGAIN_S: Final = 5.0  # an announcement that is repeated was meant
KEPT_S: Final = 60.0  # after the last sign of a copy
TELL_S: Final = 10.0
MAX_SUSPECTS: Final = 64  # peers that started anew lately, or are copied
MAX_CHANGES: Final = 64  # of our own statuses that are remembered
MAX_OWN_ADDRESSES: Final = 128  # that we had since the start


K = TypeVar("K")
V = TypeVar("V")


class _Life(msgspec.Struct):
    """One instance of a peer: from which sequence to which it is known to have spoken, and its newest status."""

    first: int
    last: int
    heard_at: float
    signed: Signed | None


class _Suspect(msgspec.Struct):
    """A peer of which there were two instances, one after the other or at once."""

    lives: dict[str, _Life]
    proved_at: float | None = None


class Clones:
    """What is known of copied identities. ``instance``: ours."""

    __slots__ = (
        "_addresses",
        "_changes",
        "_first",
        "_foreign_at",
        "_foreign_place",
        "_instance",
        "_places",
        "_suspects",
    )

    def __init__(self, instance: str) -> None:
        self._instance = instance
        self._first: int | None = None
        self._changes: dict[int, None] = {}
        self._addresses: dict[str, None] = {}
        self._foreign_at: float | None = None
        self._foreign_place = ""
        self._places: dict[
            str, tuple[float, float]
        ] = {}  # foreign address: first and last time it was announced as ours
        self._suspects: dict[PeerId, _Suspect] = {}

    # --- ourselves ---------------------------------------------------------------------------------------------------

    def on_issued(self, status: PeerStatus) -> None:
        """We issued a status."""
        if self._first is None:
            self._first = status.sequence
        _remember(self._changes, status.changed, None, MAX_CHANGES)
        for address in status.addresses:
            _remember(self._addresses, address.partition("/p2p/")[0], None, MAX_OWN_ADDRESSES)

    def on_own(self, status: PeerStatus, now: float) -> bool:
        """Somebody brought a status with our own signature; True if this proves for the first time that we are copied."""
        if status.instance == self._instance or self._first is None or status.sequence <= self._first:
            return False
        first = self._foreign_at is None or now - self._foreign_at > KEPT_S
        self._foreign_at = now
        self._foreign_place = next(iter(status.addresses), "")
        return first

    def is_foreign(self, changed: int) -> bool:
        """Whether a notice of our own PeerId is of a status that we never issued, though we were running."""
        return self._first is not None and changed > self._first and changed not in self._changes

    def on_own_sighting(self, addresses: Iterable[str], now: float) -> None:
        """Somebody announces our PeerId."""
        for address in addresses:
            address = address.partition("/p2p/")[0]
            if address.startswith("/ip4/") and address not in self._addresses:
                first, last = self._places.pop(address, (now, now))
                self._places[address] = (now if now - last > KEPT_S else first, now)
                if len(self._places) > MAX_CHANGES:
                    del self._places[next(iter(self._places))]

    def problem(self, now: float) -> str:
        """What to tell the person in front of this peer; '' if all is well."""
        text = (
            "another machine runs with this peer's identity{}: a home was copied; start one of them with a new --home"
        )
        if self._foreign_at is not None and now - self._foreign_at <= KEPT_S:
            return text.format(f" ({self._foreign_place})" if self._foreign_place else "")
        announced = [
            address
            for address, (first, last) in self._places.items()
            if now - last <= KEPT_S and last - first >= AGAIN_S and address not in self._addresses
        ]
        return text.format(f", or announces it, at {announced[-1]}") if announced else ""

    # --- others ------------------------------------------------------------------------------------------------------

    def on_status(
        self, before: PeerStatus | None, before_signed: Signed | None, status: PeerStatus, signed: Signed, now: float
    ) -> None:
        """A peer's status came, where ``before`` was known."""
        peer_id = status.peer_id
        if before is not None and before.instance != status.instance and peer_id not in self._suspects:
            _remember(self._suspects, peer_id, _Suspect({}), MAX_SUSPECTS)
            self._note(peer_id, before.instance, changed_of(before), before.sequence, before_signed, now)
        if peer_id in self._suspects:
            self._note(peer_id, status.instance, changed_of(status), status.sequence, signed, now)

    def on_vitals(self, before: PeerStatus | None, vitals: Vitals, now: float) -> None:
        """A neighbour spoke of itself, where ``before`` was known."""
        if before is not None and before.peer_id in self._suspects:
            self._note(before.peer_id, vitals.instance, vitals.sequence, vitals.sequence, None, now)

    def _note(self, peer_id: PeerId, instance: str, first: int, last: int, signed: Signed | None, now: float) -> None:
        suspect = self._suspects[peer_id]
        life = suspect.lives.setdefault(instance, _Life(first, last, now, signed))
        life.first, life.signed = min(life.first, first), signed or life.signed
        if last > life.last:
            life.last, life.heard_at = last, now
        if len(suspect.lives) > 2:
            ended = min(suspect.lives, key=lambda each: suspect.lives[each].last)
            del suspect.lives[ended]
        if len(suspect.lives) == 2:
            a, b = suspect.lives.values()
            if a.first <= b.last and b.first <= a.last:
                suspect.proved_at = min(a.heard_at, b.heard_at)  # both are there as long as both speak

    def is_copied(self, peer_id: PeerId, now: float) -> bool:
        """Whether there are two of that peer."""
        suspect = self._suspects.get(peer_id)
        return suspect is not None and suspect.proved_at is not None and now - suspect.proved_at <= KEPT_S

    def twins(self, peer_id: PeerId, now: float) -> tuple[Signed, ...]:
        """Statuses of both, if two of that peer are there."""
        if not self._suspects or not self.is_copied(peer_id, now):
            return ()
        return tuple(life.signed for life in self._suspects[peer_id].lives.values() if life.signed)

    def copied(self, now: float) -> tuple[PeerId, ...]:
        """Other peers of which there are two."""
        return tuple(peer for peer in self._suspects if self.is_copied(peer, now))


def _remember(known: dict[K, V], key: K, value: V, most: int) -> None:
    known.pop(key, None)
    known[key] = value
    if len(known) > most:
        del known[next(iter(known))]
