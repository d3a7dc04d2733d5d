"""When a circuit of ours is renewed or replaced, and which relays are not to be trusted with one for now.

Rules. A circuit has a life: so many seconds, so many bytes each way. At RENEW_SHARE of either, whoever dialled it dials another
one beside it: new streams go over that one, and what was begun on the first has the rest of its life to end in. One that breaks
is replaced at once, over another relay if there is one; after REPLACE_S it is left to whoever wants to be connected. A circuit
that either end has closed in order is not replaced. A relay that breaks SHORT_LIVES circuits in a row within SHORT_S each is
shunned, longer each time. Time is passed in. Not here: the relay's side (core.relay), streams (services.relay_client).
"""

from __future__ import annotations

import math
from typing import Final, Literal, TypeAlias

import msgspec

from meshmax.base.ids import PeerId
from meshmax.base.units import KIB
from meshmax.core.backoff import Random, backoff_s

MAX_CIRCUITS: Final = 64  # of ours, either way; beyond it neighbours are too many to be all behind relays
MAX_CIRCUITS_PER_PEER: Final = 4  # as many as a relay allows: a new one, an old one, and both sides dialled at once
MAX_BROUGHT: Final = 24  # by one relay; ours bring 8 to a peer, and one that invents guests leaves room for the others'
RENEW_SHARE: Final = 0.5  # of its life, so that a stream has as much again: a quarter of an hour as relays usually are
RETRY_FIRST_S, RETRY_MOST_S = 1.0, 60.0  # pauses of renewals that fail
REPLACE_S: Final = 15.0  # for how long a broken one is tried to be replaced
SHORT_S: Final = 5.0
SHORT_LIVES: Final = 3
SHUN_FIRST_S, SHUN_MOST_S = 60.0, 3600.0
MAX_SHUNNED: Final = 256  # relays whose conduct is remembered
RATE_BYTES_PER_S: Final = 128 * KIB  # each way, of a circuit whose relay does not tell: what our relays give at least

Direction = Literal["in", "out"]


class Life(msgspec.Struct, frozen=True):
    """What one circuit may carry: seconds in all, bytes each way; 0: no limit."""

    duration_s: float = 0.0
    data_bytes: int = 0


class Connect(msgspec.Struct, frozen=True):
    """Dial ``peer_id`` over ``relay``, or over any other one first if it was lost there: answered by `on_connect`."""

    peer_id: PeerId
    relay: PeerId
    lost: bool


Action: TypeAlias = Connect


class Circuit:
    """One that is open."""

    __slots__ = ("carried", "direction", "life", "opened_s", "peer_id", "relay", "renew_s", "renewed")

    def __init__(self, peer_id: PeerId, relay: PeerId, direction: Direction, life: Life, now: float) -> None:
        self.peer_id, self.relay, self.direction, self.life, self.opened_s = peer_id, relay, direction, life, now
        self.carried: dict[Direction, int] = {"in": 0, "out": 0}
        self.renew_s = now + RENEW_SHARE * life.duration_s if life.duration_s else math.inf
        self.renewed = direction == "in"  # whoever dialled it renews it

    def carry(self, direction: Direction, size_bytes: int) -> bool:
        """Bytes passed; whether that makes a look at `Circuits.deadline` due."""
        self.carried[direction] += size_bytes
        if self.renewed or not self.life.data_bytes or self.carried[direction] < RENEW_SHARE * self.life.data_bytes:
            return False
        self.renew_s = self.opened_s
        return True


class _Wanted:
    """A peer that is to be dialled over a relay."""

    __slots__ = ("asked", "ends_s", "failures", "lost", "relay", "retry_s")

    def __init__(self, relay: PeerId, lost: bool, now: float) -> None:
        self.relay, self.lost, self.retry_s = relay, lost, now
        self.ends_s = now + REPLACE_S if lost else math.inf
        self.failures = 0
        self.asked = False


