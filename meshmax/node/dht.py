"""The DHT in a node: for which mesh, when at all, by whom it joins, and what is kept.

On while the mesh is private or a bootstrap node is known, unless ``dht: false`` or the network lets no UDP out. On an open LAN
mesh by itself it stays silent: there only addresses of the LAN count, and whoever has one of them is found by mDNS, or by a
given address. A node joins by what it kept, by its bootstrap nodes, and by the peers that it is connected to, at the UDP ports
that they tell. When the mesh changes, nothing more is asked or announced in the old DHT, it ends, and the new one begins with
what was kept of that mesh; likewise when other bootstrap nodes are trusted. A node that others cannot reach takes part as a
client: it asks and announces, and is in nobody's table. Not here: what is announced (services.announce).
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, Final

import trio

from meshmax.base.errors import InvalidRequest, ManifestInvalid, MeshmaxError, NotAMember, RemoteProtocolError
from meshmax.base.ids import PeerId
from meshmax.base.membership import OPEN_MESH, MeshId
from meshmax.base.model import Signed
from meshmax.base.providers import MAX_PROVIDERS, ProviderRecord
from meshmax.base.reachability import Reachability
from meshmax.net.addresses import parse_endpoint
from meshmax.net.dht import KademliaDht, open_dht
from meshmax.net.dht_protocol import Membership
from meshmax.node.bootstrapping import MAX_BOOTSTRAP, bootstrap_places
from meshmax.services.observe import ask_observed
from meshmax.store.dht_file import load_dht, save_dht
from meshmax.telemetry.isolate import isolate
from meshmax.wire.dht_chain import open_chain, seal_chain

if TYPE_CHECKING:
    from meshmax.node.running import Node
    from meshmax.ports import Datagrams

KEEP_S: Final = 900.0  # between two savings of what the DHT knows
JOIN_S: Final = (2.0, 60.0)  # first and longest pause while nobody is known
JOIN_AGAIN_S: Final = 900.0  # while somebody is: those who came since may know others
MAX_JOIN_PEERS: Final = 32  # connected peers that are asked
CHECK_S: Final = 1.0  # between looks at whether the mesh is another one
RESOLVE_S: Final = 5.0  # for a bootstrap node's name
MIN_CONTACTS: Final = 3  # with fewer, joining goes on as with none


class NodeDht:
    """ports.Dht of this node, whatever mesh it is in; finds nothing while it is off."""

    def __init__(self, node: Node) -> None:
        self._node = node
        self._running: KademliaDht | None = None
        self._woken = trio.Event()
        self.mesh: MeshId = OPEN_MESH  # whose `current` is
        self._ports: dict[PeerId, int] = {}  # UDP ports that bootstrap nodes told

    @property
    def current(self) -> KademliaDht | None:
        """The DHT of the mesh that the node is in now; None while there is none."""
        return self._running if self.mesh == self._node.membership.mesh else None

    def look_again(self) -> None:
        """The mesh may have changed: follow at once. Cheap."""
        self._woken.set()
        self._woken = trio.Event()

    @property
    def wanted(self) -> bool:
        """Whether there is a DHT to take part in."""
        config = self._node.config
        somewhere = self._node.membership.mesh != OPEN_MESH or bool(bootstrap_places(self._node))
        return config.dht and self._node.datagrams is not None and somewhere and not self._node.traversal.udp_blocked

    @property
    def why_off(self) -> str:
        """Why there is none, for people; '' if there is, or will be in a moment."""
        if self.wanted:
            return ""
        if not self._node.config.dht:
            return "it is turned off (dht: false)"
        if self._node.datagrams is None:
            return "there is no UDP port"
        if self._node.traversal.udp_blocked:
            return "this network lets no UDP out"
        return "the open mesh of one LAN does without it; it is on with a bootstrap node, or in a mesh of your own"

    @property
    def contacts(self) -> int:
        """See ports.Dht."""
        return self.current.contacts if self.current else 0

    @property
    def problem(self) -> str:
        """See ports.Dht; '' while it is not wanted."""
        if self.current is not None:
            return self.current.problem
        return "it is about to start" if self.wanted else ""

    async def join(self, addresses: Sequence[tuple[str, int]]) -> int:
        """See ports.Dht."""
        await trio.lowlevel.checkpoint()
        return await self.current.join(addresses) if self.current else 0

    async def find(self, key: bytes, enough: int = MAX_PROVIDERS) -> tuple[ProviderRecord, ...]:
        """See ports.Dht."""
        await trio.lowlevel.checkpoint()
        return await self.current.find(key, enough) if self.current else ()

    async def announce(self, record: Signed) -> int:
        """See ports.Dht."""
        await trio.lowlevel.checkpoint()
        return await self.current.announce(record) if self.current else 0

    def moved(self, key: bytes) -> int:
        """See ports.Dht."""
        return self.current.moved(key) if self.current else 0

    async def run(self) -> None:
        """Keep a DHT of the mesh that we are in, until cancelled."""
        datagrams = self._node.datagrams
        if datagrams is None:
            return
        shared = _Shared(datagrams)
        while True:
            woken, mesh = self._woken, self._node.membership.mesh
            if self.wanted:
                if not await isolate("dht", partial(self._run_in, mesh, shared)):  # a failure of it is none of the node
                    await trio.sleep(JOIN_S[1])
            else:
                with trio.move_on_after(CHECK_S):
                    await woken.wait()

    async def _run_in(self, mesh: MeshId, datagrams: Datagrams) -> None:
        """Take part in the DHT of ``mesh`` until the node is in another."""
        node, self.mesh = self._node, mesh
        trusted = frozenset(bootstrap_places(node))
        opened = open_dht(
            node.signer,
            datagrams,
            mesh,
            random=node.world.random,
            unix_now=node.world.unix_now,
            client=lambda: is_client(node.traversal.reachability()),
            membership=self._rules(mesh, trusted),
            state=await node.world.run_sync(partial(load_dht, node.home.path, mesh)),
        )
        try:
            async with opened as dht, trio.open_nursery() as nursery:
                self._running = dht
                nursery.start_soon(self._join_on, dht)
                nursery.start_soon(self._keep_on, mesh, dht)
                try:
                    await self._stay(mesh, trusted)
                finally:
                    with trio.CancelScope(shield=True):
                        await self._keep(mesh, dht)
                nursery.cancel_scope.cancel()
        finally:
            self._running = None

    async def _stay(self, mesh: MeshId, trusted: frozenset[PeerId]) -> None:
        while self.wanted and self._node.membership.mesh == mesh and bootstrap_places(self._node).keys() == trusted:
            woken = self._woken
            with trio.move_on_after(CHECK_S):
                await woken.wait()

    async def _join_on(self, dht: KademliaDht) -> None:
        pause_s = JOIN_S[0]
        while True:
            await dht.join(await self._places())
            if dht.contacts >= MIN_CONTACTS:
                pause_s = JOIN_AGAIN_S
            await trio.sleep(pause_s)
            pause_s = min(2 * pause_s, JOIN_S[1]) if dht.contacts < MIN_CONTACTS else JOIN_AGAIN_S

    async def _places(self) -> list[tuple[str, int]]:
        """UDP addresses of bootstrap nodes, then those of connected peers, at the ports that they tell; else a guess."""
        node, found = self._node, dict[tuple[str, int], None]()

        async def of_bootstrap(peer_id: PeerId, texts: Sequence[str]) -> None:
            port = await self._udp_port_of(peer_id)
            for place in await _udp_places(texts, port, names=True):
                found[place] = None

        async with trio.open_nursery() as nursery:
            for peer_id, texts in bootstrap_places(node).items():
                nursery.start_soon(of_bootstrap, peer_id, texts)
        for peer_id in list(node.swarm.connections())[:MAX_JOIN_PEERS]:
            view = node.presence.view(peer_id)
            port = view.status.udp_port if view is not None and view.status is not None else 0
            for place in await _udp_places(node.presence.addresses_of(peer_id), port):
                found[place] = None
        return list(found)

    async def _udp_port_of(self, peer_id: PeerId) -> int:
        """What a bootstrap node that we are connected with tells, or told last; 0 if it never did."""
        try:
            told = (await ask_observed(self._node.swarm, peer_id)).udp_port
        except MeshmaxError:  # not connected, or it does not serve this
            return self._ports.get(peer_id, 0)
        self._ports[peer_id] = told
        while len(self._ports) > MAX_BOOTSTRAP:
            del self._ports[next(iter(self._ports))]
        return told

    async def _keep_on(self, mesh: MeshId, dht: KademliaDht) -> None:
        while True:
            await trio.sleep(KEEP_S)
            await self._keep(mesh, dht)

    async def _keep(self, mesh: MeshId, dht: KademliaDht) -> None:
        node = self._node
        save = partial(save_dht, node.home.path, dht.dump(), mesh)
        await isolate("dht file", partial(node.world.run_sync, save))

    def _rules(self, mesh: MeshId, trusted: frozenset[PeerId]) -> Membership | None:
        """In a private mesh: certificates, as in `MembershipService`."""
        membership = self._node.membership
        if mesh == OPEN_MESH:
            return None

        def is_member(peer_id: PeerId, chain: bytes) -> bool:
            try:
                membership.standing.verify(open_chain(mesh, chain), peer_id, self._node.world.unix_now())
            except (NotAMember, ManifestInvalid, RemoteProtocolError):
                return False
            return True

        return Membership(is_member, lambda: seal_chain(mesh, membership.standing.chain), trusted)


def is_client(where: Reachability) -> bool:
    """Whether no table of the DHT should hold us: others tried and could not reach us, or their datagrams would not.

    Who was asked by nobody is taken for reachable, as on a LAN: the nodes that enter it in their tables try by themselves.
    """
    return where.state == "private" or where.nat.udp == "blocked"


class _Shared:
    """The UDP port, on which one DHT after the other receives."""

    def __init__(self, datagrams: Datagrams) -> None:
        self._datagrams = datagrams
        self._receivers: dict[range, Callable[[bytes, tuple[str, int]], None]] = {}

    @property
    def addresses(self) -> tuple[tuple[str, int], ...]:
        """See ports.Datagrams."""
        return self._datagrams.addresses

    def send(self, data: bytes, to: tuple[str, int]) -> None:
        """See ports.Datagrams."""
        self._datagrams.send(data, to)

    def receive(self, first_bytes: range, on_datagram: Callable[[bytes, tuple[str, int]], None]) -> None:
        """See ports.Datagrams; the newest receiver is called."""
        if first_bytes not in self._receivers:
            self._datagrams.receive(first_bytes, lambda data, sender: self._receivers[first_bytes](data, sender))  # noqa: PLW0108 -- the one of then
        self._receivers[first_bytes] = on_datagram


async def _udp_places(texts: Sequence[str], port: int, *, names: bool = False) -> list[tuple[str, int]]:
    """Where datagrams to who is at these multiaddrs may go: to the ``port`` that it told, and to the control port's number,
    which a port mapping may have kept. Names are only looked up (``names``) that a person gave.
    """
    places: list[tuple[str, int]] = []
    for text in texts:
        try:
            endpoint = parse_endpoint(text)
        except InvalidRequest:  # relayed: nothing to send datagrams to
            continue
        hosts = [endpoint.host] if not endpoint.name else await _looked_up(endpoint.host) if names else []
        places += [(host, number) for number in dict.fromkeys((port, endpoint.port)) if number for host in hosts]
    return places


async def _looked_up(host: str) -> list[str]:
    """``host`` as IP addresses; none if its name means nothing here at the moment, or nobody says in time."""
    found: list[tuple[Any, ...]] = []
    with trio.move_on_after(RESOLVE_S):
        try:
            found = await trio.socket.getaddrinfo(host, None, type=trio.socket.SOCK_DGRAM)
        except OSError:
            return []
    return [str(entry[4][0]) for entry in found]


@asynccontextmanager
async def open_node_dht(node: Node) -> AsyncIterator[None]:
    """Run ``node.dht`` for the time of the block; after presence, whose peers it joins by."""
    async with trio.open_nursery() as nursery:
        nursery.start_soon(node.dht.run)
        try:
            yield
        finally:
            nursery.cancel_scope.cancel()
