"""Which attempts at better paths there are: bounds, glare, restarts. Each goes its own way by core.attempt.

At once: with one peer one for control and MAX_LANES for lanes, MAX_ATTEMPTS in all. Each side may begin one control attempt
a second with a peer (BURST at once, for restarts). Glare, when both offer control: the offer of the smaller PeerId counts;
who has the larger one takes its own back, whatever came of it, and answers. A new offer of a peer whose older one is being
answered takes its place, as after a change of its network. When ours changes, every attempt ends with "restart": candidates
are others now, and who leads begins again under a new id. Not here: I/O, waiting, what follows from an end (services.signalling).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from meshmax.base.errors import Busy
from meshmax.base.ids import PeerId
from meshmax.base.traversal import Purpose
from meshmax.core.attempt import Attempt
from meshmax.core.attempt_actions import Action, Means, Send
from meshmax.core.candidates import Screen
from meshmax.wire.signal import Decline, DeclineReason, Offer

MAX_LANES: Final = 4  # with one peer; as many lanes as one opens to it at once
MAX_ATTEMPTS: Final = 16  # in all; each has a port, a channel and up to 16 targets
BURST: Final = 3  # control attempts of one side with one peer: the first, and two restarts
REFILL_S: Final = 1.0
LANE_BURST: Final = 8  # as above, for lanes
LANE_REFILL_S: Final = 0.5
MAX_RATES: Final = 1024  # peers, purposes and sides whose rate is remembered; beyond, the longest unused is forgotten

_RateKey = tuple[PeerId, Purpose, bool]  # bool: we began


class Signalling:
    """See the module. Times are monotonic seconds."""

    __slots__ = ("_attempts", "_new_id", "_rates", "us")

    def __init__(self, us: PeerId, new_id: Callable[[], bytes]) -> None:
        """``new_id``: fresh random ids of ATTEMPT_ID_BYTES."""
        self.us = us
        self._new_id = new_id
        self._attempts: dict[bytes, Attempt] = {}
        self._rates: dict[_RateKey, tuple[float, float]] = {}

    @property
    def attempts(self) -> tuple[Attempt, ...]:
        """Those under way."""
        self._sweep()
        return tuple(self._attempts.values())

    def control(self, peer: PeerId) -> Attempt | None:
        """The control attempt with this peer, if one is under way."""
        return next((each for each in self.attempts if each.peer == peer and each.purpose == "control"), None)

    def want(self, peer: PeerId, purpose: Purpose, means: Means, now: float) -> tuple[Attempt, list[Action]]:
        """Lead an attempt; for control none may be under way with the peer. Raises Busy with the time to wait."""
        self._enter((peer, purpose, True), now)
        attempt = Attempt(self._new_id(), peer, purpose, means, None)
        self._attempts[attempt.id] = attempt
        return attempt, attempt.begin(now)

    def on_offer(
        self, peer: PeerId, offer: Offer, means: Means, screen: Screen, now: float
    ) -> tuple[Attempt | None, list[Action]]:
        """A peer offers: the attempt to answer it, or None where it is declined. Actions may end others."""
        older = self.control(peer) if offer.purpose == "control" else None
        if offer.attempt in self._attempts:
            return None, [_decline(offer, "busy", REFILL_S)]
        if older is not None and older.lead and self.us < peer:
            return None, [_decline(offer, "glare")]
        try:
            self._enter((peer, offer.purpose, False), now, older)
        except Busy as busy:
            return None, [_decline(offer, "busy", busy.retry_after_s)]
        actions: list[Action] = []
        if older is not None:
            lead = older.lead
            actions += older.withdraw("glare" if lead else "restart", "glare" if lead else "restart", now)
        attempt = Attempt(offer.attempt, peer, offer.purpose, means, screen)
        self._attempts[attempt.id] = attempt
        return attempt, actions + attempt.begin_with(offer, now)

    def on_network_changed(self, now: float) -> list[Action]:
        """Our addresses are others."""
        return [action for each in self.attempts for action in each.withdraw("restart", "restart", now)]

    def deadline(self) -> float | None:
        """When `tick` is due; None: never."""
        return min((at_s for each in self.attempts if (at_s := each.deadline()) is not None), default=None)

    def tick(self, now: float) -> list[Action]:
        """End what is late."""
        return [action for each in self.attempts for action in each.tick(now)]

    # --- pieces ------------------------------------------------------------------------------------------------------

    def _sweep(self) -> None:
        for attempt in [each for each in self._attempts.values() if each.ended]:
            del self._attempts[attempt.id]

    def _enter(self, key: _RateKey, now: float, instead: Attempt | None = None) -> None:
        """Raises Busy. ``instead``: it ends if this begins."""
        peer, purpose, _ = key
        others = [each for each in self.attempts if each is not instead]
        with_peer = sum(each.peer == peer and each.purpose == purpose for each in others)
        if with_peer >= (1 if purpose == "control" else MAX_LANES) or len(others) >= MAX_ATTEMPTS:
            raise Busy("many attempts at a better path are under way", REFILL_S)
        self._spend(key, now)

    def _spend(self, key: _RateKey, now: float) -> None:
        burst, refill_s = (BURST, REFILL_S) if key[1] == "control" else (LANE_BURST, LANE_REFILL_S)
        room, at_s = self._rates.pop(key, (float(burst), now))
        room = min(room + (now - at_s) / refill_s, float(burst))
        self._rates[key] = (room - 1.0, now) if room >= 1.0 else (room, now)
        while len(self._rates) > MAX_RATES:
            del self._rates[next(iter(self._rates))]
        if room < 1.0:
            raise Busy("a path to this peer was tried just now", (1.0 - room) * refill_s)


def _decline(offer: Offer, reason: DeclineReason, retry_after_s: float = 0.0) -> Send:
    return Send(offer.attempt, Decline(offer.attempt, reason, retry_after_s))
