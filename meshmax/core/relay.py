"""Who may use this node as a relay, and how much: reservations, circuits, and what flows through them.

Rules. A peer that wants to be reached through us reserves a place for TTL_S, of which there are `RelayLimits.reservations`, some
for one subnet; asking again renews it. A circuit joins two peers, of which the target has a reservation. Circuits are
bounded in all, by peer (at either end), by subnet of the one who asks, and by both. Each has a life of its own: so many seconds,
so many bytes each way, at a rate; ending one changes nothing for any other, those of the same peers included. Requests are
paced by peer and subnet. A peer that does not answer any more loses its reservation (`forget`), not the circuits that are
open. Time is passed in. Not here: messages (wire.relay), streams (services.relay_server).
"""

from __future__ import annotations

from collections import Counter
from typing import Final, Literal, TypeVar

import msgspec

from meshmax.base.ids import PeerId
from meshmax.base.units import KIB, MIB
from meshmax.core.bucket import Bucket
from meshmax.core.rates import Rates

TTL_S: Final = 3600.0  # of a reservation, as usual among libp2p's relays
REQUESTS_PER_S, REQUESTS_BURST = (
    0.5,
    16.0,
)  # of one peer; an honest one renews every half hour and connects now and then
SUBNET_PER_S, SUBNET_BURST = 5.0, 100.0  # of a site behind one NAT
TOTAL_PER_S: Final = 100.0  # requests in all; a few percent of one core

K = TypeVar("K")
Direction = Literal["there", "back"]  # from the one who asked for the circuit, and to it
Refusal = Literal["reservations", "circuits", "no reservation", "rate", "itself"]


class RelayLimits(msgspec.Struct, frozen=True):
    """What a relay gives. Circuits carry control messages and prompts, no models: those would use it up for everybody."""

    reservations: int = 512  # one each of the peers that are connected to a bootstrap node
    reservations_per_subnet: int = 64
    circuits: int = 64  # at once; at most 8 MiB/s each way in all
    circuits_per_peer: int = 8
    circuits_per_subnet: int = 16  # asked for from one
    circuits_per_pair: int = 4  # from one subnet to one peer, so that nobody alone keeps others from reaching it
    duration_s: float = 1800.0  # of one circuit; peers that still need it ask for another
    data_bytes: int = 64 * MIB  # in each direction of one circuit
    rate_bytes_per_s: int = 128 * KIB  # likewise; above it a sender waits, less than five seconds for a full window
    idle_s: float = 120.0  # without a byte either way; heartbeats come every few seconds


# For members of our own mesh, who are few and known: more for each, and less in all than a whole uplink.
MEMBERS_LIMITS: Final = RelayLimits(
    reservations=64,
    reservations_per_subnet=64,
    circuits=16,
    circuits_per_subnet=16,
    data_bytes=256 * MIB,
    rate_bytes_per_s=256 * KIB,
)


class Reservation(msgspec.Struct):
    """A place that ``peer_id`` has until ``expires_s``."""

    peer_id: PeerId
    subnet: str
    expires_s: float


class Circuit:
    """One circuit that is open; ended with `Relay.close`."""

    __slots__ = ("_buckets", "_limits", "_moved_s", "carried", "ends_s", "source", "subnet", "target")

    def __init__(self, source: PeerId, subnet: str, target: PeerId, limits: RelayLimits, now: float) -> None:
        self.source, self.subnet, self.target = source, subnet, target
        self.ends_s = now + limits.duration_s
        self.carried: dict[Direction, int] = {"there": 0, "back": 0}
        self._limits, self._moved_s = limits, now
        self._buckets: dict[Direction, Bucket] = {
            "there": Bucket(limits.rate_bytes_per_s),
            "back": Bucket(limits.rate_bytes_per_s),
        }

    def carry(self, direction: Direction, size_bytes: int, now: float) -> float | None:
        """Seconds to wait before these bytes may go on; None: they may not, the circuit is used up."""
        self.carried[direction] += size_bytes
        if self.carried[direction] > self._limits.data_bytes or now >= self.ends_s:
            return None
        self._moved_s = now
        return self._buckets[direction].reserve(size_bytes, now)

    def deadline(self) -> float:
        """When it ends if nothing moves."""
        return min(self.ends_s, self._moved_s + self._limits.idle_s)


