"""Which ways to a lane's connection are tried, and in which order.

"direct": to the peer's lane port, at the address that its control connection has. "signalled": an attempt that both sides
agree on over the control connection, as simultaneous open. Rules: direct comes first where it should work: on one LAN, at a
port that the peer's router maps, or where we dialled the peer ourselves at an address of its own. Otherwise signalled comes
first, and direct is of use only to a peer that dialled us without help, which may listen for all the world. What failed
lately goes last, and does not run until the others have failed; that is remembered of one peer at one address, for FAILED_S.
To a peer that is reached over a relay an attempt that failed is not repeated for RELAYED_S: two sides and the relay are kept
busy by it, and attempts at a better path (core.upgrades) find out by themselves when one works.
Not here: dialling (services.lane_dial).
"""

from __future__ import annotations

from typing import Final, Literal

import msgspec

from meshmax.base.ids import PeerId
from meshmax.base.status import Path

Way = Literal["direct", "signalled"]

FAILED_S: Final = 120.0  # a port that was closed a moment ago is; a router that was set right meanwhile waits this long
RELAYED_S: Final = 600.0  # about the last pauses of core.upgrades; a path that became better ends it at once
MAX_REMEMBERED: Final = 256  # peers' ways; the oldest is forgotten, which costs one wait


class LanePeer(msgspec.Struct, frozen=True):
    """What the control connection to a peer says. ``ip`` is None where it leads over somebody else; ``near``: on a LAN."""

    peer: PeerId
    ip: str | None
    near: bool
    direction: Literal["in", "out"]
    path: Path


def ways_to(peer: LanePeer, external_port: int, signals: bool) -> tuple[Way, ...]:
    """The ways that may work, the likelier first. ``external_port`` is the grant's; ``signals``: attempts can be agreed on."""
    if peer.ip is None:
        return ("signalled",) if signals else ()
    if not signals:
        return ("direct",)
    mapped = bool(external_port) and ":" not in peer.ip
    if peer.near or mapped or (peer.direction == "out" and peer.path == "direct"):
        return ("direct", "signalled")
    return ("signalled", "direct") if peer.path == "direct" else ("signalled",)


class WayMemory:
    """Which ways failed lately. Times in seconds, monotonic."""

    def __init__(self) -> None:
        self._until: dict[tuple[PeerId, str | None, Way], float] = {}

    def failed(self, peer: LanePeer, way: Way, now: float) -> None:
        """``way`` did not work, or took much longer than another."""
        key = (peer.peer, peer.ip, way)
        self._until.pop(key, None)
        self._until[key] = now + (RELAYED_S if peer.path == "relay" else FAILED_S)
        if len(self._until) > MAX_REMEMBERED:
            del self._until[next(iter(self._until))]

    def worked(self, peer: LanePeer, way: Way) -> None:
        """It did."""
        self._until.pop((peer.peer, peer.ip, way), None)

    def pause_s(self, peer: LanePeer, now: float) -> float:
        """How long no lane to the peer is worth an attempt, since it is reached over a relay and one failed; 0 to try one."""
        if peer.path != "relay":
            self._until.pop((peer.peer, None, "signalled"), None)
            return 0.0
        return max(self._until.get((peer.peer, peer.ip, "signalled"), now) - now, 0.0)

    def sort(self, peer: LanePeer, ways: tuple[Way, ...], now: float) -> tuple[tuple[Way, ...], tuple[Way, ...]]:
        """``ways`` in two parts: those to be tried, and those for when they failed. The first is empty only if ``ways`` is."""
        bad = tuple(way for way in ways if self._until.get((peer.peer, peer.ip, way), now) > now)
        good = tuple(way for way in ways if way not in bad)
        return (good, bad) if good else (bad, ())
