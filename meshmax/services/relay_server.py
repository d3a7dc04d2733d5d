"""Relays circuits between peers that cannot reach each other: the hop side of libp2p's circuit relay v2.

Rules. Who may ask is said by the owner: strangers, members of our mesh, or both, each with limits and places of their own; others
are refused whatever they ask, so that they learn nothing. core.relay decides the rest. Every circuit has a task of its own that
owns its two streams and nothing else: it copies both ways, at most COPY_BYTES held in each, so a slow reader slows its sender
and nobody else; when either end breaks, or a limit is reached, both of its streams are reset, and when one side says that it
sends no more, that is passed on. Peers with a reservation are pinged, which keeps their connection from counting as idle and
frees the places of those that are gone. Who comes over a relay is refused: circuits do not go over circuits. What is carried is
the peers' own Noise, which we cannot read. Not here: being a client of relays (services.relay_client).
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from functools import partial
from typing import Final, NoReturn

import trio

from meshmax.base.errors import MeshmaxError, PeerGone, RemoteProtocolError
from meshmax.base.ids import PeerId
from meshmax.base.units import KIB
from meshmax.core.relay import MEMBERS_LIMITS, Circuit, Direction, Refusal, Relay, Reservation
from meshmax.core.subnets import ip_of, source_of
from meshmax.ports import Stream, Swarm
from meshmax.services.relay_stream import RelayMessages, is_relayed
from meshmax.telemetry.log import get_logger
from meshmax.telemetry.metrics import CIRCUITS, RELAYED
from meshmax.wire import relay as wire
from meshmax.wire.protocols import PING, RELAY_HOP, RELAY_STOP

REQUEST_TIMEOUT_S: Final = 10.0  # until a request is there, and until a target has answered
COPY_BYTES: Final = 16 * KIB  # read ahead in one direction of one circuit
PING_S: Final = 30.0  # half of what a guest may be idle
PING_TIMEOUT_S: Final = 10.0
PING_BYTES: Final = 32  # of libp2p's ping protocol
MAX_PINGS: Final = 32  # at once

_log = get_logger("relay")
_STATUS: Final[dict[Refusal, wire.Status]] = {
    "reservations": wire.RESERVATION_REFUSED,
    "circuits": wire.RESOURCE_LIMIT_EXCEEDED,
    "rate": wire.RESOURCE_LIMIT_EXCEEDED,
    "no reservation": wire.NO_RESERVATION,
    "itself": wire.PERMISSION_DENIED,
}


class RelayServer:
    """See the module. Made by `open_relay_server`. ``unix_now``: for the ends of reservations, which peers are told."""

    def __init__(
        self,
        swarm: Swarm,
        relay: Relay | None,
        unix_now: Callable[[], float],
        members: Relay | None = None,
        serves_members: Callable[[], bool] = lambda: True,
    ) -> None:
        """``relay``: for strangers, None: not for them. ``members``: for members, as long as ``serves_members()``."""
        self._swarm, self._unix_now = swarm, unix_now
        self.relay, self.members, self._serves_members = relay, members, serves_members

    @property
    def circuits(self) -> int:
        """Open now."""
        return sum(relay.circuits for relay in (self.relay, self.members) if relay is not None)

    def _relay_for(self, peer_id: PeerId) -> Relay | None:
        if self.members is not None and peer_id in self._swarm.connections():
            return self.members if self._serves_members() else self.relay
        return self.relay

    def _may_be_reached(self, relay: Relay, peer_id: PeerId) -> bool:
        """A member's place ends with its membership, as by a revocation, though it may be connected as a guest still."""
        return relay is not self.members or peer_id in self._swarm.connections()

    async def answer(self, stream: Stream) -> None:
        """Serve one hop stream, to the end of its circuit if it becomes one. Raises PeerGone, RemoteProtocolError."""
        asking = RelayMessages(stream)
        with trio.move_on_after(REQUEST_TIMEOUT_S) as scope:
            request = await _request(asking)
        if scope.cancelled_caught:
            raise PeerGone("the peer did not ask in time")
        if request is None:
            await stream.send_all(wire.encode_hop_status(wire.MALFORMED_MESSAGE))
            return
        relay = self._relay_for(stream.peer)
        subnet = source_of(ip_of(stream.address))
        if relay is None or is_relayed(stream):
            await stream.send_all(wire.encode_hop_status(wire.PERMISSION_DENIED))
        elif isinstance(request, wire.Reserve):
            await self._reserve(relay, stream, subnet)
        else:
            await self._connect(relay, asking, subnet, request.peer_id)

    async def _reserve(self, relay: Relay, stream: Stream, subnet: str) -> None:
        now = trio.current_time()
        place = relay.reserve(stream.peer, subnet, now)
        if not isinstance(place, Reservation):
            await stream.send_all(wire.encode_hop_status(_STATUS[place]))
            return
        expires_at_s = int(self._unix_now() + place.expires_s - now)
        reply = wire.encode_hop_status(
            wire.OK, expires_at_s=expires_at_s, addresses=self._swarm.addresses, limit=_limit_of(relay)
        )
        await stream.send_all(reply)

    async def _connect(self, relay: Relay, asking: RelayMessages, subnet: str, target: PeerId) -> None:
        stream = asking.stream
        if not self._may_be_reached(relay, target):
            relay.forget(target)
        circuit = relay.connect(stream.peer, subnet, target, trio.current_time())
        if not isinstance(circuit, Circuit):
            await stream.send_all(wire.encode_hop_status(_STATUS[circuit]))
            return
        CIRCUITS.set(self.circuits)
        try:
            asked = await self._ask_target(relay, stream.peer, target)
            if asked is None:
                await stream.send_all(wire.encode_hop_status(wire.CONNECTION_FAILED))
            else:
                await self._join(relay, circuit, asking, asked)
        finally:
            relay.close(circuit)
            CIRCUITS.set(self.circuits)

    async def _join(self, relay: Relay, circuit: Circuit, asking: RelayMessages, asked: RelayMessages) -> None:
        """The life of a circuit. In order at its end: what was sent last still arrives; else both ends learn of it at once."""
        streams = asked.stream, asking.stream
        in_order = False
        try:
            await asking.stream.send_all(wire.encode_hop_status(wire.OK, limit=_limit_of(relay)))
            in_order = await _carry(circuit, asking, asked)
        finally:
            with trio.CancelScope(shield=True):  # neither blocks for long
                for stream in streams:
                    await (stream.aclose() if in_order else stream.reset())

    async def _ask_target(self, relay: Relay, source: PeerId, target: PeerId) -> RelayMessages | None:
        """The stream to ``target``, which has accepted; None if it did not."""
        stream: Stream | None = None
        accepted = False
        try:
            with trio.move_on_after(REQUEST_TIMEOUT_S):
                stream = await self._swarm.open_stream(target, RELAY_STOP, eager=True)
                await stream.send_all(wire.encode_stop_connect(source, _limit_of(relay)))
                messages = RelayMessages(stream)
                accepted = wire.parse_stop_status(await messages.receive()) == wire.OK
                if accepted:
                    return messages
        except MeshmaxError as error:
            _log.debug("a circuit's target did not accept", target=target, error=error.message)
            if isinstance(error, PeerGone) and stream is None:
                relay.forget(target)  # not connected any more
        finally:
            if stream is not None and not accepted:
                with trio.CancelScope(shield=True):  # does not block
                    await stream.reset()
        return None

    async def run(self) -> NoReturn:
        """Ping who has a place, again and again."""
        limiter = trio.CapacityLimiter(MAX_PINGS)
        while True:
            await trio.sleep(PING_S)
            async with trio.open_nursery() as nursery:
                for relay in (self.relay, self.members):
                    if relay is not None:
                        relay.expire(trio.current_time())
                        for peer_id in relay.reserved():
                            if self._may_be_reached(relay, peer_id):
                                nursery.start_soon(self._ping, relay, relay.place_of(peer_id), limiter)
                            else:
                                relay.forget(peer_id)

    async def _ping(self, relay: Relay, place: Reservation | None, limiter: trio.CapacityLimiter) -> None:
        """Free the place if who has it does not answer, nor asks for it anew meanwhile, as over another connection."""
        if place is None:
            return
        peer_id = place.peer_id
        async with limiter:
            stream: Stream | None = None
            try:
                with trio.move_on_after(PING_TIMEOUT_S) as scope:
                    stream = await self._swarm.open_stream(peer_id, PING)
                    await stream.send_all(bytes(PING_BYTES))
                    await stream.receive_some(PING_BYTES)
                if not scope.cancelled_caught:
                    return
            except PeerGone:
                pass
            except MeshmaxError:
                return  # it answers, and that it does not speak this protocol
            finally:
                if stream is not None:
                    with trio.CancelScope(shield=True):  # does not block
                        await stream.reset()
            if relay.place_of(peer_id) is place:
                relay.forget(peer_id)


