"""Keeps knowing where we stand: asks bootstrap nodes, relays in use and neighbours outside, now and then and on changes.

A look has two halves: visits (how do you see me, what do you serve: `Observer`, with a voucher each), then, by those that
answered, the questions of services.nat_probe side by side. It takes two seconds, five where somebody is slow, and nobody waits
for it: what is known is read from here at any time. Bootstrap nodes are visited as a guest; a connection that answers is left
to them to end. Whether UDP is blocked is remembered for each network, so that who comes back to one knows at once. Not here:
what follows from answers and when to look (core.reachability).
"""

from __future__ import annotations

import ipaddress
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Final, NoReturn

import msgspec
import trio

from meshmax.base.errors import ManifestInvalid, MeshmaxError, RemoteProtocolError
from meshmax.base.ids import PeerId
from meshmax.base.model import Signed
from meshmax.base.reachability import PortMapping, Reachability, ReachState
from meshmax.core.networks import BlockedNetworks, network_of
from meshmax.core.reachability import DialledBack, FilterSeen, Look, MappedSeen, SeenFrom, Whereabouts, scope_of
from meshmax.net.links import is_worse
from meshmax.ports import ConnectionView, Probes, Swarm, SwarmEvent
from meshmax.services.nat_probe import Observer, dial_back, filtering, tcp_mapping, udp_mapping
from meshmax.services.observe import ask_observer, ip_behind
from meshmax.telemetry.isolate import isolate
from meshmax.telemetry.log import get_logger
from meshmax.wire import observe as wire
from meshmax.wire.voucher import decode_voucher, verify_voucher

MAX_BOOTSTRAP: Final = 4  # visited in one look; a majority of four is three
MAX_NEIGHBOURS: Final = 3  # members outside that are asked besides
MAX_OBSERVERS: Final = 12  # whose last answers are kept
VISIT_S: Final = 5.0  # for all visits of a look
STALE_S: Final = 2.0  # for an answer over a connection that may be a dead one
LATE_S: Final = 1.0  # for further visits, once one was answered
RELAYED_S: Final = 10.0  # after which who came over a relay has a direct path, where there is one
MAX_SUSPECTS: Final = 16  # at once
CROSSING_S: Final = 5.0  # in which two peers that dial one another have connected twice
CHECK_S: Final = 5.0  # between looks for somebody to ask, while there is nobody
MEASURE_S: Final = 12.0  # for the second half; each question has its own, shorter time

Places = Callable[[], Mapping[PeerId, tuple[str, ...]]]

_log = get_logger("reachability")


