"""The peer's side of circuit relay v2: keeps places at relays, dials members over relays, takes circuits that relays bring.

Rules. Circuits are taken only from relays at which we hold a place, a bounded number of them. What comes out of a circuit is
a byte stream that the swarm adopts: Noise proves who is at its other end, whatever the relay said, and admission that it is
of our mesh. A relay that is none of ours is dialled where others say that it is, but never at loopback and the like, nor at a
port of a system service. A relay that we use is pinged: one that is gone or frozen costs us its place, and its circuits are
broken at once, so that they are made anew over another. Circuits are renewed before they end. Not here: when and where
(core.reservations, core.circuits), whom to connect to (the connector), being a relay (services.relay_server).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Final, NoReturn

import trio

from meshmax.base.errors import ConnectError, InvalidRequest, MeshmaxError, NotAMember, PeerGone, RemoteProtocolError
from meshmax.base.ids import PeerId
from meshmax.core.backoff import Random
from meshmax.core.candidates import leads_here, may_lead_elsewhere
from meshmax.core.circuits import Circuits, Connect, Direction, Life
from meshmax.core.rates import Rates
from meshmax.core.reachability import scope_of
from meshmax.core.reservations import MAX_TTL_S, Ask, Leave, RelayPlace, Reservations
from meshmax.core.reservations import Action as PlaceAction
from meshmax.core.subnets import ip_of
from meshmax.net.addresses import Endpoint, is_only_here, multiaddr_of, parse_circuit, parse_endpoint
from meshmax.ports import CountsStreams, Stream, Swarm
from meshmax.services.relay_pings import RelayPings
from meshmax.services.relay_stream import CircuitBytes, RelayMessages
from meshmax.telemetry.log import get_logger
from meshmax.wire import relay as wire
from meshmax.wire.multiaddr import try_decode_multiaddr
from meshmax.wire.protocols import RELAY_HOP, RELAY_STOP

CHECK_S: Final = 5.0  # between looks at who may be asked; whoever is told of changes calls look_again
ASK_S: Final = 10.0  # for a place: dial, ask, answer
PATIENCE_S: Final = 1.5  # of these, once our network is another: then we ask from there
REQUEST_S: Final = 5.0  # for a relay to say what circuit it brings
ADOPT_S: Final = 10.0  # for Noise, Yamux and admission over a circuit
OFFERS_PER_S, OFFERS_BURST, OFFERS_TOTAL_PER_S = 2.0, 16.0, 10.0  # circuits that one relay may bring, and all of them

_log = get_logger("relay")
_WHY: Final[dict[int, str]] = {
    wire.RESERVATION_REFUSED: "it has no place left",
    wire.RESOURCE_LIMIT_EXCEEDED: "it carries as much as it can",
    wire.PERMISSION_DENIED: "it does not relay for us",
    wire.CONNECTION_FAILED: "the peer did not answer it",
    wire.NO_RESERVATION: "the peer has no place there",
}


class RelayClient:
    """See the module. Made by `open_relay_client`; satisfies ports.Relays."""

    def __init__(
        self,
        swarm: Swarm,
        places: Callable[[], Sequence[RelayPlace]],
        wanted: Callable[[], bool],
        unix_now: Callable[[], float],
        random: Random,
        nursery: trio.Nursery,
        ways: Callable[[PeerId], Sequence[str]],
        member: Callable[[PeerId], bool],
    ) -> None:
        self._swarm, self._places, self._wanted, self._unix_now = swarm, places, wanted, unix_now
        self._nursery, self._ways, self._member = nursery, ways, member
        self._reservations = Reservations(random)
        self.circuits = Circuits(random)
        self.on_circuit: Callable[[], None] = lambda: None  # called when one is on its way, either way
        self._offers = Rates(OFFERS_PER_S, OFFERS_BURST, OFFERS_TOTAL_PER_S)
        self._watchers: list[Callable[[], None]] = []
        self._told: tuple[object, ...] = ()
        self._wake = trio.Event()
        self._asks: dict[PeerId, trio.CancelScope] = {}  # for places: the last of each relay that is under way
        self._pings = RelayPings(swarm, nursery, self.uses, self._on_unanswered)
        self._uses: Counter[PeerId] = Counter()  # open circuits, and those on their way

    # --- ports.Relays ------------------------------------------------------------------------------------------------

    @property
    def relays(self) -> tuple[PeerId, ...]:
        """See ports.Relays."""
        return self._reservations.relays

    @property
    def addresses(self) -> tuple[str, ...]:
        """See ports.Relays."""
        return tuple(f"{text}/p2p/{self._swarm.peer_id}" for text in self._reservations.addresses)

    def watch(self, on_change: Callable[[], None]) -> None:
        """See ports.Relays."""
        self._watchers.append(on_change)

    async def connect(self, peer_id: PeerId, relay: PeerId | str, *, guest: bool = False) -> None:
        """See ports.Relays."""
        place = self._place_of(peer_id, relay)
        if peer_id == self._swarm.peer_id or place.peer_id in (peer_id, self._swarm.peer_id):
            raise ConnectError("a relay is a third peer")
        where = f"{(place.addresses or ('',))[0]}/p2p/{place.peer_id}/p2p-circuit"
        try:
            await self._connect(peer_id, place, guest)
        except NotAMember:
            raise
        except MeshmaxError as error:
            raise ConnectError(attempts=[(where[:200], "relay", error.message)]) from error

    # --- for meshmax.node --------------------------------------------------------------------------------------------

    def look_again(self) -> None:
        """Our network or our mesh has changed: what failed may work now. Cheap, never raises."""
        self._reservations.on_network_change()
        for scope in self._asks.values():
            scope.deadline = min(scope.deadline, trio.current_time() + PATIENCE_S)
        self.doubt()
        self.check()

    def doubt(self) -> None:
        """Connections may be dead, since others are: ping the relays in use at once. Cheap, never raises."""
        self._pings.doubt()

    def check(self) -> None:
        """Whether places are wanted, or who may be asked, may be another now. Cheap, never raises."""
        self._perform(self._reservations.on_candidates(self._candidates(), trio.current_time()))

    def uses(self, peer_id: PeerId) -> bool:
        """Whether the connection to this peer serves us as one to a relay, and must stay."""
        return peer_id in self._reservations.relays or bool(self._uses[peer_id])

    # --- places ------------------------------------------------------------------------------------------------------

    async def run(self) -> NoReturn:
        """Keep places and circuits, until cancelled."""
        check_s = trio.current_time()
        while True:
            now = trio.current_time()
            if now >= check_s:
                check_s = now + CHECK_S
            self._act(self._reservations.on_candidates(self._candidates(), now))
            for action in self.circuits.tick(now):
                self._nursery.start_soon(self._reconnect, action)
            due = [s for s in (self._reservations.deadline(), self.circuits.deadline(), check_s) if s is not None]
            with trio.move_on_at(min(due)):
                await self._wake.wait()
            self._wake = trio.Event()

    def _candidates(self) -> list[RelayPlace]:
        if not self._wanted():
            return []
        now, own = trio.current_time(), self._swarm.peer_id
        return [
            place for place in self._places() if place.peer_id != own and not self.circuits.shunned(place.peer_id, now)
        ]

    def _perform(self, actions: Sequence[PlaceAction]) -> None:
        self._act(actions)
        self._stir()

    def _act(self, actions: Sequence[PlaceAction]) -> None:
        for action in actions:
            match action:
                case Ask(place=place):
                    self._nursery.start_soon(self._reserve, place)
                case Leave(peer_id=peer_id):
                    _log.info("relay left", relay=peer_id)
                    self._nursery.start_soon(self._leave, peer_id)
        told = self.relays, self.addresses
        if told != self._told:
            self._told = told
            for watcher in self._watchers:
                watcher()

    def _stir(self) -> None:
        self._wake.set()

    async def _reserve(self, place: RelayPlace) -> None:
        why, relay = f"no answer within {ASK_S:g} s", place.peer_id
        status: wire.RelayStatus | None = None
        with trio.move_on_after(ASK_S) as scope:
            self._asks[relay] = scope
            try:
                status = await self._ask_for_place(place)
            except MeshmaxError as error:
                why = error.message
        now, last = trio.current_time(), self._asks.get(relay) is scope
        if last:
            del self._asks[relay]
        if status is not None and status.status == wire.OK:
            ttl_s = status.expires_at_s - self._unix_now() if status.expires_at_s else MAX_TTL_S
            first = relay not in self.relays
            told = _told_addresses(relay, status, self._seen_at(relay))
            self._perform(self._reservations.on_reserved(relay, ttl_s, told, now))
            if first and relay in self.relays:
                _log.info("relay keeps a place for us", relay=relay)
            self._pings.keep(relay)
            return
        if status is not None:
            why = _WHY.get(status.status, f"it answered with status {status.status}")
        _log.info("relay keeps no place for us", relay=relay, why=why)
        if last:  # else it was asked once more since, over another connection, and that counts
            self._perform(self._reservations.on_failed(relay, now))

    def _seen_at(self, relay: PeerId) -> str:
        """The IP address at which we reach the relay; '' where there is none."""
        view = self._swarm.connections().get(relay)
        return ip_of(view.address) if view is not None else ""

    async def _ask_for_place(self, place: RelayPlace) -> wire.RelayStatus:
        await self._reach(place)
        stream = await self._swarm.open_stream(place.peer_id, RELAY_HOP)
        try:
            await stream.send_all(wire.encode_reserve())
            return wire.parse_hop_status(await RelayMessages(stream).receive())
        finally:
            with trio.CancelScope(shield=True):  # does not block
                await stream.aclose()

    async def _reach(self, place: RelayPlace) -> None:
        """Be connected to the relay, as a member if it is one, else as a guest."""
        view = self._swarm.connections().get(place.peer_id)
        if view is None:
            await self._swarm.dial(place.peer_id, place.addresses, guest=not place.member)
        elif view.path == "relay":
            raise ConnectError("it is itself reached over a relay")

    async def _leave(self, peer_id: PeerId) -> None:
        """Let the connection of a guest go if nothing else goes over it; it would stay for as long as the place does."""
        streams = self._swarm.streams(peer_id) if isinstance(self._swarm, CountsStreams) else 0
        others = streams > (peer_id in self._pings)  # those who use it end it when they have done, or the relay does
        if peer_id not in self._swarm.connections() and not self.uses(peer_id) and not others:
            await self._swarm.disconnect(peer_id)

    # --- relays in use -----------------------------------------------------------------------------------------------

    async def _on_unanswered(self, relay: PeerId, frozen: bool) -> None:
        """Its connection ended, does not answer any more (``frozen``), or is of no more use."""
        if self.uses(relay):
            _log.info("relay lost", relay=relay, why="it does not answer" if frozen else "its connection ended")
        if frozen:
            self.doubt()  # what took this connection may have taken others
            await self._swarm.disconnect(relay)
        on_lost = self._reservations.on_silent if frozen else self._reservations.on_lost
        self._perform(on_lost(relay, trio.current_time()))

    # --- circuits that we dial ---------------------------------------------------------------------------------------

    def _place_of(self, peer_id: PeerId, relay: PeerId | str) -> RelayPlace:
        if "/" not in relay:
            known = self._reservations.place_of(PeerId(relay))
            return known or RelayPlace(PeerId(relay), (), self._member(PeerId(relay)))
        try:
            circuit = parse_circuit(relay)
        except InvalidRequest as error:
            raise ConnectError(error.message) from None
        over = circuit.relay.peer_id
        if over is None or circuit.target not in (None, peer_id):
            raise ConnectError(f"'{relay[:200]}' leads to another peer")
        address = relay.partition("/p2p/")[0]
        known = self._reservations.place_of(over)
        if known is None and over not in self._swarm.connections() and not self._may_dial(circuit.relay):
            raise ConnectError(f"'{relay[:200]}' names a relay where none may be")
        addresses = (known.addresses if known else ()) or (address,)  # what we know ourselves before what others say
        return RelayPlace(over, addresses, known.member if known else self._member(over))

    def _may_dial(self, relay: Endpoint) -> bool:
        """Whether others' word may have us dial a relay there; see the module. Who listens on loopback alone lives there."""
        if is_only_here(self._swarm.addresses):
            return True
        return not leads_here(relay.host) if relay.name else may_lead_elsewhere(relay.host, relay.port)

    async def _connect(self, peer_id: PeerId, place: RelayPlace, guest: bool) -> None:
        relay = place.peer_id
        if pause_s := self.circuits.shunned(relay, trio.current_time()):
            raise ConnectError(f"it has cut circuits short again and again; tried again in {pause_s:.0f} s")
        if not self.circuits.room_for(peer_id):
            raise ConnectError("there are as many relayed connections as this peer keeps")
        self._uses[relay] += 1
        self.on_circuit()
        try:
            await self._reach(place)
            messages, limit = await self._ask_for_circuit(peer_id, relay)
            byte_stream = self._open(messages, limit, peer_id, "out", renewed=not guest)
            await self._adopt(byte_stream, relay, peer_id, "out", guest)
        finally:
            self._unuse(relay)

    async def _ask_for_circuit(self, peer_id: PeerId, relay: PeerId) -> tuple[RelayMessages, wire.Limit]:
        stream = await self._swarm.open_stream(relay, RELAY_HOP, eager=True)
        connected = False
        try:
            messages = RelayMessages(stream)
            await stream.send_all(wire.encode_connect(peer_id))
            status = wire.parse_hop_status(await messages.receive())
            if status.status != wire.OK:
                raise ConnectError(_WHY.get(status.status, f"it answered with status {status.status}"))
            connected = True
            return messages, status.limit
        except PeerGone:
            if relay in self._pings:  # its connection stands, as far as we know
                self.circuits.on_cut_short(relay, trio.current_time())
            raise
        finally:
            if not connected:
                with trio.CancelScope(shield=True):  # does not block
                    await stream.reset()

    def _open(
        self, messages: RelayMessages, limit: wire.Limit, peer_id: PeerId, direction: Direction, renewed: bool = True
    ) -> CircuitBytes:
        """A circuit's byte stream; a task of its own ends its stream after it was closed. ``renewed``: it is to be kept up."""
        relay = messages.stream.peer
        life = Life(limit.duration_s, limit.data_bytes) if renewed else Life()
        circuit = self.circuits.on_opened(peer_id, relay, direction, life, trio.current_time())

        def carried(way: Direction, size_bytes: int) -> None:
            if circuit.carry(way, size_bytes):
                self._stir()

        byte_stream = CircuitBytes(messages, limit.rate_bytes_per_s, carried)

        async def live() -> None:
            try:
                await byte_stream.closed.wait()
            finally:
                with trio.CancelScope(shield=True):  # neither blocks
                    await (messages.stream.reset() if byte_stream.broken else messages.stream.aclose())
                self._unuse(relay)
                self.circuits.on_ended(circuit, byte_stream.broken, trio.current_time())
                self._stir()

        self._uses[relay] += 1
        self._nursery.start_soon(live)
        self._pings.keep(relay)
        return byte_stream

    async def _adopt(
        self, byte_stream: CircuitBytes, relay: PeerId, peer_id: PeerId, direction: Direction, guest: bool = False
    ) -> None:
        address = f"{multiaddr_of(*byte_stream.remote)}/p2p/{relay}/p2p-circuit"
        try:
            await self._swarm.adopt(byte_stream, peer_id, direction, "relay", address, guest=guest)
        except NotAMember:
            raise  # the swarm ends it when both sides have read why
        except BaseException:
            byte_stream.close()
            raise

    def _unuse(self, relay: PeerId) -> None:
        self._uses[relay] -= 1
        if self._uses[relay] <= 0:
            del self._uses[relay]

    async def _reconnect(self, action: Connect) -> None:
        """Renew or replace a circuit."""
        peer_id, done = action.peer_id, False
        view = self._swarm.connections().get(peer_id)
        if not self._wanted() or (view is not None and view.path != "relay"):
            done = True  # there is a better path, or none over relays is wanted any more
        else:
            for relay in self._ways_to(action):
                with trio.move_on_after(ASK_S):
                    try:
                        await self.connect(peer_id, relay)
                        done = True
                        break
                    except MeshmaxError as error:
                        _log.debug("no circuit", peer=peer_id, error=error.message)
        self.circuits.on_connect(peer_id, done, trio.current_time())
        self._stir()

    def _ways_to(self, action: Connect) -> list[PeerId | str]:
        """Relays over which the peer may be reached, the best last if the circuit over it was lost."""
        others: list[PeerId | str] = [
            way for way in self._ways(action.peer_id) if f"/p2p/{action.relay}/p2p-circuit" not in way
        ]
        return [*others, action.relay] if action.lost else [action.relay, *others]

    # --- circuits that relays bring ----------------------------------------------------------------------------------

    async def answer(self, stream: Stream) -> None:
        """Take a circuit, to its end. Raises RemoteProtocolError, PeerGone."""
        messages = RelayMessages(stream)
        with trio.move_on_after(REQUEST_S) as scope:
            request = wire.parse_stop_connect(await messages.receive())
        if scope.cancelled_caught:
            raise RemoteProtocolError("the relay did not say whom it connects us with")
        status = self._judge(stream.peer, request.peer_id)
        await stream.send_all(wire.encode_stop_status(status))
        if status != wire.OK:
            return
        self.on_circuit()
        byte_stream = self._open(messages, request.limit, request.peer_id, "in")
        with trio.move_on_after(ADOPT_S) as scope:
            try:
                await self._adopt(byte_stream, stream.peer, request.peer_id, "in", guest=True)
            except MeshmaxError as error:
                _log.debug("a circuit was not adopted", peer=request.peer_id, relay=stream.peer, error=error.message)
        if scope.cancelled_caught:
            byte_stream.close()
        await byte_stream.closed.wait()

    def _judge(self, relay: PeerId, source: PeerId) -> wire.Status:
        if relay not in self.relays or source in (relay, self._swarm.peer_id):
            return wire.PERMISSION_DENIED
        taken = self.circuits.room_for(source, relay) and self._offers.take(relay, trio.current_time())
        return wire.OK if taken else wire.RESOURCE_LIMIT_EXCEEDED


