"""Which relays keep a place for us: whom to ask, when to renew, and what follows when one is lost.

Rules. At most MAX_PLACES are kept, so that one is left when a relay dies. Candidates come in the order of preference, and are
asked in it; one that fails, refuses or is lost is asked again after growing pauses, and the next one at once. One that fell
silent is asked again at once as well: it may be our router that forgot the connection, or the relay that froze. A place is
renewed at half of its time; whoever does not renew it has lost it for us. A place at who is no candidate any more is left:
without candidates, as when we are reached without relays, all are. A change of our network ends every pause, also that of a
relay which is being asked, and places are asked for anew: a relay that missed us meanwhile keeps none. Time is passed in. Not
here: who is a candidate (the owner), circuits (core.circuits), streams (services.relay_client).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Final, TypeAlias

import msgspec

from meshmax.base.ids import PeerId
from meshmax.core.backoff import Random, backoff_s

MAX_PLACES: Final = 2  # a second one for when the first one's relay dies; more would only be told to everybody
MAX_CANDIDATES: Final = 32  # looked at; bootstrap nodes and neighbours
MAX_ADDRESSES: Final = 2  # of one relay, told to others; they all end at the same machine
MIN_TTL_S: Final = 120.0  # a relay whose clock is behind ours is asked once a minute, no more often
MAX_TTL_S: Final = 3600.0  # as usual; of one whose clock is ahead we would renew too late
FIRST_BACKOFF_S: Final = 2.0
MAX_BACKOFF_S: Final = 300.0


class RelayPlace(msgspec.Struct, frozen=True):
    """A relay where a place may be had. ``addresses``: multiaddrs without /p2p; ``member``: it is one of our mesh."""

    peer_id: PeerId
    addresses: tuple[str, ...]
    member: bool = False


class Ask(msgspec.Struct, frozen=True):
    """Ask this relay for a place, or for one more time the one that we have: answered by `on_reserved` or `on_failed`."""

    place: RelayPlace


class Leave(msgspec.Struct, frozen=True):
    """The place there is of no use any more."""

    peer_id: PeerId


Action: TypeAlias = Ask | Leave


class _Relay:
    """One candidate. ``expires_s`` 0: we have no place there."""

    __slots__ = ("again", "asked", "doubtful", "expires_s", "failures", "place", "renew_s", "retry_s", "told")

    def __init__(self, place: RelayPlace) -> None:
        self.place = place
        self.asked = False
        self.doubtful = False  # asked, with little hope
        self.again = False  # our network changed since it was asked
        self.renew_s = self.expires_s = self.retry_s = 0.0
        self.failures = 0
        self.told: tuple[str, ...] = ()  # addresses that it told of itself


class Reservations:
    """The places of one node."""

    __slots__ = ("_random", "_relays")

    def __init__(self, random: Random) -> None:
        self._random = random
        self._relays: dict[PeerId, _Relay] = {}  # in the order of preference

    @property
    def relays(self) -> tuple[PeerId, ...]:
        """At which we hold a place."""
        return tuple(peer_id for peer_id, relay in self._relays.items() if relay.expires_s)

    @property
    def addresses(self) -> tuple[str, ...]:
        """Circuit multiaddrs without who is reached, the best of each relay first."""
        held = [relay for relay in self._relays.values() if relay.expires_s]
        listed = [tuple(dict.fromkeys((*relay.place.addresses, *relay.told)))[:MAX_ADDRESSES] for relay in held]
        return tuple(
            f"{texts[turn]}/p2p/{relay.place.peer_id}/p2p-circuit"
            for turn in range(MAX_ADDRESSES)
            for relay, texts in zip(held, listed, strict=True)
            if turn < len(texts)
        )

    def place_of(self, peer_id: PeerId) -> RelayPlace | None:
        """How a relay is reached; None if it is no candidate."""
        relay = self._relays.get(peer_id)
        return relay.place if relay else None

    # --- what happens ------------------------------------------------------------------------------------------------

    def on_candidates(self, places: Sequence[RelayPlace], now: float) -> list[Action]:
        """Who may be asked from now on, the preferred first; () if no place is wanted. Call it now and then."""
        known, self._relays = self._relays, {}
        for place in places[:MAX_CANDIDATES]:
            if place.peer_id not in self._relays:
                self._relays[place.peer_id] = known.pop(place.peer_id) if place.peer_id in known else _Relay(place)
                self._relays[place.peer_id].place = place
        left: list[Action] = [Leave(peer_id) for peer_id, relay in known.items() if relay.expires_s]
        return left + self._next(now)

    def on_reserved(self, peer_id: PeerId, ttl_s: float, told: Sequence[str], now: float) -> list[Action]:
        """The relay keeps a place for us. ``told``: its own addresses, without /p2p. Leave if it is wanted no more."""
        relay = self._relays.get(peer_id)
        if relay is None:
            return [Leave(peer_id)]
        if not relay.expires_s and len(self.relays) >= MAX_PLACES:  # others were asked since
            relay.asked = relay.doubtful = False
            return [Leave(peer_id)]
        ttl_s = min(max(ttl_s, MIN_TTL_S), MAX_TTL_S)
        relay.asked = relay.doubtful = False
        relay.failures = 0
        relay.renew_s, relay.expires_s, relay.told = now + ttl_s / 2, now + ttl_s, tuple(told)[:MAX_ADDRESSES]
        return self._next(now)

    def on_failed(self, peer_id: PeerId, now: float, pause_s: float = 0.0) -> list[Action]:
        """The relay gave no place, lost ours, or is of no use: others are asked at once, it not for ``pause_s`` at least."""
        relay = self._relays.get(peer_id)
        if relay is not None:
            relay.asked = relay.doubtful = False
            relay.expires_s = 0.0
            relay.failures += 1
            own_s = backoff_s(relay.failures, FIRST_BACKOFF_S, MAX_BACKOFF_S, self._random)
            if relay.again:
                relay.again, relay.failures, own_s = False, 0, 0.0
            relay.retry_s = now + max(own_s, pause_s)
        return self._next(now)

    def on_lost(self, peer_id: PeerId, now: float) -> list[Action]:
        """The relay is not connected any more. The first time it is asked again at once: perhaps only a connection broke."""
        relay = self._relays.get(peer_id)
        if relay is None or not relay.expires_s:
            return []
        relay.asked, relay.expires_s, relay.retry_s = False, 0.0, now
        return self._next(now)

    def on_silent(self, peer_id: PeerId, now: float) -> list[Action]:
        """The relay did not answer any more on its connection, which was cut: it is asked on another, and the next one, too."""
        relay = self._relays.get(peer_id)
        if relay is None or not relay.expires_s:
            return self.on_failed(peer_id, now)
        relay.expires_s, relay.asked, relay.doubtful = 0.0, True, True
        return [Ask(relay.place), *self._next(now)]

    def on_network_change(self) -> None:
        """What failed from where we were may work from here: see `deadline`."""
        for relay in self._relays.values():
            relay.failures, relay.retry_s, relay.renew_s, relay.again = 0, -math.inf, -math.inf, relay.asked

    def tick(self, now: float) -> list[Action]:
        """Time passed: see `deadline`."""
        return self._next(now)

    def deadline(self) -> float | None:
        """When `tick` is due; None: not before something happens."""
        times = [relay.renew_s for relay in self._relays.values() if relay.expires_s and not relay.asked]
        if self._lacking():
            times += [relay.retry_s for relay in self._relays.values() if not relay.expires_s and not relay.asked]
        return min(times, default=None)

    # --- deciding ----------------------------------------------------------------------------------------------------

    def _lacking(self) -> int:
        return MAX_PLACES - sum(
            bool(relay.expires_s or (relay.asked and not relay.doubtful)) for relay in self._relays.values()
        )

    def _next(self, now: float) -> list[Action]:
        actions: list[Action] = []
        for relay in self._relays.values():
            if relay.expires_s and not relay.asked and now >= relay.renew_s:
                relay.asked = True
                actions.append(Ask(relay.place))
        for relay in self._relays.values():
            if self._lacking() > 0 and not relay.expires_s and not relay.asked and now >= relay.retry_s:
                relay.asked = True
                actions.append(Ask(relay.place))
        return actions