class ReachabilityService:
    """See the module. Made by `open_reachability`."""

    def __init__(
        self,
        swarm: Swarm,
        places: Places,
        own: Callable[[], Sequence[str]],
        control_port: Callable[[], int],
        unix_now: Callable[[], float],
        *,
        probes: Probes | None = None,
        stun: Callable[[], Awaitable[Sequence[tuple[str, int]]]] | None = None,
        mappings: Callable[[], Sequence[PortMapping]] = tuple,
        mapping_why: Callable[[], str] = str,
        relays: Callable[[], Sequence[PeerId]] = tuple,
        wanted: Callable[[], bool] = lambda: True,
        blocked: BlockedNetworks | None = None,
        keep: Callable[[BlockedNetworks], Awaitable[None]] | None = None,
    ) -> None:
        """``places``: bootstrap nodes' addresses; ``own``: IP addresses of our interfaces; ``stun``: configured servers."""
        self._swarm, self._places, self._own, self._control_port = swarm, places, own, control_port
        self._unix_now, self._probes, self._configured = unix_now, probes, stun
        self._mappings, self._relays, self._wanted = mappings, relays, wanted
        self._mapping_why = mapping_why
        self._blocked, self._keep = blocked or BlockedNetworks(), keep
        self._core = Whereabouts(trio.current_time())
        self._observers: dict[PeerId, Observer] = {}  # the last answer of each, most recent last
        self._vouchers: dict[PeerId, Signed] = {}
        self._servers: tuple[tuple[str, int], ...] = ()  # configured ones, resolved
        self._suspects: set[PeerId] = set()  # that came over a relay just now
        self._relays_seen: frozenset[PeerId] = frozenset()
        self._ended: set[PeerId] = set()  # relays whose silent connections the look that is going on ended
        self._ways: dict[PeerId, ConnectionView] = {}  # of connected peers, as they were when we last looked
        self._watchers: list[Callable[[], None]] = []
        self._woken = trio.Event()
        self._looking = trio.CancelScope()
        self._asking: frozenset[PeerId] = frozenset()
        self._told: tuple[Reachability, bool] = (self.view, self.udp_blocked)

    # --- what is known -----------------------------------------------------------------------------------------------

    @property
    def state(self) -> ReachState:
        """`view`'s, without all that it takes to make one."""
        return self._core.view.state

    @property
    def view(self) -> Reachability:
        """Where we stand now."""
        return msgspec.structs.replace(
            self._core.view,
            mappings=tuple(self._mappings()),
            relays=tuple(self._relays()),
            mapping_why=self._mapping_why(),
        )

    @property
    def udp_blocked(self) -> bool:
        """Whether this network lets no UDP out, as we saw now or were here last: who waits for UDP need not."""
        if self._core.view.nat.udp != "unknown":
            return self._core.view.nat.udp == "blocked"
        return self._blocked.has(network_of(self._own()), self._unix_now())

    @property
    def stun(self) -> tuple[tuple[str, int], ...]:
        """STUN servers: (IP address, UDP port) of nodes that were asked, the last ones first, then configured ones."""
        found = [each.stun for each in reversed(self._observers.values())]
        return tuple(dict.fromkeys([*filter(None, found), *self._servers]))

    @property
    def tcp_observers(self) -> tuple[tuple[str, int], ...]:
        """TCP observers, likewise."""
        return tuple(dict.fromkeys(filter(None, (each.tcp for each in reversed(self._observers.values())))))

    @property
    def vouchers(self) -> tuple[Signed, ...]:
        """Words of observers on where we come from, of the last hour."""
        return tuple(signed for signed in self._vouchers.values() if self._is_ours(signed))

    def is_asking(self, peer_id: PeerId) -> bool:
        """Whether a look is going on in which ``peer_id`` is asked: its connection is needed."""
        return peer_id in self._asking

    def watch(self, on_change: Callable[[], None]) -> None:
        """Call ``on_change`` when `view` or `udp_blocked` is another. It must not block, and is kept for ever."""
        self._watchers.append(on_change)

    # --- what happens ------------------------------------------------------------------------------------------------

    def look_again(self) -> None:
        """The network changed, or the mesh: what was known may be wrong. Cheap."""
        self._core.on_network_change(self._own(), trio.current_time())
        self._vouchers.clear()
        self._looking.cancel()  # it began on the old network
        self._wake()
        self._tell()

    def on_mappings(self) -> None:
        """Ports were mapped, or are no longer. Cheap."""
        self._core.on_mappings(trio.current_time())
        self._wake()
        self._tell()

    def on_relays(self) -> None:
        """Other relays keep a place for us than before. Cheap."""
        before, self._relays_seen = self._relays_seen, frozenset(self._relays())
        for peer_id in before - self._relays_seen - self._ended:
            self._on_lost(peer_id)
        self._tell()

    def _on_lost(self, peer_id: PeerId, *, near: bool = False) -> None:
        """``near``: it was in our own network, whose router says nothing of it."""
        left = {
            each
            for each, view in self._swarm.connections().items()
            if near or not self._is_near(ip_behind(view.address))
        }
        self._core.on_lost(peer_id, trio.current_time(), left | set(self._relays()))
        self._wake()

    def on_unreached(self, peer_id: PeerId) -> None:
        """A neighbour that should have been able to could not connect to us. Cheap."""
        self._core.on_unreached(peer_id, trio.current_time())
        self._wake()

    async def run(self) -> NoReturn:
        """Look when a look is due, until cancelled."""
        while True:
            woken = self._woken
            if trio.current_time() >= self._core.deadline() and self._wanted() and await self._is_anybody():
                with trio.CancelScope() as self._looking:
                    await isolate("reachability", self._look_once)
                if self._looking.cancelled_caught:
                    continue
            due, now = self._core.deadline(), trio.current_time()
            with trio.move_on_at(due if due > now else now + CHECK_S):
                await woken.wait()

    async def follow_swarm(self) -> NoReturn:
        """Notice neighbours that are lost, and those that come over a relay although others reach us, until cancelled."""
        async with trio.open_nursery() as nursery:
            while True:
                async with self._swarm.subscribe() as events:
                    async for event in events:
                        self._on_event(event)
                        if self._is_relayed(event.peer_id) and len(self._suspects) < MAX_SUSPECTS:
                            nursery.start_soon(self._suspect, event.peer_id)
                await trio.lowlevel.checkpoint()

    def _on_event(self, event: SwarmEvent) -> None:
        """Who comes back over a relay before we miss it has not gone, but the connection that it had has."""
        peer_id, view = event.peer_id, self._swarm.connections().get(event.peer_id)
        before = self._ways.pop(peer_id, None)
        if view is not None:
            self._ways[peer_id] = view
        if event.kind == "disconnected" or (before is not None and view is not None and _is_lost(before, view)):
            self._on_lost(peer_id, near=before is not None and self._is_near(ip_behind(before.address)))

    def _is_relayed(self, peer_id: PeerId) -> bool:
        view = self._swarm.connections().get(peer_id)
        return view is not None and view.direction == "in" and view.path == "relay"

    async def _suspect(self, peer_id: PeerId) -> None:
        """A neighbour came over a relay: if that is still so in a while, it could not come directly."""
        if peer_id in self._suspects or self._core.view.state not in ("public", "mapped"):
            return
        self._suspects.add(peer_id)
        try:
            await trio.sleep(RELAYED_S)
        finally:
            self._suspects.discard(peer_id)
        if self._is_relayed(peer_id):
            self.on_unreached(peer_id)

    def _wake(self) -> None:
        self._woken.set()
        self._woken = trio.Event()

    def _tell(self) -> None:
        told, self._told = self._told, (self.view, self.udp_blocked)
        if told != self._told:
            for watcher in self._watchers:
                watcher()

    # --- a look ------------------------------------------------------------------------------------------------------

    async def _is_anybody(self) -> bool:
        if self._configured is not None:
            self._servers = tuple(await self._configured())
        return bool(self._places() or self._servers or self._neighbours())

    async def _look_once(self) -> None:
        whom = self._whom()
        self._asking = frozenset(whom)
        self._core.begin(trio.current_time())
        try:
            await self._look_at(whom)
        finally:
            self._asking = frozenset()
            self._ended.clear()

    async def _look_at(self, whom: Mapping[PeerId, tuple[str, ...]]) -> None:
        visited = await self._visit_all(whom)
        look = Look(tuple(self._own()), self._control_port(), mappings=tuple(self._mappings()), visited=len(whom))
        look = msgspec.structs.replace(look, seen=tuple(SeenFrom(e.ip, e.seen_ip) for e in visited if e.seen_ip))
        self._core.on_seen(look)
        self._tell()
        with trio.move_on_after(MEASURE_S):
            look = await self._measure(look, visited)
        before = self.view.state
        self._core.on_look(look, trio.current_time())
        if _outside(self._mappings()) != _outside(look.mappings):  # meanwhile, so nobody was asked to come there
            self._core.on_mappings(trio.current_time())
        if self.view.state != before:
            _log.info("where this machine stands", state=self.view.state, why=self.view.why)
        await self._remember()
        self._tell()

    async def _measure(self, look: Look, visited: Sequence[Observer]) -> Look:
        udp: list[MappedSeen] = []
        tcp: list[MappedSeen] = []
        dialled: list[DialledBack] = []
        filtered = [FilterSeen()]
        servers = list(dict.fromkeys([*filter(None, (each.stun for each in visited)), *self._servers]))

        async def ask_udp(probes: Probes) -> None:
            udp.extend(await udp_mapping(probes, servers))

        async def ask_tcp(probes: Probes) -> None:
            tcp.extend(await tcp_mapping(probes, [each.tcp for each in visited if each.tcp]))

        async def ask_filter(probes: Probes) -> None:
            filtered[0] = await filtering(self._swarm, probes, visited)

        async def ask_back(observer: Observer) -> None:
            dialled.extend(await dial_back(self._swarm, observer, self._ports()))

        async with trio.open_nursery() as nursery:
            for observer in visited:
                nursery.start_soon(ask_back, observer)
            if self._probes is not None:
                for ask in (ask_udp, ask_tcp, ask_filter):
                    nursery.start_soon(ask, self._probes)
        asked = tuple(server[0] for server in servers) if self._probes is not None else ()
        return msgspec.structs.replace(
            look, udp=tuple(udp), udp_asked=asked, tcp=tuple(tcp), filtering=filtered[0], dialled=tuple(dialled)
        )

    def _ports(self) -> list[int]:
        """TCP ports at which we may be reached: where we listen, and what routers forward to there."""
        control = self._control_port()
        mapped = [each.external_port for each in self._mappings() if (each.protocol, each.port) == ("tcp", control)]
        return list(dict.fromkeys([control, *mapped]))

    async def _remember(self) -> None:
        state = self._core.view.nat.udp
        if state != "unknown" and self._blocked.note(
            network_of(self._own()), state == "blocked", self._unix_now()
        ) and self._keep is not None:  # fmt: skip
            await self._keep(self._blocked)

    # --- visits ------------------------------------------------------------------------------------------------------

    async def _visit_all(self, whom: Mapping[PeerId, tuple[str, ...]]) -> list[Observer]:
        """All that answered within VISIT_S, and within LATE_S of the first."""
        found: list[Observer] = []
        with trio.move_on_after(VISIT_S) as waiting:

            async def visit(peer_id: PeerId, addresses: Sequence[str]) -> None:
                observer = await self._try_visit(peer_id, addresses)
                if observer is not None:
                    found.append(observer)
                    waiting.deadline = min(waiting.deadline, trio.current_time() + LATE_S)

            async with trio.open_nursery() as nursery:
                for peer_id, addresses in whom.items():
                    nursery.start_soon(visit, peer_id, addresses)
        return found

    def _whom(self) -> dict[PeerId, tuple[str, ...]]:
        """Whom to visit, with addresses where we may have to dial."""
        found = {peer_id: texts for peer_id, texts in self._places().items() if peer_id != self._swarm.peer_id}
        found = dict(list(found.items())[:MAX_BOOTSTRAP])
        for peer_id in (*self._relays(), *self._neighbours()):
            found.setdefault(peer_id, ())
        return found

    def _neighbours(self) -> list[PeerId]:
        """Members outside that we reached, so that they may be asked from outside in turn."""
        found = []
        for peer_id, view in self._swarm.connections().items():
            ip = ip_behind(view.address)
            if view.direction == "out" and view.path in ("direct", "mapped") and ip and not self._is_near(ip):
                found.append(peer_id)
        return found[:MAX_NEIGHBOURS]

    def _is_near(self, ip: str) -> bool:
        """Whether ``ip`` seems to be in a network that we are in ourselves."""
        return scope_of(ip) < 2 or network_of([ip]) in {network_of([own]) for own in self._own()}

    async def _try_visit(self, peer_id: PeerId, addresses: Sequence[str]) -> Observer | None:
        """Twice: a guest's connection may have been ended by another user of it, or be one of the network before."""
        for last in (False, True):
            try:
                if addresses:
                    await self._swarm.dial(peer_id, addresses, guest=True)
                with trio.move_on_after(VISIT_S if last or not addresses else STALE_S):
                    reply, address = await ask_observer(self._swarm, peer_id, wire.Observe())
                    if isinstance(reply, wire.Observed):
                        return self._noted(peer_id, address, reply)
                    raise RemoteProtocolError("the node answered another question than ours")
            except MeshmaxError as error:
                _log.debug("an observer did not answer", peer=peer_id, why=error.message)
            if addresses and peer_id not in self._swarm.connections():
                self._ended.add(peer_id)
                await self._swarm.disconnect(peer_id)
        return None

    def _noted(self, peer_id: PeerId, address: str, told: wire.Observed) -> Observer | None:
        ip = ip_behind(address)
        if not ip:
            return None
        observer = Observer(peer_id, ip, ip_behind(told.address), told)
        self._observers.pop(peer_id, None)
        self._observers[peer_id] = observer
        if len(self._observers) > MAX_OBSERVERS:
            self._vouchers.pop(next(iter(self._observers)), None)
            del self._observers[next(iter(self._observers))]
        try:
            signed = decode_voucher(told.voucher)
        except ManifestInvalid:
            return observer
        if signed.signer == peer_id and self._is_ours(signed):
            self._vouchers[peer_id] = signed
        return observer

    def _is_ours(self, signed: Signed) -> bool:
        try:
            return verify_voucher(signed, self._unix_now()).peer_id == self._swarm.peer_id
        except ManifestInvalid:
            return False