class Circuits:
    """The circuits of one node that end at it, and the conduct of relays."""

    __slots__ = ("_conduct", "_open", "_random", "_wanted")

    def __init__(self, random: Random) -> None:
        self._random = random
        self._open: dict[Circuit, None] = {}
        self._wanted: dict[PeerId, _Wanted] = {}
        self._conduct: dict[PeerId, tuple[int, int, float]] = {}  # lives cut short, times shunned, until when

    def __len__(self) -> int:
        return len(self._open)

    def room_for(self, peer_id: PeerId, brought_by: PeerId | None = None) -> bool:
        """Whether one more circuit with this peer may be opened. ``brought_by``: the relay that wants to bring it to us."""
        brought = sum(circuit.direction == "in" and circuit.relay == brought_by for circuit in self._open)
        if brought >= MAX_BROUGHT:
            return False
        own = sum(circuit.peer_id == peer_id for circuit in self._open)
        return own < MAX_CIRCUITS_PER_PEER and len(self._open) < MAX_CIRCUITS

    def over(self, relay: PeerId) -> tuple[Circuit, ...]:
        """Those that are open over this relay."""
        return tuple(circuit for circuit in self._open if circuit.relay == relay)

    def shunned(self, relay: PeerId, now: float) -> float:
        """For how many seconds the relay is not to be used; 0.0: it may."""
        return max(0.0, self._conduct.get(relay, (0, 0, 0.0))[2] - now)

    # --- what happens ------------------------------------------------------------------------------------------------

    def on_opened(self, peer_id: PeerId, relay: PeerId, direction: Direction, life: Life, now: float) -> Circuit:
        """A circuit stands; it counts until `on_ended`."""
        circuit = Circuit(peer_id, relay, direction, life, now)
        self._open[circuit] = None
        return circuit

    def on_ended(self, circuit: Circuit, broken: bool, now: float) -> None:
        """It is over. ``broken``: neither by us nor in order by the peer."""
        if circuit not in self._open:
            return
        del self._open[circuit]
        if not broken:
            return
        if now - circuit.opened_s >= SHORT_S:
            self._conduct.pop(circuit.relay, None)  # it does what it should: forgiven
        else:
            self.on_cut_short(circuit.relay, now)
        others = any(other.peer_id == circuit.peer_id for other in self._open)
        if circuit.direction == "out" and not others:
            self._wanted[circuit.peer_id] = _Wanted(circuit.relay, True, now)

    def on_cut_short(self, relay: PeerId, now: float) -> None:
        """The relay broke a circuit that had hardly begun."""
        short, times, until_s = self._conduct.pop(relay, (0, 0, 0.0))
        short += 1
        if short >= SHORT_LIVES:
            short, times = 0, times + 1
            until_s = now + backoff_s(times, SHUN_FIRST_S, SHUN_MOST_S, self._random)
        self._conduct[relay] = short, times, until_s
        if len(self._conduct) > MAX_SHUNNED:
            del self._conduct[next(iter(self._conduct))]

    def on_connect(self, peer_id: PeerId, done: bool, now: float) -> None:
        """What a Connect came to. ``done``: there is a circuit, or none is wanted any more."""
        wanted = self._wanted.get(peer_id)
        if wanted is None or not wanted.asked:
            return  # a circuit broke since, and is to be replaced: what that Connect came to says nothing of it
        wanted.asked = False
        wanted.failures += 1
        wanted.retry_s = now + backoff_s(wanted.failures, RETRY_FIRST_S, RETRY_MOST_S, self._random)
        if done or wanted.retry_s >= wanted.ends_s:
            del self._wanted[peer_id]

    def tick(self, now: float) -> list[Action]:
        """Time passed, or bytes did: see `deadline`."""
        for circuit in self._open:
            if not circuit.renewed and now >= circuit.renew_s:
                circuit.renewed = True
                self._wanted.setdefault(circuit.peer_id, _Wanted(circuit.relay, False, now))
        actions: list[Action] = []
        for peer_id, wanted in self._wanted.items():
            if not wanted.asked and now >= wanted.retry_s:
                wanted.asked = True
                actions.append(Connect(peer_id, wanted.relay, wanted.lost))
        return actions

    def deadline(self) -> float | None:
        """When `tick` is due; None: not before something happens."""
        times = [circuit.renew_s for circuit in self._open if not circuit.renewed and circuit.renew_s < math.inf]
        times += [wanted.retry_s for wanted in self._wanted.values() if not wanted.asked]
        return min(times, default=None)