def _told_addresses(relay: PeerId, status: wire.RelayStatus, seen_at: str) -> list[str]:
    """The addresses that the relay says it has, without /p2p, as far as others may be told of them.

    What is nearer than ``seen_at``, where we reach it ourselves, leads others to machines of their own.
    """
    found = []
    for raw in status.addresses:
        text = try_decode_multiaddr(raw)
        try:
            endpoint = parse_endpoint(text or "")
        except InvalidRequest:
            continue
        if endpoint.name or scope_of(endpoint.host) < scope_of(seen_at):
            continue
        if scope_of(seen_at) and not may_lead_elsewhere(endpoint.host, endpoint.port):
            continue
        if text and endpoint.peer_id in (None, relay):
            found.append(text.partition("/p2p/")[0])
    return found


@asynccontextmanager
async def open_relay_client(
    swarm: Swarm,
    places: Callable[[], Sequence[RelayPlace]],
    wanted: Callable[[], bool],
    unix_now: Callable[[], float],
    random: Random,
    ways: Callable[[PeerId], Sequence[str]] = lambda peer_id: (),
    member: Callable[[PeerId], bool] = lambda peer_id: False,
) -> AsyncIterator[RelayClient]:
    """A relay client on ``swarm``, until the block is left.

    ``places``: where a place may be had, the preferred first; ``wanted``: whether any is, and relayed connections are kept up.
    ``ways``: circuit multiaddrs at which a member is said to be reached. ``member``: whether a peer is one of our mesh, as far
    as is known, and thus a relay to be dialled as such.
    """
    async with trio.open_nursery() as nursery:
        client = RelayClient(swarm, places, wanted, unix_now, random, nursery, ways, member)
        swarm.serve(RELAY_STOP, client.answer, to="anyone")
        nursery.start_soon(client.run)
        try:
            yield client
        finally:
            nursery.cancel_scope.cancel()