def _is_lost(before: ConnectionView, now: ConnectionView) -> bool:
    """Whether a peer is connected as one is whose connection ``before`` is dead. Circuits are renewed as they end."""
    again = now.path == before.path != "relay" and now.opened_at_s - before.opened_at_s > CROSSING_S
    return again or is_worse(now.path, than=before.path)


def _outside(mappings: Sequence[PortMapping]) -> set[tuple[str, int, str, int]]:
    return {(each.protocol, each.port, each.external_ip, each.external_port) for each in mappings}


@asynccontextmanager
async def open_reachability(service: ReachabilityService) -> AsyncIterator[ReachabilityService]:
    """Look, until the block ends."""
    async with trio.open_nursery() as nursery:
        nursery.start_soon(service.run)
        nursery.start_soon(service.follow_swarm)
        try:
            yield service
        finally:
            nursery.cancel_scope.cancel()


async def resolve_servers(given: Sequence[tuple[str, int]]) -> tuple[tuple[str, int], ...]:
    """Configured STUN servers by IP address; those whose names mean nothing here now are left out, as after VISIT_S."""
    found: list[tuple[str, int]] = []
    for host, port in given:
        try:
            found.append((str(ipaddress.ip_address(host)), port))
            continue
        except ValueError:
            pass
        with trio.move_on_after(VISIT_S):
            try:
                entries = await trio.socket.getaddrinfo(host, port, type=trio.socket.SOCK_DGRAM)
            except OSError:
                continue
            found += [(str(entry[4][0]), port) for entry in entries]
    return tuple(dict.fromkeys(found))
