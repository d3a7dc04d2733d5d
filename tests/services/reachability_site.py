"""A peer behind a NAT that tests may change, with observers outside, for tests of the service that asks these."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any, Literal

import trio
import trio.testing

from meshmax.base.doctor import TriedOutcome
from meshmax.base.ids import PeerId
from meshmax.base.reachability import PortMapping
from meshmax.base.status import Path
from meshmax.core.networks import BlockedNetworks
from meshmax.core.reachability import MappedSeen
from meshmax.ports import Arrival, ConnectionView, SwarmEvent
from meshmax.services.observe import Attest, ObserveServer, Reach
from meshmax.services.reachability import ReachabilityService
from meshmax.services.strangers import NoMesh
from meshmax.testing.memory_swarm import MemoryNetwork, MemorySwarm, SeededSigner
from meshmax.wire.look_back import try_nonce

UNIX_S = 1_800_000_000.0
WAN, INNER, PORT = "81.2.69.142", "192.168.1.5", 11435
A, B, C = "5.6.7.8", "9.10.11.12", "13.14.15.16"


def unix_now() -> float:
    return UNIX_S + trio.current_time()


class FakeNat:
    """Where we stand, as observers find it; may be changed by a test. It is our `Probes`, too."""

    def __init__(self) -> None:
        self.control: TriedOutcome = "silent"
        self.open_ports: set[int] = set()
        self.udp = True
        self.wan = WAN
        self.filtering = "endpoint-independent"
        self.knocks: list[tuple[str, str, int]] = []
        self._ports: list[FakePort] = []

    def knock_of(self, observer: str) -> Callable[[str, int], Any]:
        async def knock(ip: str, port: int) -> TriedOutcome:
            await trio.sleep(0.05)
            self.knocks.append((observer, ip, port))
            return self.control if port == PORT else "open" if port in self.open_ports else "silent"

        return knock

    def arrive(self, data: bytes, sender: tuple[str, int]) -> bool:
        for port in self._ports:
            port.arrive(data, sender)
        return True

    def other_port_of(self, observer: str) -> Callable[[bytes, tuple[str, int]], bool]:
        return lambda data, _to: self.arrive(data, (observer, 9))

    @asynccontextmanager
    async def open_udp(self, *, ipv6: bool = False) -> AsyncIterator[FakePort]:
        self._ports.append(FakePort(self))
        yield self._ports[-1]

    async def tcp_mapped(self, observers: Sequence[tuple[str, int]]) -> tuple[MappedSeen, ...]:
        await trio.sleep(0.04)
        return tuple(MappedSeen(at, 5001, (self.wan, 42000)) for at in observers)


class FakePort:
    """A UDP port behind the NAT."""

    local_port = 5000

    def __init__(self, nat: FakeNat) -> None:
        self._nat = nat
        self._talked: set[tuple[str, int]] = set()
        self._expected: dict[bytes, Arrival] = {}

    async def mapped(self, server: tuple[str, int]) -> tuple[str, int] | None:
        self._talked.add(server)
        await trio.sleep(0.04 if self._nat.udp else 1.5)
        return (self._nat.wan, 41000) if self._nat.udp else None

    def expect(self, nonce: bytes) -> Arrival:
        arrival = self._expected[nonce] = Arrival()
        return arrival

    def arrive(self, data: bytes, sender: tuple[str, int]) -> None:
        arrival = self._expected.get(try_nonce(data) or b"")
        passes = {
            "endpoint-independent": True,
            "address-dependent": sender[0] in {ip for ip, _ in self._talked},
            "address-and-port-dependent": sender in self._talked,
            "nothing": False,
        }[self._nat.filtering]
        if arrival and passes:
            arrival.sender = sender
            arrival.there.set()


class OneSocket:
    """An observer's UDP port."""

    def __init__(self, nat: FakeNat, ip: str) -> None:
        self._nat, self._ip = nat, ip
        self.addresses = ((ip, PORT),)

    def send(self, data: bytes, to: tuple[str, int]) -> None:
        self._nat.arrive(data, (self._ip, PORT))

    def receive(self, first_bytes: range, on_datagram: Any) -> None:
        raise NotImplementedError


class Site:
    """A peer behind a NAT and observers outside."""

    def __init__(self, network: MemoryNetwork, swarm: MemorySwarm, nat: FakeNat) -> None:
        self.network, self.swarm, self.nat = network, swarm, nat
        self.observers: dict[PeerId, tuple[str, ...]] = {}
        self.own: tuple[str, ...] = (INNER,)
        self.mappings: tuple[PortMapping, ...] = ()
        self.kept: list[dict[str, float]] = []
        self.told = 0

    async def keep(self, blocked: BlockedNetworks) -> None:
        await trio.lowlevel.checkpoint()
        self.kept.append(dict(blocked.seen))

    def service(self, **more: Any) -> ReachabilityService:
        service = ReachabilityService(
            self.swarm,
            lambda: self.observers,
            lambda: self.own,
            lambda: PORT,
            unix_now,
            probes=self.nat,
            mappings=lambda: self.mappings,
            keep=self.keep,
            **more,
        )
        service.watch(self._on_change)
        return service

    def _on_change(self) -> None:
        self.told += 1


@asynccontextmanager
async def open_site(*ips: str) -> AsyncIterator[Site]:
    network, nat = MemoryNetwork(), FakeNat()
    async with AsyncExitStack() as stack:
        swarm = await stack.enter_async_context(network.open_swarm(SeededSigner(1)))
        network.move(swarm, f"/ip4/{WAN}/tcp/{PORT}")  # from where it is seen
        site = Site(network, swarm, nat)
        for number, ip in enumerate(ips):
            signer = SeededSigner(10 + number)
            node = await stack.enter_async_context(network.open_swarm(signer, NoMesh()))
            network.move(node, f"/ip4/{ip}/tcp/{PORT}")
            reach = Reach(trio.current_time, nat.knock_of(ip), OneSocket(nat, ip), nat.other_port_of(ip))
            server = ObserveServer(PORT, 11437, ("stun", "observer"), Attest(signer, unix_now), reach)
            server.register(node)
            site.observers[node.peer_id] = (f"/ip4/{ip}/tcp/{PORT}",)
        yield site


def state_of(where: ReachabilityService) -> str:
    return where.view.state


def is_blocked(where: ReachabilityService) -> bool:
    return where.udp_blocked


class Relayed:
    """A swarm to which peers come, over a relay if nothing else is said."""

    def __init__(self, swarm: MemorySwarm) -> None:
        self._swarm = swarm
        self.paths: dict[PeerId, ConnectionView] = {}
        self._events, self._source = trio.open_memory_channel[SwarmEvent](10)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._swarm, name)

    async def come(
        self,
        peer_id: PeerId,
        path: Path = "relay",
        opened_at_s: float = 0.0,
        kind: Literal["connected", "moved"] = "connected",
        address: str = "/ip4/5.5.5.5/tcp/1",
    ) -> None:
        address += "/p2p/x/p2p-circuit" if path == "relay" else ""
        self.paths[peer_id] = ConnectionView(peer_id, address, "in", opened_at_s, path)
        await self._events.send(SwarmEvent(peer_id, kind))
        await trio.testing.wait_all_tasks_blocked()

    def connections(self) -> dict[PeerId, ConnectionView]:
        return {**self._swarm.connections(), **self.paths}

    @asynccontextmanager
    async def subscribe(self) -> AsyncIterator[Any]:
        yield self._source