def _limit_of(relay: Relay) -> wire.Limit:
    limits = relay.limits
    return wire.Limit(int(limits.duration_s), limits.data_bytes, limits.rate_bytes_per_s)


async def _request(asking: RelayMessages) -> wire.Reserve | wire.Connect | None:
    """None: the peer asked for nothing that there is."""
    try:
        return wire.parse_hop_request(await asking.receive())
    except RemoteProtocolError:
        return None


async def _carry(circuit: Circuit, asking: RelayMessages, asked: RelayMessages) -> bool:
    """Copy both ways until both sides have said that they send no more (True), one breaks, or the circuit is used up."""
    copying = 2
    async with trio.open_nursery() as nursery:

        async def copy(direction: Direction, source: RelayMessages, sink: Stream) -> None:
            nonlocal copying
            if await _copy(circuit, direction, source, sink):
                await sink.send_eof()
                copying -= 1
                if copying:
                    return
            nursery.cancel_scope.cancel()

        async def watch() -> None:
            while True:
                left_s = circuit.deadline() - trio.current_time()
                if left_s <= 0:
                    nursery.cancel_scope.cancel()
                await trio.sleep(max(0.0, left_s))

        nursery.start_soon(_quietly, nursery, partial(copy, "there", asking, asked.stream))
        nursery.start_soon(_quietly, nursery, partial(copy, "back", asked, asking.stream))
        nursery.start_soon(watch)
    return not copying