class Relay:
    """Reservations and circuits of one node."""

    __slots__ = ("_circuits", "_pairs", "_peers", "_rates", "_reservations", "_subnet_rates", "_subnets", "limits")

    def __init__(self, limits: RelayLimits = RelayLimits()) -> None:  # noqa: B008  frozen
        self.limits = limits
        self._reservations: dict[PeerId, Reservation] = {}
        self._circuits: set[Circuit] = set()
        self._peers: Counter[PeerId] = Counter()  # circuits by peer, at either end
        self._subnets: Counter[str] = Counter()  # circuits by the asker's subnet
        self._pairs: Counter[tuple[str, PeerId]] = Counter()  # by the asker's subnet and the target
        self._rates = Rates(REQUESTS_PER_S, REQUESTS_BURST, TOTAL_PER_S)
        self._subnet_rates = Rates(SUBNET_PER_S, SUBNET_BURST, TOTAL_PER_S)

    # --- reservations ------------------------------------------------------------------------------------------------

    def reserve(self, peer_id: PeerId, subnet: str, now: float) -> Reservation | Refusal:
        """A place for ``peer_id``, or one more time the one that it has."""
        if not self._paced(peer_id, subnet, now):
            return "rate"
        self.expire(now)
        known = self._reservations.pop(peer_id, None)
        others = sum(place.subnet == subnet for place in self._reservations.values())
        if known is None and (
            len(self._reservations) >= self.limits.reservations or others >= self.limits.reservations_per_subnet
        ):
            return "reservations"
        place = self._reservations[peer_id] = Reservation(peer_id, subnet, now + TTL_S)
        return place

    def forget(self, peer_id: PeerId) -> None:
        """The peer is gone: its place is free. No error if it had none."""
        self._reservations.pop(peer_id, None)

    def expire(self, now: float) -> None:
        """Free the places whose time is over. They stand in the order in which they end."""
        while self._reservations:
            oldest = next(iter(self._reservations.values()))
            if oldest.expires_s > now:
                return
            del self._reservations[oldest.peer_id]

    def place_of(self, peer_id: PeerId) -> Reservation | None:
        """The peer's place, another one each time that it has asked; None: it has none."""
        return self._reservations.get(peer_id)

    def reserved(self) -> tuple[PeerId, ...]:
        """Who has a place."""
        return tuple(self._reservations)

    # --- circuits ----------------------------------------------------------------------------------------------------

    def connect(self, source: PeerId, subnet: str, target: PeerId, now: float) -> Circuit | Refusal:
        """A circuit from ``source`` to ``target``; it counts from now on until `close`."""
        if not self._paced(source, subnet, now):
            return "rate"
        self.expire(now)
        if source == target:
            return "itself"
        if target not in self._reservations:
            return "no reservation"
        full = (
            len(self._circuits) >= self.limits.circuits
            or max(self._peers[source], self._peers[target]) >= self.limits.circuits_per_peer
            or self._subnets[subnet] >= self.limits.circuits_per_subnet
            or self._pairs[subnet, target] >= self.limits.circuits_per_pair
        )
        if full:
            return "circuits"
        circuit = Circuit(source, subnet, target, self.limits, now)
        self._circuits.add(circuit)
        self._count(circuit, 1)
        return circuit

    def close(self, circuit: Circuit) -> None:
        """This circuit, and no other one, is over; idempotent."""
        if circuit in self._circuits:
            self._circuits.discard(circuit)
            self._count(circuit, -1)

    @property
    def circuits(self) -> int:
        """How many are open."""
        return len(self._circuits)

    def _count(self, circuit: Circuit, by: int) -> None:
        _add_to(self._peers, circuit.source, by)
        _add_to(self._peers, circuit.target, by)
        _add_to(self._subnets, circuit.subnet, by)
        _add_to(self._pairs, (circuit.subnet, circuit.target), by)

    def _paced(self, peer_id: PeerId, subnet: str, now: float) -> bool:
        return self._subnet_rates.take(subnet, now) and self._rates.take(peer_id, now)


def _add_to(counter: Counter[K], key: K, by: int) -> None:
    counter[key] += by
    if not counter[key]:
        del counter[key]  # strangers choose the keys