async def _copy(circuit: Circuit, direction: Direction, source: RelayMessages, sink: Stream) -> bool:
    """Whether ``source`` came to its end; False: the circuit is used up."""
    data, source.ahead = source.ahead, b""
    while True:
        if not data:
            data = await source.stream.receive_some(COPY_BYTES)
        if not data:
            return True
        wait_s = circuit.carry(direction, len(data), trio.current_time())
        if wait_s is None:
            return False
        await trio.sleep(wait_s)
        await sink.send_all(data)
        RELAYED.inc(len(data))
        data = b""


async def _quietly(nursery: trio.Nursery, copy: Callable[[], Awaitable[None]]) -> None:
    """That an end of a circuit went away is how circuits end."""
    try:
        await copy()
    except PeerGone:
        nursery.cancel_scope.cancel()


@asynccontextmanager
async def open_relay_server(
    swarm: Swarm,
    unix_now: Callable[[], float],
    relay: Relay | None = None,
    *,
    strangers: bool = True,
    members: Callable[[], bool] | None = None,
) -> AsyncIterator[RelayServer]:
    """A relay on ``swarm`` until the block is left: for anyone if ``strangers``, for members of our mesh while ``members()``."""
    for_members = Relay(MEMBERS_LIMITS) if members is not None else None
    for_strangers = (relay or Relay()) if strangers else None
    server = RelayServer(swarm, for_strangers, unix_now, for_members, members or (lambda: False))
    swarm.serve(RELAY_HOP, server.answer, to="anyone")
    async with trio.open_nursery() as nursery:
        nursery.start_soon(server.run)
        try:
            yield server
        finally:
            nursery.cancel_scope.cancel()
